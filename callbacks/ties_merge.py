"""Fuse shards with a loss-aware TIES merge, if that costs nothing that matters.

REPAIR (arXiv 2510.01879), Sec. 2.5 and LOSSAWARETIESMERGE of Alg. 4. Deviations: weights are renormalised over the
shards that contribute at a coordinate (`normalize: global` is the literal rule); the merge is measured before it
counts and undone where it costs more than `max_op_drop`; the fused shard stays routed by default (`target: main`
writes it into W_v).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.stream import asked_of, folded
from repair_lightning.functional import Normalize, loss_weights, ties_merge
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.guard_questions import guard_questions
from repair_lightning.scoring.metrics import overall_performance
from repair_lightning.scoring.protocols import answers
from repair_lightning.types import BASE, Decision

from .editing import Editing, stream_of

log = logging.getLogger(__name__)


def mean_loss(ledger: Ledger, shard: int) -> float:
    """Average last edit loss, in nats, of the edits that a shard owns; 0 for a shard without edits."""
    losses = [ledger.entry(id).loss for id in ledger.owned_by(shard)]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else 0.0


def accept(before: float, after: float, max_drop: float) -> Decision:
    """Whether a merge may stay, from the guard's score before and after."""
    yes = before - after <= max_drop
    words = "within" if yes else f"costs {before - after:.3f}, more than"
    return Decision(yes, f"guard score {before:.3f} -> {after:.3f}: {words} {max_drop}")


