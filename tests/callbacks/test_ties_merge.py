"""The merge: which shards, with what weights, and that a rejected one leaves no trace."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from helpers_runs import fit, world_editor, world_stream, written_editor
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger, Scoreboard
from callbacks import ties_merge as ties_merge_module
from callbacks.ties_merge import MergeGuard, accept, groups_of, mean_loss
from repair_lightning.commands.evaluate import evaluate_pack
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.functional import ties_merge
from repair_lightning.packs.pack import load_edited, save_pack
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.protocols import answers, forced_choice
from repair_lightning.types import BASE, Edit, EditReport

# -- which, with what weights, whether ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "size", "groups"),
    [
        ([], 0, []),
        ([3], 0, []),
        ([3, 5], 0, [[3, 5]]),
        ([1, 2, 3, 4], 2, [[1, 2], [3, 4]]),
        ([1, 2, 3], 2, [[1, 2]]),  # a group of one is nothing to merge
        ([1, 2, 3, 4, 5], 3, [[1, 2, 3], [4, 5]]),
        ([1, 2], 9, [[1, 2]]),
    ],
)
def test_groups(shards, size, groups):
    assert groups_of(shards, size) == groups


def test_mean_loss_of_what_a_shard_owns():
    """Shard 0 owns losses 1 and 2: mean 1.5; a lost (non-finite) loss does not count; an empty shard has 0."""
    ledger = Ledger()
    ledger.arrive([Edit(id, f"p {id}", "t") for id in "abcd"], 0)
    losses = {"a": 1.0, "b": 2.0, "c": math.nan}
    ledger.written(EditReport(id, 0, loss, 0.0, 1) for id, loss in losses.items())
    ledger.written([EditReport("d", 1, 7.0, 0.0, 1)])
    assert [mean_loss(ledger, shard) for shard in (0, 1, 2)] == [1.5, 7.0, 0.0]


@pytest.mark.parametrize(
    ("before", "after", "drop", "yes"),
    [(0.9, 0.9, 0.0, True), (0.9, 0.95, 0.0, True), (0.75, 0.5, 0.25, True), (0.75, 0.5, 0.2499, False)],
)
def test_accept_up_to_the_allowed_drop(before, after, drop, yes):
    decision = accept(before, after, drop)
    assert bool(decision) is yes
    assert f"{before:.3f} -> {after:.3f}" in decision.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"merge.density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"merge.density must be in \(0, 1\], got 1.5"),
        ({"group": 1}, r"merge.group must be 0 \(all\) or at least 2, got 1"),
        ({"group": -2}, r"merge.group must be 0 \(all\) or at least 2, got -2"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        LossAwareTiesMerge(**options)


# -- a real editor with two shards -------------------------------------------------------------------------------------


def shards_of(*options: Any, **more: Any) -> Any:
    return written_editor(*options, **more)[0]


def everything(editor: Any) -> dict[str, Any]:
    """All that a merge may touch, copied."""
    memory = editor.memory
    shards = {
        id: (memory[id].delta.detach().clone(), memory[id].mask.clone(), memory[id].generation) for id in memory.ids
    }
    return {
        "shards": shards,
        "next_id": memory.next_id,
        "router": copy.deepcopy(editor.router.state_dict()),
        "ledger": editor.ledger.state_dict(),
        "weight": editor.edited.split.value.weight.detach().clone(),
        "base_changed": editor.base_changed,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("target", ["side", "main"])
@pytest.mark.parametrize(
    ("router", "mask_ratio"), [("key", 1.0), ("key", 0.4), ("activation", 1.0), ("hybrid", 1.0)], ids=str
)
def test_a_rejected_merge_leaves_no_trace(router, mask_ratio, target):
    editor = shards_of(routing={"router": router}, mask_ratio=mask_ratio)
    assert len(editor.memory) == 2, "the premise: two shards"
    before, said = everything(editor), correctness(editor, list(map(editor.ledger.edit, editor.ledger)))
    merge = LossAwareTiesMerge(max_op_drop=-2.0, target=target)  # no merge can gain that much
    merge.merge(editor)
    assert not merge.outcome
    assert "more than -2.0" in merge.outcome.reason
    after = everything(editor)
    assert {key for key in before if not same(before[key], after[key])} == set()
    assert correctness(editor, list(map(editor.ledger.edit, editor.ledger))) == said


@pytest.mark.parametrize("normalize", ["contributors", "global"])
@pytest.mark.parametrize("mask_ratio", [1.0, 0.4])
def test_an_accepted_merge_leaves_one_shard_that_owns_all(normalize, mask_ratio):
    editor = shards_of(mask_ratio=mask_ratio)
    deltas = editor.memory.stacked().detach().clone()
    losses = [mean_loss(editor.ledger, shard) for shard in (0, 1)]
    merge = LossAwareTiesMerge(max_op_drop=1.0, normalize=normalize, alpha=3.0)
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


def test_a_trimmed_merge_keeps_the_share_asked_for():
    editor = shards_of()
    LossAwareTiesMerge(max_op_drop=1.0, density=0.05).merge(editor)
    share = editor.memory[2].delta.ne(0).float().mean().item()
    assert 0.05 <= share <= 0.1 + 1e-3  # each of two shards keeps a twentieth


def test_groups_are_judged_one_by_one():
    """Four shards in groups of two: one merged shard per group, and every edit still has an owner."""
    editor = shards_of(number=8, capacity=2)
    assert len(editor.memory) == 4
    merge = LossAwareTiesMerge(max_op_drop=1.0, group=2)
    merge.merge(editor)
    assert editor.memory.ids == [4, 5]
    assert editor.ledger.sizes() == {4: 4, 5: 4}
    assert "shards [0, 1]" in merge.outcome.reason
    assert "shards [2, 3]" in merge.outcome.reason


def test_one_shard_is_nothing_to_merge():
    editor = shards_of(number=4)
    before = everything(editor)
    merge = LossAwareTiesMerge()
    merge.merge(editor)
    assert not merge.outcome
    assert merge.outcome.reason == "1 shard: nothing to merge"
    assert same(before, everything(editor))


@pytest.mark.parametrize("target", ["side", "main"])
def test_a_stream_that_wrote_nothing_is_nothing_to_merge(target):
    """All edits are quarantined: no shard owns any, and neither target may fail on that."""
    editor = shards_of(number=4)
    editor.forget(list(editor.ledger))
    editor.ledger.quarantine(list(editor.ledger), "gave up")
    merge = LossAwareTiesMerge(target=target)
    merge.merge(editor)
    assert not merge.outcome
    assert not editor.base_changed


def test_an_editor_without_shards_says_so():
    editor = shards_of(number=4)
    editor.can_merge = False
    merge = LossAwareTiesMerge()
    merge.merge(editor)
    assert merge.outcome.reason == "this editor cannot merge"


# -- into W_v ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "group"), [(4, 0), (8, 0), (8, 2)], ids=["one_shard", "two_shards", "groups"])
def test_into_the_main_weights(tmp_path, number, group):
    """The fused delta is added to W_v; the bank is empty, no prompt is routed, and a plain checkpoint says the same."""
    editor = shards_of(number=number, capacity=4 if group == 0 else 2)
    value = editor.edited.split.value.weight
    original, deltas = value.detach().clone(), editor.memory.stacked().detach().clone()
    merge = LossAwareTiesMerge(max_op_drop=1.0, target="main", group=group)
    merge.merge(editor)
    assert merge.outcome
    assert editor.base_changed
    assert len(editor.memory) == 0
    if number == 4:
        torch.testing.assert_close(value.detach(), original + deltas[0])
    elif group == 0:
        weights = torch.tensor(list(merge.weights.values()))
        torch.testing.assert_close(value.detach(), original + ties_merge(deltas, weights))
    else:
        assert not torch.equal(value, original)
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


def test_a_stream_goes_on_after_a_merge_into_the_main_weights(tmp_path):
    """Merging into W_v after every window: the next window opens a new shard on the changed base."""
    editor = world_editor(steps=30, capacity=8)
    stream = world_stream(max_edits=12, window=4, batch_size=4)
    board = Scoreboard(live=0)
    merge = LossAwareTiesMerge(target="main", every_n_windows=1, max_op_drop=1.0)
    fit(editor, stream, [ErrorSampleMonitor(), PruneAndRetrigger(enabled=False), board, merge], tmp_path)
    assert len(stream.ledger) == 12
    assert editor.base_changed
    assert len(editor.memory) == 0
    assert board.results["final"].routing["edit"]["base"] == 1.0
    assert {row["memory"] for row in board.results["final"].rows} == {BASE}


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "merges"), [(None, 1), (1, 4), (2, 2)])
def test_cadence(tmp_path, every, merges):
    """Three windows: at the end of the stream, and after every n-th window where asked."""

    class Counting(LossAwareTiesMerge):
        calls = 0

        def merge(self, editor: Any) -> None:
            self.calls += 1
            super().merge(editor)

    merge = Counting(max_op_drop=1.0, every_n_windows=every)
    editor, stream = world_editor(steps=15, capacity=3), world_stream(max_edits=9, window=3, batch_size=3)
    fit(editor, stream, [ErrorSampleMonitor(), PruneAndRetrigger(enabled=False), merge], tmp_path)
    assert merge.calls == merges
    assert len(editor.memory) == 1
    assert stream.ledger.owned_by(editor.memory.ids[0]) == list(stream.ledger)


def test_off_keeps_all_shards(tmp_path):
    merge = LossAwareTiesMerge(enabled=False)
    editor, stream = world_editor(steps=15, capacity=3), world_stream(max_edits=9, window=3, batch_size=3)
    fit(editor, stream, [merge], tmp_path)
    assert editor.memory.ids == [0, 1, 2]
    assert merge.outcome is None


def test_the_guard_asks_no_scoring_prompt(monkeypatch):
    """The guard's prompts are the edits' own, those behind the base's contexts, and the held-out irrelevant ones."""
    editor = shards_of()
    asked: list[str] = []
    encode, choose = editor.encode, editor.edited.choose
    monkeypatch.setattr(editor, "encode", lambda edit: asked.append(edit.prompt) or encode(edit))
    monkeypatch.setattr(editor.edited, "choose", lambda prompts: asked.extend(prompts) or choose(prompts))
    assert 0 <= MergeGuard(editor, 256).score() <= 1
    own = [editor.ledger.edit(id).prompt for id in editor.ledger]
    unrelated = set(editor.held_out_prompts[:256])
    assert unrelated <= set(asked)
    assert set(own) <= set(asked)
    rest = set(asked) - unrelated - set(own)
    assert len(rest) == len(own)
    assert all(any(text.endswith(f". {prompt}") for prompt in own) for text in rest)


