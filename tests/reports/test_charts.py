"""The numbers behind the pictures, against small cases counted by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from repair_lightning.editors import REGISTRY
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import RepairError
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import (
    RUN_CHARTS,
    answered_by,
    components,
    cost,
    costs_of,
    costs_of_results,
    first_scores,
    live,
    op_against,
    outcomes_of,
    retention,
    scale,
    sensitivity,
    separation,
)
from repair_lightning.reports.comparison import Grid, Result, read_tables, write_tables
from repair_lightning.reports.drawing import EDITORS, Chart, _apart, _look
from repair_lightning.reports.report import CHECKS
from repair_lightning.types import Edit, EditReport

SCORES = {"rel": 1.0, "gen": 0.5, "loc": 1.0, "near": None, "op": 0.7937}


def run_in(folder: Path, rows: list[dict[str, Any]] = (), curve: list[dict[str, Any]] = ()) -> Artefacts:  # type: ignore[assignment]
    """A small run directory."""
    stages = {stage: {"autoregressive": SCORES, "teacher_forced": SCORES} for stage in ("pre_edit", "final")}
    content = {"base": {"name": "org/small"}, "editor": "repair", "n_edits": 6, "seconds": {"edit": 2.0}, **stages}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "generations.jsonl").write_text("".join(json.dumps({"stage": "final"} | row) + "\n" for row in rows))
    (folder / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    ledger = Ledger()
    ledger.arrive([Edit(f"e{i}", f"Who is {i}?", "She") for i in range(6)], 0)
    ledger.written([EditReport(f"e{i}", i % 3, 0.1, 0.0, 3) for i in range(6)])
    ledger.to_parquet(folder / "edits.parquet")
    return Artefacts.read(folder)


def row(kind: str, score: float, threshold: float | None = 2.0, id: str = "e0", correct: bool = True) -> dict[str, Any]:
    return {"kind": kind, "score": score, "threshold": threshold, "id": id, "correct": correct}


def chart_of(found: Chart | str) -> Chart:
    assert isinstance(found, Chart), found
    return found


def test_separation(tmp_path):
    """Score 3 over threshold 2 is 1.5, right of the line; every panel adds up to 100 per cent; a prompt that names no
    subject has -1 and no threshold, and counts as nothing. What lies over the line is what a shard answers, or it says
    which check failed. AUROC is the share of pairs in the right order."""
    excited, unsaid = {"checks": {"activation": [0.5, 0.7]}}, {"checks": {"its target's tokens said": [0.5, 1.0]}}
    rows = [row("edit", 3.0) | {"memory": 0}, row("edit", 2.2) | unsaid, row("near", 2.4) | excited]
    rows.append(row("near", -1.0, None))
    rows.append(row("edit", 9.0, None))  # nothing to compare with: not in the picture
    chart = chart_of(separation(run_in(tmp_path / "run", rows), bins=15))
    places = {(one["prompts"], one["ratio"]) for one in chart.rows if one["share"] == 50}
    who = {(one["prompts"][:4], one["who"].split(":")[0]) for one in chart.rows if one["share"]}
    not_said, not_excited = (f"over the line, but {why}" for why in CHECKS.values())
    assert who == {("edit", "over the line"), ("edit", not_said), ("neig", not_excited), ("neig", "not over the line")}
    assert places == {("edits (2)", 1.15), ("edits (2)", 1.55), ("neighbours (2)", 0.05), ("neighbours (2)", 1.25)}
    edges = {round((one["ratio"] - 1) / 0.05) for one in chart.rows}
    assert all(edge % 2 for edge in edges), "no bar lies across the line"
    assert sum(one["share"] for one in chart.rows) == 200
    assert all(one["share"] for one in chart.rows), "no bars of nothing"
    assert "AUROC of edits and rephrases: 0.750 against neighbours." in chart.words
    assert "100.0 % of the edits, 50.0 % of the neighbours" in chart.words
    assert isinstance(separation(run_in(tmp_path / "run", [row("edit", 0.0, None)])), str)

    random = np.random.default_rng(0)
    about, others = random.uniform(0.5, 9, 30), random.uniform(0, 6, 40)
    rows = [row("edit", value) for value in about] + [row("locality", value) for value in others]
    share = np.mean([a > b for a, b in product(about, others)])
    words = chart_of(separation(run_in(tmp_path / "run", rows))).words
    assert f"AUROC of edits and rephrases: {share:.3f} against unrelated prompts." in words


def test_outcomes_of_edits():
    final = [row("edit", 1, id="a"), row("rephrase", 1, id="a"), row("edit", 1, id="b"), row("locality", 1, id="a")]
    final += [row("rephrase", 1, id="b", correct=False), row("edit", 1, id="c", correct=False)]
    final.append(row("locality", 1, id="a", correct=False))
    assert outcomes_of(final) == {"a": "all right", "b": "a rephrase wrong", "c": "its own prompt wrong"}


def test_retention_by_age(tmp_path):
    """Six edits in two groups: the older three, of which one is lost, have four later edits in the mean."""
    rows = [row("edit", 1, id=f"e{i}", correct=i != 0) for i in (2, 0, 3, 1, 5, 4)]
    rows += [row("rephrase", 1, id="e5", correct=False)]
    chart = chart_of(retention(run_in(tmp_path / "run", rows), bins=2))
    rel, gen = "Rel at the end", "Gen at the end"
    expected = [(4.0, rel, 66.667, 3), (1.0, rel, 100, 3), (0.0, gen, 0, 1)]
    assert [tuple(line.values()) for line in chart.rows] == expected
    few = "retention: fewer than five scored edits in generations.jsonl"
    assert retention(run_in(tmp_path / "run", rows[:4])) == few


def test_the_first_score_after_the_last_write():
    story = [("written", "a", None), ("evaluated", "a", 0.0), ("requeued", "a", 0.0), ("written", "a", None)]
    story += [("evaluated", "a", 1.0), ("evaluated", "a", 0.5), ("written", "b", None)]
    assert first_scores([dict(zip(("kind", "id", "score"), told, strict=True), shard=1) for told in story]) == {
        "a": 1.0
    }


def test_live_and_cost_follow_the_curve(tmp_path):
    def line(edits: int, seconds: float, **live: float | None) -> dict[str, Any]:
        return {"edits": edits, "seconds": seconds} | ({"live": {"autoregressive": live}} if live else {})

    run = run_in(tmp_path / "run", curve=[line(2, 1.0, rel=0.5, near=None), line(4, 3.0), line(4, 3.5, rel=1.0)])
    assert [tuple(one.values()) for one in chart_of(live(run)).rows] == [(2, "Rel", 50.0), (4, "Rel", 100.0)]
    assert costs_of([run]).values.tolist() == [["run", 2, 1.0], ["run", 4, 3.0], ["run", 4, 3.5]]
    assert costs_of([run_in(tmp_path / "old")]).values.tolist() == [["old", 6, 2.0]]


def test_what_is_missing_is_one_line(tmp_path):
    for name, make in RUN_CHARTS.items():
        words = make(run_in(tmp_path / "run"))
        assert name == "cost" or (isinstance(words, str) and words.startswith(f"{name}: ") and "\n" not in words)


def result(variant: str, size: int, seed: int, op: float | None, edit: float = 3.0, base: str = "org/small") -> Result:
    scores = {"rel": 1.0, "gen": op, "loc": 1.0, "near": None, "op": op}
    metrics = {"base": {"name": base}, "n_edits": size, "seconds": {"edit": edit}, "final": {"autoregressive": scores}}
    return Result(variant, "", size, seed, "finished", metrics=metrics)


BROKEN = Result("broken", "", 30, 0, "failed", error="no")


def test_components_at_the_size_that_most_variants_have():
    found = [result("all", 30, 0, 0.9), result("all", 30, 1, 0.7), result("none", 30, 0, 0.5)]
    chart = chart_of(components([*found, result("all", 90, 0, 0.1), BROKEN]))
    ops = [(line["variant"], line["value"], line["sd"]) for line in chart.rows if line["score"] == "OP"]
    assert ops == [("all", 80.0, pytest.approx(14.142, abs=1e-3)), ("none", 50.0, None)]
    assert "30 edits" in chart.title
    assert isinstance(components(found[:2]), str)


GRID = Grid({"a.steps": (1, 2), "a.lr": (0.1, 0.5)}, {"a.steps": 2, "a.lr": 0.1}, {"a.form": "dense"})


def test_sensitivity():
    ops = {"steps 1 lr 0.1": 0.5, "steps 2 lr 0.1": 0.75, "steps 2 lr 0.5": 0.25}
    chart = chart_of(sensitivity(GRID, [result(name, 30, 0, op) for name, op in ops.items()], "grid"))
    cells = [(0.1, 1, 50.0, "50.0"), (0.5, 1, None, "-"), (0.1, 2, 75.0, "75.0"), (0.5, 2, 25.0, "25.0")]
    assert [tuple(line.values()) for line in chart.rows] == cells
    assert "Best 75.0 at steps 2 and lr 0.1; worst 25.0 at steps 2 and lr 0.5." in chart.words
    assert isinstance(sensitivity(GRID, [BROKEN], "grid"), str)


def test_a_table_is_read_back(tmp_path):
    write_tables(tmp_path, [result("all", 30, 0, 0.9), BROKEN], GRID)
    results, grid = read_tables(tmp_path)
    assert [one.status for one in results] == ["finished", "failed"]
    assert results[0].figure(("final", "autoregressive", "op")) == 0.9
    assert grid is not None
    assert dict(grid.cells())["steps 1 lr 0.1"] == {"a.form": "dense", "a.steps": 1, "a.lr": 0.1}
    (tmp_path / "table.json").write_text('{"runs": [{}]}')
    with pytest.raises(RepairError, match="is no table of a comparison"):
        read_tables(tmp_path)


def test_scale_has_a_line_where_the_number_of_edits_differs():
    found = [result("all", 30, 0, 0.9), result("all", 30, 1, 0.7), result("all", 90, 0, 0.6)]
    found += [result("none", 30, 0, 0.1)] + [
        result("all", size, 0, op, base="large/") for size, op in ((30, 0.95), (300, 0.85))
    ]
    chart = chart_of(scale(found))
    points = [("large", 30, 95.0), ("large", 300, 85.0), ("small", 30, 80.0), ("small", 90, 60.0)]
    assert [(line["of"], line["edits"], line["OP"]) for line in chart.rows] == points
    assert isinstance(scale(found[-1:]), str)


def test_cost_needs_three_points():
    spent = costs_of_results([result("a", 10, 0, 0.9, 2.0), result("a", 10, 1, 0.9, 4.0), result("b", 10, 0, 0.9, 5.0)])
    assert spent.values.tolist() == [["a", 10, 3.0], ["b", 10, 5.0]]
    two = pd.concat([spent, spent * [1, 2, 2]])
    assert cost(two) == "cost: needs the seconds of editing at three numbers of edits"
    chart = chart_of(cost(pd.concat([two, spent[:1] * [1, 3, 3]])))
    assert [tuple(line.values()) for line in chart.rows] == [("a", 10, 3.0), ("a", 20, 6.0), ("a", 30, 9.0)]


def test_who_answered_is_counted(tmp_path):
    """Shares of `metrics.json` times the prompts that were asked: two of four edits, one by another's shard."""
    run = run_in(tmp_path / "run", [row("edit", 3.0, id=f"e{i}") for i in range(4)] + [row("near", 1.0)])
    shares = {"edit": {"right": 0.5, "wrong": 0.25, "base": 0.25}, "near": {"right": 0.0, "wrong": 0.0, "base": 1.0}}
    run.metrics["routing"] = shares | {"rephrase": None}  # type: ignore[index]
    chart = chart_of(answered_by(run))
    assert [tuple(line.values()) for line in chart.rows] == [("edits", 2, 1, 1), ("neighbours", 0, 0, 1)]
    assert list(chart.rows[0]) == ["prompts", "its own edit's shard", "another shard", "the base"]


