"""The REPAIR editor with dense shards, as the paper's, on tiny real bases: what is written is answered, and everything
else keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_runs import logits

from repair_lightning.editors.repair import Distillation, Routing, Writing
from repair_lightning.edits.ledger import EditStatus
from repair_lightning.types import BASE, Edit, EditBatch, EditReport


def dense(optimizer: str = "adam", **options: Any) -> Writing:
    """How to write dense shards."""
    return Writing(optimizer, **options)


@pytest.fixture
def editor_of(editor_of):
    """As everywhere, but with dense shards."""
    return lambda *model_type, **options: editor_of(*model_type, **({"writing": dense()} | options))


def own(shard: int, *ids: str) -> list[EditReport]:
    """Reports that make a shard the owner of edits."""
    return [EditReport(id, shard, loss=0.1, kd=0.0, steps=1) for id in ids]


def prompts_of(edits):
    return [edit.prompt for edit in edits]


def targets_of(edits):
    return [edit.target for edit in edits]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_short_way_and_the_long_way_write_the_same(editor_of, write, edits, model_type):
    """On the last layer only the positions that are read are run; whole rows and the whole model must give the
    same deltas.

    Ten steps of plain gradient descent, so that rounding has no time to grow.
    """
    deltas, reports = [], []
    for tail in ("positions", "rows", "model"):
        editor = editor_of(model_type, writing=dense("sgd", lr=0.01, steps=10, stop_margin=None))
        assert editor.tail == "positions"
        editor.tail = tail
        reports.append(write(editor, edits[:4]))
        deltas.append(editor.memory[0].delta.detach())
    for i in (1, 2):
        torch.testing.assert_close(deltas[0], deltas[i], rtol=1e-3, atol=1e-5)
        for one, other in zip(reports[0], reports[i], strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-3)


class TestAssignment:
    def assign(self, editor, *edits):
        return editor.assign(EditBatch(edits))

    def test_ties_go_to_the_emptiest_then_to_the_oldest(self, editor_of, edits):
        editor = editor_of(writing=dense(shards=3, capacity=4))
        editor.ledger.arrive(edits, 0)
        assert self.assign(editor, edits[7]) == 0
        editor.ledger.written(own(0, "e0", "e1") + own(1, "e2"))
        assert self.assign(editor, edits[7]) == 2
        editor.ledger.written(own(2, "e3", "e4"))
        assert self.assign(editor, edits[7]) == 1

    def test_a_full_shard_takes_no_more(self, editor_of, edits):
        editor = editor_of(writing=dense(shards=2, capacity=2))
        editor.memory[0].delta.data.add_(1.0)
        editor.ledger.arrive(edits, 0)
        editor.ledger.written(own(0, "e0"))
        assert self.assign(editor, edits[7]) == 0
        assert self.assign(editor, edits[6], edits[7]) == 1, "there is room for one, not for two"
        editor.ledger.written(own(0, "e1"))
        assert self.assign(editor, edits[7]) == 1
        editor.ledger.written(own(1, "e2", "e3"))
        assert self.assign(editor, edits[7]) == 2, "all are full: a new one opens"
        assert editor.memory.ids == [0, 1, 2]

    def test_a_shard_holds_its_capacity_however_small_batches_are(self, editor_of, edits, monkeypatch):
        """Long targets make small batches, not small shards."""
        editor = editor_of(writing=dense(shards=1, capacity=8))
        monkeypatch.setattr(Writing, "batch_tokens", 1)
        editor.ledger.arrive(edits, 0)
        assert editor.batch_limit(edits) == 1
        editor.ledger.written(own(0, *(f"e{i}" for i in range(7))))
        assert self.assign(editor, edits[7]) == 0


@pytest.mark.parametrize(("model_type", "mask_ratio"), [("llama", 1.0), ("gpt2", 0.5)])
def test_an_overflow_leaves_no_trace(editor_of, write, answers, edits, model_type, mask_ratio):
    """A learning rate of 1e30 overflows float32, for real: LayerNorm makes the loss NaN of it, but RMSNorm divides
    it away, so that the loss stays finite at log(vocabulary) and only the shard itself tells."""
    editor = editor_of(model_type, writing=dense(mask_ratio=mask_ratio))
    write(editor, edits[:3])
    delta = editor.memory[0].delta.detach().clone()
    routes = editor.edited.route(prompts_of(edits))
    editor.writing = dense("sgd", lr=1e30, steps=5, stop_margin=None, mask_ratio=mask_ratio)
    reports = write(editor, edits[3:6])
    assert all("not finite" in report.error and "rolled back" in report.error for report in reports)
    assert torch.equal(editor.memory[0].delta, delta)
    assert editor.edited.route(prompts_of(edits)) == routes
    assert answers(editor.edited, editor.tokenizer, prompts_of(edits[:3])) == targets_of(edits[:3])
    for edit in edits[3:6]:
        entry = editor.ledger.entry(edit.id)
        assert (entry.status, entry.shard, entry.attempts) == (EditStatus.FAILED, None, 1)


def test_who_leaves_by_distillation(editor_of, write, edits):
    """Exactly those at or above the limit, which is put at the third highest of the first run's values."""

    def written(consistency: float | None):
        distillation = Distillation(weight=1.0, consistency=consistency)
        editor = editor_of(distillation=distillation, writing=dense(steps=10, stop_margin=None))
        return editor, write(editor, edits)

    _, free = written(None)
    assert not any(report.residual for report in free)
    limit = sorted(report.kd for report in free)[-3]
    editor, reports = written(limit)
    assert [report.kd for report in reports] == [report.kd for report in free]
    assert [report.residual for report in reports] == [report.kd >= limit for report in free]
    for report, route in zip(reports, editor.edited.route(prompts_of(edits)), strict=True):
        assert route.memory == (BASE if report.residual else 0)
        assert (editor.ledger.entry(report.id).status == EditStatus.RESIDUAL) == report.residual


