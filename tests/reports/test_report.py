"""What a run leaves behind: JSON that any reader takes, files that are whole, tables that a person reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from repair_lightning.reports.report import print_report, routing_table, score_table, verdict
from repair_lightning.storage import files
from repair_lightning.storage.files import rounded, write_json, write_rows

SCORES = {"rel": 1.0, "gen": 0.5, "loc": 0.25, "near": None, "op": None}
METRICS = {
    "base": {"name": "some/base"},
    "n_edits": 3,
    "pre_edit": {"autoregressive": SCORES, "teacher_forced": SCORES},
    "final": {"autoregressive": SCORES, "teacher_forced": SCORES},
    "routing": {"edit": {"base": 0.125, "right": 0.75, "wrong": 0.125}, "near": None},
}
RUN = {
    "closed_loop": {"windows": 2, "rolled_back": 0, "pruned": 1, "retriggered": 7, "quarantined": 1},
    "merge": {"accepted": False, "reason": "costs too much"},
    "seconds": {"edit": 1.0, "evaluate": 2.0, "total": 4.0},
    "edits_per_minute": 180.0,
}


def shown(content) -> str:
    screen = io.StringIO()
    Console(file=screen, width=160).print(content)
    return screen.getvalue()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.12345678, 0.123457), (float("inf"), None), (float("nan"), None), (-float("inf"), None), (3, 3), (True, True)],
)
def test_rounded(value, expected):
    assert rounded({"a": {"b": value}, "c": "text", "d": None}) == {"a": {"b": expected}, "c": "text", "d": None}


def test_json_is_json(tmp_path):
    """Infinity and NaN are not JSON: a strict reader must take the file."""
    write_json(tmp_path / "deep" / "m.json", {"a": float("inf"), "b": float("nan"), "c": {"d": 1 / 3}, "é": "日本"})
    text = (tmp_path / "deep" / "m.json").read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse) == {"a": None, "b": None, "c": {"d": 0.333333}, "é": "日本"}
    assert "日本" in text


def test_numbers_in_lists_are_json_too(tmp_path):
    write_json(tmp_path / "m.json", {"a": [float("nan"), 1.0, {"b": float("inf")}]})
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail) == {"a": [None, 1.0, {"b": None}]}


def test_rows(tmp_path):
    write_rows(tmp_path / "r.jsonl", ({"i": i, "text": "ü\n"} for i in range(3)))
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"i": i, "text": "ü\n"} for i in range(3)]


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    """The old content stands until the new one is complete, also when writing fails half way."""
    path = tmp_path / "m.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}


def test_the_score_table_has_a_dash_for_what_was_not_asked():
    text = shown(score_table(METRICS, "title"))
    rows = [line for line in text.splitlines() if "autoregressive" in line]
    assert len(rows) == 2  # stages that the metrics lack have no row
    cells = [cell.strip() for cell in rows[0].split("│")][1:-1]
    assert cells == ["autoregressive", "before", "100.0", "50.0", "25.0", "-", "-"]
    assert "title" in text
    assert "None" not in text


def test_the_routing_table():
    text = shown(routing_table(METRICS["routing"]))
    row = next(line for line in text.splitlines() if " edit " in line)
    assert [cell.strip() for cell in row.split("│")][1:-1] == ["edit", "12.5", "75.0", "12.5"]
    assert " near " not in text


def printed(metrics, run_dir, width: int = 200) -> str:
    screen = io.StringIO()
    print_report(metrics, run_dir, Console(file=screen, width=width))
    return screen.getvalue()


def test_the_report_of_a_run_names_what_lies_there(tmp_path):
    (tmp_path / "metrics.json").touch()
    text = printed(METRICS | RUN | {"perplexity": {"pre": 30.125, "final": 1.5}}, tmp_path)
    assert "3 edits of some/base" in text
    assert "2 windows, 0 rolled back, 1 shard pruned, 7 edits written anew, 1 quarantined" in text
    assert "not applied (costs too much)" in text
    assert "180 edits a minute" in text
    assert "pre 30.12, final 1.50" in text
    assert "metrics.json" in text
    assert "checkpoints" not in text  # not there


def test_a_pipe_gets_whole_lines(tmp_path):
    """Without a terminal there is no width to keep: text lines are not broken, in names of folders neither."""
    folder = tmp_path / ("long name " * 8)
    folder.mkdir()
    (folder / "metrics.json").touch()
    lines = printed(METRICS | RUN, folder, width=60).splitlines()
    assert f"Everything is in {folder}:" in lines
    assert any(line.startswith("Closed loop: 2 windows, ") and line.endswith("(costs too much).") for line in lines)
    assert "180 edits a minute: 1.0 s editing, 2.0 s scoring, 4.0 s in all." in lines


def test_the_verdict_is_one_line(tmp_path):
    final = {"rel": 1.0, "gen": 0.5, "loc": 0.25, "near": None, "op": 0.5}
    metrics = METRICS | RUN | {"final": {"autoregressive": final}, "n_edits": 1}
    line = "1 edit of some/base: Rel 100.0  Gen 50.0  Loc 25.0  Near -  OP 50.0; 1 quarantined; runs/x"
    assert verdict(metrics, Path("runs/x")) == line


def test_the_report_of_a_pack_has_no_run():
    text = printed(METRICS, None)
    assert "3 edits of some/base" in text
    assert "edits a minute" not in text


def test_square_brackets_in_names_are_printed_as_they_are(tmp_path):
    """Names and reasons come from users and data; rich would take [bold] for markup."""
    folder = tmp_path / "run[1]"
    folder.mkdir()
    merge = {"accepted": True, "reason": "shards [0, 1]: guard score"}
    text = printed(METRICS | RUN | {"base": {"name": "org/[x]base[/bold]"}, "merge": merge}, folder)
    assert "shards [0, 1]" in text
    assert "run[1]" in text
    assert "org/[x]base[/bold]" in text
