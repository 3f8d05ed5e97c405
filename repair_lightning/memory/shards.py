"""Shards, and how they change the value matrix's output.

REPAIR (arXiv 2510.01879), Sec. 2.2. A shard stands for `delta = W'_i - W_v` in float32, in the layout (D, F) whatever
the base's own storage order, and is applied to the value matrix's output: `y + A(x) delta^T`. It is stored dense (the
paper's, with its mask), or as two factors (ours). Rows that no shard answers are not touched, so their bits stay the
base's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from repair_lightning.errors import RepairError
from repair_lightning.functional import pack_mask, pack_values, unpack_mask, unpack_values
from repair_lightning.functional.int8 import quantized


def content_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


class Shard(nn.Module):
    """One side memory: `delta` (D, F), trainable where `mask` (D, F) is open, zero elsewhere.

    `generation` counts the re-initialisations; each draws a fresh mask.
    """

    delta: nn.Parameter
    mask: Tensor

    def __init__(self, shape: tuple[int, int], mask: Tensor | None = None, generation: int = 0) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mask", mask if mask is not None else torch.ones(0, dtype=torch.bool))
        self.generation = generation

    @property
    def open(self) -> Tensor | None:
        """The mask (D, F), or None where every coordinate is open."""
        return self.mask if self.mask.numel() else None

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""
        return nn.functional.linear(activations, self.delta)

    def fingerprint(self) -> str:
        """A hash of what it holds."""
        return content_hash(self.delta)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Of a masked shard only what the mask opens is stored, beside the mask in bits."""
        delta = self.delta if keep_vars else self.delta.detach()
        if self.open is None:
            destination[f"{prefix}delta"] = delta
        else:
            destination[f"{prefix}mask"] = pack_mask(self.mask)
            destination[f"{prefix}values"] = pack_values(delta, self.mask)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
        if f"{prefix}delta" in state_dict:
            self.mask = torch.ones(0, dtype=torch.bool, device=self.delta.device)
            found = state_dict[f"{prefix}delta"]
        else:
            self.mask = unpack_mask(state_dict[f"{prefix}mask"], self.delta.shape).to(self.delta.device)
            found = unpack_values(state_dict[f"{prefix}values"].to(self.delta.device), self.mask)
        with torch.no_grad():
            self.delta.copy_(found)


class LowRankShard:
    """A side memory `delta = left right` of rank R, with `left` (D, R) and `right` (R, F); in int8 they are
    :func:`quantized`, with a `scale` (R,). It never changes, and is no module: there may be a hundred thousand.

    `number` tells it from every other shard of its bank, also from those that had its id before a rollback. On the
    `host` it stays in the CPU's memory wherever the bank goes, and is brought to the device when it answers.
    """

    __slots__ = ("left", "number", "right", "scale")
    open = None
    generation = 0

    def __init__(self, left: Tensor, right: Tensor, number: int, scale: Tensor | None = None) -> None:
        self.left, self.right, self.number, self.scale = left.detach(), right.detach(), number, scale

    @classmethod
    def in_int8(cls, left: Tensor, right: Tensor, number: int = 0) -> LowRankShard:
        """One that takes a byte per entry, from finite factors."""
        left, right, scale = quantized(left, right)
        return cls(left, right, number, scale)

    @property
    def delta(self) -> Tensor:
        """The whole matrix (D, F), computed anew each time."""
        left, right = self.factors()
        return left @ right

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(part.nbytes for part in self.state_dict().values())

    def factors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """`left` (D, R) and `right` (R, F) in float32, on a device, by default its own."""
        left, right = (part.to(device or part.device).float() for part in (self.left, self.right))
        return (left if self.scale is None else left * self.scale.to(left.device)), right

    def state_dict(self) -> dict[str, Tensor]:
        """Its factors; that of the bank leaves them out, see `SideMemory.rows`."""
        return {"left": self.left, "right": self.right} | ({} if self.scale is None else {"scale": self.scale})

    def moved(self, change: Callable[[Tensor], Tensor]) -> LowRankShard:
        """The same shard, as what moves modules to devices wants it."""
        before = self.state_dict()
        after = {name: change(part) for name, part in before.items()}
        same = all(after[name] is part for name, part in before.items())
        return self if same else LowRankShard(**after, number=self.number)

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""
        left, right = self.factors(activations.device)
        return nn.functional.linear(nn.functional.linear(activations, right), left)

    def fingerprint(self) -> str:
        """A hash of what it holds."""
        return "".join(map(content_hash, self.state_dict().values()))


