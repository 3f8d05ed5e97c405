"""Fine-tuning of one value matrix: FT-L inside a norm ball, and FT-EWC with the elastic penalty.

FT-L: "Modifying Memories in Transformer Models", arXiv 2012.00363, Sec. 3: the loss of the edits is minimised under
`||W - W_0||_inf <= delta`, by projection after each step. W_0 is the base's own matrix, so the bound holds for all
edits together. Defaults: `hparams/FT/gpt2-xl_constr.json` of github.com/zjunlp/EasyEdit, ROME's baseline. Deviations:
the layer is `resolve_layer`'s (theirs is the first); each target token and the end of sequence are trained where they
are read (theirs: all of them at the prompt's last token). In a base of lower precision what is rounded is rounded into
the ball.

FT-EWC: "Overcoming catastrophic forgetting in neural networks" (Kirkpatrick et al., 2017, arXiv 1612.00796), Eq. 3:

    loss of the edits + weight / 2 sum_i F_i (W_i - W*_i)^2

with F the diagonal of the Fisher information of what is to stay: the mean over prompts of the squared gradient of the
log likelihood of their answer. Here these are the irrelevant prompts with the base's own answers, and W* is the base's
matrix. With `accumulate` each window's edits are added when it is over, and W* is then the matrix that said them:
online EWC (Schwarz et al., 2018, arXiv 1805.06370, with gamma 1). Defaults: `grace/config/editor/ft_ewc.yaml` of
github.com/Thartvigsen/GRACE; its 0.1 F (W - W*)^2 is a weight of 0.2 here. Deviations: theirs takes F from the last ten
edits; one matrix of one layer, `resolve_layer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import KEPT, register
from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.inner_loop import Tail, TargetRows, TargetTail, descend, tail_of
from repair_lightning.editors.values import slopes
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.memory.shards import Selection, Shard
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.types import Edit, EditBatch, EditReport

ROWS = 32  # texts whose gradients are taken together


def rounded_into_ball(weight: Tensor, centre: Tensor, radius: float) -> Tensor:
    """A `weight` of the ball in the type of `centre`; what rounding puts outside takes the next number inside."""
    rounded = weight.to(centre.dtype)
    inside = (rounded.double() - centre.double()).abs() <= radius
    return torch.where(inside, rounded, torch.nextafter(rounded, centre))


@register("ft")
class FT(WeightEditor):
    """Fine-tuning inside an L-infinity ball.

    Args:
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_loss: a batch is done once its mean loss is below this, in nats; None takes all steps.
        norm_constraint: delta, how far each coordinate may be from the base's own; None leaves it free.
    """

    stop_margin: float | None = None

    def __init__(
        self,
        lr: float = 5e-4,
        steps: int = 25,
        stop_loss: float | None = 0.01,
        norm_constraint: float | None = 5e-4,
        **common: Any,
    ) -> None:
        super().__init__(layers=1, **common)
        self.lr, self.steps, self.stop_loss, self.norm_constraint = lr, steps, stop_loss, norm_constraint
        positive(self, "lr", *(["norm_constraint"] if norm_constraint is not None else []))
        at_least(1, self, "steps")

    @cached_property
    def tail(self) -> Tail:
        """How much of the model a step must run."""
        return tail_of(self)

    def penalty(self, delta: Tensor) -> Tensor:
        """What is added to the mean edit loss for a change (D, F) of the matrix as it was before the batch."""
        return delta.new_zeros(())

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Descend on the edits' mean loss, inside the ball."""
        weights, radius = self.edited.weights, self.norm_constraint
        own, matrix = weights.original(self.layer), weights.matrix(self.layer)
        centre = own - matrix
        rows = TargetRows.of(self.edited, [self.encode(edit) for edit in edits])
        trained = Shard(self.memory.shape).to(self.edited.device)
        tail = TargetTail(self.edited.split, rows, self.tail)

        def done(_: int, logits: Tensor, losses: Tensor) -> bool:
            if self.stop_loss is not None and bool(losses.mean() < self.stop_loss):
                return True
            return bool(rows.lead(logits, self.stop_margin).all())

        def total(losses: Tensor) -> Tensor:
            return losses.mean() + self.penalty(trained.delta)

        def project() -> None:
            if radius is not None:
                trained.delta.clamp_(centre - radius, centre + radius)

        optimizer = torch.optim.Adam([trained.delta], lr=self.lr)
        with tail.cut(), self.edited.forced(Selection(len(rows), [(trained, None)])):
            steps, losses = descend(rows, lambda: tail(trained.product)[0], optimizer, self.steps, done, total, project)
        matrix = matrix + trained.delta.detach()
        if radius is not None:
            matrix = rounded_into_ball(matrix, own.to(self.edited.value_weight.dtype), radius)
        weights.put(self.layer, matrix)
        return self.reports(edits, losses, [steps] * len(edits))


@register("ft_ewc")
class FTEWC(FT):
    """Fine-tuning with the elastic penalty.

    Args:
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_margin: a batch is done once every target token leads its best rival by this many nats; None takes all
            steps.
        weight: lambda, of the penalty; it wants to be the larger, the more the base's answers are to stay.
        accumulate: the edits of windows that are over are to stay too.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        steps: int = 100,
        stop_margin: float | None = 0.0,
        weight: float = 0.2,
        accumulate: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(lr=lr, steps=steps, stop_loss=None, norm_constraint=None, **common)
        self.stop_margin, self.weight, self.accumulate = stop_margin, weight, accumulate
        at_least(0, self, "weight")
        self.learnt: dict[str, Tensor] = {}
        """With `accumulate`, once a window is over: F as `fisher`, and W* as `anchor`."""
        self.recent: dict[str, Edit] = {}
        """The window's edits so far, by id."""

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
        self.recent |= {edit.id: edit for edit in batch.edits if edit.id not in spoilt}
        return reports

    def penalty(self, delta: Tensor) -> Tensor:
        """The elastic penalty."""
        return self.weight / 2 * (self.fisher * (self.moved + delta).square()).sum()

    def finish_window(self) -> None:
        """With `accumulate`, the window's edits are to stay from now on."""
        if self.accumulate and self.recent:
            own = self.fisher_of([self.encode(edit) for edit in self.recent.values()])
            self.learnt = {"fisher": self.fisher + own, "anchor": self.edited.weights.matrix(self.layer)}
        self.recent = {}

    def own_state(self) -> dict[str, Any]:
        """With `accumulate`, F and W*."""
        return dict(self.learnt)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        self.learnt = {name: value.to(self.edited.device) for name, value in state.items()}
