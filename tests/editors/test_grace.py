"""GRACE: where its keys go, and that a value stands for the layer's output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repair_lightning.errors import ConfigError
from repair_lightning.types import BASE

FEW = {"eps": 0.3, "relative": True, "lr": 0.3, "steps": 4}


@pytest.fixture
def editor(editor_of):
    return editor_of("llama", "grace", **FEW)


def near(edit, **changes):
    """Another edit whose prompt differs in the last character alone."""
    return replace(edit, id=edit.id + "'", prompt=edit.prompt + "?", **changes)


def between(editor, one, other) -> float:
    keys = editor.balls.key_of(editor.query_of([one, other]))
    return float((keys[0] - keys[1]).norm())


def test_far_edits_have_entries_of_their_own(editor, write, edits):
    write(editor, edits[:3])
    balls = editor.balls
    assert balls.members == [["e0"], ["e1"], ["e2"]]
    assert balls.shards.tolist() == editor.memory.ids == [0, 1, 2]
    assert editor.figures() == {"entries": 3, "edits_per_entry": 1.0}


def test_the_same_answer_nearby_joins_and_the_ball_reaches_it(editor, write, edits):
    other = near(edits[0])
    editor.first = 0.9 * between(editor, edits[0], other)
    write(editor, [edits[0], other])
    assert editor.balls.members == [["e0", "e0'"]]
    assert float(editor.balls.radii[0]) > editor.first
    assert editor.choose([edits[0].prompt, other.prompt]).memory.tolist() == [0, 0]


def test_another_answer_nearby_splits_the_way_between(editor, write, edits):
    other = near(edits[0], target="Oslo")
    distance = between(editor, edits[0], other)
    editor.first = 0.9 * distance
    write(editor, [edits[0], other])
    assert editor.balls.members == [["e0"], ["e0'"]]
    torch.testing.assert_close(editor.balls.radii, torch.full((2,), distance / 2))
    assert editor.choose([edits[0].prompt, other.prompt]).memory.tolist() == [0, 1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_value_is_what_leaves_the_matrix(editor_of, write, edits, model_type):
    """At every token of a row that an entry answers; the other rows keep their bits."""
    editor = editor_of(model_type, "grace", **FEW)
    write(editor, edits[:2])
    ids = torch.tensor(editor.tokenizer([edits[1].prompt] * 3)["input_ids"])
    choices = (None, editor.edited.choose([edits[0].prompt, "no such thing", edits[1].prompt]))
    seen = []
    handle = editor.edited.split.value.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        for choice in choices:
            with editor.edited.forced(choice):
                editor.base.model(input_ids=ids)
    handle.remove()
    plain, changed = (output.view(3, -1, output.shape[-1]) for output in seen)
    assert torch.equal(changed[1], plain[1])
    for row, shard in ((0, 0), (2, 1)):
        assert torch.equal(changed[row], editor.memory[shard].value.expand_as(changed[row]))


def test_undoing_one_of_an_entry_leaves_the_other(editor, write, edits):
    """The entry was opened by the one that goes: the other is placed anew, at its own key."""
    other = near(edits[0])
    editor.first = 0.9 * between(editor, edits[0], other)
    write(editor, [edits[0], other])
    assert editor.undo(["e0"]) == ["e0'"]
    assert editor.balls.members == [["e0'"]]
    asked = [other.prompt, edits[0].prompt]
    assert editor.choose(asked).memory.tolist() == [editor.ledger.owner_of("e0'"), BASE]
    assert editor.balls.radii.tolist() == [pytest.approx(editor.first)]
    assert editor.undo(["e0'"]) == []
    assert editor.choose([edits[0].prompt, other.prompt]).memory.tolist() == [BASE, BASE]


def test_refusals(editor_of, editor, write, edits):
    with pytest.raises(ConfigError, match=r"layer must lie below the last, got 2: .* give a lower --model.layer"):
        editor_of("llama", "grace", layer=2)
    write(editor, edits[:1])
    with pytest.raises(Exception, match="replaces the output has no delta"):
        _ = editor.memory[0].delta
