"""What a run leaves behind: JSON that any reader takes, files that are whole, tables that a person reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from repair_lightning.reports.report import form_frame, print_report, routing_frame, score_frame, verdict
from repair_lightning.storage import files
from repair_lightning.storage.files import write_json, write_rows

SCORES = {"rel": 1.0, "gen": 0.5, "loc": 0.25, "near": None, "op": None}
BOTH = {"autoregressive": SCORES, "teacher_forced": SCORES}
METRICS = {
    "base": {"name": "org/[x]base[/bold]"},
    "n_edits": 3,
    "pre_edit": BOTH,
    "final": BOTH,
    "routing": {"edit": {"base": 0.125, "right": 0.75, "wrong": 0.125}, "near": None},
    "closed_loop": {"windows": 2, "rolled_back": 0, "pruned": 1, "retriggered": 7, "quarantined": 1},
    "merge": {"accepted": False, "reason": "shards [0, 1]: guard score"},
    "seconds": {"edit": 1.0, "evaluate": 2.0, "total": 4.0},
    "edits_per_minute": 180.0,
}


def test_json_is_json_and_rows_are_lines(tmp_path):
    """Infinity and NaN are not JSON: a strict reader must take the file."""
    infinite = float("inf")
    values = [float("nan"), -infinite, 1 / 3, 3, True, None]
    write_json(tmp_path / "deep" / "m.json", {"a": infinite, "b": {"c": values}, "é": "日本"})
    text = (tmp_path / "deep" / "m.json").read_text(encoding="utf-8")
    read = {"a": None, "b": {"c": [None, None, 0.333333, 3, True, None]}, "é": "日本"}
    assert json.loads(text, parse_constant=pytest.fail) == read
    write_rows(tmp_path / "r.jsonl", ({"i": i, "text": "ü\n"} for i in range(3)))
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"i": i, "text": "ü\n"} for i in range(3)]


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    """The old content stands until the new one is complete, also when writing fails half way."""
    path = tmp_path / "m.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}


def test_the_tables_have_a_dash_or_no_row_for_what_was_not_asked():
    rows = score_frame(METRICS).values.tolist()
    assert rows[:2] == [["autoregressive", stage, "100.0", "50.0", "25.0", "-", "-"] for stage in ("before", "after")]
    assert len(rows) == 4
    assert routing_frame(METRICS["routing"]).values.tolist() == [["edit", "12.5", "75.0", "12.5"]]
    assert form_frame(None).empty


@pytest.mark.parametrize("width", [60, 200])
def test_the_report_of_a_run(tmp_path, width):
    """A pipe gets whole lines; names and reasons of the user's are no markup."""
    folder = tmp_path / ("long name [1] " * 8)
    folder.mkdir()
    (folder / "metrics.json").touch()
    screen = io.StringIO()
    print_report(METRICS | {"perplexity": {"pre": 30.125, "final": 1.5}}, folder, Console(file=screen, width=width))
    text = screen.getvalue()
    assert "3 edits of org/[x]base[/bold]" in text
    loop = "Closed loop: 2 windows, 0 rolled back, 1 shard pruned, 7 edits written again, 1 quarantined."
    assert {
        f"{loop} Merge: not applied (shards [0, 1]: guard score).",
        "180 edits a minute: 1.0 s editing, 2.0 s scoring, 4.0 s in all.",
        "Perplexity of the targets: pre 30.12, final 1.50",
        f"Everything is in {folder}, for a reader in report.html: metrics.json",
    } <= set(text.splitlines())


def test_the_report_of_a_pack_has_no_run_and_the_verdict_is_one_line():
    screen = io.StringIO()
    print_report(METRICS, None, Console(file=screen, width=200))
    assert "edits a minute" not in screen.getvalue()
    line = "3 edits of org/[x]base[/bold]: Rel 100.0  Gen 50.0  Loc 25.0  Near -  OP -; 1 quarantined; runs/x"
    assert verdict(METRICS, Path("runs/x")) == line
