"""Means and variances of features that arrive in parts, without keeping them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """What is known of all features so far: their `count`, their `mean` (X,), and their `spread` (X,), the sum of
    squared distances from the mean."""

    count: int
    mean: Tensor
    spread: Tensor

    @classmethod
    def none(cls, size: int, device: torch.device | None = None) -> RunningMoments:
        """Before the first feature of `size` coordinates."""
        return cls(0, torch.zeros(size, device=device), torch.zeros(size, device=device))

    def with_(self, features: Tensor) -> RunningMoments:
        """With further features (n, X); Chan, Golub and LeVeque's update of two parts."""
        n, total = len(features), self.count + len(features)
        mean = features.mean(0)
        apart = mean - self.mean
        spread = self.spread + (features - mean).square().sum(0) + apart.square() * (self.count * n / total)
        return RunningMoments(total, self.mean + apart * (n / total), spread)

    def normalise(self, features: Tensor, floor: float = 1e-12) -> Tensor:
        """Features (n, X) without the mean and (unbiased) variance of all so far; `floor` is the least deviation."""
        deviation = (self.spread / max(self.count - 1, 1)).sqrt()
        return (features - self.mean) / deviation.clamp_min(floor)