class TestGuardAsks:
    """The guard's own prompts before and after, against a plain computation that asks everything."""

    def chosen(self, editor: Any, shift: int, monkeypatch: Any) -> list[int]:
        """Route the held-out prompts at will: six base, base, 0, 0, 1, base in turn; of the second shift in part
        elsewhere."""
        turns = [(BASE, BASE), (BASE, 0), (0, 0), (0, BASE), (1, 0), (BASE, BASE)]
        prompts = editor.held_out_prompts
        memory = {prompt: turns[i % len(turns)][shift] for i, prompt in enumerate(prompts)}
        monkeypatch.setattr(
            editor.edited, "choose", lambda asked: forced_choice(torch.tensor([memory[prompt] for prompt in asked]))
        )
        return [memory[prompt] for prompt in prompts]

    def say(self, editor: Any, chosen: list[int]) -> list[str]:
        return answers(editor.edited, list(editor.held_out_prompts), torch.tensor(chosen), max_new_tokens=8)

    def plain_score(self, guard: MergeGuard, before: list[str], after: list[str]) -> float:
        parts = [correctness(guard.editor, edits) for edits in (guard.edits, guard.in_context)]
        rel, gen = (sum(part.values()) / len(part) for part in parts)
        same = sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
        return (rel * gen * same) ** (1 / 3)

    @pytest.fixture
    def asked(self, monkeypatch) -> list[str]:
        seen: list[str] = []
        real = ties_merge_module.answers

        def watched(model, prompts, *rest, **more):
            seen.extend(prompts)
            return real(model, prompts, *rest, **more)

        monkeypatch.setattr(ties_merge_module, "answers", watched)
        return seen

    @pytest.fixture
    def editor(self) -> Any:
        return shards_of()

    def test_into_the_side_memory_only_what_was_or_is_a_shards(self, editor, asked, monkeypatch):
        prompts = list(editor.held_out_prompts)
        first = self.chosen(editor, 0, monkeypatch)
        before = self.say(editor, first)
        guard = MergeGuard(editor, 64)
        assert asked == [prompt for prompt, memory in zip(prompts, first, strict=True) if memory != BASE]
        assert guard.score() == pytest.approx(self.plain_score(guard, before, before))
        editor.memory[0].delta.data.mul_(-10.0)
        second = self.chosen(editor, 1, monkeypatch)
        asked.clear()
        found = guard.score()
        moved = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair != (BASE, BASE)]
        assert set(asked) == {prompts[i] for i in moved}
        assert len(asked) == len(moved) + first.count(BASE) - sum(
            pair == (BASE, BASE) for pair in zip(first, second, strict=True)
        ), "after, and what had not been asked before"
        after = self.say(editor, second)
        changed = sum(a != b for a, b in zip(before, after, strict=True))
        assert 0 < changed < len(moved), "the premise"
        assert found > 0, "the premise"
        assert found == pytest.approx(self.plain_score(guard, before, after))
        asked.clear()
        assert guard.score() == found
        assert len(asked) == len(moved), "what was said before is known"

    def test_into_the_base_all(self, editor, asked, monkeypatch):
        prompts = list(editor.held_out_prompts)
        chosen = self.chosen(editor, 0, monkeypatch)
        before = self.say(editor, chosen)
        guard = MergeGuard(editor, 64, into_base=True)
        assert asked == prompts
        weight = editor.edited.value_weight
        kept = weight.detach().clone()
        try:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight.data.add_(8 * weight.std() * noise)
            asked.clear()
            found = guard.score()
            assert asked == prompts
            after = self.say(editor, chosen)
            assert 0 < sum(a != b for a, b in zip(before, after, strict=True)) < len(after), "the premise"
            assert found > 0, "the premise"
            assert found == pytest.approx(self.plain_score(guard, before, after))
        finally:
            weight.data.copy_(kept)

    def test_a_merge_says_to_its_guard_where_it_goes(self, editor, asked):
        """No held-out prompt is routed, so that a merge into the side memory asks for none and one into W_v for all."""
        unrelated = editor.held_out_prompts
        assert set(editor.edited.choose(unrelated).memory.tolist()) == {BASE}, "the premise"
        LossAwareTiesMerge(max_op_drop=-2.0).merge(editor)
        assert asked == []
        LossAwareTiesMerge(max_op_drop=-2.0, target="main").merge(editor)
        assert asked == [*unrelated] * 3


def test_the_guard_sees_damage_to_unrelated_answers():
    """A W_v that was overwritten with noise answers unrelated prompts otherwise, though no prompt is routed."""
    editor = shards_of()
    guard = MergeGuard(editor, 64)
    before = guard.score()
    weight = editor.edited.value_weight
    original = weight.detach().clone()
    weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 10 * weight.std())
    try:
        assert guard.score() < before
    finally:
        weight.data.copy_(original)


def test_evaluating_a_merged_pack_compares_with_the_unmerged_base(tmp_path):
    """`evaluate_pack` asks the base before it folds W_v in: before editing no edit is answered, afterwards all are."""
    editor = shards_of(number=4, capacity=4)
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(editor.ledger.edit(id).as_dict()) + "\n" for id in editor.ledger))
    LossAwareTiesMerge(max_op_drop=1.0, target="main").merge(editor)
    metrics = evaluate_pack(save_pack(editor, tmp_path / "pack", {}), str(records))
    assert metrics["pre_edit"]["autoregressive"]["rel"] < 1.0
    assert metrics["pre_edit"]["autoregressive"]["loc"] == 1.0
    assert metrics["final"]["autoregressive"]["rel"] == 1.0
    assert metrics["routing"]["edit"]["base"] == 1.0
