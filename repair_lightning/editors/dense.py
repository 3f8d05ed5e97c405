"""The inner loop over one dense shard: the edit loss, intra-batch distillation (Eq. 4) and the routing loss (Eq. 6, 7).

A gradient step on the delta moves what the shard says at one edit's positions together with what it says at all that
look alike, so that many edits in one shard undo each other. By default the delta is trained in dual coordinates
instead: `delta = V^T C`, where C is the dual basis of the batch's activations and of irrelevant prompts'. A step of V's
gradient is then a step of the delta's gradient preconditioned by the second moment of its inputs (the input factor of
K-FAC, arXiv 1503.05671): each position moves by itself, and irrelevant prompts stay where they are.

Shapes: M target tokens, n batch members, D = d_model, F = d_ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.inner_loop import OpenCoordinates, TargetRows, TargetTail
from repair_lightning.editors.rivals import rivals_of
from repair_lightning.functional import activation_scores, kd_loss, routing_margin_loss, soft_kd_loss, target_margin
from repair_lightning.functional.least_squares import dual_basis
from repair_lightning.memory.shards import Selection, Shard

if TYPE_CHECKING:
    from repair_lightning.editors.repair import Repair

APART = 0.1  # of the routing loss: where training may end
RIDGE = 1e-2  # of the dual basis: smaller ones fit as well and separate less, larger ones need more steps


class DualCoordinates:
    """A shard's delta in training as `known + mask (V^T C)`, with V (M, D) trained from zero.

    Args:
        shard: what is trained; it changes with each step.
        keys: (M, F) the activations at the target tokens' positions.
        quiet: (N, F) activations at which nothing should be added.
    """

    def __init__(self, shard: Shard, keys: Tensor, quiet: Tensor) -> None:
        self.shard, self.known = shard, shard.delta.detach().clone()
        self.basis = dual_basis(keys, quiet, RIDGE)
        self.parameter = nn.Parameter(keys.new_zeros(len(keys), len(self.known)))
        self._at: Tensor | None = None

    def delta(self) -> Tensor:
        """The whole delta (D, F), from which gradients reach V."""
        change = self.parameter.T @ self.basis
        return self.known + (change if self.shard.open is None else change * self.shard.open)

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""
        if self.shard.open is not None:
            return nn.functional.linear(activations, self.delta())
        if activations is not self._at:  # where positions alone run, they are the same in every step
            self._at, self._known = activations, nn.functional.linear(activations, self.known)
            self._responses = activations @ self.basis.T
        return self._known + self._responses @ self.parameter

    @property
    def trained(self) -> nn.Parameter:
        """What a backward pass leaves its gradient in."""
        return self.parameter

    def step(self, optimizer: Any) -> None:
        """One step from V's gradient, which is used up."""
        optimizer.step()
        self.parameter.grad = None

    def finish(self) -> None:
        """The shard holds what was trained."""
        self.shard.delta.data.copy_(self.delta().detach())


