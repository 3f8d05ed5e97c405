"""Fuse shards with a loss-aware TIES merge, if that costs nothing that matters.

REPAIR (arXiv 2510.01879), Sec. 2.5 and LOSSAWARETIESMERGE of Alg. 4. Deviations: weights are renormalised over the
shards that contribute at a coordinate (`normalize: global` is the literal rule); the merge is measured before it
counts and undone where it costs more than `max_op_drop`; the fused shard stays routed by default (`target: main`
writes it into W_v).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.functional import Normalize, loss_weights, ties_merge, trim
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.metrics import overall_performance
from repair_lightning.scoring.protocols import answers
from repair_lightning.types import BASE, Decision

log = logging.getLogger(__name__)


def groups_of(shards: Sequence[int], size: int) -> list[list[int]]:
    """Shards in groups of `size`, all in one for 0; a group of one is nothing to merge and left out."""
    size = size or len(shards)
    groups = [list(shards[at : at + size]) for at in range(0, len(shards), max(size, 1))]
    return [group for group in groups if len(group) > 1]


def mean_loss(ledger: Ledger, shard: int) -> float:
    """Average last edit loss, in nats, of the edits that a shard owns; 0 for a shard without edits."""
    losses = [ledger.entry(id).loss for id in ledger.owned_by(shard)]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else 0.0


def accept(before: float, after: float, max_drop: float) -> Decision:
    """Whether a merge may stay, from the guard's score before and after."""
    drop = before - after
    words = f"guard score {before:.3f} -> {after:.3f}"
    if drop > max_drop:
        return Decision(False, f"{words}: costs {drop:.3f}, more than {max_drop}")
    return Decision(True, f"{words}: within {max_drop}")


class LossAwareTiesMerge(pl.Callback):
    """Merges groups of shards at the end of the stream and, if asked, every few windows.

    Args:
        enabled: off keeps all shards.
        alpha: sensitivity of the weights to the shards' losses, per nat; 0 weighs all alike.
        normalize: `contributors` or `global`.
        density: share of a shard's coordinates that is kept before merging, in (0, 1].
        group: shards per fused shard; 0 fuses all into one.
        max_shards: more shards than this in one group are not merged: what so many say does not fit one matrix, and
            each is laid out in full for it.
        every_n_windows: also merge so often during the stream; None merges at its end alone.
        target: `side` keeps the fused shard routed, `main` writes it into the base's W_v.
        max_op_drop: a merge that costs more of the guard's score is undone.
        guard_sample: most edits that the guard asks.
    """

    def __init__(
        self,
        enabled: bool = True,
        alpha: float = 1.0,
        normalize: Normalize = "contributors",
        density: float = 1.0,
        group: int = 0,
        max_shards: int = 64,
        every_n_windows: int | None = None,
        target: Literal["side", "main"] = "side",
        max_op_drop: float = 0.01,
        guard_sample: int = 256,
    ) -> None:
        if not 0 < density <= 1:
            raise ConfigError(f"merge.density must be in (0, 1], got {density}")
        if group < 0 or group == 1:
            raise ConfigError(f"merge.group must be 0 (all) or at least 2, got {group}")
        self.enabled, self.alpha, self.normalize, self.density = enabled, alpha, normalize, density
        self.group, self.max_shards = group, max_shards
        self.every_n_windows, self.target = every_n_windows, target
        self.max_op_drop, self.guard_sample = max_op_drop, guard_sample
        self.outcome: Decision | None = None
        self.weights: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Every n windows, if asked."""
        windows = trainer.datamodule.windows  # type: ignore[attr-defined]
        if self.enabled and self.every_n_windows and windows % self.every_n_windows == 0:
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

    def merge(self, editor: Any) -> None:
        """Merge every group of shards that bears it; says in `outcome` whether all were accepted and why."""
        if not editor.can_merge:
            self.outcome = Decision(False, "this editor cannot merge")
            return
        owners = [shard for shard in editor.memory.ids if editor.ledger.owned_by(shard)]
        groups = groups_of(owners, self.group)
        if not groups and (self.target == "side" or not owners):
            if self.outcome is None:
                self.outcome = Decision(False, f"{len(owners)} shard: nothing to merge")
            return
        groups = groups or [owners]
        largest = max(map(len, groups))
        if largest > self.max_shards:
            self.outcome = Decision(False, f"{largest} shards are more than merge.max_shards, {self.max_shards}")
            return
        outcomes = [self.merge_group(group, editor) for group in groups]
        self.outcome = Decision(all(outcomes), "; ".join(outcome.reason for outcome in outcomes))
        log.info("merge %s: %s", "accepted" if self.outcome else "rejected", self.outcome.reason)
        weights = {f"merge/weight/{shard}": weight for shard, weight in self.weights.items()}
        editor.log_now({"merge/accepted": float(bool(self.outcome)), **weights})

    def merge_group(self, shards: list[int], editor: Any) -> Decision:
        """Fuse one group, measure, and undo it where it costs too much."""
        guard = MergeGuard(editor, self.guard_sample, self.target == "main")
        before = guard.score()
        snapshot, router, owned = editor.memory.snapshot(), editor.router.state_dict(), _owners(editor.ledger, shards)
        fused = editor.fuse(shards, self.fused_delta(shards, editor))
        editor.ledger.reassign([id for ids in owned.values() for id in ids], fused)
        editor.calibrate()
        if self.target == "main":
            editor.fold(fused)
        after = guard.score()
        decision = accept(before, after, self.max_op_drop)
        editor.team.same("whether a merge may stay", decision.reason)
        if not decision:
            if self.target == "main":
                editor.unfold()
            editor.memory.restore(snapshot)
            editor.router.load_state_dict(router)
            for shard, ids in owned.items():
                editor.ledger.reassign(ids, shard, "unmerged")
        elif self.target == "main":
            editor.ledger.reassign(editor.ledger.owned_by(fused), BASE)
        named = f"shards {shards}" if len(shards) <= 8 else f"{len(shards)} shards"
        return Decision(decision.yes, f"{named}: {decision.reason}")

    @torch.no_grad()
    def fused_delta(self, shards: list[int], editor: Any) -> Tensor:
        """The weighted TIES merge of some shards' deltas, (D, F)."""
        losses = torch.tensor([mean_loss(editor.ledger, shard) for shard in shards])
        weights = loss_weights(losses, self.alpha)
        self.weights = {str(shard): float(weight) for shard, weight in zip(shards, weights, strict=True)}
        deltas = editor.memory.stacked(shards)
        if self.density < 1:
            deltas = torch.stack([trim(delta, self.density) for delta in deltas])
        return ties_merge(deltas, weights.to(deltas), self.normalize)


