"""Figures as files: every kind is drawn, and what cannot be is said."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from repair_lightning.__main__ import main
from repair_lightning.errors import ConfigError
from repair_lightning.reports.charts import draw_figures, gather
from repair_lightning.reports.comparison import Grid, Result, write_tables

HOSTILE = "all - $x^2$ \\frac{ <script>alert(1)</script>\n\x07&"


def result(variant: str, size: int, op: float) -> Result:
    scores = dict.fromkeys(("rel", "gen", "loc", "op"), op)
    final = {"base": {"name": "b"}, "final": {"autoregressive": scores}}
    metrics = {"n_edits": size, "seconds": {"edit": size / 10}, **final}
    return Result(variant, "", size, 0, "finished", metrics=metrics)


@pytest.fixture
def comparisons(tmp_path) -> Path:
    """A folder with a comparison of variants, one of a hostile name, and one over a grid."""
    for name in ("parts", "grid"):
        (tmp_path / "compared" / name).mkdir(parents=True)
    variants = [result("all", 30, 0.9), result(HOSTILE, 30, 0.4), result("all", 90, 0.8)]
    write_tables(tmp_path / "compared" / "parts", variants)
    grid = Grid({"a.steps": (1, 2), "a.lr": (0.1, 0.5)}, {"a.steps": 2, "a.lr": 0.1})
    cells = [result(name, 30, 0.2 * i) for i, (name, _) in enumerate(grid.cells())]
    write_tables(tmp_path / "compared" / "grid", cells[:3], grid)
    return tmp_path / "compared"


def test_all_of_a_run_and_its_comparisons(hard_run, comparisons, tmp_path, monkeypatch, capsys):
    to = tmp_path / "new" / "figures"
    monkeypatch.setattr(sys, "argv", ["x", "figures", "--runs", str(hard_run), str(comparisons), "--to", str(to)])
    main()
    names = {"separation", "answered_by", "live", "retention", "features", "components", "sensitivity-grid", "scale"}
    names |= {"cost", "op_against_seconds"}
    assert {file.name for file in to.iterdir()} == {f"{name}.{end}" for name in names for end in ("png", "svg", "csv")}
    for name in names:
        picture = (to / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n", name
        assert len(picture) > 2_000, name  # not an empty page
        root = ElementTree.fromstring((to / f"{name}.svg").read_text())  # XML whatever the names are
        assert not [element for element in root.iter() if element.tag.endswith("script")], name
    with open(to / "scale.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["of", "edits", "OP", "sd", "low", "high"]
    assert rows == [["b", "30", "90.0", "", "", ""], ["b", "90", "80.0", "", "", ""]]
    assert "alert(1)" in (to / "components.svg").read_text()


def test_what_is_left_out_is_said_and_a_figure_is_the_same_file_again(comparisons, tmp_path):
    for to in ("a", "b"):
        files, missing = draw_figures([comparisons / "grid"], tmp_path / to)
        assert {file.stem for file in files} == {"sensitivity-grid"}
    of_run = "separation, answered_by, live, retention, features"
    assert [words.split(":")[0] for words in missing] == [of_run, "components", "scale", "cost"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes(), file.name


def test_runs_of_a_comparison_are_its_results_and_several_runs_have_names(hard_run, comparisons, tmp_path):
    skipped = shutil.ignore_patterns("checkpoints", "pack", "report.html")
    shutil.copytree(hard_run, comparisons / "parts" / "all" / "n30-seed0", ignore=skipped)
    shutil.copytree(hard_run, comparisons / "other run", ignore=skipped)
    runs, found = gather([comparisons, hard_run])
    assert [run.name for run in runs] == ["other run", "hard"]
    assert [one.name for one in found] == ["grid", "parts"]
    files, _ = draw_figures([comparisons / "other run", hard_run], tmp_path / "to")
    names = {file.stem for file in files}
    assert {"retention-other_run", "retention-hard"} <= names
    assert "retention" not in names


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished run and no comparison"):
        draw_figures([tmp_path], tmp_path / "to")
    assert not (tmp_path / "to").exists()