class DenseWriter:
    """Trains a batch into a dense shard, with an editor's options, base and optimiser."""

    def __init__(self, editor: Repair) -> None:
        self.editor, self.team = editor, editor.team
        self.distillation, self.routing = editor.distillation, editor.routing

    def train(self, module: Shard, rows: TargetRows, budget: int) -> tuple[int, list[float], list[float]]:
        """The inner loop; returns the steps taken and each member's last edit loss and distillation loss."""
        mine, part = self._own_rows(rows)  # of all rows, where they are not dealt out, mine is None
        tail = TargetTail(self.editor.edited.split, part, self.editor.tail)
        trained = self._coordinates(module, rows)
        margin, every, rate = self.editor.pace(tail.states, self.editor.writing.rate * self.editor.lr_unit)
        if mine is not None:  # one rate for all ranks: the mean over all rows
            shares = torch.tensor([rate, 1.0], device=module.delta.device) * len(part.labels)
            rate = float(torch.div(*self.team.total(shares)))
        generator, size = torch.Generator().manual_seed(self.editor.seed * 1_000_003), len(self.editor.background)
        hook = Selection(len(part), [(trained, None)])
        with (
            self.editor.bound(trained.parameter, rate) as optimizer,
            tail.cut(),
            self.editor.edited.forced(hook),
        ):
            # What is distilled is read from the whole vocabulary.
            rivals = None if self.distillation.weight else rivals_of(tail, every)
            for step in range(budget + 1):  # the last round only looks at what the steps made
                if rivals is None or rivals.due(step) or step == budget:
                    with torch.set_grad_enabled(rivals is None):
                        logits, features = tail(trained.product)
                        losses = part.per_row(part.losses(logits))
                        kd, per_sample = self._distil(logits, features, part, mine)
                routing = losses.new_zeros(())
                if self.routing.weight:
                    irrelevant = torch.randperm(size, generator=generator)[: self.routing.sample]
                    routing = self._routing_loss(trained.delta(), rows, irrelevant.to(module.delta.device))
                if step == budget or (step % every == 0 and self._written(logits, part.labels, margin, routing)):
                    break
                if rivals is not None:
                    losses = part.per_row(rivals.losses(step, logits, lambda: tail(trained.product)[0]))
                total = losses.mean() if mine is None else losses.sum() / len(rows)
                total = total + self.distillation.weight * kd
                total = total + self.routing.weight * routing / (1 if mine is None else self.team.size)
                self.editor.backpropagate(total)
                self.editor.share_gradient(trained.trained, summed=mine is not None)
                trained.step(optimizer)
        trained.finish()
        lost = self._among_all(mine, part.per_member(losses.detach()))
        apart = per_sample.detach() if self.distillation.weight else torch.zeros(rows.members)
        return step, lost.tolist(), apart.tolist()

    def _coordinates(self, module: Shard, rows: TargetRows) -> DualCoordinates | OpenCoordinates:
        """What is trained: V of the batch's dual coordinates, or with another optimiser than ours the delta itself."""
        if self.editor.stepping != "normalized":
            return OpenCoordinates(module)
        quiet = self.editor.background.at_last().activations[: self.routing.sample, 0].float()
        return DualCoordinates(module, rows.reading(rows.activations).float(), quiet)

    def _own_rows(self, rows: TargetRows) -> tuple[list[int] | None, TargetRows]:
        """The members whose rows this rank trains on, and those rows; None and all where there are fewer than ranks."""
        if not self.editor.splits_rows or rows.members < self.team.size:
            return None, rows
        mine = self.team.mine(rows.members)
        rehearsed = [rows.members + i for i in self.team.mine(rows.owners - rows.members)]
        return mine, rows.part([*mine, *rehearsed])

    def _distil(
        self, logits: Tensor, features: Tensor, rows: TargetRows, mine: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The distillation loss of a batch and each member's own (n,), from logits (M, V) and features (M, D).

        Where the batch's rows are dealt out, `mine` are this rank's members: the others' take part as constants, and
        the sum of all ranks' gradients is the gradient of the whole.
        """
        at = rows.firsts[: rows.members]
        if not self.distillation.weight:
            return features.new_zeros(()), features.new_zeros(len(at), dtype=torch.float32)
        features = self._among_all(mine, features[at])
        loss, per_sample = kd_loss(features, self.distillation.cosine, self.distillation.variance)
        if self.distillation.temperature and len(features) > 1:
            loss = loss + soft_kd_loss(self._among_all(mine, logits[at]), self.distillation.temperature)
        return loss, per_sample

    def _among_all(self, mine: Sequence[int] | None, own: Tensor) -> Tensor:
        """The members' rows on all ranks, where they are dealt out; the gradient reaches this rank's `own` alone."""
        if mine is None:
            return own
        (everyone,) = self.team.rows(mine, own.detach())
        return everyone.index_copy(0, torch.tensor(mine, device=own.device), own)

    def _routing_loss(self, delta: Tensor, rows: TargetRows, sample: Tensor) -> Tensor:
        known, unit = self.editor.background, self.editor.unit if self.routing.relative else 1.0
        edit, irrelevant = (
            activation_scores(prompts.float(), [delta], mask, self.routing.pool, check=False)[:, 0]
            for prompts, mask in (
                (rows.prompts.activations, rows.prompts.mask),
                (known.activations[sample], known.mask[sample]),
            )
        )
        # The scores, not the margins, are scaled: the loss stays near one.
        return routing_margin_loss(edit / unit, irrelevant / unit, self.editor.margins)

    def _written(self, logits: Tensor, labels: Tensor, margin: float | None, routing: Tensor) -> bool:
        """Whether every target token, on every rank that trains the same shard, leads its best rival by the margin, and
        the edits' scores keep nearly all of theirs."""
        if margin is None:
            return False
        own = (target_margin(logits.detach()[:, None], labels[:, None]) >= margin).all()
        return bool(self.editor.agreed(own & (routing.detach() <= APART)))