def _owners(ledger: Ledger, shards: Sequence[int]) -> dict[int, list[str]]:
    return {shard: ledger.owned_by(shard) for shard in shards}


class MergeGuard:
    """What a merge must not cost, from data that scoring never uses.

    Args:
        editor: whose memory is about to be merged; what it answers now is the reference.
        sample: most edits, and most irrelevant prompts, that are asked.
        into_base: the merge will change the base itself, so that prompts which no shard answers must be asked too.
    """

    def __init__(self, editor: Any, sample: int, into_base: bool = False) -> None:
        self.editor, self.into_base = editor, into_base
        ledger = editor.ledger
        written = [ledger.edit(id) for id in ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)]
        self.edits = written[:: max(1, len(written) // sample)][:sample]
        self.in_context = editor.in_context(self.edits)
        self.unrelated = editor.guard_prompts[:sample]
        self.chosen = self._choice()
        self.before = self._answers([i for i, memory in enumerate(self.chosen) if into_base or memory != BASE])

    def score(self) -> float:
        """In [0, 1], higher is better: the geometric mean of three shares.

        Edits answered right; edits answered right after a context that the base wrote; irrelevant prompts that
        nothing else sees answered as before.
        """
        right = correctness(self.editor, self.edits)
        in_context = correctness(self.editor, self.in_context)
        return overall_performance(_mean(right.values()), _mean(in_context.values()), self._same()) or 0.0

    def _same(self) -> float:
        """The share of irrelevant prompts that are answered as before; those that were and are the base's are."""
        chosen = self._choice()
        pairs = enumerate(zip(self.chosen, chosen, strict=True))
        ask = [i for i, pair in pairs if self.into_base or pair != (BASE, BASE)]
        self.before |= self._answers([i for i in ask if i not in self.before], [BASE] * len(self.chosen))
        after = self._answers(ask, chosen)
        return 1 - sum(self.before[i] != after[i] for i in ask) / max(len(chosen), 1)

    def _choice(self) -> list[int]:
        return self.editor.edited.choose(self.unrelated).memory.tolist()

    def _answers(self, index: list[int], chosen: list[int] | None = None) -> dict[int, str]:
        chosen = self.chosen if chosen is None else chosen
        prompts, memory = [self.unrelated[i] for i in index], torch.tensor([chosen[i] for i in index], dtype=torch.long)
        return dict(zip(index, answers(self.editor.edited, prompts, memory, max_new_tokens=8), strict=True))


def _mean(scores: Iterable[float]) -> float:
    known = list(scores)
    return sum(known) / max(len(known), 1)
