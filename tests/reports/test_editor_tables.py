"""The paper's form of a comparison's tables: groups of columns, what was not run, one compilable LaTeX document."""

from __future__ import annotations

import csv
import io
import re

import pytest

from repair_lightning.reports.charts import Chart
from repair_lightning.reports.comparison import COLUMNS, Result, cell
from repair_lightning.reports.comparison_charts import op_against
from repair_lightning.reports.comparison_page import write_comparison_page
from repair_lightning.reports.editor_tables import (
    BEFORE,
    costs,
    editor_tables,
    grouped_csv,
    grouped_latex,
    grouped_markdown,
    write_editor_tables,
)
from repair_lightning.reports.plotly_charts import figure


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


def test_scores_are_grouped_by_the_number_of_edits(results):
    table = editor_tables(results)[0]
    assert (table.sizes, table.columns) == ([1, 30], ("Rel", "Gen", "Loc", "OP"))
    rows = {name: [entry.texts for entry in entries] for name, entries in table.rows}
    assert list(rows) == [BEFORE, "ours", "rome_1", "slow"]
    assert rows["ours"] == [
        ("0.90", "0.90", "1.00", "0.90"),
        ("0.85 ± 0.07", "0.85 ± 0.07", "1.00 ± 0.00", "0.85 ± 0.07"),
    ]
    assert rows["rome_1"][1] == ("not run: it takes hours & days", "", "", "")
    assert rows["slow"] == [("stopped: after 5 min", "", "", ""), ("failed", "", "", "")]
    assert rows[BEFORE][0] == ("0.00", "0.00", "1.00", "0.00")
    assert editor_tables(results)[1].rows[1][1][0].cells[0] == "0.95"


def test_costs_are_per_edit(results):
    table = editor_tables(results)[-1]
    assert table.columns == ("s/edit", "kB/edit", "peak MiB", "dev")
    rows = dict(table.rows)
    assert rows["ours"][0].cells == ("2.00", "21.0", "3", "-")
    assert rows["rome_1"][0].cells[-1] == "0.0300"


def test_perplexity_has_a_table_where_it_was_asked(results):
    assert [table.name for table in editor_tables(results)] == ["autoregressive", "teacher_forced", "costs"]
    found = editor_tables([finished("ours", 30, perplexity={"pre": 40.0, "final": 1.5})])[2]
    assert (found.name, found.columns) == ("perplexity", ("PPL", "Loc"))
    assert [entries[0].cells for _, entries in found.rows] == [("40.00", "-"), ("1.50", "1.00")]


def test_every_line_of_the_latex_has_as_many_columns_as_its_table(results):
    text = grouped_latex(editor_tables(results))
    assert text.startswith(r"\documentclass")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert r"\multicolumn{4}{c}{not run: it takes hours \& days}" in text
    assert r"rome\_1 &" in text
    assert r"$\pm$" in text
    assert "±" not in text
    for columns, body in re.findall(r"\\begin\{tabular\}\{l(r+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        for line in [line for line in body.splitlines() if line.endswith(r"\\")]:
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + spans == len(columns)


def test_markdown_and_csv(results):
    text = grouped_markdown(editor_tables(results))
    assert "| ours | 0.90 | 0.90 | 1.00 | 0.90 | 0.85 ± 0.07 |" in text
    lengths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert lengths == {10}
    rows = list(csv.DictReader(io.StringIO(grouped_csv(results))))
    (row,) = [
        r for r in rows if (r["table"], r["editor"], r["N"], r["column"]) == ("autoregressive", "ours", "30", "OP")
    ]
    assert (row["mean"], row["sd"], row["seeds"], row["status"]) == ("0.85", "0.070710678", "2", "finished")


def test_the_csv_stays_numbers_where_a_seed_is_missing():
    results = [
        finished("ours", 30, 0, rel=0.915),
        finished("ours", 30, 1, rel=0.905),
        Result("ours", "", 30, 2, "failed"),
    ]
    (rel, *_) = [r for r in csv.DictReader(io.StringIO(grouped_csv(results))) if r["editor"] == "ours"]
    assert (rel["mean"], rel["sd"], rel["seeds"], rel["status"]) == ("0.91", "0.0070710678", "2", "finished")
    assert "0.91 ± 0.01 (2 of 3 seeds)" in grouped_markdown(editor_tables(results))


def test_what_is_prepared_is_paid_by_every_single_edit():
    """100 s of training and 50 s of writing: one edit of its own needs all of the training, one of 50 a share."""
    seconds = {"edit": 150.0, "prepare": 100.0, "total": 160.0}
    assert costs({"seconds": seconds, "n_edits": 50})["seconds_per_edit"] == 3.0
    assert costs({"seconds": seconds, "n_edits": 50, "singles": 50})["seconds_per_edit"] == 101.0


def test_a_column_that_a_finished_run_lacks_did_not_fail():
    results = [finished("ours", 30, 0), Result("ours", "", 30, 1, "failed")]
    assert cell(results, COLUMNS["OP oracle"]) == "-"
    assert cell(results, COLUMNS["OP"]) == "90.0 (1 failed)"
    assert cell(results[1:], COLUMNS["OP"]) == "failed"


def test_bytes_of_single_edits_are_of_one():
    run = finished("ours", 1, singles=100, n_edits=100, memory_bytes=21_000, bytes_per_edit=21_000)
    assert cell([run], COLUMNS["bytes/edit"]) == "21000"


def test_op_against_what_an_edit_costs(results):
    chart = op_against("seconds", results)
    assert isinstance(chart, Chart)
    points = {(row["editor"], row["id"]): (row["cost"], row["OP"]) for row in chart.rows()}
    assert points == {
        ("ours", "N = 1"): (2.0, 90.0),
        ("ours", "N = 30"): (2.0, 85.0),
        ("rome_1", "N = 1"): (2.0, 50.0),
    }
    assert "Highest OP at N = 1: ours 90.0 at 2; N = 30: ours 85.0 at 2." in chart.words
    drawn = figure(chart)
    assert [note["text"] for note in drawn["layout"]["annotations"]] == ["<b>N = 1</b>", "<b>N = 30</b>"]
    places = {(trace["name"], trace["xaxis"]): (trace["x"], trace["y"]) for trace in drawn["data"]}
    assert places == {
        ("ours", "x"): ([2.0], [90.0]),
        ("rome_1", "x"): ([2.0], [50.0]),
        ("ours", "x2"): ([2.0], [85.0]),
        ("rome_1", "x2"): ([], []),
    }
    kept = op_against("kept", results)
    assert isinstance(kept, Chart)
    assert set(kept.columns["cost"]) == {21.0}
    assert isinstance(op_against("peak", [results[-1]]), str)


def test_the_files_and_the_page(results, tmp_path):
    hostile = [*results, finished("<script>alert(1)</script>", 30)]
    assert [file.name for file in write_editor_tables(tmp_path, results)] == ["scores.md", "scores.csv", "scores.tex"]
    page = write_comparison_page(tmp_path, hostile).read_text()
    assert "<script>alert(1)" not in page
    assert "not run: it takes hours &amp; days" in page
    assert "N = 1 is the mean over 100 single edits" in page
    assert 'id="plot-op_against_seconds"' in page
    heads = re.search(r"<thead><tr>(.*?)</tr>\s*<tr>(.*?)</tr></thead>", page, re.DOTALL)
    assert heads
    assert [sum(map(int, re.findall(r'colspan="(\d+)"', heads[1])))] == [heads[2].count("<th")] == [9]
    assert 'src="http' not in page
