"""The merge: which shards, with what weights, and that a rejected one leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_runs import same, written_editor
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import LossAwareTiesMerge
from callbacks.ties_merge import MergeGuard, accept, mean_loss
from repair_lightning.edits.stream import asked_of, folded
from repair_lightning.functional import ties_merge
from repair_lightning.packs.pack import load_edited, save_pack
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.probes import guard_questions
from repair_lightning.types import BASE, Decision


@pytest.mark.parametrize(
    ("before", "after", "drop", "yes"), [(0.9, 0.9, 0.0, True), (0.75, 0.5, 0.25, True), (0.75, 0.5, 0.2499, False)]
)
def test_accept_up_to_the_allowed_drop(before, after, drop, yes):
    decision = accept(before, after, drop)
    assert bool(decision) is yes
    assert f"{before:.3f} -> {after:.3f}" in decision.reason


def everything(editor: Any) -> dict[str, Any]:
    """All that a merge may touch, copied."""
    memory = editor.memory
    found = [memory[id] for id in memory.ids]
    return {
        "shards": [(shard.delta.detach().clone(), shard.mask.clone(), shard.generation) for shard in found],
        "next_id": memory.next_id,
        "router": copy.deepcopy(editor.router.state_dict()),
        "ledger": editor.ledger.state_dict(),
        "weight": editor.edited.split.value.weight.detach().clone(),
        "base_changed": editor.base_changed,
    }


@pytest.mark.parametrize(
    ("router", "mask_ratio", "target"), [("key", 0.4, "side"), ("key", 1.0, "main"), ("hybrid", 1.0, "side")]
)
def test_a_rejected_merge_leaves_no_trace(router, mask_ratio, target):
    editor, _ = written_editor(routing={"router": router}, mask_ratio=mask_ratio)
    assert len(editor.memory) == 2, "the premise: two shards"
    before, said = everything(editor), correctness(editor, list(map(editor.ledger.edit, editor.ledger)))
    merge = LossAwareTiesMerge(max_op_drop=-2.0, target=target)  # no merge can gain that much
    merge.merge(editor)
    assert not merge.outcome
    assert "more than -2.0" in merge.outcome.reason
    (tried,) = merge.merges
    assert (tried["shards"], tried["into"], tried["accepted"]) == ([0, 1], None, False)
    assert merge.merged == []
    after = everything(editor)
    assert {key for key in before if not same(before[key], after[key])} == set()
    assert correctness(editor, list(map(editor.ledger.edit, editor.ledger))) == said


@pytest.mark.parametrize("enabled", [True, False])
def test_why_nothing_is_merged(enabled):
    """An editor that cannot merge says so whatever the setting; else the setting counts, or what was tried."""
    unable = written_editor(2, form="low_rank", capacity=1)[0]
    unable.can_merge = False
    merge = LossAwareTiesMerge(enabled=enabled)
    merge.on_train_end(None, unable)
    assert merge.verdict(unable) == Decision(False, "this editor cannot merge")
    able, _ = written_editor(2, capacity=2)
    merge.on_train_end(None, able)
    reason = "1 shard: nothing to merge" if enabled else "merging is off"
    assert merge.verdict(able) == Decision(False, reason)


def test_the_guard_trips_by_itself():
    """With its defaults: what two shards of several edits each say does not fit the one that TIES makes of them."""
    editor, _ = written_editor(mask_ratio=1.0)
    merge = LossAwareTiesMerge(rule="ties")
    merge.merge(editor)
    assert not merge.outcome
    assert "more than 0.06" in merge.outcome.reason
    assert merge.verdict(editor) == merge.outcome
    assert editor.memory.ids == [0, 1]


@pytest.mark.parametrize(("normalize", "mask_ratio"), [("contributors", 0.4), ("global", 1.0)])
def test_an_accepted_merge_leaves_one_shard_that_owns_all(normalize, mask_ratio):
    editor, _ = written_editor(mask_ratio=mask_ratio)
    deltas = editor.memory.stacked().detach().clone()
    losses = [mean_loss(editor.ledger, shard) for shard in (0, 1)]
    merge = LossAwareTiesMerge(rule="ties", max_op_drop=1.0, normalize=normalize, alpha=3.0)
    merge.merge(editor)
    assert merge.outcome
    assert editor.memory.ids == [2]  # a new id, never one that was used
    assert editor.ledger.owned_by(2) == list(editor.ledger)
    assert set(editor.router.shards.tolist()) == {2}
    weights = torch.softmax(-3.0 * torch.tensor(losses, dtype=torch.float64), 0)
    assert list(merge.weights) == ["0", "1"]
    assert list(merge.weights.values()) == pytest.approx(weights.tolist(), rel=1e-5)
    expected = ties_merge(deltas, torch.tensor(list(merge.weights.values())), normalize)
    torch.testing.assert_close(editor.memory[2].delta.detach(), expected)
    chosen = set(editor.choose([editor.ledger.edit(id).prompt for id in editor.ledger]).memory.tolist())
    assert chosen <= {2, BASE}
    assert 2 in chosen


def test_by_default_groups_become_one_shard_each_that_answers_nearly_all():
    """Four shards in groups of two, by least squares; what was merged is left alone."""
    editor, _ = written_editor(number=16, optimizer=None, steps=150)
    edits = list(map(editor.ledger.edit, editor.ledger))
    assert set(correctness(editor, edits).values()) == {1.0}, "the premise"
    assert len(editor.memory) == 4
    merge = LossAwareTiesMerge(group=2, max_op_drop=1.0)
    merge.merge(editor, whole=True)
    assert merge.outcome
    assert editor.memory.ids == merge.merged == [4, 5]
    assert [(one["shards"], one["into"]) for one in merge.merges] == [([0, 1], 4), ([2, 3], 5)]
    for one in merge.merges:
        assert f"{one['before']:.3f} -> {one['after']:.3f}" in one["reason"]
        assert one["reason"] in merge.outcome.reason
    assert sum(correctness(editor, edits).values()) >= 14
    again = LossAwareTiesMerge(group=2, max_op_drop=1.0)
    again.load_state_dict(merge.state_dict())
    again.merge(editor)
    assert editor.memory.ids == [4, 5]
    assert again.merges == merge.merges


@pytest.mark.parametrize("number", [4, 8], ids=["one_shard", "two_shards"])
def test_into_the_main_weights(tmp_path, number):
    """The fused delta is added to W_v; the bank is empty, no prompt is routed, and a plain checkpoint says the same."""
    editor, _ = written_editor(number=number, capacity=4)
    value = editor.edited.split.value.weight
    original, deltas = value.detach().clone(), editor.memory.stacked().detach().clone()
    merge = LossAwareTiesMerge(rule="ties", max_op_drop=1.0, target="main")
    merge.merge(editor)
    assert merge.outcome
    assert editor.base_changed
    assert len(editor.memory) == 0
    weights = torch.tensor(list(merge.weights.values())) if number > 4 else torch.ones(1)
    torch.testing.assert_close(value.detach(), original + ties_merge(deltas, weights))
    prompts = [editor.ledger.edit(id).prompt for id in editor.ledger]
    assert (editor.choose(prompts).memory == BASE).all()

    pack = save_pack(editor, tmp_path / "pack", {})
    plain = AutoModelForCausalLM.from_pretrained(pack / "merged", dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(pack / "merged", local_files_only=True, padding_side="left")
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert torch.equal(plain.get_parameter(f"model.layers.{editor.layer}.mlp.down_proj.weight"), value)
    model, tok = load_edited(pack)
    ids = model.generate(**tok(prompts, padding=True, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert torch.equal(plain.generate(**batch, max_new_tokens=8, do_sample=False), ids)
    if number == 4:  # a single shard is taken over as it is: W_v answers its edits
        scores = correctness(editor, [editor.ledger.edit(id) for id in editor.ledger])
        assert set(scores.values()) == {1.0}


def test_the_guard_asks_no_scoring_prompt(monkeypatch):
    """The guard's prompts are the edits' own, those after the base's contexts, irrelevant ones of its own, and
    questions from the bank about the edited subjects."""
    editor, _ = written_editor()
    asked: list[str] = []
    encode, choose = editor.encode, editor.edited.choose
    monkeypatch.setattr(editor, "encode", lambda edit: asked.append(edit.prompt) or encode(edit))
    monkeypatch.setattr(editor.edited, "choose", lambda prompts: asked.extend(prompts) or choose(prompts))
    assert 0 <= MergeGuard(editor, list(editor.ledger)).score() <= 1
    own = [editor.ledger.edit(id).prompt for id in editor.ledger]
    unrelated = set(editor.guard_prompts)
    assert not unrelated & {*editor.background_prompts, *editor.held_out_prompts}
    assert unrelated <= set(asked)
    assert set(own) <= set(asked)
    edits = [editor.ledger.edit(id) for id in editor.ledger]
    about = set(guard_questions(editor.anchors_of(edits), 64))
    assert not {folded(text) for text in set(asked) - set(own)} & asked_of(edits)
    rest = set(asked) - unrelated - set(own) - about
    assert len(rest) == len(own)
    assert all(any(text.endswith(f". {prompt}") for prompt in own) for text in rest)


def test_the_guard_sees_damage_to_unrelated_answers():
    """A W_v that was overwritten with noise answers unrelated prompts otherwise, though no prompt is routed."""
    editor, _ = written_editor()
    guard = MergeGuard(editor, list(editor.ledger), into_base=True)
    before = guard.score()
    own = editor.edited.weights.matrix(editor.layer)
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)) * 10 * own.std()
    editor.edited.weights.put(editor.layer, noise)
    assert guard.score() < before
