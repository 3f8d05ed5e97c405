"""Reports of prompts that are messages: a person reads turns. And what a report says of edits in other forms."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from repair_lightning.edits.ledger import Ledger
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.html_report import write_report
from repair_lightning.reports.report_tables import edits_table, examples, failed_table, forms_table, others_table
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit, EditReport, Probe

TURNS = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Where was Mara Quill born?"},
]
SHOWN = "user: Hello there!\nassistant: Good day.\nuser: Where was Mara Quill born?"
SCORES = {"rel": 0.5, "gen": None, "loc": 0.5, "near": None, "op": None}
NONE = dict.fromkeys(("rel", "contains", "fires", "garbled"))
FORMS = {"bare": {"rel": 0.5, "contains": 0.75, "fires": 0.625, "garbled": 0.0}, "chat": NONE}


def row(stage: str, id: str, kind: str, prompt: str, **more: Any) -> dict[str, Any]:
    found = {"stage": stage, "id": id, "kind": kind, "prompt": prompt, "expected": "Oslo", "answer": "Oslo"}
    found |= {"base_answer": "Perth", "correct": True, "teacher_forced": 1.0, "memory": 0, "score": 0.9}
    return found | {"threshold": 0.5, "nearest": id} | more


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of two edits that are dialogues: one right, one wrong, with an unrelated dialogue that has changed."""
    prompt = dialogue.dump(TURNS)
    other = dialogue.with_question(prompt, "Who sang?")
    wrong = dialogue.with_question(prompt, "Where was Rufus Ashgrove born?")
    edits = [Edit("right", prompt, "Oslo", locality=(Probe(other),)), Edit("wrong", wrong, "Oslo")]
    ledger = Ledger()
    ledger.arrive(edits, 0)
    ledger.written([EditReport(edit.id, i, 0.1, 0.0, 3) for i, edit in enumerate(edits)])
    ledger.to_parquet(tmp_path / "edits.parquet")
    rows = [
        row("final", "right", "edit", prompt),
        row("final", "right", "locality", other, correct=False),
        row("final", "wrong", "edit", wrong, answer="Bergen", correct=False, memory=1),
        {"stage": "forms", "form": "bare", "id": "right", "answer": "Oslo", "rel": True},
    ]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    stages = {stage: {"autoregressive": SCORES, "teacher_forced": SCORES} for stage in ("pre_edit", "final")}
    stages["final"] = stages["final"] | {"forms": FORMS, "same_subject": {"asked": 40, "fires": 0.05, "changed": 0.025}}
    metrics = {"base": {"name": "org/small"}, "editor": "repair", "n_edits": 2, "seconds": {"edit": 2.0}, **stages}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def test_tables_show_turns(run_dir):
    run = Artefacts.read(run_dir)
    assert examples(run).rows[0].cells[0].text == SHOWN
    assert failed_table(run).rows[0].cells[1].text == SHOWN.replace("Mara Quill", "Rufus Ashgrove")
    assert others_table(run).rows[0].cells[2].text == SHOWN.replace("Where was Mara Quill born?", "Who sang?")
    assert [line[1] for line in edits_table(run)["rows"]] == [SHOWN.replace("Mara Quill", "Rufus Ashgrove"), SHOWN]


def test_the_page_shows_turns_and_forms(run_dir):
    page = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert '"role"' not in page
    assert SHOWN in page
    table = page[page.index('id="forms-table"') :].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    assert cells == ["as bare text", "50.0", "75.0", "62.5", "0.0"]  # a form that the base does not have is left out
    words = (
        "40 other questions about edited subjects, which no edit answers: a shard answers 5.0 % of them, and 2.5 % of"
    )
    assert words in page
    assert (
        page.index('id="score-table"') < page.index('id="forms-table"') < page.index(words) < page.index('id="failed"')
    )


def test_a_run_without_such_figures_has_neither(run_dir):
    """Those of earlier releases, and runs that were told not to ask."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for final in ({"forms": None, "same_subject": None}, {}):
        kept = {key: value for key, value in metrics["final"].items() if key not in ("forms", "same_subject")}
        (run_dir / "metrics.json").write_text(json.dumps(metrics | {"final": kept | final}))
        page = write_report(run_dir).read_text(encoding="utf-8")
        assert "forms-table" not in page
        assert "about edited subjects" not in page
        assert forms_table(Artefacts.read(run_dir)).rows == []