def encodings(spec: Any, name: str) -> Iterator[dict[str, Any]]:
    """What every part of a picture says of one of its axes."""
    for key, part in spec.items() if isinstance(spec, dict) else enumerate(spec if isinstance(spec, list) else ()):
        if key == "encoding" and name in part:
            yield part[name]
        yield from encodings(part, name)


def test_lines_that_coincide_are_drawn_once_under_all_their_names(tmp_path):
    scores = {"rel": 1.0, "gen": 0.5, "loc": 1.0}
    curve = [{"edits": edits, "live": {"autoregressive": scores}} for edits in (2, 4)]
    chart = chart_of(live(run_in(tmp_path / "run", curve=curve)))
    assert len(chart.rows) == 6, "the data are whole"
    assert "Rel = Loc" in chart.svg()
    (drawn,) = chart.picture.to_dict()["datasets"].values()
    assert {line["score"] for line in drawn} == {"Rel = Loc", "Gen"}


@pytest.mark.parametrize(
    ("ops", "low", "high", "said"),
    [
        ((0.98, 0.995), 97, 100, "OP, per cent, from 97"),
        ((0.42, 0.5), 41, 51, "OP, per cent, from 41 to 51"),
        ((0.003, 0.01), 0, 2, "OP, per cent, from 0 to 2"),
        ((0.9, 1.0), 0, 100, "OP, per cent"),
        ((1.0, 1.0), 0, 100, "OP, per cent"),
    ],
)
def test_an_axis_is_zoomed_and_says_so_where_all_values_differ_by_less_than_ten_points(ops, low, high, said):
    """Names beside points keep their distance, 6 % of the height."""
    runs = [result("keyed", 10, 0, ops[0]), result("wise", 10, 0, ops[1]), result("keyed", 20, 0, ops[1])]
    drawn = [one for one in (scale(runs), *op_against(runs)) if isinstance(one, Chart)]
    assert len(drawn) == 2
    for chart in drawn:
        axis = next(y for y in encodings(chart.picture.to_dict(), "y") if y["field"] == "OP")
        room = 0.03 * (high - low)
        assert axis["scale"]["domain"] == pytest.approx([low - room, high + room])
        assert axis["title"] == said
    rows = [{"across": 0.5, "OP": 99.0 + i / 10, "editor": f"editor-{i}"} for i in range(4)]
    heights = sorted(row["label"] for row in _apart(rows, "OP", "editor", (98.0, 100.0)))
    assert all(0.12 <= b - a < 1 for a, b in pairwise(heights))


