"""The closed loop: when it prunes, whom it requeues, and that nothing is ever lost."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from helpers_runs import fit, hard_edits, world_editor, world_stream, write_edits, written_editor
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks import ErrorSampleMonitor, PruneAndRetrigger
from callbacks.prune_retrigger import should_prune
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.training.team import ALONE
from repair_lightning.types import BASE, Edit, EditReport


@pytest.mark.parametrize(
    ("rate", "pool", "acts"),
    [
        (0.35, 0, False),  # at the threshold: not above it
        (math.nextafter(0.35, 1), 0, True),
        (0.0, 100, False),  # a full pool, but no shard is to blame
        (0.01, 32, False),
        (0.01, 33, True),
    ],
)
def test_thresholds_are_exceeded_not_reached(rate, pool, acts):
    decision = should_prune({0: (0.0, 9), 7: (rate, 20)}, pool, tau_prune=0.35, tau_pool=32)
    assert bool(decision) is acts


class Bench:
    """One shard of a hundred edits; each retrigger repairs exactly `delta` of the error rate."""

    can_prune = True
    team = ALONE
    complete = False

    def __init__(self, percent_wrong: int, delta: int) -> None:
        self.ledger, self.wrong, self.delta, self.exhausted = Ledger(), percent_wrong, delta, False
        self.ids = [f"{i:03}" for i in range(100)]
        self.ledger.arrive([Edit(id, f"prompt {id}", "target") for id in self.ids], 0)
        self.write(self.ids)

    def write(self, ids: list[str]) -> None:
        self.ledger.written(EditReport(id, 0, 0.1, 0.0, 1) for id in ids)
        self.ledger.evaluated({id: float(i >= self.wrong) for i, id in enumerate(self.ids)}, 0.85)

    def prune(self, shard: int) -> None:
        assert shard == 0
        self.wrong = max(0, self.wrong - self.delta)

    def forget(self, ids: list[str]) -> None:
        assert list(ids) == self.ids  # all that the shard owned, right or wrong

    def finish_window(self) -> None:
        """No thresholds here."""

    def window(self, feedback: PruneAndRetrigger) -> bool:
        """One epoch end and the writes it asked for; whether it pruned."""
        before = feedback.pruned
        feedback.on_train_epoch_end(SimpleNamespace(datamodule=self), self)  # type: ignore[arg-type]
        waiting = self.ledger.with_status(EditStatus.REQUEUED)
        if waiting:
            self.write(waiting)
        return feedback.pruned > before


@settings(max_examples=40)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 100))
def test_the_pruning_threshold_is_hit_in_time(error, tau, delta):
    """Theorem 6: after at most ceil((r0 - tau)+ / delta) retriggers the error rate is tau or less, and no more come."""
    bench, feedback = Bench(error, delta), PruneAndRetrigger(max_attempts=1000)
    feedback.tau_prune = tau / 100
    feedback.tau_pool = 1000
    bound = math.ceil(Fraction(max(error - tau, 0), delta))
    retriggers = sum(bench.window(feedback) for _ in range(bound + 3))
    assert retriggers == bound
    rate, evaluated = bench.ledger.error_rates()[0]
    assert evaluated == 100
    assert rate <= tau / 100
    assert feedback.retriggered == 100 * bound
    assert len(bench.ledger.owned_by(0)) == 100


def epoch_end(feedback: PruneAndRetrigger, stream, editor) -> None:
    feedback.on_train_epoch_end(SimpleNamespace(datamodule=stream), editor)  # type: ignore[arg-type]


def test_pruning_requeues_every_edit_of_the_shard_and_the_failures_of_others():
    editor, stream = written_editor(mask_ratio=0.5)
    ledger = stream.ledger
    assert ledger.sizes() == {0: 4, 1: 4}, "the premise: two shards"
    bad, good = ledger.owned_by(0), ledger.owned_by(1)
    scores = dict.fromkeys([*bad, *good], 1.0) | {bad[0]: 0.0, bad[1]: 0.0, good[0]: 0.0}
    ledger.evaluated(scores, 0.85)
    prompts = [ledger.edit(id).prompt for id in bad]
    mask = editor.memory[0].mask.clone()
    kept = editor.memory[1].delta.detach().clone()
    assert (editor.choose(prompts).memory == 0).all()

    feedback = PruneAndRetrigger()
    epoch_end(feedback, stream, editor)

    assert (feedback.pruned, feedback.retriggered) == (1, 5)
    assert set(ledger.with_status(EditStatus.REQUEUED)) == {*bad, good[0]}  # the two right ones of shard 0 included
    assert set(ledger.with_status(EditStatus.WRITTEN)) == set(good[1:])
    assert not editor.memory[0].delta.any()
    assert editor.memory[0].generation == 1
    assert not torch.equal(mask, editor.memory[0].mask)
    assert torch.equal(kept, editor.memory[1].delta)
    assert (editor.choose(prompts).memory == BASE).all()
    assert not stream.exhausted
    assert {id for batch in stream.next_window() for id in batch.ids} == {*bad, good[0]}


def test_below_the_thresholds_failures_wait_for_the_end_of_the_stream():
    editor, stream = written_editor()
    stream.ledger.evaluated(dict.fromkeys(stream.ledger, 1.0) | {"w0001": 0.0}, 0.85)
    feedback = PruneAndRetrigger()
    stream.arrived = 4  # more is to come
    epoch_end(feedback, stream, editor)
    assert stream.ledger.with_status(EditStatus.FAILED) == ["w0001"]
    stream.arrived = 8
    epoch_end(feedback, stream, editor)
    assert stream.ledger.with_status(EditStatus.REQUEUED) == ["w0001"]
    assert (feedback.pruned, feedback.retriggered) == (0, 1)
    assert editor.choose([stream.ledger.edit("w0001").prompt]).memory.item() == BASE


def test_a_hard_stream_ends_with_every_edit_accounted_for(tmp_path):
    """Half the edits cannot be written: shards are pruned, right edits are written anew, and none is missing."""
    feedback = PruneAndRetrigger(max_attempts=3)
    stream = world_stream(write_edits(tmp_path / "hard.jsonl", hard_edits(12)), window=3, batch_size=3)
    fit(world_editor(capacity=3), stream, [ErrorSampleMonitor(), feedback], tmp_path)
    ledger = stream.ledger
    easy = [edit.id for edit in stream.edits[::2]]
    assert list(ledger) == [edit.id for edit in stream.edits]
    assert ledger.with_status(EditStatus.WRITTEN) == easy
    assert len(ledger.with_status(EditStatus.QUARANTINED)) == 6
    assert {ledger.entry(id).attempts for id in ledger.with_status(EditStatus.QUARANTINED)} == {3}
    assert feedback.pruned > 0
    assert any(ledger.entry(id).attempts > 1 for id in easy)  # a right edit of a pruned shard was not forgotten
    assert {ledger.entry(id).score for id in easy} == {1.0}
