"""The ranks of a run as seen by one of them: who does what, and everybody's results for all.

Every rank holds the same ledger, bank of shards and router, and takes every decision by itself. Only costly work is
dealt out: each rank does its part, and all get all parts in one order, so that the copies stay equal; :meth:`Team.same`
checks that they are. A team of one passes everything through untouched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Choice, Query
from repair_lightning.models.edited import EditedModel

_CPU = torch.device("cpu")

T = TypeVar("T")


class RankError(RepairError):
    """The ranks of a run cannot go on together."""


class LeftOutError(RankError):
    """Another rank has reported what went wrong; this one only has to leave."""


class LostError(RankError):
    """Another rank does not answer."""

    exit_code = 75


@dataclass(frozen=True)
class Team:
    """This process among the ranks of a run.

    Tensors lie on `device` to be sent. Where it does not deal, all ranks do all of the work in step, as they must where
    each holds but a part of the base's weights; `rows_of_batches` says that one batch is dealt out among the ranks
    (data-parallel), not the batches of a window.
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

    def mine(self, number: int, costs: Sequence[float] | None = None) -> list[int]:
        """This rank's share of `number` pieces of work, as indices; the costliest pieces go round first."""
        order = list(range(number)) if costs is None else sorted(range(number), key=lambda i: (-costs[i], i))
        return sorted(order[self.rank :: self.parts] if self.parts > 1 else order)

    def mine_of(self, prompts: Sequence[str]) -> list[int]:
        """This rank's share of some prompts, as indices: a prompt is always the same rank's, which may know its states
        from an earlier time."""
        numbers = [crc32(prompt.encode("utf-8", "surrogatepass")) for prompt in prompts]
        return [i for i, number in enumerate(numbers) if self.parts == 1 or number % self.parts == self.rank]

    def rows(self, index: Sequence[int], *tensors: Tensor) -> list[Tensor]:
        """Every rank's rows of some tensors in the order of their indices, on the device that they came from.

        The ranks' indices together are 0 to n - 1. All but the first dimension must agree among the ranks, but may be
        anything where a rank has no rows.
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

    def items(self, index: Sequence[int], items: Sequence[T]) -> list[T]:
        """As :meth:`rows`, for texts, names and numbers, one per index."""
        if self.parts == 1:
            return list(items)
        found: dict[int, T] = {}
        for part in self.gather_objects(dict(zip(index, items, strict=True))):
            found |= part
        return [found[i] for i in range(len(found))]

    def gather(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Every rank's tensors, rank by rank; shapes may differ, dtypes and the number of tensors may not."""
        if self.size == 1:
            return [tensors]
        shapes = self.gather_objects([tensor.shape for tensor in tensors])
        found = [self._gather_one(tensor, [row[i] for row in shapes]) for i, tensor in enumerate(tensors)]
        return list(zip(*found, strict=True))

    def _gather_one(self, tensor: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """As bytes, padded to the longest: not every backend sends every type, nor tensors of different lengths."""
        sizes = [shape.numel() * tensor.element_size() for shape in shapes]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: tensor.nbytes] = tensor.detach().to(self.device).contiguous().reshape(-1).view(torch.uint8)
        found = [torch.empty_like(padded) for _ in shapes]
        if len(padded):
            dist.all_gather(found, padded)
        parts = [whole[:size].view(tensor.dtype) for whole, size in zip(found, sizes, strict=True)]
        return [part.reshape(shape).to(tensor.device) for part, shape in zip(parts, shapes, strict=True)]

    def gather_objects(self, item: T) -> list[T]:
        """What each rank gives, rank by rank: texts, numbers and lists of them, pickled; for tensors see `gather`."""
        if self.size == 1:
            return [item]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item)
        return found

    def first(self, item: T) -> T:
        """What rank 0 gives; what the others do is not looked at."""
        return self.gather_objects(item)[0]

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, where all ranks have one of the same shape and type."""
        if self.size == 1:
            return tensor
        found = tensor.detach().to(self.device, copy=True).contiguous()
        dist.broadcast(found, 0)
        return found.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, the same bits for all."""
        if self.size == 1:
            return tensor
        found = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(found)
        return found.to(tensor.device)

    def same(self, what: str, content: str) -> None:
        """Check that all ranks hold the same: else a `RankError` on rank 0 names those that differ from it, and the
        others leave with a `LeftOutError`."""
        found = self.gather_objects(hashlib.sha256(content.encode()).hexdigest())
        others = [str(rank) for rank, other in enumerate(found) if other != found[0]]
        if others:
            who = f"rank {', '.join(others)} differs from rank 0 in {what}: the run is stopped"
            self._refuse(f"{who} before anything else is written; the same command goes on from the last checkpoint")

    def together(self, task: Callable[[], T]) -> T:
        """Do something on every rank; where it fails on one, it fails on all: the `RepairError` on rank 0 is what the
        first failing rank said, with its number where that is another; a `LeftOutError` ends the others."""
        error, result = None, []
        try:
            result.append(task())
        except RepairError as found:
            error = found
        said = self.gather_objects(str(error) if error else "")
        if error is not None and self.rank == 0:
            raise error
        if failing := [rank for rank, text in enumerate(said) if text]:
            self._refuse(f"rank {failing[0]}: {said[failing[0]]}")
        return result[0]

    def _refuse(self, words: str) -> NoReturn:
        """All ranks end here, and one of them says why."""
        raise RankError(words) if self.rank == 0 else LeftOutError(words)


ALONE = Team()
"""One process that does everything."""


class SharedModel(EditedModel):
    """An edited model whose `team` deals prompts out among themselves: all of them must ask alike."""

    team: Team = ALONE

    @torch.no_grad()
    def choose(self, prompts: Sequence[str], batch_size: int = 64) -> Choice:
        """Who answers prompts; each is routed by one rank."""
        mine = self.team.mine_of(prompts)
        return self.shared_choice(mine, super().choose([prompts[i] for i in mine], batch_size))

    def shared_choice(self, mine: Sequence[int], part: Choice) -> Choice:
        """The choices of all ranks, from this one's `part` for the prompts with the indices `mine`."""
        if self.team.parts == 1:
            return part
        names = max(self.team.gather_objects([check.name for check in part.checks] if mine else []), key=len)
        tensors = part.tensors() if mine else [part.memory, *[part.score] * (2 + 2 * len(names))]
        return Choice.of(self.team.rows(mine, *tensors), self.team.items(mine, part.nearest), names)

    def shared_query(self, number: int, ask: Callable[[list[int]], Query]) -> Query:
        """The states of `number` prompts, each computed by one rank; `ask` gives those with the given indices."""
        mine = self.team.mine(number)
        if self.team.parts == 1 or self.router.reads_all_tokens:  # whole prompts are too much to send around
            return ask(list(range(number)))
        some = ask(mine or [0])  # one at the least: its shape is needed
        part = some if mine else some.rows(slice(0, 0))
        texts = tuple(self.team.items(mine, part.texts))
        return Query(texts, *self.team.rows(mine, part.mask, part.hidden, part.activations))


def team_of(model: EditedModel) -> Team:
    """The ranks among which a model's prompts are dealt out; a model that knows none is asked by one process."""
    return model.team if isinstance(model, SharedModel) else ALONE
