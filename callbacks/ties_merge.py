"""Fuse shards, weighted by their losses, if that costs nothing that matters.

REPAIR (arXiv 2510.01879), Sec. 2.5 and LOSSAWARETIESMERGE of Alg. 4. Deviations: the fused shard meets what the shards
add at their own edits' positions by least squares (`rule: ties` is the paper's, with weights renormalised over the
shards that contribute at a coordinate; `normalize: global` is the literal rule); shards are merged in groups; each is
measured before it counts and undone where it costs more than `max_op_drop`; the fused shard stays routed by default
(`target: main` writes it into W_v).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.stream import asked_of, folded
from repair_lightning.errors import ConfigError, counted
from repair_lightning.functional import Normalize, loss_weights, ties_merge
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.probes import guard_questions
from repair_lightning.scoring.protocols import answers, overall_performance
from repair_lightning.types import BASE, Decision

from .editing import Editing, stream_of

log = logging.getLogger(__name__)

Rule = Literal["least_squares", "ties"]


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
    """Merges shards at the end of the stream and, if asked, every few windows; what was merged is not merged again.

    Args:
        enabled: off keeps all shards.
        rule: `least_squares` or `ties`.
        group: how many shards become one; None merges all at once.
        alpha: sensitivity of the weights to the shards' losses, per nat; 0 weighs all alike.
        normalize: of `ties`: `contributors` or `global`.
        every_n_windows: also merge so often during the stream, full groups alone; None merges at its end alone.
        target: `side` keeps the fused shard routed, `main` writes it into the base's W_v.
        max_op_drop: a merge that costs more of the guard's score is undone.
    """

    max_shards = 64
    """More are not merged at once: what so many say does not fit one matrix."""

    def __init__(
        self,
        enabled: bool = True,
        rule: Rule = "least_squares",
        group: int | None = 4,
        alpha: float = 1.0,
        normalize: Normalize = "contributors",
        every_n_windows: int | None = None,
        target: Literal["side", "main"] = "side",
        max_op_drop: float = 0.06,
    ) -> None:
        if rule not in get_args(Rule):
            raise ConfigError(f"merge.rule must be one of {', '.join(get_args(Rule))}, got '{rule}'")
        if group is not None and group < 2:
            raise ConfigError(f"merge.group must be at least 2, or null for all at once, got {group}")
        self.enabled, self.rule, self.group, self.alpha, self.normalize = enabled, rule, group, alpha, normalize
        self.every_n_windows, self.target, self.max_op_drop = every_n_windows, target, max_op_drop
        self.outcome: Decision | None = None
        self.merges: list[dict[str, Any]] = []  # each one that was tried, for `metrics.json`

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Every n windows, if asked."""
        every = self.every_n_windows
        if self.enabled and every and stream_of(trainer).windows % every == 0:
            self.merge(pl_module, whole=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """At the end of the stream."""
        if self.enabled:
            self.merge(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What came of the merges so far."""
        known = None if self.outcome is None else [self.outcome.yes, self.outcome.reason]
        return {"outcome": known, "merges": list(self.merges)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.outcome = None if state_dict["outcome"] is None else Decision(*state_dict["outcome"])
        self.merges = list(state_dict["merges"])

    def verdict(self, editor: Editing) -> Decision:
        """Whether a merge stays, and why, or why none was tried: an editor that cannot merge is the first reason."""
        if not editor.can_merge:
            return Decision(False, "this editor cannot merge")
        return Decision(False, "merging is off") if self.outcome is None else self.outcome

    @property
    def weights(self) -> dict[str, float]:
        """The weight that each shard had when it was last merged."""
        return {shard: weight for one in self.merges for shard, weight in one["weights"].items()}

    @property
    def merged(self) -> list[int]:
        """The shards that merges left, which are not merged again."""
        return [one["into"] for one in self.merges if one["accepted"]]

    def merge(self, editor: Editing, whole: bool = False) -> None:
        """Merge the shards that own edits, group by group, where they bear it; with `whole`, full groups alone.

        Says in `outcome` how many merges stay, and why.
        """
        if not editor.can_merge:
            return
        shards = [s for s in editor.edited.memory.ids if editor.ledger.owned_by(s) and s not in self.merged]
        size = self.group or max(len(shards), 1)
        groups = [shards[at : at + size] for at in range(0, len(shards), size)]
        least = size if whole else 1 if self.target == "main" else 2
        groups = [group for group in groups if len(group) >= least]
        if not groups:
            if self.outcome is None:
                self.outcome = Decision(False, f"{counted(len(shards), 'shard')}: nothing to merge")
            return
        tried = [self._merge(group, editor) for group in groups]
        self.merges += tried
        stay = sum(one["accepted"] for one in tried)
        said = "; ".join(f"{_named(one['shards'])}: {one['reason']}" for one in tried[:8])
        self.outcome = Decision(stay > 0, f"{stay} of {counted(len(groups), 'merge')}: {said}")
        log.info("merges: %s", self.outcome.reason)
        weights = {f"merge/weight/{shard}": weight for shard, weight in self.weights.items()}
        costs = [one["before"] - one["after"] for one in tried if one["after"] is not None]
        cost = {"merge/cost": max(costs)} if costs else {}
        editor.log_now({"merge/accepted": stay / len(groups), **cost, **weights})

    def _merge(self, shards: list[int], editor: Editing) -> dict[str, Any]:
        tried: dict[str, Any] = {"shards": shards, "into": None, "rule": self.rule, "weights": {}}
        if len(shards) > self.max_shards:
            none = {"before": None, "after": None, "accepted": False}
            return tried | none | {"reason": f"{len(shards)} shards are more than {self.max_shards}"}
        model, into_base = editor.edited, self.target == "main"
        owned = {shard: editor.ledger.owned_by(shard) for shard in shards}
        ids = [id for known in owned.values() for id in known]
        guard = MergeGuard(editor, ids, into_base)
        before = guard.score()
        snapshot, router = model.memory.snapshot(), model.router.state_dict()
        weights = dict(zip(map(str, shards), self.weights_of(shards, editor).tolist(), strict=True))
        fused = editor.fuse(shards, self.fused_delta(shards, editor))
        editor.ledger.reassign(ids, fused)
        editor.calibrate()
        if into_base:
            editor.fold(fused)
        after = guard.score()
        decision = accept(before, after, self.max_op_drop)
        editor.team.same("whether a merge may stay", decision.reason)
        if decision and into_base:
            editor.ledger.reassign(editor.ledger.owned_by(fused), BASE)
        elif not decision:
            if into_base:
                editor.unfold()
            model.memory.restore(snapshot)
            model.router.load_state_dict(router)
            for shard, known in owned.items():
                editor.ledger.reassign(known, shard, "unmerged")
        into = (BASE if into_base else fused) if decision else None
        found = {"into": into, "weights": weights, "before": before, "after": after}
        return tried | found | {"accepted": decision.yes, "reason": decision.reason}

    def weights_of(self, shards: list[int], editor: Editing) -> Tensor:
        """(K,) how much each shard counts, by the losses of its edits."""
        return loss_weights(torch.tensor([mean_loss(editor.ledger, shard) for shard in shards]), self.alpha)

    @torch.no_grad()
    def fused_delta(self, shards: list[int], editor: Editing) -> Tensor:
        """The weighted merge of some shards' deltas, (D, F), by the rule."""
        weights = self.weights_of(shards, editor)
        if self.rule == "least_squares":
            return editor.least_squares(shards, weights.tolist())
        deltas = editor.edited.memory.stacked(shards)
        return ties_merge(deltas, weights.to(deltas), self.normalize)


def _named(shards: list[int]) -> str:
    return f"shards {shards}" if len(shards) <= 8 else f"{len(shards)} shards"


class MergeGuard:
    """What a merge must not cost, against what the editor answers now, on at most `sample` of the edits `ids` and of
    irrelevant prompts of its own; where the merge changes the base itself (`into_base`), on any edits and also on those
    prompts that no shard answers."""

    def __init__(self, editor: Editing, ids: Sequence[str], into_base: bool = False, sample: int = 256) -> None:
        self.editor, self.into_base = editor, into_base
        ledger = editor.ledger
        asked_for = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED) if into_base else ids
        written = [ledger.edit(id) for id in asked_for]
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