def test_bars_are_the_deviation_over_seeds_and_of_one_seed_the_bootstraps(tmp_path):
    found = [result("all", 30, 0, 0.9), result("all", 30, 1, 0.7), result("all", 90, 0, 0.6)]
    assert found[2].metrics is not None
    found[2].metrics["final"]["op_interval"] = {"low": 0.5, "high": 0.64}  # type: ignore[index]
    chart = chart_of(scale(found))
    assert [(line["low"], line["high"]) for line in chart.rows] == [(65.858, 94.142), (50.0, 64.0)]
    bars = [layer for layer in chart.picture.to_dict()["layer"] if layer["mark"]["type"] == "errorbar"]
    assert [(bar["encoding"]["y"]["field"], bar["encoding"]["y2"]["field"]) for bar in bars] == [("low", "high")]
    assert "of one seed, where OP would lie in 95 of 100 draws" in chart.words
    plain = chart_of(scale([result("all", size, 0, 0.9) for size in (30, 90)]))
    assert "Bars" not in plain.words


def test_every_editor_has_one_look_of_its_own_in_every_picture():
    ours = {name for name, kind in REGISTRY.items() if kind.__module__.startswith("repair_lightning.")}
    assert set(EDITORS) == ours
    assert len(set(EDITORS.values())) == len(EDITORS)
    scales = [part.to_dict()["scale"] for part in _look([{"of": "mine"}], "of", EDITORS)]
    assert tuple(scale["range"][0] for scale in scales) not in EDITORS.values(), "nobody looks like an editor"
    ops = {"wise": 0.8, "keyed": 0.9, "mine": 0.9}  # the last two lines are one
    several = [result(name, size, 0, op, size * op) for name, op in ops.items() for size in (10, 20, 30)]
    drawn = [chart_of(scale(several)), chart_of(cost(costs_of_results(several, "of: ")))]
    for chart in [*drawn, *(one for one in op_against(several) if isinstance(one, Chart))]:
        svg = chart.svg()
        assert all(colour in svg for colour, _ in map(EDITORS.get, ("wise", "keyed"))), chart.name  # type: ignore[misc]


