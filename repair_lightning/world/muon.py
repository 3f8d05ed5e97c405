"""The Muon optimizer: momentum whose update of every matrix is orthogonalised.

All singular directions of a weight matrix then move at the same speed. For a model that has to memorise thousands of
equally rare facts this takes several times fewer steps than Adam, which follows the few directions all facts share.
Newer versions of torch ship the same method as ``torch.optim.Muon``; this one runs on all that the project supports.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest (semi-)orthogonal matrix, by a quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide.bfloat16() / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if wide is not matrix else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the steps are scaled so that Adam's learning rates and decays fit."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix that has a gradient; returns the loss of the optional closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, matrix: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        """Decay one matrix and move it along its orthogonalised momentum."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        direction = orthogonalise(gradient.lerp(average, momentum))
        matrix.mul_(1 - lr * weight_decay)
        matrix.add_(direction, alpha=-0.2 * lr * max(matrix.shape) ** 0.5)
