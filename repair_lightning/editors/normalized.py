"""Normalised gradient descent on values, one step length for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class NormalizedGradient(torch.optim.Optimizer):
    """Steps of fixed length along each position's gradient, shorter where it has less to go than the worst position.

    Values stay in the span of what the head asks for. Adam moves each coordinate alike; what that adds besides says
    rare tokens where keys of another form mix the positions.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; every parameter is (..., R, D)."""
        found = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                size = parameter.grad.norm(dim=-1, keepdim=True)
                most = size.amax(dim=-2, keepdim=True) if size.dim() > 1 else size
                share = (size / most.clamp_min(1e-30)).sqrt()
                parameter -= group["lr"] * share * parameter.grad / size.clamp_min(1e-30)
        return found