def test_names_beside_points_do_not_lie_on_each_other():
    rows = [{"across": 0.5 + i % 2 / 50, "OP": 90.0, "editor": f"editor-{i}"} for i in range(8)]
    heights = sorted(row["label"] for row in _apart(rows, "OP", "editor"))
    assert len(heights) == 8
    assert all(b - a >= 6 for a, b in pairwise(heights))
    apart = [{"across": 0.1, "OP": 90.0, "editor": "a"}, {"across": 0.99, "OP": 90.0, "editor": "b"}]
    assert [(row["label"], row["side"]) for row in _apart(apart, "OP", "editor")] == [(90.0, "left"), (90.0, "right")]


def test_an_axis_that_does_not_begin_at_zero_says_so():
    runs = [result("keyed", size, 0, 0.9) for size in (10, 20, 30)]
    drawn = [one for one in (scale(runs), cost(costs_of_results(runs)), *op_against(runs)) if isinstance(one, Chart)]
    assert len(drawn) == 3
    for chart in drawn:
        axes = [axis for name in ("x", "y") for axis in encodings(chart.picture.to_dict(), name) if "scale" in axis]
        assert axes
        for axis in axes:
            logarithmic = axis["scale"].get("type") == "log"
            assert logarithmic == axis["title"].endswith(", logarithmic")
            assert logarithmic or axis["scale"].get("zero") or axis["scale"]["domain"] == [-3, 103]
