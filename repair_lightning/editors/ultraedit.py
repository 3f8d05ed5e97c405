"""UltraEdit: one gradient, one normalisation over all edits so far, one linear solve.

Paper: "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models", arXiv 2505.14679,
Sec. 3 and Alg. 1. At every position from which a target token is read, h is what enters the matrix and g the gradient
of the edit loss at what leaves it. Both are normalised with the mean and variance of all edits so far (lifelong
normalisation); with `v = -lr ||h~||^2 g~` the shift of the matrix is `V^T H (H^T H + I)^-1`, with H the plain h.

Deviations: W_v of the written layers alone, as for every editor here (the authors also write gate and up projections);
the target ends with the end of sequence. `lr` has no scale that fits all bases: `||h~||^2` grows with d_ffn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.checks import positive
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.values import Places, slopes
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.functional.least_squares import damped_change
from repair_lightning.functional.moments import RunningMoments
from repair_lightning.types import Edit, EditReport


def pseudo_values(keys: Tensor, gradients: Tensor, known: RunningMoments, lr: float) -> Tensor:
    """`-lr ||h~||^2 g~` (n, D) for keys (n, F) and gradients (n, D), both normalised by what is known of all so far."""
    normal = known.normalise(torch.cat([keys, gradients], -1))
    h, g = normal.split([keys.shape[1], gradients.shape[1]], -1)
    return -lr * h.square().sum(-1, keepdim=True) * g


@register("ultraedit")
class UltraEdit(WeightEditor):
    """Lifelong normalisation and a closed form.

    Args:
        layers: how many layers are written into.
        lr: length of the step.
    """

    def __init__(self, layers: int = 2, lr: float = 1e-6, **common: Any) -> None:
        super().__init__(layers=layers, **common)
        self.lr = lr
        positive(self, "lr")
        self.known: dict[int, RunningMoments] = {}

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """One step for some edits."""
        rows = TargetRows.of(self.edited, [self.encode(edit) for edit in edits])
        places = Places.of_targets(rows)
        losses, keys_at, deltas_at = slopes(self.edited, self.written_layers, rows, torch.mean)
        for layer in self.written_layers:
            keys, gradient = places.read(keys_at[layer]), places.read(deltas_at[layer])
            known = self.known.get(layer) or RunningMoments.none(keys.shape[1] + gradient.shape[1], keys.device)
            self.known[layer] = known.with_(torch.cat([keys, gradient], -1))
            aims = pseudo_values(keys, gradient, self.known[layer], self.lr)
            eye = torch.eye(keys.shape[1], device=keys.device)
            self.edited.weights.add(layer, damped_change(keys, aims, eye))
        return self.reports(edits, rows.per_member(rows.per_row(losses)).tolist(), [1] * len(edits))

    def own_state(self) -> dict[str, Any]:
        """The running moments."""
        return {f"{layer}.{name}": value for layer in self.known for name, value in vars(self.known[layer]).items()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        device = self.edited.device
        self.known = {
            int(layer): RunningMoments(count, state[f"{layer}.mean"].to(device), state[f"{layer}.spread"].to(device))
            for layer, count in ((name.split(".")[0], state[name]) for name in state if name.endswith(".count"))
        }
