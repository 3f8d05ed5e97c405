"""Other questions about edited subjects: which are asked, and what is counted of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from repair_lightning.scoring import protocols
from repair_lightning.scoring import same_subject as own
from repair_lightning.scoring.same_subject import OWN, questions_about_subjects, same_subject
from repair_lightning.texts import asking
from repair_lightning.types import BASE, Edit


@pytest.fixture(scope="module")
def editor(editor_of, write, edits) -> Any:
    """All eight edits in a tiny base."""
    editor = editor_of()
    write(editor, edits)
    return editor


class TestQuestions:
    def test_each_names_its_subject_and_asks_what_no_edit_asks(self, edits):
        found = questions_about_subjects(edits)
        subjects = {edit.id: edit.subject for edit in edits}
        assert {id for id, _ in found} == set(subjects)
        assert len({text for _, text in found}) == len(found) > 2 * len(edits)
        for id, text in found:
            assert asking.places(text, asking.spellings(subjects[id])), text
            assert text not in {edit.prompt for edit in edits}

    def test_they_are_other_edits_relations_and_our_own(self, edits):
        """By hand: one asks where, the other what instrument; the subjects change places."""
        pair = [edits[0], edits[2]]
        assert [edit.prompt for edit in pair] == [
            "Where was Mara Kelstrom born?",
            "What instrument did Ilse Vandermeer play?",
        ]
        found = {text for _, text in questions_about_subjects(pair)}
        assert {"What instrument did Mara Kelstrom play?", "Where was Ilse Vandermeer born?"} < found
        rest = found - {"What instrument did Mara Kelstrom play?", "Where was Ilse Vandermeer born?"}
        assert rest <= {text.format(edit.subject) for text in OWN for edit in pair}

    def test_what_another_edit_of_the_subject_asks_is_left_out(self, edits):
        """The second edit's own question is no question that must keep the base's answer."""
        also = Edit("also", "What instrument did Mara Kelstrom play?", "the lute", subject="Mara Kelstrom")
        found = {text for _, text in questions_about_subjects([edits[0], edits[2], also])}
        assert "What instrument did Mara Kelstrom play?" not in found
        assert "Where was Ilse Vandermeer born?" in found

    def test_what_a_record_says_is_the_same_question_is_left_out(self):
        """Joined over two records, of which only one gives the rephrase."""
        one = Edit("a", "Where was Mara Kelstrom born?", "Orsk", subject="Mara Kelstrom")
        other = Edit("b", "The birthplace of Ilse Vandermeer is", "Verin", subject="Ilse Vandermeer")
        told = replace(other, rephrases=("Where was Ilse Vandermeer born?",))
        asked = "The birthplace of Mara Kelstrom is"
        assert asked in {text for _, text in questions_about_subjects([one, other])}
        assert asked not in {text for _, text in questions_about_subjects([one, told])}

    def test_an_edit_alone_is_asked_our_own(self, edits):
        assert {text for _, text in questions_about_subjects(edits[:1])} == {t.format(edits[0].subject) for t in OWN}

    @pytest.mark.parametrize("number", [1, 5, 20])
    def test_at_most_so_many_and_the_same_each_time(self, edits, number):
        found = questions_about_subjects(edits, number)
        assert found == questions_about_subjects(edits, number)
        assert len(found) == number

    def test_without_a_subject_there_is_nothing_to_ask(self, edits):
        nobody = [replace(edits[0], subject=None), replace(edits[1], subject="Somebody Else")]
        assert questions_about_subjects(nobody) == []


class TestFigures:
    def test_by_hand(self, editor, edits, monkeypatch):
        """Of all questions every fourth is forced to a shard that is not its own; the rest is the base's."""
        questions = [text for _, text in questions_about_subjects(edits)]
        memory = torch.tensor([0 if i % 4 == 0 else BASE for i in range(len(questions))])
        real = editor.edited.choose
        monkeypatch.setattr(editor.edited, "choose", lambda asked: replace(real(asked), memory=memory))
        nobody = torch.full_like(memory, BASE)
        now, before = (protocols.answers(editor.edited, questions, chosen, 16) for chosen in (memory, nobody))
        changed = sum(a != b for a, b in zip(now, before, strict=True))
        assert changed > 0, "the premise"
        assert same_subject(editor.edited, edits) == {
            "asked": len(questions),
            "fires": pytest.approx(int((memory != BASE).sum()) / len(questions)),
            "changed": pytest.approx(changed / len(questions)),
        }

    def test_shards_stay_silent(self, editor, edits):
        """Relations of a random base are noise; but a shard that is asked anything else does not say its target."""
        found = same_subject(editor.edited, edits)
        assert found is not None
        assert found["changed"] <= found["fires"] < 0.25

    def test_only_what_a_shard_answers_is_generated(self, editor, edits, monkeypatch):
        asked: list[str] = []
        real = protocols.answers
        monkeypatch.setattr(
            protocols, "answers", lambda model, prompts, *rest: asked.extend(prompts) or real(model, prompts, *rest)
        )
        found = same_subject(editor.edited, edits)
        assert found is not None
        assert len(asked) == 2 * round(found["fires"] * found["asked"])

    def test_a_base_that_was_written_into_is_asked_everything(self, editor_of, write, edits):
        """No shard answers, yet answers change; what the base said before is said by its own weights."""
        editor = editor_of("llama", "ft", lr=0.02, steps=100, norm_constraint=0.5)
        write(editor, edits[:4])
        found = same_subject(editor.edited, edits, editor.base_changed)
        assert found is not None
        assert found["fires"] == 0.0
        assert found["changed"] > 0
        assert same_subject(editor.edited, edits, base_changed=False)["changed"] == 0.0
        assert editor.base_changed, "and it is left as it was found"

    def test_no_subject_no_figures(self, editor, edits):
        assert same_subject(editor.edited, [replace(edits[0], subject=None)]) is None


def test_each_of_our_own_has_one_place_for_the_subject():
    assert all(text.count("{}") == 1 for text in OWN)
    assert len(set(OWN)) == len(OWN) >= own._EACH
