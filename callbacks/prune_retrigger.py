"""Prune the worst shard and write its edits again.

REPAIR (arXiv 2510.01879), Sec. 2.4 and RETRIGGER of Alg. 4. Deviations: the error rate is failed over evaluated among
the edits that a shard owns; with a pruned shard **every** edit it owned is requeued, the right ones included; what
fails too often is quarantined and reported, never dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.errors import ConfigError, counted
from repair_lightning.types import BASE, Decision

from .editing import Editing, Remembering, stream_of

log = logging.getLogger(__name__)

ErrorRates = Mapping[int, tuple[float, int]]
"""Per shard: the error rate and the number of edits that it was measured on."""


def worst_shard(rates: ErrorRates) -> int:
    """The shard with the highest error rate; the lowest id among equals."""
    return max(rates, key=lambda shard: (rates[shard][0], -shard))


def should_prune(rates: ErrorRates, pool: int, tau_prune: float, tau_pool: int) -> Decision:
    """Whether the closed loop must act: a shard fails too often, or too many failed edits wait in the pool."""
    if not rates:
        return Decision(False, "no shard was evaluated")
    worst = worst_shard(rates)
    rate, evaluated = rates[worst]
    if rate > tau_prune:
        return Decision(True, f"shard {worst}: error {rate:.2f} > {tau_prune} over {counted(evaluated, 'edit')}")
    if pool > tau_pool and rate > 0:
        return Decision(True, f"feedback pool: {pool} > {tau_pool} edits; shard {worst} is the worst, error {rate:.2f}")
    over, waiting = counted(evaluated, "edit"), counted(pool, "edit")
    return Decision(False, f"worst shard {worst}: error {rate:.2f} over {over}, {waiting} in the pool")


class PruneAndRetrigger(Remembering):
    """Prunes shards, requeues their edits, and quarantines what cannot be written.

    Args:
        enabled: off leaves failed edits failed.
        max_attempts: writes per edit before a failure is final.
    """

    tau_prune = 0.35
    """Highest error rate of a shard."""
    tau_pool = 32
    """Most failed edits that may wait (tau_E); at the stream's end all are written again."""
    kept = ("pruned", "retriggered")

    def __init__(self, enabled: bool = True, max_attempts: int = 4) -> None:
        if max_attempts < 1:
            raise ConfigError(f"feedback.max_attempts must be at least 1, got {max_attempts}")
        self.enabled, self.max_attempts = enabled, max_attempts
        self.pruned = self.retriggered = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Decide and act, once per window."""
        if not self.enabled:
            return
        stream, ledger = stream_of(trainer), stream_of(trainer).ledger
        self._give_up(pl_module)
        failed = ledger.with_status(EditStatus.FAILED)
        owners = {ledger.owner_of(id) for id in failed} - {None, BASE}
        rates = ledger.error_rates(owners)  # type: ignore[arg-type]  # other shards' are 0
        decision = should_prune(rates, len(failed), self.tau_prune, self.tau_pool)
        pl_module.team.same("whether to prune", decision.reason)
        if decision and pl_module.can_prune:
            worst = worst_shard(rates)
            ids = list(dict.fromkeys([*ledger.owned_by(worst), *failed]))  # all that it owned, right or wrong
            log.info("prune: %s; to be written again: %s", decision.reason, counted(len(ids), "edit"))
            pl_module.prune(worst)
            self.pruned += 1
            self._retry(ids, f"pruned: {decision.reason}", pl_module)
        elif failed and stream.complete:
            self._retry(failed, "the stream has ended", pl_module)

    def _give_up(self, editor: Editing) -> None:
        """Quarantine what has had all its attempts; the base answers its prompts again."""
        ledger = editor.ledger
        ids = [id for id in ledger.with_status(EditStatus.FAILED) if ledger.entry(id).attempts >= self.max_attempts]
        if not ids:
            return
        for id in ids:
            ledger.quarantine([id], f"still wrong after {counted(ledger.entry(id).attempts, 'attempt')}")
        editor.forget(ids)
        editor.finish_window()  # new thresholds: a shard that owns nothing answers nothing
        named = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        said = f"{counted(self.max_attempts, 'attempt')}: {counted(len(ids), 'edit')} ({named})"
        log.warning("quarantined, still wrong after %s; edits.parquet says which and why", said)

    def _retry(self, ids: list[str], reason: str, editor: Editing) -> None:
        editor.forget(ids)  # until they are written again
        editor.ledger.requeue(ids, reason)
        self.retriggered += len(ids)
