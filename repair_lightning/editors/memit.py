"""ROME, one fact at a time as a rank-one change of one matrix, and MEMIT, many facts at once over several layers.

Papers: "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, Sec. 3.1: with k the mean key of the
subject's last token behind some contexts and v the value found for it, `W' = W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)`,
the least change in the norm of C with `W' k = v`.
"Mass-Editing Memory in a Transformer", arXiv 2210.07229, Sec. 4 and Alg. 1: values are found for the uppermost of the
written layers; from the lowest on, each takes an equal share R of what is still missing and the change
`R K^T (C_0 + K K^T)^-1` (Eq. 14), where C_0 is the second moment of keys times `moment_weight`.

Defaults: `hparams/ROME` of github.com/kmeng01/rome and of EasyEdit, and `hparams/MEMIT/EleutherAI_gpt-j-6B.json` of
github.com/kmeng01/memit. Deviations: the stopping loss is the target's; C is of the stream's irrelevant prompts,
regularised, not of 100,000 Wikipedia texts; contexts are the base's own greedy texts; the target ends with the end of
sequence; MEMIT's shift is clamped by the value matrix's output, theirs by the layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.checks import positive
from repair_lightning.editors.values import Values
from repair_lightning.editors.weights import ValueEditor
from repair_lightning.functional.least_squares import damped_change, minimal_change

ROMES = Values("subject", lr=0.5, relative=False, steps=20, stop_margin=None, stop_loss=0.05, check_every=1)
ROMES = replace(ROMES, decay=0.5, clamp=4.0, essence=0.0625, contexts=10)
MEMITS = replace(ROMES, steps=25, clamp=0.75, contexts=5)


@register("rome")
class ROME(ValueEditor):
    """Rank-one model editing.

    Args:
        layer: the edited layer; None for the paper's share of the depth. Not the last: nothing there would carry the
            subject's value to the answer.
        values: how the value is found.
    """

    batchable = False
    default_depth = 17 / 47  # layer 17 of GPT-2 XL's 0 to 47

    def __init__(self, values: Values = ROMES, **common: Any) -> None:
        super().__init__(layers=1, values=values, **common)

    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The least change in the norm of C that gives the key its value."""
        matrix = self.edited.weights.matrix(layer)
        return matrix + minimal_change(keys, values - keys @ matrix.T, self.moments[layer])


@register("memit")
class MEMIT(ValueEditor):
    """Mass-editing memory in a transformer.

    Args:
        layer: the lowest edited layer; None ends at the paper's share of the depth.
        layers: how many layers are written into.
        values: how values are found.
        moment_weight: weight of the keys' second moment against the keys of a batch (lambda of Eq. 15).
    """

    default_depth = 0.3  # layer 8 of GPT-J's 0 to 27

    def __init__(self, layers: int = 6, values: Values = MEMITS, moment_weight: float = 15000.0, **common: Any) -> None:
        super().__init__(layers=layers, values=values, **common)
        self.moment_weight = moment_weight
        positive(self, "moment_weight")

    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The change that solves the batch's normal equations."""
        matrix = self.edited.weights.matrix(layer)
        return matrix + damped_change(keys, values - keys @ matrix.T, self.moment_weight * self.moments[layer])