class TestReplay:
    def test_earlier_edits_stay_answered(self, editor_of, write, answers, edits):
        editor = editor_of(writing=dense(replay=128))
        write(editor, edits[:3])
        write(editor, edits[3:])
        assert set(editor.ledger.sizes()) == {0}
        assert answers(editor.edited, editor.tokenizer, prompts_of(edits)) == targets_of(edits)

    @pytest.mark.parametrize(
        ("replay", "written", "expected"), [(2, 5, ["e2", "e3"]), (2, 3, ["e1", "e2"]), (0, 5, [])]
    )
    def test_rows_are_the_shards_own_latest(self, editor_of, write, edits, monkeypatch, replay, written, expected):
        editor = editor_of(writing=dense(replay=replay, steps=2))
        write(editor, edits[:4])
        seen, rows = [], editor.rows
        monkeypatch.setattr(
            editor, "rows", lambda own, more, rehearsed: seen.append(rehearsed) or rows(own, more, rehearsed)
        )
        editor.rewrite(EditBatch((edits[written],)), 0)
        assert [edit.id for edit in seen[0]] == expected


@pytest.mark.parametrize("router", ["key", "activation"])
def test_a_fused_shard_owns_the_edits_of_its_parts(editor_of, write, answers, edits, router):
    """The fused delta is the one shard's alone, so that its own edits must still be answered."""
    editor = editor_of(routing=Routing(router=router, act_ratio=0.05), writing=dense(capacity=4, steps=200))
    write(editor, edits, 4)
    fused = editor.fuse([0, 1], editor.memory[1].delta.detach().clone())
    assert fused == 2
    editor.ledger.reassign([edit.id for edit in edits], fused)
    editor.calibrate()
    assert editor.memory.ids == [2]
    routes = [route.memory for route in editor.edited.route(prompts_of(edits))]
    assert set(routes[4:]) == {2}
    choice = editor.router.route(editor.edited.query(prompts_of(edits)), editor.memory)
    assert router != "key" or choice.memory.tolist() == [2] * len(edits)
    assert router != "key" or set(routes[:4]) == {BASE}, "what the fused delta does not say is not answered by it"
    assert answers(editor.edited, editor.tokenizer, prompts_of(edits[4:])) == targets_of(edits[4:])


def test_folding_there_and_back(folder_of, prepared, write, answers, edits):
    """GPT-2 stores W_v transposed, and with d_ffn = d_model its shape does not say so."""
    editor = prepared(folder_of("gpt2", n_inner=32), "repair", writing=dense(steps=300))
    some = edits[:4]
    write(editor, some)
    weights = {name: value.clone() for name, value in editor.base.model.state_dict().items()}
    with editor.edited.forced(0):
        routed = logits(editor.base.model, editor.tokenizer, prompts_of(some))
    editor.fold(0)
    assert editor.base_changed
    assert editor.memory.ids == []
    torch.testing.assert_close(
        logits(editor.base.model, editor.tokenizer, prompts_of(some)), routed, rtol=1e-3, atol=1e-3
    )
    assert answers(editor.edited, editor.tokenizer, prompts_of(some)) == targets_of(some)
    changed = [n for n, value in editor.base.model.state_dict().items() if not torch.equal(value, weights[n])]
    assert len(changed) == 1
    editor.unfold()
    assert not editor.base_changed
    assert editor.memory.ids == [0]
    assert all(torch.equal(value, weights[name]) for name, value in editor.base.model.state_dict().items())


def test_the_same_seed_gives_the_same_bits(editor_of, write, edits):
    """Whatever the global generator's state."""
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        routing, distillation = Routing(weight=0.5, sample=4), Distillation(weight=0.5)
        writing = dense(mask_ratio=0.5, steps=15, contexts=1, init_scale=0.1, capacity=4)
        editor = editor_of(routing=routing, writing=writing, distillation=distillation, seed=3)
        write(editor, edits, 4)
        found.append(editor.memory.stacked().detach())
    assert torch.equal(*found)


def test_a_subject_that_the_prompt_does_not_name_is_none(editor_of, write):
    """It is found by what it asks, and by nothing that only names the subject."""
    editor = editor_of()
    elsewhere = Edit("x", "Where was he born?", "Oslo", subject="Mara Kelstrom")
    write(editor, [elsewhere])
    asked = [elsewhere.prompt, "Where was Mara Kelstrom born?"]
    assert [route.memory for route in editor.edited.route(asked)] == [0, BASE]
