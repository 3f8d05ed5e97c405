"""The hybrid: what the matrix does not hold becomes a shard, and a shard says the same when the matrix moves on."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.editors.values import Values
from repair_lightning.models.prefix import pad_left
from repair_lightning.scoring.correctness import correctness
from repair_lightning.types import BASE

SURE = Values(lr=0.3, steps=60, stop_margin=6.0)


def hybrid(editor_of, ridge: float):
    return editor_of("llama", "rls_repair", values=SURE, ridge=ridge, anchoring=0.01)


def read_at(editor, edit) -> torch.Tensor:
    """The logits at the positions from which an edit's target is read, through the router."""
    row = editor.encode(edit)
    ids, mask = pad_left([row.ids])
    chosen = editor.choose([edit.prompt])
    with torch.no_grad(), editor.edited.forced(chosen):
        return editor.base.model(input_ids=ids, attention_mask=mask).logits[0, len(row.prompt) - 1 : -1]


@pytest.fixture
def taken_over(editor_of, write, edits):
    """Three edits that a far too stiff problem got wrong, written anew."""
    editor = hybrid(editor_of, ridge=30.0)
    write(editor, edits[:3])
    editor.ledger.evaluated(correctness(editor, edits[:3]), 0.85)
    failed = [edit.id for edit in edits[:3] if editor.ledger.entry(edit.id).score == 0]
    assert len(failed) == 3, "the premise"
    editor.forget(failed)
    editor.ledger.requeue(failed, "wrong")
    write(editor, edits[:3])
    return editor


def test_what_it_got_wrong_becomes_a_shard(taken_over, edits):
    assert correctness(taken_over, edits[:3]) == {edit.id: 1.0 for edit in edits[:3]}
    assert taken_over.choose([edit.prompt for edit in edits[:3]]).memory.tolist() == taken_over.memory.ids
    assert taken_over.terms == {}
    assert (taken_over.figures()["in_the_matrix"], taken_over.figures()["in_shards"]) == (0, 3)


def test_a_shard_says_the_same_when_the_matrix_moves_on(taken_over, write, edits):
    before = [read_at(taken_over, edit) for edit in edits[:3]]
    matrix = taken_over.edited.weights.matrix(taken_over.layer)
    taken_over.ridge = 0.003
    taken_over.problems = {}
    write(taken_over, edits[3:6])
    moved = taken_over.edited.weights.matrix(taken_over.layer) - matrix
    assert float(moved.norm()) > 0.1 * float(matrix.norm()), "the premise"
    for edit, logits in zip(edits[:3], before, strict=True):
        torch.testing.assert_close(read_at(taken_over, edit), logits, rtol=5e-2, atol=5e-2)
    assert {taken_over.ledger.owner_of(edit.id) for edit in edits[3:6]} == {BASE}
    taken_over.undo([edits[3].id, edits[0].id])
    for edit, logits in zip(edits[1:3], before[1:], strict=True):
        torch.testing.assert_close(read_at(taken_over, edit), logits, rtol=5e-2, atol=5e-2)
    assert taken_over.terms.keys() == {edit.id for edit in edits[4:6]}
