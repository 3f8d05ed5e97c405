"""Edits asked in other forms: which figures a base has, and what a shard that is silent or speaks nonsense makes of
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repair_lightning.scoring import forms as own
from repair_lightning.scoring.forms import FORMS, form_rows, form_scores
from repair_lightning.types import BASE


@pytest.fixture(scope="module")
def in_chat(chat_editor, edits) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return form_scores(chat_editor.edited, edits[:4])


def test_each_form_ends_in_the_question_and_opens_the_answer(chat_editor, edits):
    forms = chat_editor.edited.forms
    rows = form_rows(forms, edits[0].prompt)
    assert tuple(rows) == FORMS
    for name, row in rows.items():
        assert row is not None
        assert edits[0].prompt in forms.spelling.spelled(row), name
        assert forms.turns(row) == {"bare": 0, "second_turn": 2}.get(name, 1), name
        assert edits[0].prompt in forms.asked_in(row), name
        assert own._EARLIER[0] not in forms.asked_in(row)
    assert len(rows["long"] or ()) > own._LONG / 2


def test_a_base_with_a_template_has_all_figures(in_chat):
    scores, _ = in_chat
    assert tuple(scores) == FORMS
    assert all(value is not None for found in scores.values() for value in found.values())
    assert scores["chat"] == {"rel": 1.0, "contains": 1.0, "fires": 1.0, "garbled": 0.0}
    assert scores["bare"] == scores["chat"], "the other form that every edit is written in"
    assert {found["garbled"] for found in scores.values()} == {0.0}, "a shard says its target or nothing"


def test_answers_are_what_generation_says(chat_editor, edits, in_chat):
    """A shard is not asked again for the target that routing asked it for: it must say it all the same."""
    forms, (_, rows) = chat_editor.edited.forms, in_chat
    by_id = {edit.id: edit for edit in edits}
    for row in rows:
        ids = torch.tensor([form_rows(forms, by_id[row["id"]].prompt)[row["form"]]])
        limit = len(forms.continued(ids[0].tolist(), row["expected"]).target) + 8
        output = chat_editor.edited.generate(ids, do_sample=False, max_new_tokens=limit)
        assert forms.said(output[0, ids.shape[1] :].tolist()).strip() == row["answer"]


def test_a_damaged_shard_is_silent(chat_editor, edits, in_chat):
    """It would say something else, so that the base answers: nothing is garbled, and less fires."""
    shards = [chat_editor.memory[shard] for shard in chat_editor.memory.ids]
    for shard in shards:
        shard.left.neg_()
    scores, rows = form_scores(chat_editor.edited, edits[:4])
    for shard in shards:
        shard.left.neg_()
    for form, found in scores.items():
        assert found == {"rel": 0.0, "contains": 0.0, "fires": 0.0, "garbled": 0.0}, form
    assert {row["nearest"] for row in rows if row["form"] == "chat"} == {edit.id for edit in edits[:4]}


def test_an_editor_that_is_not_asked_for_its_target_can_be_garbled(editor_of, write, edits):
    """GRACE knows no target of its entries: a value that is noise answers with noise."""
    editor = editor_of("llama", "grace", eps=0.5, relative=True, lr=0.3, steps=100, stop_margin=2.0)
    write(editor, edits[:4])
    assert not editor.router.vouches
    for shard in editor.memory.ids:
        for value in editor.memory[shard].state_dict().values():
            if value.is_floating_point():
                value.copy_(3 * value.abs().max() * torch.randn(value.shape))
    scores, rows = form_scores(editor.edited, edits[:4])
    assert scores["bare"]["fires"] == 1.0
    assert scores["bare"]["rel"] == 0.0
    assert scores["bare"]["garbled"] > 0
    for row in rows:
        assert not (row["garbled"] and row["memory"] == BASE)
