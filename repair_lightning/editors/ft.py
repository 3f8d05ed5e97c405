"""FT-L: fine-tuning of one value matrix, no coordinate of which may move further than a bound.

Paper: "Modifying Memories in Transformer Models", arXiv 2012.00363, Sec. 3: the loss of the edits is minimised under
`||W - W_0||_inf <= delta`, by projection after each step. W_0 is the base's own matrix, so the bound holds for all
edits together.

Defaults: `hparams/FT/gpt2-xl_constr.json` of github.com/zjunlp/EasyEdit, ROME's baseline. Deviations: the layer is
`resolve_layer`'s (theirs is the first); each target token and the end of sequence are trained where they are read
(theirs: all of them at the prompt's last token). In a base of lower precision what is rounded is rounded into the ball.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.inner_loop import Tail, TargetRows, TargetTail, descend, tail_of
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.memory.shards import Selection, Shard
from repair_lightning.types import Edit, EditReport


def into_ball(weight: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The nearest `weight` with `|weight - centre| <= radius` in each coordinate; of any shape, both alike."""
    return torch.minimum(torch.maximum(weight, centre - radius), centre + radius)


def rounded_into_ball(weight: Tensor, centre: Tensor, radius: float) -> Tensor:
    """A `weight` of the ball in the type of `centre`; what rounding puts outside takes the next number inside."""
    rounded = weight.to(centre.dtype)
    inside = (rounded.double() - centre.double()).abs() <= radius
    return torch.where(inside, rounded, torch.nextafter(rounded, centre))


@register("ft")
class FT(WeightEditor):
    """Fine-tuning inside an L-infinity ball; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_loss: a batch is done once its mean loss is below this, in nats; None takes all steps.
        norm_constraint: delta, how far each coordinate may be from the base's own; None leaves it free.
    """

    def __init__(
        self,
        base: str = "",
        lr: float = 5e-4,
        steps: int = 25,
        stop_loss: float | None = 0.01,
        norm_constraint: float | None = 5e-4,
        **common: Any,
    ) -> None:
        super().__init__(base, layers=1, **common)
        self.lr, self.steps, self.stop_loss, self.norm_constraint = lr, steps, stop_loss, norm_constraint
        positive(self, "lr", *(["norm_constraint"] if norm_constraint is not None else []))
        at_least(1, self, "steps")
        self.stop_margin: float | None = None

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

        def project() -> None:
            if radius is not None:
                trained.delta.copy_(into_ball(trained.delta, centre, radius))

        with tail.cut(), self.edited.forced(Selection(len(rows), [(trained, None)])):
            steps, losses = descend(
                rows,
                lambda: tail(trained.product)[0],
                torch.optim.Adam([trained.delta], lr=self.lr),
                self.steps,
                done,
                lambda losses: losses.mean() + self.penalty(trained.delta),
                project,
            )
        matrix += trained.delta.detach()
        if radius is not None:
            matrix = rounded_into_ball(matrix, own.to(self.edited.value_weight.dtype), radius)
        weights.put(self.layer, matrix)
        return self.reports(edits, losses, [steps] * len(edits))
