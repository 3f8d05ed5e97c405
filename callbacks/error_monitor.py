"""The error-sample monitor: after each window, is what was written answered right?

REPAIR (arXiv 2510.01879), Sec. 2.4 and EVALUATE of Alg. 3. Deviation: besides the window's edits a sample of older ones
is asked, because a later write can break an earlier edit. Only the edits' own prompts are asked, through the router.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import lightning.pytorch as pl

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.scoring.correctness import correctness

from .editing import stream_of


def sample_to_check(ledger: Ledger, window: int, older: int, generator: random.Random) -> list[str]:
    """Ids of the edits that were written since their last check, with up to `older` of those checked before."""
    written = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)
    due = [id for id in written if ledger.entry(id).window == window or ledger.entry(id).score is None]
    rest = sorted(set(written) - set(due))
    return due + generator.sample(rest, min(older, len(rest)))


class ErrorSampleMonitor(pl.Callback):
    """Scores edits after each window and enters the verdicts in the ledger.

    Args:
        tau_correct: least score that counts as right, in (0, 1] (Err_Thresh in the paper).
        protocol: `autoregressive` (exact answer, 0 or 1) or `teacher_forced` (share of tokens).
    """

    older = 64
    """Earlier edits that are asked again after each window."""
    seed = 0
    """Of their sample; `train.py` sets it to the run's."""

    def __init__(
        self, tau_correct: float = 0.85, protocol: Literal["autoregressive", "teacher_forced"] = "autoregressive"
    ) -> None:
        if not 0 < tau_correct <= 1:
            raise ConfigError(f"monitor.tau_correct must be in (0, 1], got {tau_correct}")
        self.tau_correct, self.protocol = tau_correct, protocol

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Ask, and tell the ledger."""
        stream = stream_of(trainer)
        window = stream.windows - 1
        ids = sample_to_check(stream.ledger, window, self.older, random.Random(f"{self.seed}/{window}"))
        scores = correctness(pl_module, [stream.ledger.edit(id) for id in ids], self.protocol)
        stream.ledger.evaluated(scores, self.tau_correct)
        if scores:
            failed = sum(score < self.tau_correct for score in scores.values())
            figures = {"monitor/error_rate": failed / len(scores), "monitor/checked": float(len(scores))}
            pl_module.log_dict(figures, batch_size=len(scores))
