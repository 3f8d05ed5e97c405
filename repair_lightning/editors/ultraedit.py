"""UltraEdit: one gradient, one normalisation over all edits so far, one linear solve.

Paper: "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models", arXiv 2505.14679,
Sec. 3 and Alg. 1. At every position from which a target token is read, h is what enters the matrix and g the gradient
of the edit loss at what leaves it. Both are normalised with the mean and variance of all edits so far (lifelong
normalisation); with `v = -lr ||h~||^2 g~` the shift of the matrix is `V^T H (H^T H + I)^-1`, with H the plain h.

Deviations: W_v of the written layers alone, as for every editor here (the authors also write gate and up projections);
the target ends with the end of sequence. `lr` has no scale that fits all bases: `||h~||^2` grows with d_ffn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.values import Places, pushing
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.errors import ConfigError
from repair_lightning.functional import target_cross_entropy
from repair_lightning.functional.least_squares import damped_change
from repair_lightning.functional.moments import RunningMoments
from repair_lightning.models.prefix import SplitModel, stack_left
from repair_lightning.types import BASE, Edit, EditReport


def pseudo_values(keys: Tensor, gradients: Tensor, known: RunningMoments, lr: float) -> Tensor:
    """`-lr ||h~||^2 g~` (n, D) for keys (n, F) and gradients (n, D), both normalised by what is known of all so far."""
    normal = known.normalise(torch.cat([keys, gradients], -1))
    h, g = normal.split([keys.shape[1], gradients.shape[1]], -1)
    return -lr * h.square().sum(-1, keepdim=True) * g


@register("ultraedit")
class UltraEdit(WeightEditor):
    """Lifelong normalisation and a closed form; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layers: how many layers are written into.
        lr: length of the step.
        common: what every editor takes, see `Editor`.
    """

    def __init__(
        self,
        base: str = "",
        layers: int = 2,
        lr: float = 1e-6,
        **common: Any,
    ) -> None:
        super().__init__(base, layers=layers, **common)
        if not 0 < lr < math.inf:
            raise ConfigError(f"lr must be positive, got {lr}")
        self.lr = lr
        self.known: dict[int, RunningMoments] = {}

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """One step for some edits."""
        encoded = [self.encode(edit) for edit in edits]
        captures = self.edited.captures([row.ids for row in encoded])
        rows = TargetRows(encoded, captures, range(len(edits)), len(edits))
        places = Places.of_targets(encoded, range(len(edits)), len(edits)).to(self.edited.device)
        loss, gradients = self._gradients(rows, places)
        _, activations, _ = self.states([row.ids for row in encoded])
        for layer, gradient in gradients.items():
            keys = places.read(stack_left(activations[layer]))
            known = self.known.get(layer) or RunningMoments.none(keys.shape[1] + gradient.shape[1], keys.device)
            self.known[layer] = known.with_(torch.cat([keys, gradient], -1))
            aims = pseudo_values(keys, gradient, self.known[layer], self.lr)
            eye = torch.eye(keys.shape[1], device=keys.device)
            self.edited.weights.add(layer, damped_change(keys, aims, eye))
        return [EditReport(edit.id, BASE, value, 0.0, 1) for edit, value in zip(edits, loss.tolist(), strict=True)]

    def _gradients(self, rows: TargetRows, places: Places) -> tuple[Tensor, dict[int, Tensor]]:
        """Each member's loss (n,), and by layer the gradients (S, D) of the mean token loss at what the matrix puts
        out."""
        size, width = rows.ids.shape
        like = rows.hidden.new_zeros(len(places.member), rows.hidden.shape[-1], dtype=torch.float32)
        shifts = {layer: like.clone().requires_grad_() for layer in self.written_layers}
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(self.edited.split.skipping())
            for layer, shift in shifts.items():
                split = SplitModel(self.edited.base, layer)
                stack.enter_context(pushing(split, places.spread(shift, size, width)))
            logits, _ = self.edited.split.tail(rows.ids, rows.mask, rows.hidden, rows.span)
            token_losses = target_cross_entropy(rows.reading(logits)[:, None], rows.labels[:, None])
            token_losses.mean().backward()
        losses = rows.per_member(rows.per_row(token_losses.detach()))
        return losses, {layer: shift.grad for layer, shift in shifts.items() if shift.grad is not None}

    def own_state(self) -> dict[str, Any]:
        """The running moments."""
        found: dict[str, Any] = {}
        for layer, known in self.known.items():
            found |= {f"{layer}.count": known.count, f"{layer}.mean": known.mean, f"{layer}.spread": known.spread}
        return found

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        layers = [int(name.removesuffix(".count")) for name in state if name.endswith(".count")]
        device = self.edited.device
        self.known = {
            layer: RunningMoments(
                state[f"{layer}.count"], *(state[f"{layer}.{part}"].to(device) for part in ("mean", "spread"))
            )
            for layer in layers
        }
