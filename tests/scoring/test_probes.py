"""Probes: read with care, asked before and after, and only what changed is asked again."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_runs import world_edits, written_editor

from repair_lightning.errors import RepairError
from repair_lightning.scoring import protocols
from repair_lightning.scoring.probes import KnownQuestion, ProbeScorer, load_probes


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answers": ["A"]}, "record 1, field 'question': is missing"),
        ({"question": "Who?", "answers": [1]}, "record 1, field 'answers': is no list of texts"),
    ],
)
def test_a_bad_probe_is_named(tmp_path, row, words):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RepairError, match=words):
        load_probes(tmp_path / "p.jsonl")


def test_what_edits_change_and_what_they_leave(monkeypatch):
    """The base is asked before a shard answers: half of the probes are prompts of edits, and change."""
    editor, _ = written_editor(4)
    model = editor.edited
    edits, others = world_edits(4), world_edits(4, start=40)
    nobody = torch.full((8,), -1)
    told = protocols.answers(model, [edit.prompt for edit in (*edits, *others)], nobody, 32)
    probes = tuple(KnownQuestion(edit.prompt, (said,)) for edit, said in zip((*edits, *others), told, strict=True))
    scorer = ProbeScorer(model, probes)
    asked: list[str] = []
    answers = protocols.answers
    monkeypatch.setattr(
        protocols, "answers", lambda m, prompts, *rest: asked.extend(prompts) or answers(m, prompts, *rest)
    )
    assert scorer.score() == {"number": 8, "pre": 1.0, "final": 0.5, "same": 0.5, "fired": 0.5}
    assert sorted(asked) == sorted(edit.prompt for edit in edits)
    asked.clear()
    scorer.score(base_changed=True)
    assert len(asked) == 8
