"""A shard that does not say its edit's target is silent, and nothing counts such an edit as written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.types import BASE


def test_an_edit_whose_target_does_not_hold_in_its_own_prompt_is_not_right(editor_of, write, edits):
    """Its shard would say something else there, so the base answers: the ledger, both protocols and the confusion say
    that it was not written, whatever the router found."""
    editor = editor_of()
    write(editor, edits[:3])
    broken = edits[1]
    assert correctness(editor, edits[:3]) == {"e0": 1.0, "e1": 1.0, "e2": 1.0}
    editor.memory[editor.ledger.owner_of(broken.id)].left.neg_()
    assert correctness(editor, edits[:3]) == {"e0": 1.0, "e1": 0.0, "e2": 1.0}
    editor.ledger.evaluated(correctness(editor, edits[:3]), 0.85)
    assert editor.ledger.with_status("failed") == [broken.id]
    scorer = Scorer(editor.edited, [replace(edit, rephrases=(), near=()) for edit in edits[:3]])
    owners = editor.owner_choice([question.edit for question in scorer.questions])
    result = scorer.score("stage", scorer.choose(), owners)
    assert [row["correct"] for row in result.rows] == [True, False, True]
    assert (result.rows[1]["memory"], result.rows[1]["nearest"]) == (BASE, broken.id)
    assert result.rows[1]["answer"] == result.rows[1]["base_answer"] != broken.target
    assert result.scores["autoregressive"]["rel"] == pytest.approx(2 / 3)
    assert result.scores["autoregressive"]["garbled"] == 0.0
    assert result.scores["teacher_forced"]["rel"] < 1.0
    assert result.routing["edit"] == pytest.approx({"base": 1 / 3, "right": 2 / 3, "wrong": 0.0})
    forced = scorer.by_oracle(owners)
    assert not forced.rows[1]["correct"], "asked of the shard itself it is no better"
