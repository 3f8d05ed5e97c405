"""The paper's form of a comparison's tables: groups of columns, what was not run, one LaTeX document, one page."""

from __future__ import annotations

import csv

import pytest

from repair_lightning.reports.comparison import BEFORE, Result, costs, editor_parts, write_tables
from repair_lightning.reports.html_report import write_comparison_page


def finished(variant: str, size: int, seed: int = 0, rel: float = 0.9, **more) -> Result:
    def scores(value: float) -> dict:
        return {"rel": value, "gen": value, "loc": 1.0, "near": None, "op": value}

    both = {"autoregressive": scores(rel), "teacher_forced": scores(rel + 0.05)}
    before = {"autoregressive": scores(0.0), "teacher_forced": scores(0.3)}
    metrics = {"n_edits": size, "final": both, "pre_edit": before, "seconds": {"edit": 2.0 * size, "total": 9.0}}
    metrics |= {"bytes_per_edit": 21_000.0, "peak_bytes": {"host": 3 << 20, "device": None}, "method": {}}
    return Result(variant, "", size, seed, "finished", "train.py", metrics=metrics | more)


@pytest.fixture
def results() -> list[Result]:
    return [
        finished("ours", 1, singles=100),
        finished("ours", 30, seed=0, rel=0.9),
        finished("ours", 30, seed=1, rel=0.8),
        finished("rome_1", 1, rel=0.5, method={"deviation": {"3": 0.02, "4": 0.04}}),
        Result("rome_1", "", 30, 0, "not run", error="it takes hours & days"),
        Result("slow", "", 1, 0, "stopped", error="after 5 min"),
        Result("slow", "", 30, 0, "failed", error="no"),
    ]


def test_scores_are_grouped_by_the_number_of_edits_and_costs_are_per_edit(results):
    scores, forced, spent = (part.table().frame.set_index(("", "variant")) for part in editor_parts(results))
    assert list(scores.columns) == [(f"N = {n}", name) for n in (1, 30) for name in ("Rel", "Gen", "Loc", "OP")]
    assert list(scores.index) == [BEFORE, "ours", "rome_1", "slow"]
    assert scores.loc["ours", "N = 1"].tolist() == ["0.90", "0.90", "1.00", "0.90"]
    assert scores.loc["ours", "N = 30"].tolist() == ["0.85 ± 0.07", "0.85 ± 0.07", "1.00 ± 0.00", "0.85 ± 0.07"]
    assert scores.loc[["rome_1", "slow"], ("N = 30", "OP")].tolist() == ["not run", "failed"]
    assert forced.loc[["ours", BEFORE], ("N = 1", "Rel")].tolist() == ["0.95", "0.30"]
    assert list(spent["N = 1"].columns) == ["s/edit", "kB/edit", "peak MiB", "dev"]
    assert spent.loc["ours", "N = 1"].tolist() == ["2.00", "21.0", "3", "-"]
    assert spent.loc["rome_1", ("N = 1", "dev")] == "0.0300"


def test_the_files(results, tmp_path):
    write_tables(tmp_path, results)
    text = (tmp_path / "scores.md").read_text()
    assert "Not run: `rome_1`, 30 edits: it takes hours & days." in text
    with open(tmp_path / "scores.csv") as file:
        rows = {(r["table"], r["editor"], r["N"], r["column"]): r for r in csv.DictReader(file)}
    row = rows["autoregressive", "ours", "30", "OP"]
    assert (row["mean"], row["sd"], row["seeds"], row["status"]) == ("0.85", "0.070710678", "2", "finished")
    assert rows["autoregressive", "slow", "30", "OP"]["status"] == "failed"
    text = (tmp_path / "scores.tex").read_text()
    assert text.startswith(r"\documentclass")
    assert r"rome\_1 &" in text
    assert r"$\pm$" in text
    assert text.isascii()


def test_what_is_prepared_is_paid_by_every_single_edit():
    """100 s of training and 50 s of writing: one edit of its own needs all of the training, one of 50 a share."""
    seconds = {"edit": 150.0, "prepare": 100.0, "total": 160.0}
    assert costs({"seconds": seconds, "n_edits": 50})["seconds_per_edit"] == 3.0
    assert costs({"seconds": seconds, "n_edits": 50, "singles": 50})["seconds_per_edit"] == 101.0


def test_the_page_is_whole_and_safe(results, tmp_path):
    hostile = [*results, finished("<script>alert(1)</script>", 30)]
    page = write_comparison_page(tmp_path, hostile).read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "it takes hours &amp; days" in page
    assert "N = 1 is the mean over 100 single edits" in page
    assert 'id="plot-op_against_seconds"' in page
    assert 'src="http' not in page
