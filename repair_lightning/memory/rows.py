"""Rows that never change: a checkpoint stores each of them once, and later ones name where it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = "numbers"
"""The name of the rows' numbers among their tensors."""


@dataclass(frozen=True)
class Rows:
    """A table whose rows come and go and are never changed.

    Attributes:
        numbers: (N,) long, ascending. A number stands for one row for ever, also behind a rollback.
        take: the tensors of the rows from one place up to another.
    """

    numbers: Tensor
    take: Callable[[int, int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """Rows as they were stored: their tensors, and which of them (n,) are still there."""

    tensors: Mapping[str, Tensor]
    kept: Tensor


def joined(parts: Sequence[Part], name: str, fill: int | None = None, width: int = 0) -> Tensor:
    """One tensor of all rows that are still there; narrower ones are filled up to `width` where `fill` is given."""
    found = [part.tensors[name][part.kept] for part in parts]
    if fill is not None:
        found = [torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill) for rows in found]
    return torch.cat(found)
