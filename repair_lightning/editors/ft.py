"""FT-L: fine-tuning of one value matrix, no coordinate of which may move further than a bound.

Paper: "Modifying Memories in Transformer Models", arXiv 2012.00363, Sec. 3: the loss of the edits is minimised under
`||W - W_0||_inf <= delta`, by projection after each step. W_0 is the base's own matrix, so the bound holds for all
edits together, however many windows they come in.

Defaults are those of ROME's baseline, as EasyEdit has them (`hparams/FT/gpt2-xl_constr.json` of
github.com/zjunlp/EasyEdit): Adam at 5e-4, 25 steps, no weight decay, delta 5e-4 (5e-5 for GPT-J), and the end once the
mean loss is below 0.01. Deviations: the layer is `resolve_layer`'s (theirs is the first); each target token and the end
of sequence are trained where they are read (theirs: all of them at the prompt's last token), because free generation
must say them in their order. In a base of lower precision what is rounded is rounded into the ball.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.inner_loop import Tail, TargetRows, TargetTail
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.errors import ConfigError
from repair_lightning.functional import target_cross_entropy, target_margin
from repair_lightning.memory.shards import Selection, Shard
from repair_lightning.types import BASE, Edit, EditReport


def into_ball(weight: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The nearest `weight` with `|weight - centre| <= radius` in each coordinate; of any shape, both alike."""
    return torch.minimum(torch.maximum(weight, centre - radius), centre + radius)


def rounded_into_ball(weight: Tensor, centre: Tensor, radius: float) -> Tensor:
    """A float32 `weight` of the ball in the type of `centre`: what rounding puts outside takes the next number
    inside."""
    rounded = weight.to(centre.dtype)
    inside = (rounded.double() - centre.double()).abs() <= radius
    return torch.where(inside, rounded, torch.nextafter(rounded, centre))


class FineTuner(WeightEditor):
    """Gradient descent on W_v of one layer; subclasses say what holds it back.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_loss: a batch is done once its mean loss is below this, in nats; None takes all steps.
        stop_margin: a batch is done once every target token leads its best rival by this many nats; None does not
            look.
        common: what every editor takes, see `Editor`.
    """

    def __init__(
        self,
        base: str,
        lr: float,
        steps: int,
        stop_loss: float | None,
        stop_margin: float | None,
        **common: Any,
    ) -> None:
        super().__init__(base, layers=1, **common)
        if not 0 < lr < math.inf:
            raise ConfigError(f"lr must be positive and finite, got {lr}")
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        self.lr, self.steps = lr, steps
        self.stop_loss, self.stop_margin = stop_loss, stop_margin

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, find how much of the model a step must run."""
        super().prepare(background, held_out)
        self.tail: Tail = "model"
        if self.cache_mib:
            self.tail = "positions" if self.edited.split.adds_up() else "rows"

    def penalty(self, delta: Tensor) -> Tensor:
        """What is added to the mean edit loss for a change (D, F) of the matrix as it was before the batch."""
        return delta.new_zeros(())

    def constrain(self, delta: Tensor) -> None:
        """Put a change (D, F) back to where it may be, in place; called after each step."""

    def settle(self, delta: Tensor) -> None:
        """Write the batch's change (D, F) into the base."""
        self.edited.weights.add(self.layer, delta)

    def rows_of(self, edits: Sequence[Edit]) -> TargetRows:
        """The edits' training rows, from the prefix cache."""
        encoded = [self.encode(edit) for edit in edits]
        captures = self.edited.captures([row.ids for row in encoded])
        return TargetRows(encoded, captures, range(len(edits)), len(edits))

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Descend on the edits' mean loss."""
        steps, losses, delta = self._descend(self.rows_of(edits))
        self.settle(delta)
        return [EditReport(edit.id, BASE, loss, 0.0, steps) for edit, loss in zip(edits, losses, strict=True)]

    def _descend(self, rows: TargetRows) -> tuple[int, list[float], Tensor]:
        """The steps taken, each member's last loss, and the change (D, F)."""
        trained = Shard(self.memory.shape).to(self.edited.device)
        optimizer = torch.optim.Adam([trained.delta], lr=self.lr)
        tail = TargetTail(self.edited.split, rows, self.tail)
        hook = Selection(len(rows), [(trained, None)])
        with torch.enable_grad(), self.cut(), self.edited.forced(hook):
            for step in range(self.steps + 1):  # the last round only looks at what the steps made
                logits, _ = tail(trained.product)
                losses = rows.per_row(target_cross_entropy(logits[:, None], rows.labels[:, None]))
                if step == self.steps or self._done(logits.detach(), losses.detach(), rows.labels):
                    break
                optimizer.zero_grad()
                (losses.mean() + self.penalty(trained.delta)).backward()
                optimizer.step()
                with torch.no_grad():
                    self.constrain(trained.delta)
        return step, rows.per_member(losses.detach()).tolist(), trained.delta.detach()

    def _done(self, logits: Tensor, losses: Tensor, labels: Tensor) -> bool:
        if self.stop_loss is not None and bool(losses.mean() < self.stop_loss):
            return True
        if self.stop_margin is None:
            return False
        return bool((target_margin(logits[:, None], labels[:, None]) >= self.stop_margin).all())

    def cut(self) -> AbstractContextManager[Any]:
        """What the steps need not run is out of the way."""
        return nullcontext() if self.tail == "model" else self.edited.split.skipping(whole=self.tail == "positions")


@register("ft")
class FT(FineTuner):
    """Fine-tuning inside an L-infinity ball; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_loss: a batch is done once its mean loss is below this, in nats; None takes all steps.
        norm_constraint: delta, how far each coordinate may be from the base's own; None leaves it free.
        common: what every editor takes, see `Editor`.
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
        super().__init__(base, lr=lr, steps=steps, stop_loss=stop_loss, stop_margin=None, **common)
        if norm_constraint is not None and not norm_constraint > 0:
            raise ConfigError(f"norm_constraint must be positive, or null for none, got {norm_constraint}")
        self.norm_constraint = norm_constraint

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Besides, take the ball's centre in what the change is counted from."""
        weights = self.edited.weights
        self.centre = weights.original(self.layer) - weights.matrix(self.layer)
        return super().change(edits)

    def constrain(self, delta: Tensor) -> None:
        """Into the ball."""
        if self.norm_constraint is not None:
            delta.copy_(into_ball(delta, self.centre, self.norm_constraint))

    def settle(self, delta: Tensor) -> None:
        """Into the base, and rounded into the ball."""
        weights = self.edited.weights
        matrix = weights.matrix(self.layer) + delta
        if self.norm_constraint is not None:
            own = weights.original(self.layer).to(self.edited.value_weight.dtype)
            matrix = rounded_into_ball(matrix, own, self.norm_constraint)
        weights.put(self.layer, matrix)
