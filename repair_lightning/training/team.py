"""The ranks of a run as seen by one of them: who does what, and everybody's results for all.

Every rank holds the same ledger, bank of shards and router, and takes every decision by itself from them. Only costly
work is dealt out: each rank does its part and :meth:`Team.rows` gives all parts to all, in one order, so that the
copies stay equal. :meth:`Team.same` checks that they are. A team of one passes everything through untouched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from repair_lightning.errors import RepairError

_DIMENSIONS = 4
"""Most dimensions of a tensor that is sent."""

_CPU = torch.device("cpu")

T = TypeVar("T")


class RankError(RepairError):
    """The ranks of a run cannot go on together."""


class LeftOutError(RankError):
    """Another rank has reported what went wrong; this one only has to leave."""


@dataclass(frozen=True)
class Team:
    """This process among the ranks of a run.

    Args:
        rank: its number, from 0.
        size: how many there are.
        device: where tensors must lie to be sent.
        deals: whether work is dealt out. Off, all ranks do all of it in step, as they must where each holds but a part
            of the base's weights.
        rows_of_batches: whether one batch is dealt out among the ranks (data-parallel), not the batches of a window.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    deals: bool = True
    rows_of_batches: bool = False

    @property
    def parts(self) -> int:
        """Into how many parts work is dealt."""
        return self.size if self.deals else 1

    # -- dealing ------------------------------------------------------------------------------------------------------

    def mine(self, number: int, costs: Sequence[float] | None = None) -> list[int]:
        """This rank's share of `number` pieces of work, as indices; the costliest pieces go round first."""
        return self.share(number, self.rank if self.parts > 1 else 0, costs)

    def share(self, number: int, rank: int, costs: Sequence[float] | None = None) -> list[int]:
        """The share of a rank, see :meth:`mine`."""
        if self.parts == 1:
            return list(range(number))
        order = list(range(number)) if costs is None else sorted(range(number), key=lambda i: (-costs[i], i))
        return sorted(order[rank :: self.parts])

    def rows(self, index: Sequence[int], *tensors: Tensor) -> list[Tensor]:
        """Every rank's rows in the order of their indices.

        Args:
            index: of this rank's rows; together the ranks' indices are 0 to n - 1.
            tensors: each with a row per index. All but the first dimension must agree among the ranks, but may be
                anything where a rank has no rows.

        Returns:
            per tensor its n rows, on the device that they came from.
        """
        if self.parts == 1:
            return list(tensors)
        parts = self.gather(torch.tensor(list(index), dtype=torch.long), *tensors)
        order = torch.cat([part[0] for part in parts]).argsort()
        found = []
        for i, own in enumerate(tensors, 1):
            full = [part[i] for part in parts if len(part[i])] or [own]
            found.append(torch.cat(full)[order.to(own.device)])
        return found

    def texts(self, index: Sequence[int], texts: Sequence[str]) -> list[str]:
        """As :meth:`rows`, for texts."""
        if self.parts == 1:
            return list(texts)
        parts = self.gather(torch.tensor(list(index), dtype=torch.long), *_packed(texts))
        found: dict[int, str] = {}
        for numbers, lengths, data in parts:
            found |= dict(zip(numbers.tolist(), _unpacked(lengths, data), strict=True))
        return [found[i] for i in range(len(found))]

    def numbers(self, index: Sequence[int], rows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        """As :meth:`rows`, for rows of any length of whole or of floating-point numbers (exact up to 2^53)."""
        if self.parts == 1:
            return list(rows)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        whole = torch.tensor([isinstance(number, int) for row in rows for number in row], dtype=torch.bool)
        flat = torch.tensor([float(number) for row in rows for number in row], dtype=torch.float64)
        found: dict[int, list[float]] = {}
        for numbers, sizes, values, integer in self.gather(torch.tensor(list(index)).long(), lengths, flat, whole):
            plain = [int(v) if i else v for v, i in zip(values.tolist(), integer.tolist(), strict=True)]
            parts = iter(plain)
            found |= {i: list(islice(parts, size)) for i, size in zip(numbers.tolist(), sizes.tolist(), strict=True)}
        return [found[i] for i in range(len(found))]

    def mine_of(self, prompts: Sequence[str]) -> list[int]:
        """This rank's share of some prompts, as indices: a prompt is always the same rank's, which may know its states
        from an earlier time."""
        if self.parts == 1:
            return list(range(len(prompts)))
        return [
            i
            for i, prompt in enumerate(prompts)
            if crc32(prompt.encode("utf-8", "surrogatepass")) % self.parts == self.rank
        ]

    # -- sending ------------------------------------------------------------------------------------------------------

    def gather(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Every rank's tensors, rank by rank; shapes may differ, dtypes and the number of tensors may not."""
        if self.size == 1:
            return [tensors]
        head = torch.tensor([_shape(tensor) for tensor in tensors], dtype=torch.long)
        heads = [found.cpu() for found in self._all_gather(head)]
        data = torch.cat([_bytes(tensor).to(self.device) for tensor in tensors])
        sizes = [sum(_nbytes(row, t) for row, t in zip(found.tolist(), tensors, strict=True)) for found in heads]
        padded = torch.zeros(max(max(sizes), 1), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        everyone = self._all_gather(padded)
        return [tuple(_cut(whole, found.tolist(), tensors)) for whole, found in zip(everyone, heads, strict=True)]

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.to(self.device).contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def all_texts(self, texts: Sequence[str]) -> list[list[str]]:
        """Every rank's texts, rank by rank."""
        return [_unpacked(lengths, data) for lengths, data in self.gather(*_packed(texts))]

    def first(self, texts: Sequence[str]) -> list[str]:
        """The texts of rank 0."""
        return list(texts) if self.size == 1 else self.all_texts(texts if self.rank == 0 else [])[0]

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, where all ranks have one of the same shape and type."""
        if self.size == 1:
            return tensor
        data = _bytes(tensor).to(self.device, copy=True)
        dist.broadcast(data, 0)
        return data.view(tensor.dtype).reshape(tensor.shape).to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, the same bits for all."""
        if self.size == 1:
            return tensor
        found = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(found)
        return found.to(tensor.device)

    # -- agreeing -----------------------------------------------------------------------------------------------------

    def anyone(self, yes: bool) -> bool:
        """Whether any rank says yes."""
        return bool(self.total(torch.tensor(float(yes))) > 0)

    def everyone(self, yes: bool) -> bool:
        """Whether every rank says yes."""
        return not self.anyone(not yes)

    def same(self, what: str, content: str) -> None:
        """Check that all ranks hold the same.

        Raises:
            RankError: they do not; the message names the ranks that differ from the first.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(content.encode()).hexdigest()
        found = [texts[0] for texts in self.all_texts([digest])]
        others = [str(rank) for rank, other in enumerate(found) if other != found[0]]
        if others:
            raise RankError(
                f"rank {', '.join(others)} differs from rank 0 in {what}: the run is stopped before anything else is "
                "written; the same command goes on from the last checkpoint"
            )

    def together(self, task: Callable[[], T]) -> T:
        """Do something on every rank; where it fails on one, it fails on all.

        Raises:
            RepairError: on rank 0, what the first failing rank said, with that rank's number where it is not rank 0.
            LeftOutError: on the others, which have nothing to add.
        """
        error: RepairError | None = None
        result: list[T] = []
        try:
            result.append(task())
        except RepairError as found:
            error = found
        said = [texts[0] for texts in self.all_texts([str(error) if error else ""])] if self.size > 1 else []
        failing = [rank for rank, text in enumerate(said) if text]
        if error is not None and (self.size == 1 or self.rank == 0):
            raise error
        if failing:
            words = f"rank {failing[0]}: {said[failing[0]]}"
            raise RankError(words) if self.rank == 0 else LeftOutError(words)
        return result[0]


ALONE = Team()
"""One process that does everything."""


def _packed(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    data = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8) if any(encoded) else _NO_BYTES
    return torch.tensor([len(row) for row in encoded], dtype=torch.long), data


def _unpacked(lengths: Tensor, data: Tensor) -> list[str]:
    whole, found, at = data.cpu().numpy().tobytes(), [], 0
    for length in lengths.tolist():
        found.append(whole[at : at + length].decode("utf-8", "surrogatepass"))
        at += length
    return found


_NO_BYTES = torch.zeros(0, dtype=torch.uint8)


def _shape(tensor: Tensor) -> list[int]:
    if tensor.dim() > _DIMENSIONS:
        raise ValueError(f"a tensor that is sent may have {_DIMENSIONS} dimensions, got {tensor.dim()}")
    return [tensor.dim(), *tensor.shape, *[0] * (_DIMENSIONS - tensor.dim())]


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if len(flat) else _NO_BYTES.to(flat.device)


def _count(row: Sequence[int]) -> int:
    number = 1
    for size in row[1 : 1 + row[0]]:
        number *= size
    return number


def _nbytes(row: Sequence[int], like: Tensor) -> int:
    return _count(row) * like.element_size()


def _cut(whole: Tensor, shapes: Sequence[Sequence[int]], like: Sequence[Tensor]) -> Iterator[Tensor]:
    at = 0
    for row, tensor in zip(shapes, like, strict=True):
        end = at + _nbytes(row, tensor)
        part = whole[at:end].clone()  # a view may lie at an address that its type does not allow
        values = part.view(tensor.dtype) if len(part) else part.to(tensor.dtype)
        yield values.reshape(row[1 : 1 + row[0]]).to(tensor.device)
        at = end
