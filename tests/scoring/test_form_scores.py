"""Edits asked in other forms: which figures a base has, and what a shard that is silent or speaks nonsense makes of
them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from repair_lightning.scoring import forms as own
from repair_lightning.scoring.forms import FIGURES, FORMS, form_rows, form_scores
from repair_lightning.scoring.protocols import contains, same_answer
from repair_lightning.types import BASE

NOTHING = dict.fromkeys(FIGURES)


@pytest.fixture(scope="module")
def bare_editor(editor_of, write, edits) -> Any:
    """Four edits in a base without a chat template, which reads 128 tokens."""
    editor = editor_of()
    write(editor, edits[:4])
    return editor


@pytest.fixture(scope="module")
def in_chat(chat_editor, edits) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return form_scores(chat_editor.edited, edits[:4], longest=chat_editor.max_tokens)


def damaged(editor: Any, change: Callable[[torch.Tensor], Any], measure: Callable[[], Any]) -> Any:
    """What is measured while each shard's factors are changed in place."""
    before = {shard: editor.memory[shard].left.clone() for shard in editor.memory.ids}
    try:
        for shard in before:
            change(editor.memory[shard].left)
        return measure()
    finally:
        for shard, left in before.items():
            editor.memory[shard].left.copy_(left)


class TestRows:
    def test_each_form_ends_in_the_question_and_opens_the_answer(self, chat_editor, edits):
        forms = chat_editor.edited.forms
        rows = form_rows(forms, edits[0].prompt)
        assert tuple(rows) == FORMS
        for name, row in rows.items():
            assert row is not None
            assert edits[0].prompt in forms.spelled(row), name
            assert forms.turns(row) == {"bare": 0, "second_turn": 2}.get(name, 1), name
            assert edits[0].prompt in forms.asked_in(row), name
            assert own._EARLIER[0] not in forms.asked_in(row)
        assert len(rows["long"] or ()) > own._LONG / 2

    def test_without_a_template_there_are_three(self, bare_editor, edits):
        rows = form_rows(bare_editor.edited.forms, edits[0].prompt)
        assert [name for name, row in rows.items() if row is None] == ["chat", "system", "second_turn"]

    def test_a_template_that_takes_no_system_message_has_no_such_form(self, chat_editor, edits, monkeypatch):
        forms = chat_editor.edited.forms
        monkeypatch.setattr(forms, "takes_system", False)
        rows = form_rows(forms, edits[0].prompt)
        assert [name for name, row in rows.items() if row is None] == ["system"]


