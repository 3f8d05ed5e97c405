"""Another spelling of the target is right where a model answers freely, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from repair_lightning.scoring.correctness import answered, correctness
from repair_lightning.scoring.forms import form_scores
from repair_lightning.scoring.scorer import Scorer


@pytest.fixture(scope="module")
def edits(written):
    return written[1].edits[:4]


@pytest.fixture(scope="module")
def other(edits):
    """The same edits as records that ask for a target which no shard says; what shards say is its second alias."""
    return [replace(edit, target="the Upper Zarn", aliases=("Zarn (upper)", edit.target)) for edit in edits]


def test_free_generation_takes_them_and_teacher_forcing_does_not(written, edits, other):
    """By hand: the first edit's alias is what is said, the second has none, so that Rel is a half."""
    editor, _ = written
    records = [other[0], replace(other[1], aliases=())]
    scorer = Scorer(editor.edited, records)
    owners = editor.owner_choice([question.edit for question in scorer.questions])
    found = scorer.by_oracle(owners)
    assert [row["correct"] for row in found.rows if row["kind"] == "edit"] == [True, False]
    assert found.scores["autoregressive"]["rel"] == found.scores["autoregressive"]["contains"] == 0.5
    without = Scorer(editor.edited, [replace(edit, aliases=()) for edit in records]).by_oracle(owners)
    assert found.scores["teacher_forced"] == without.scores["teacher_forced"]
    assert without.scores["autoregressive"]["rel"] == 0.0
    known = Scorer(editor.edited, edits[:2]).by_oracle(owners).scores
    assert known["autoregressive"]["rel"] == 1.0, "the premise: both are answered with their targets"


def test_an_alias_is_not_garbled(written, other):
    """A choice by hand names no edit: what the record holds alone says whether an answer is strange."""
    editor, _ = written
    scorer = Scorer(editor.edited, [replace(edit, rephrases=(), near=(), locality=()) for edit in other])
    owners = editor.owner_choice([question.edit for question in scorer.questions])
    assert scorer.score("stage", owners, owners).scores["autoregressive"]["garbled"] == 0.0
    bare = Scorer(editor.edited, [replace(edit, rephrases=(), near=(), locality=(), aliases=()) for edit in other])
    assert bare.score("stage", owners, owners).scores["autoregressive"]["garbled"] == 1.0


def test_forms_take_them(written, edits, other):
    model = written[0].edited
    found, known = form_scores(model, other)[0], form_scores(model, edits)[0]
    assert found["bare"]["rel"] == known["bare"]["rel"] > 0
    without = form_scores(model, [replace(edit, aliases=()) for edit in other])[0]
    assert without["bare"]["rel"] == without["bare"]["contains"] == 0.0


def test_a_packs_edits_are_right_by_them_and_the_closed_loop_is_not(written, edits, other, monkeypatch):
    editor, stream = written
    by_id = {edit.id: edit for edit in other}
    own = {edit.id: edit for edit in stream.edits}
    known = answered(editor, [edit.id for edit in edits])
    entry = stream.ledger.entry
    monkeypatch.setattr(stream.ledger, "entry", lambda id: replace(entry(id), edit=by_id[id]))
    assert answered(editor, list(by_id)) == known
    assert all(found["rel"] == [True] for found in known.values()), "the premise"
    assert set(correctness(editor, other).values()) == {0.0}
    assert set(correctness(editor, [own[id] for id in by_id]).values()) == {1.0}
