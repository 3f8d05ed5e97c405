"""FT-EWC: fine-tuning of one value matrix with the elastic penalty, which holds what other answers depend on.

Paper: "Overcoming catastrophic forgetting in neural networks" (Kirkpatrick et al., 2017, arXiv 1612.00796), Eq. 3:

    loss of the edits + weight / 2 sum_i F_i (W_i - W*_i)^2

with F the diagonal of the Fisher information of what is to stay: the mean over prompts of the squared gradient of the
log likelihood of their answer. Here these are the irrelevant prompts with the base's own answers, and W* is the base's
matrix. With `accumulate` each window's edits are added when it is over, and W* is then the matrix that said them:
online EWC (Schwarz et al., 2018, arXiv 1805.06370, with gamma 1).

Defaults: `grace/config/editor/ft_ewc.yaml` of github.com/Thartvigsen/GRACE; its 0.1 F (W - W*)^2 is a weight of 0.2
here. Deviations: theirs takes F from the last ten edits; one matrix of one layer, `resolve_layer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import KEPT, register
from repair_lightning.editors.checks import at_least
from repair_lightning.editors.ft import FT
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.values import slopes
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.types import Edit, EditBatch, EditReport

ROWS = 32  # texts whose gradients are taken together


def elastic_penalty(moved: Tensor, fisher: Tensor, weight: float) -> Tensor:
    """`weight / 2 sum_i F_i moved_i^2`, for what moved and F of one shape."""
    return weight / 2 * (fisher * moved.square()).sum()


@register("ft_ewc")
class FTEWC(FT):
    """Fine-tuning with the elastic penalty; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_margin: a batch is done once every target token leads its best rival by this many nats; None takes all
            steps.
        weight: lambda, of the penalty; it wants to be the larger, the more the base's answers are to stay.
        accumulate: the edits of windows that are over are to stay too.
    """

    def __init__(
        self,
        base: str = "",
        lr: float = 1e-2,
        steps: int = 100,
        stop_margin: float | None = 0.0,
        weight: float = 0.2,
        accumulate: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(base, lr=lr, steps=steps, stop_loss=None, norm_constraint=None, **common)
        self.stop_margin, self.weight, self.accumulate = stop_margin, weight, accumulate
        at_least(0, self, "weight")
        self.learnt: dict[str, Tensor] = {}
        """With `accumulate`, once a window is over: F as `fisher`, and W* as `anchor`."""
        self.recent: list[Edit] = []
        """The window's edits so far."""

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, estimate F from what the base says to the background prompts."""
        super().prepare(background, held_out)
        said = self.said_by_base(self.background_prompts[:KEPT])
        with self.edited.weights.originals():
            self.background_fisher = self.fisher_of(said)

    def fisher_of(self, texts: Sequence[Encoded]) -> Tensor:
        """The mean over texts of the squared gradient of each one's log likelihood for W_v as it is, (D, F)."""
        total = torch.zeros(self.memory.shape, device=self.edited.device)
        for start in range(0, len(texts), ROWS):
            rows = TargetRows.of(self.edited, texts[start : start + ROWS])
            _, _, deltas = slopes(self.edited, [self.layer], rows)
            for at_output, activations in zip(deltas[self.layer], rows.activations.float(), strict=True):
                total += (at_output.T @ activations).square_()
        return total / max(len(texts), 1)

    @property
    def fisher(self) -> Tensor:
        """F of all that is to stay, (D, F)."""
        return self.learnt.get("fisher", self.background_fisher)

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Besides, take the anchor from which the penalty counts."""
        anchor = self.learnt.get("anchor", self.edited.weights.original(self.layer))
        self.moved = self.edited.weights.matrix(self.layer) - anchor
        return super().change(edits)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Besides, note what was written, for the window's end."""
        reports = super().write(batch)
        spoilt = {report.id for report in reports if report.error}
        self.recent += [edit for edit in batch.edits if edit.id not in spoilt]
        return reports

    def penalty(self, delta: Tensor) -> Tensor:
        """The elastic penalty."""
        return elastic_penalty(self.moved + delta, self.fisher, self.weight)

    def finish_window(self) -> None:
        """With `accumulate`, the window's edits are to stay from now on."""
        if self.accumulate and self.recent:
            known = {edit.id: edit for edit in self.recent}
            own = self.fisher_of([self.encode(edit) for edit in known.values()])
            self.learnt = {"fisher": self.fisher + own, "anchor": self.edited.weights.matrix(self.layer)}
        self.recent = []

    def own_state(self) -> dict[str, Any]:
        """With `accumulate`, F and W*."""
        return dict(self.learnt)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        self.learnt = {name: value.to(self.edited.device) for name, value in state.items()}
