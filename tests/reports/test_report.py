"""What a run leaves behind: JSON that any reader takes, files that are whole, tables that a person reads."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from repair_lightning.reports.report import print_report
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


@pytest.mark.parametrize("width", [60, 200])
def test_the_report_of_a_run(tmp_path, width):
    """A pipe gets whole lines; names and reasons of the user's are no markup."""
    folder = tmp_path / ("long name [1] " * 8)
    folder.mkdir()
    (folder / "metrics.json").touch()
    screen = io.StringIO()
    print_report(METRICS, folder, Console(file=screen, width=width))
    text = screen.getvalue()
    assert "3 edits of org/[x]base[/bold]" in text
    loop = "Closed loop: 2 windows, 0 rolled back, 1 shard pruned, 7 edits written again, 1 quarantined."
    lines = {
        f"{loop} Merge: not applied (shards [0, 1]: guard score).",
        f"Everything is in {folder}, for a reader in report.html: metrics.json",
    }
    assert lines <= set(text.splitlines())
