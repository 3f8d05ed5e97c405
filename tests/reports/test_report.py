"""What a run leaves behind: JSON that any reader takes, files that are whole."""

from __future__ import annotations

import json

import pytest

from repair_lightning.reports.report import why_wrong
from repair_lightning.storage import files
from repair_lightning.storage.files import write_json, write_rows
from repair_lightning.types import READS


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


def test_why_a_text_that_was_asked_for_in_place_of_an_answer_is_wrong():
    row = {"kind": "rephrase", "memory": READS, "score": 0.1, "threshold": 0.4, "nearest": "e1"}
    assert why_wrong(row, None) == "it asks for a text: the base answered, which has read edit e1"
