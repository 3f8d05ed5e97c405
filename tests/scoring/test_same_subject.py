"""Other questions about edited subjects: which are asked, and what is counted of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from repair_lightning.scoring import protocols
from repair_lightning.scoring.forms import OWN, questions_about_subjects, same_subject
from repair_lightning.types import BASE


@pytest.fixture(scope="module")
def editor(editor_of, write, edits) -> Any:
    """All eight edits in a tiny base."""
    editor = editor_of()
    write(editor, edits)
    return editor


def test_they_are_other_edits_relations_and_our_own(edits):
    """By hand: one asks where, the other what instrument; the subjects change places."""
    pair = [edits[0], edits[2]]
    found = set(questions_about_subjects(pair))
    swapped = {"What instrument did Mara Kelstrom play?", "Where was Ilse Vandermeer born?"}
    assert swapped < found
    assert found - swapped <= {text.format(edit.subject) for text in OWN for edit in pair}


def test_by_hand(editor, edits, monkeypatch):
    """Of all questions every fourth is forced to a shard that is not its own; the rest is the base's."""
    about = questions_about_subjects(edits)
    questions = list(about)
    subjects = {edit.id: edit.subject for edit in edits}
    assert all(subjects[id] in text for text, id in about.items())
    memory = torch.tensor([0 if i % 4 == 0 else BASE for i in range(len(questions))])
    real = editor.edited.choose
    monkeypatch.setattr(editor.edited, "choose", lambda asked: replace(real(asked), memory=memory))
    nobody = torch.full_like(memory, BASE)
    now, before = (protocols.answers(editor.edited, questions, chosen, 16) for chosen in (memory, nobody))
    changed = sum(a != b for a, b in zip(now, before, strict=True))
    assert changed > 0, "the premise"
    found, rows = same_subject(editor.edited, edits)
    assert found == {
        "asked": len(questions),
        "fires": pytest.approx(int((memory != BASE).sum()) / len(questions)),
        "changed": pytest.approx(changed / len(questions)),
    }
    assert [row["prompt"] for row in rows] == questions[::4] + [text for i, text in enumerate(questions) if i % 4]
    rest = rows[len(questions[::4]) :]
    rows = rows[: -len(rest)]
    assert {(row["answer"], row["kept"], row["memory"], row["kind"]) for row in rest} == {
        (None, True, BASE, "same_subject")
    }
    assert all(row["id"] == about[row["prompt"]] for row in rest)
    assert [row["base_answer"] for row in rows] == before[::4]
    assert all(row["kept"] == (row["answer"] == row["base_answer"]) for row in rows)
    assert sum(not row["kept"] for row in rows) == changed
    assert {(row["kind"], row["memory"]) for row in rows} == {("same_subject", 0)}
    assert all(row["id"] == about[row["prompt"]] for row in rows)


def test_a_base_that_was_written_into_is_asked_everything(editor_of, write, edits):
    """No shard answers, yet answers change; what the base said before is said by its own weights."""
    editor = editor_of("llama", "ft", lr=0.02, steps=100, norm_constraint=0.5)
    write(editor, edits[:4])
    found, rows = same_subject(editor.edited, edits, editor.base_changed)
    assert found is not None
    assert len(rows) == found["asked"]
    assert found["fires"] == 0.0
    assert found["changed"] > 0
    assert same_subject(editor.edited, edits, base_changed=False)[0]["changed"] == 0.0
    assert editor.base_changed, "and it is left as it was found"
