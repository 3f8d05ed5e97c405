"""Edits as token ids, and their labels; `repair_lightning.models.forms` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repair_lightning.functional import IGNORED
from repair_lightning.models.prefix import pad_left


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
    return pad_left([row.target for row in rows], IGNORED, device)[0]
