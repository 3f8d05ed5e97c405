"""The error-sample monitor: whom it asks, and what it tells the ledger; and what all callbacks refuse."""

from __future__ import annotations

import random
import re
from functools import partial

import pytest
from helpers_runs import fit, hard_edits, world_editor, world_stream, write_edits

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger
from callbacks.error_monitor import sample_to_check
from repair_lightning.editors.repair import Repair, Routing
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.scoring.correctness import correctness
from repair_lightning.types import Edit, EditReport


def ledger_of(windows: int, size: int = 10) -> Ledger:
    """`windows` windows of `size` written edits; all but the last window's are evaluated."""
    ledger = Ledger()
    for window in range(windows):
        ids = [f"{window}/{i}" for i in range(size)]
        ledger.arrive([Edit(id, f"prompt {id}", "target") for id in ids], window)
        ledger.written(EditReport(id, window % 2, 0.1, 0.0, 1) for id in ids)
        if window < windows - 1:
            ledger.evaluated({id: float(i != 3) for i, id in enumerate(ids)}, 0.85)
    return ledger


def test_the_window_is_asked_whole_and_a_sample_of_the_rest():
    """Failed edits may be asked again; what no shard holds is not asked."""
    asked = sample_to_check(ledger_of(4), 3, 5, random.Random(0))
    assert asked[:10] == [f"3/{i}" for i in range(10)]
    assert len(asked) == len(set(asked)) == 15
    assert all(id.split("/")[0] in "012" for id in asked[10:])
    ledger = ledger_of(2)
    ledger.requeue(["0/1"], "pruned")
    ledger.quarantine(["0/2"], "gave up")
    ledger.arrive([Edit("late", "prompt late", "target")], 2)
    asked = sample_to_check(ledger, 1, 100, random.Random(0))
    assert "0/3" in asked  # failed in its window
    assert not {"0/1", "0/2", "late"} & set(asked)
    assert len(asked) == 18


class Listening(ErrorSampleMonitor):
    """Notes, after each window, the scores in the ledger and what was logged."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        ledger = trainer.datamodule.ledger
        scores = {id: ledger.entry(id).score for id in ledger}
        self.seen = [*getattr(self, "seen", []), (scores, dict(trainer.callback_metrics))]


def test_after_each_window_the_ledger_knows_who_is_right(tmp_path):
    """Some edits cannot be answered right: some are right, some fail, and the verdict is the router's own answer."""
    editor, stream = world_editor(), world_stream(write_edits(tmp_path / "e.jsonl", hard_edits(12)), window=6)
    monitor = Listening()
    monitor.older = 2
    fit(editor, stream, [monitor], tmp_path)
    ledger = stream.ledger
    assert [len(scores) for scores, _ in monitor.seen] == [6, 12]
    last = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)[6:]
    truth = correctness(editor, [ledger.edit(id) for id in last])
    assert {id: ledger.entry(id).score for id in last} == truth
    assert set(truth.values()) == {0.0, 1.0}, "the premise: some are right, some are not"
    for id in last:
        right = truth[id] >= monitor.tau_correct
        assert ledger.entry(id).status is (EditStatus.WRITTEN if right else EditStatus.FAILED)
    checked = monitor.seen[-1][1]["monitor/checked"]
    assert float(checked) == 8.0  # six of the window, two older
    failed = monitor.seen[0][1]["monitor/error_rate"] * 6
    assert float(failed) == pytest.approx(sum(score == 0 for score in monitor.seen[0][0].values()))


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (PruneAndRetrigger, {"max_attempts": 0}, "feedback.max_attempts must be at least 1, got 0"),
        (LossAwareTiesMerge, {"rule": "mean"}, "merge.rule must be one of least_squares, ties, got 'mean'"),
        (partial(Repair, ""), {"routing": Routing(sample=-1)}, "routing.sample must be at least 0, got -1"),
        (LossAwareTiesMerge, {"group": 1}, "merge.group must be at least 2, or null for all at once, got 1"),
    ],
)
def test_options_are_refused_as_users_write_them(callback, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        callback(**options)