class ValueShard(nn.Module):
    """A side memory that is one output: `value` (D,) takes the place of the value matrix's output at every token.

    It never changes.
    """

    value: Tensor
    open = None
    generation = 0

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().float())

    @property
    def delta(self) -> Tensor:
        """It has none: a `RepairError`."""
        raise RepairError("a shard that replaces the output has no delta: it cannot be merged or scored by activation")

    def product(self, activations: Tensor) -> Tensor:
        """It adds nothing, so this is refused too."""
        return activations @ self.delta.T

    def fingerprint(self) -> str:
        """A hash of what it holds."""
        return content_hash(self.value)


AnyShard = Shard | LowRankShard | ValueShard


def shard_from(shape: tuple[int, int], state: Mapping[str, Tensor], generation: int = 0) -> Shard | ValueShard:
    """A shard for a value matrix of (D, F) from its own `state_dict`, trainable where its kind is."""
    if "value" in state:
        return ValueShard(state["value"])
    shard = Shard(shape, generation=generation)
    shard.load_state_dict(dict(state))
    return shard


class HasFactors(Protocol):
    """What has two factors."""

    def factors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """`left` (D, R) and `right` (R, F) in float32."""


class Factors:
    """The low-rank shards of n rows, of any ranks, gathered on a device, filled up with zeros to the highest rank."""

    def __init__(self, shards: Sequence[HasFactors], device: torch.device) -> None:
        pairs = [shard.factors() for shard in shards]
        left = pad_sequence([left.T for left, _ in pairs], batch_first=True)
        self.left = left.mT.to(device)
        self.right = pad_sequence([right for _, right in pairs], batch_first=True).to(device)

    def product(self, activations: Tensor) -> Tensor:
        """`A_n delta_n^T` (n, T, D) for float32 activations (n, T, F)."""
        return activations @ self.right.mT @ self.left.mT


class Adds(Protocol):
    """What can be added to the value matrix's output."""

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""


class Selection:
    """The shards that answer the rows of a batch, sorted out once and applied at every token.

    Args:
        size: B, the number of rows.
        parts: what is added to which rows; None stands for all of them.
        replaced: values (n, D) that take the output's place, at every token, in the rows (n,).
    """

    def __init__(
        self,
        size: int,
        parts: Sequence[tuple[Adds, Tensor | None]],
        replaced: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.size, self._parts, self._replaced = size, parts, replaced

    def __bool__(self) -> bool:
        """Whether any row is a shard's."""
        return bool(self._parts) or self._replaced is not None

    def __call__(self, output: Tensor, activations: Tensor) -> Tensor:
        """Add each row's shard to the value matrix's output; rows routed to the base keep their bits.

        Args:
            output: (B, T, D), the base's own output.
            activations: (B, T, F), the value matrix's input.
        """
        changed = output
        for shard, rows in self._parts:
            if rows is None:
                return output + shard.product(activations.float()).to(output.dtype)
            changed = output.clone() if changed is output else changed
            pushed = shard.product(activations.index_select(0, rows).float())
            changed.index_add_(0, rows, pushed.to(output.dtype))
        if self._replaced is None:
            return changed
        values, rows = self._replaced
        spread = values.to(output.dtype).view(len(values), *[1] * (output.ndim - 2), values.shape[-1])
        return changed.index_copy(0, rows, spread.expand(len(values), *output.shape[1:]))
