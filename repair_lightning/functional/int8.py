"""Factors of a matrix in a byte per entry."""

from __future__ import annotations

import torch
from torch import Tensor


def quantized(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (D, R) and (R, F), finite, as integers in int8, and what each of the R pairs is to be multiplied by,
    `scale` (R,) in float32.

    Symmetric, by the largest entry of each column of `left` and row of `right`: an entry is off by 1/254 of it at most.
    """
    columns, rows = ((size / 127).float().clamp_min(1e-30) for size in (left.abs().amax(0), right.abs().amax(1)))
    return (left / columns).round().to(torch.int8), (right / rows[:, None]).round().to(torch.int8), columns * rows
