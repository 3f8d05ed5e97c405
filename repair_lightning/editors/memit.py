"""MEMIT: many facts at once, spread over several layers.

Paper: "Mass-Editing Memory in a Transformer", arXiv 2210.07229, Sec. 4 and Alg. 1: values are found for the uppermost
of the written layers; from the lowest on, each takes an equal share R of what is still missing and the change
`R K^T (C_0 + K K^T)^-1` (Eq. 14), where C_0 is the second moment of keys times `moment_weight`.

Defaults: `hparams/MEMIT/EleutherAI_gpt-j-6B.json` of github.com/kmeng01/memit. Deviations: as in `rome`; the shift is
clamped by the value matrix's output, theirs by the layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.checks import positive
from repair_lightning.editors.rome import PUBLISHED as ROMES
from repair_lightning.editors.values import Values
from repair_lightning.editors.weights import ValueEditor
from repair_lightning.functional.least_squares import damped_change

PUBLISHED = replace(ROMES, steps=25, clamp=0.75, contexts=5)


@register("memit")
class MEMIT(ValueEditor):
    """Mass-editing memory in a transformer; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: the lowest edited layer; None ends at the paper's share of the depth.
        layers: how many layers are written into.
        values: how values are found.
        moment_weight: weight of the keys' second moment against the keys of a batch (lambda of Eq. 15).
    """

    default_depth: ClassVar[float | None] = 0.3  # layer 8 of GPT-J's 0 to 27

    def __init__(
        self,
        base: str = "",
        layers: int = 6,
        values: Values = PUBLISHED,
        moment_weight: float = 15000.0,
        **common: Any,
    ) -> None:
        super().__init__(base, layers=layers, values=values, **common)
        self.moment_weight = moment_weight
        positive(self, "moment_weight")

    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The change that solves the batch's normal equations."""
        matrix = self.edited.weights.matrix(layer)
        return matrix + damped_change(keys, values - keys @ matrix.T, self.moment_weight * self.moments[layer])
