"""Edits as token ids, and their labels; `repair_lightning.models.forms` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repair_lightning.functional import IGNORED


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its target as token ids; the target includes the token that ends the answer."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and target in one row."""
        return self.prompt + self.target


def target_labels(rows: Sequence[Encoded], device: Any = None) -> Tensor:
    """Labels (B, max target length) of left-padded rows: target tokens at the right end, `IGNORED` before them."""
    width = max(len(row.target) for row in rows)
    padded = [[IGNORED] * (width - len(row.target)) + list(row.target) for row in rows]
    return torch.tensor(padded, device=device)
