"""ROME: one fact at a time as a rank-one change of one matrix.

Paper: "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, Sec. 3.1: with k the mean key of the
subject's last token behind some contexts and v the value found for it, `W' = W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)`,
the least change in the norm of C with `W' k = v`.

Defaults: `hparams/ROME` of github.com/kmeng01/rome and of EasyEdit. Deviations: the stopping loss is the target's; C
is of the stream's irrelevant prompts, regularised, not of 100,000 Wikipedia texts; contexts are the base's own greedy
texts; the target ends with the end of sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.values import Values
from repair_lightning.editors.weights import ValueEditor
from repair_lightning.functional.least_squares import minimal_change

PUBLISHED = Values(
    at="subject",
    lr=0.5,
    relative=False,
    steps=20,
    stop_margin=None,
    stop_loss=0.05,
    check_every=1,
    decay=0.5,
    clamp=4.0,
    essence=0.0625,
    contexts=10,
)


@register("rome")
class ROME(ValueEditor):
    """Rank-one model editing; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: the edited layer; None for the paper's share of the depth. Not the last: nothing there would carry the
            subject's value to the answer.
        values: how the value is found.
    """

    batchable: ClassVar[bool] = False
    default_depth: ClassVar[float | None] = 17 / 47  # layer 17 of GPT-2 XL's 0 to 47

    def __init__(self, base: str = "", values: Values = PUBLISHED, **common: Any) -> None:
        super().__init__(base, layers=1, values=values, **common)

    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The least change in the norm of C that gives the key its value."""
        matrix = self.edited.weights.matrix(layer)
        return matrix + minimal_change(keys, values - keys @ matrix.T, self.moments[layer])