class LossAwareTiesMerge(pl.Callback):
    """Merges all shards into one at the end of the stream and, if asked, every few windows.

    Args:
        enabled: off keeps all shards.
        alpha: sensitivity of the weights to the shards' losses, per nat; 0 weighs all alike.
        normalize: `contributors` or `global`.
        every_n_windows: also merge so often during the stream; None merges at its end alone.
        target: `side` keeps the fused shard routed, `main` writes it into the base's W_v.
        max_op_drop: a merge that costs more of the guard's score is undone.
    """

    max_shards = 64
    """More are not merged: what so many say does not fit one matrix, and each is laid out in full for it."""

    def __init__(
        self,
        enabled: bool = True,
        alpha: float = 1.0,
        normalize: Normalize = "contributors",
        every_n_windows: int | None = None,
        target: Literal["side", "main"] = "side",
        max_op_drop: float = 0.01,
    ) -> None:
        self.enabled, self.alpha, self.normalize = enabled, alpha, normalize
        self.every_n_windows, self.target, self.max_op_drop = every_n_windows, target, max_op_drop
        self.outcome: Decision | None = None
        self.weights: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Every n windows, if asked."""
        every = self.every_n_windows
        if self.enabled and every and stream_of(trainer).windows % every == 0:
            self.merge(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """At the end of the stream."""
        if self.enabled:
            self.merge(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What came of the merges so far."""
        known = None if self.outcome is None else [self.outcome.yes, self.outcome.reason]
        return {"outcome": known, "weights": dict(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.outcome = None if state_dict["outcome"] is None else Decision(*state_dict["outcome"])
        self.weights = dict(state_dict["weights"])

    def merge(self, editor: Editing) -> None:
        """Merge all shards that own edits, if they bear it; says in `outcome` whether they did and why."""
        if not editor.can_merge:
            self.outcome = Decision(False, "this editor cannot merge")
            return
        shards = [shard for shard in editor.edited.memory.ids if editor.ledger.owned_by(shard)]
        if len(shards) < (1 if self.target == "main" else 2):
            if self.outcome is None:
                self.outcome = Decision(False, f"{len(shards)} shard: nothing to merge")
            return
        if len(shards) > self.max_shards:
            self.outcome = Decision(False, f"{len(shards)} shards are more than {self.max_shards}")
            return
        self.outcome = self._merge(shards, editor)
        log.info("merge %s: %s", "accepted" if self.outcome else "rejected", self.outcome.reason)
        weights = {f"merge/weight/{shard}": weight for shard, weight in self.weights.items()}
        editor.log_now({"merge/accepted": float(bool(self.outcome)), **weights})

    def _merge(self, shards: list[int], editor: Editing) -> Decision:
        guard, model = MergeGuard(editor, into_base=self.target == "main"), editor.edited
        before = guard.score()
        snapshot, router = model.memory.snapshot(), model.router.state_dict()
        owned = {shard: editor.ledger.owned_by(shard) for shard in shards}
        fused = editor.fuse(shards, self.fused_delta(shards, editor))
        editor.ledger.reassign([id for ids in owned.values() for id in ids], fused)
        editor.calibrate()
        if self.target == "main":
            editor.fold(fused)
        decision = accept(before, guard.score(), self.max_op_drop)
        editor.team.same("whether a merge may stay", decision.reason)
        if not decision:
            if self.target == "main":
                editor.unfold()
            model.memory.restore(snapshot)
            model.router.load_state_dict(router)
            for shard, ids in owned.items():
                editor.ledger.reassign(ids, shard, "unmerged")
        elif self.target == "main":
            editor.ledger.reassign(editor.ledger.owned_by(fused), BASE)
        named = f"shards {shards}" if len(shards) <= 8 else f"{len(shards)} shards"
        return Decision(decision.yes, f"{named}: {decision.reason}")

    @torch.no_grad()
    def fused_delta(self, shards: list[int], editor: Editing) -> Tensor:
        """The weighted TIES merge of some shards' deltas, (D, F)."""
        losses = torch.tensor([mean_loss(editor.ledger, shard) for shard in shards])
        weights = loss_weights(losses, self.alpha)
        self.weights = {str(shard): float(weight) for shard, weight in zip(shards, weights, strict=True)}
        deltas = editor.edited.memory.stacked(shards)
        return ties_merge(deltas, weights.to(deltas), self.normalize)


class MergeGuard:
    """What a merge must not cost, against what the editor answers now, on at most `sample` edits and irrelevant prompts
    of its own; where the merge changes the base itself (`into_base`), also those that no shard answers."""

    def __init__(self, editor: Editing, sample: int = 256, into_base: bool = False) -> None:
        self.editor, self.into_base = editor, into_base
        ledger = editor.ledger
        written = [ledger.edit(id) for id in ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)]
        self.edits = written[:: max(1, len(written) // sample)][:sample]
        self.in_context = editor.in_context(self.edits)
        asked = asked_of(map(ledger.edit, ledger))
        about = guard_questions(editor.anchors_of(self.edits), sample // 4)
        about = [text for text in about if folded(text) not in asked]
        self.unrelated = [*editor.guard_prompts[:sample], *about]
        self.chosen = editor.edited.choose(self.unrelated).memory.cpu()
        self.before = self._answers(self._of_interest(self.chosen), self.chosen)

    def score(self) -> float:
        """In [0, 1], higher is better: the geometric mean of the shares of edits answered right, of edits answered
        right after a context that the base wrote, and of irrelevant prompts and other questions about edited subjects
        answered as before."""
        found = [list(correctness(self.editor, edits).values()) for edits in (self.edits, self.in_context)]
        right, in_context = (sum(scores) / max(len(scores), 1) for scores in found)
        chosen = self.editor.edited.choose(self.unrelated).memory.cpu()
        ask = self._of_interest(chosen)  # what was and is the base's is answered as before
        self.before |= self._answers([i for i in ask if i not in self.before], torch.full_like(chosen, BASE))
        after = self._answers(ask, chosen)
        same = 1 - sum(self.before[i] != after[i] for i in ask) / max(len(chosen), 1)
        return overall_performance(right, in_context, same) or 0.0

    def _of_interest(self, chosen: Tensor) -> list[int]:
        """Which irrelevant prompts a shard answers or answered; all, where the base itself will change."""
        routed = (self.chosen != BASE) | (chosen != BASE)
        return (routed | self.into_base).nonzero().flatten().tolist()

    def _answers(self, index: list[int], chosen: Tensor) -> dict[int, str]:
        prompts = [self.unrelated[i] for i in index]
        return dict(zip(index, answers(self.editor.edited, prompts, chosen[index], max_new_tokens=8), strict=True))
