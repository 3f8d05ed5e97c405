"""What the files of this package share: the accumulation type and the checks of arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32, so that sums of bfloat16 keep their digits; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_fraction(name: str, value: float, remedy: str) -> None:
    """Raise `ValueError` unless `value` is in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}: {remedy}")


def check_positive(name: str, value: float, remedy: str) -> None:
    """Raise `ValueError` unless `value` is positive and finite."""
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name} must be positive and finite, got {value}: {remedy}")


def check_not_negative(name: str, value: float, remedy: str) -> None:
    """Raise `ValueError` unless `value` is finite and at least 0."""
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}: {remedy}")


def check_bool(name: str, tensor: Tensor) -> None:
    """Raise `TypeError` unless `tensor` is boolean."""
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {tensor.dtype}: pass {name}.bool()")