class TestScores:
    def test_a_base_with_a_template_has_all_figures(self, in_chat):
        scores, _ = in_chat
        assert tuple(scores) == FORMS
        assert all(value is not None for found in scores.values() for value in found.values())
        assert scores["chat"] == {"rel": 1.0, "contains": 1.0, "fires": 1.0, "garbled": 0.0}
        assert scores["bare"] == scores["chat"], "the other form that every edit is written in"
        assert {found["garbled"] for found in scores.values()} == {0.0}, "a shard says its target or nothing"

    def test_each_figure_is_the_share_of_its_rows(self, in_chat, edits):
        scores, rows = in_chat
        assert Counter(row["form"] for row in rows) == dict.fromkeys(FORMS, 4)
        targets = {edit.id: edit.target for edit in edits}
        for row in rows:
            assert (row["stage"], row["expected"]) == ("forms", targets[row["id"]])
            assert row["rel"] == same_answer(row["answer"], row["expected"])
            assert row["contains"] == contains(row["answer"], row["expected"])
            assert row["fires"] == (row["memory"] != BASE)
        for form, found in scores.items():
            for name, value in found.items():
                assert value == sum(row[name] for row in rows if row["form"] == form) / 4
        json.dumps(rows, allow_nan=False)

    def test_answers_are_what_generation_says(self, chat_editor, edits, in_chat):
        """A shard is not asked again for the target that routing asked it for: it must say it all the same."""
        forms, (_, rows) = chat_editor.edited.forms, in_chat
        by_id = {edit.id: edit for edit in edits}
        for row in rows:
            ids = torch.tensor([form_rows(forms, by_id[row["id"]].prompt)[row["form"]]])
            limit = len(forms.continued(ids[0].tolist(), row["expected"]).target) + 8
            output = chat_editor.edited.generate(ids, do_sample=False, max_new_tokens=limit)
            assert forms.said(output[0, ids.shape[1] :].tolist()).strip() == row["answer"]

    def test_what_a_base_has_not_is_null(self, bare_editor, edits):
        """No template: no dialogues. 128 tokens: no long text."""
        scores, rows = form_scores(bare_editor.edited, edits[:4], longest=bare_editor.max_tokens)
        assert [name for name, found in scores.items() if found == NOTHING] == ["chat", "system", "second_turn", "long"]
        assert scores["bare"] == {"rel": 1.0, "contains": 1.0, "fires": 1.0, "garbled": 0.0}
        assert {row["form"] for row in rows} == {"bare", "wrapped"}

    def test_no_edit_no_figures(self, bare_editor):
        assert form_scores(bare_editor.edited, ()) == (dict.fromkeys(FORMS, NOTHING), [])

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_batches_do_not_matter(self, chat_editor, edits, in_chat, batch_size):
        found, _ = form_scores(chat_editor.edited, edits[:4], longest=chat_editor.max_tokens, batch_size=batch_size)
        assert found == in_chat[0]

    def test_of_many_edits_some_are_asked_the_same_each_time(self, bare_editor, edits):
        asked = [{row["id"] for row in form_scores(bare_editor.edited, edits, 3)[1]} for _ in range(2)]
        assert asked[0] == asked[1]
        assert len(asked[0]) == 3


class TestDamage:
    def test_a_damaged_shard_is_silent(self, chat_editor, edits, in_chat):
        """It would say something else, so that the base answers: nothing is garbled, and less fires."""
        measure = lambda: form_scores(chat_editor.edited, edits[:4], longest=chat_editor.max_tokens)  # noqa: E731
        scores, rows = damaged(chat_editor, torch.Tensor.neg_, measure)
        for form, found in scores.items():
            assert found == {"rel": 0.0, "contains": 0.0, "fires": 0.0, "garbled": 0.0}, form
        assert in_chat[0]["chat"]["fires"] == 1.0
        assert {row["nearest"] for row in rows if row["form"] == "chat"} == {edit.id for edit in edits[:4]}
        assert measure() == in_chat, "whole again"

    def test_a_shard_that_says_another_edits_target_is_wrong_but_not_garbled(self, chat_editor, edits):
        """Wrong routing says a target of the wrong edit: that is not what the expected answer is."""
        swapped = [replace(edit, target="Reykjavik") for edit in edits[:4]]
        scores, _ = form_scores(chat_editor.edited, swapped, longest=chat_editor.max_tokens)
        assert scores["chat"] == {"rel": 0.0, "contains": 0.0, "fires": 1.0, "garbled": 0.0}

    def test_an_editor_that_is_not_asked_for_its_target_can_be_garbled(self, editor_of, write, edits):
        """GRACE knows no target of its entries: a value that is noise answers with noise."""
        editor = editor_of("llama", "grace", eps=0.5, relative=True, lr=0.3, steps=100, stop_margin=2.0)
        write(editor, edits[:4])
        assert not editor.router.vouches
        for shard in editor.memory.ids:
            for value in editor.memory[shard].state_dict().values():
                if value.is_floating_point():
                    value.copy_(3 * value.abs().max() * torch.randn(value.shape))
        scores, rows = form_scores(editor.edited, edits[:4], longest=editor.max_tokens)
        assert scores["bare"]["fires"] == 1.0
        assert scores["bare"]["rel"] == 0.0
        assert scores["bare"]["garbled"] > 0
        for row in rows:
            assert not (row["garbled"] and row["memory"] == BASE)
