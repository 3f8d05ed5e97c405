"""The numbers behind the pictures, against small cases counted by hand."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import RepairError
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import (
    RUN_CHARTS,
    Chart,
    Cost,
    cost,
    costs_of,
    feature_points,
    first_scores,
    live,
    retention,
    separation,
    thinned,
)
from repair_lightning.reports.comparison import Grid, Result, read_tables, write_tables
from repair_lightning.reports.comparison_charts import (
    Scored,
    components,
    costs_of_results,
    scale,
    scored_results,
    scored_runs,
    sensitivity,
)
from repair_lightning.types import Edit, EditReport

SCORES = {"rel": 1.0, "gen": 0.5, "loc": 1.0, "near": None, "op": 0.7937}


def run_in(folder: Path, rows: list[dict[str, Any]] = (), edits: int = 4, **metrics: Any) -> Artefacts:  # type: ignore[assignment]
    """A small run directory."""
    stages = {stage: {"autoregressive": SCORES, "teacher_forced": SCORES} for stage in ("pre_edit", "final")}
    content = {"base": {"name": "org/small"}, "editor": "repair", "n_edits": edits, "seconds": {"edit": 2.0}, **stages}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(content | metrics))
    (folder / "generations.jsonl").write_text("".join(json.dumps({"stage": "final"} | row) + "\n" for row in rows))
    return Artefacts.read(folder)


def row(kind: str, score: float, threshold: float | None = 2.0, id: str = "e0", correct: bool = True) -> dict[str, Any]:
    return {"kind": kind, "score": score, "threshold": threshold, "id": id, "correct": correct}


# -- of one run --------------------------------------------------------------------------------------------------------


def test_separation(tmp_path):
    """Score 3 over threshold 2 is 1.5, right of the line; every panel adds up to 100 per cent."""
    rows = [row("edit", 3.0), row("edit", 2.2), row("rephrase", 1.0), row("near", 2.4), row("near", 0.0)]
    rows.append(row("edit", 9.0, None))  # nothing to compare with: not in the picture
    chart = separation(run_in(tmp_path / "run", rows), bins=15)
    assert isinstance(chart, Chart)
    totals = {panel: sum(chart.part("prompts", panel)["share"]) for panel in chart.values("prompts")}
    assert totals == pytest.approx({"edits (2)": 100, "rephrases (1)": 100, "neighbours (2)": 100})
    edits = chart.part("prompts", "edits (2)")
    assert [round(x, 1) for x, share in zip(edits["ratio"], edits["share"], strict=True) if share] == [1.1, 1.5]
    assert "100.0 % of the edits, 0.0 % of the rephrases, 50.0 % of the neighbours" in chart.words


def test_auroc_is_the_share_of_pairs_in_the_right_order(tmp_path):
    random = np.random.default_rng(0)
    about, others = random.uniform(0.5, 9, 30), random.uniform(0, 6, 40)
    rows = [row("edit", value) for value in about] + [row("locality", value) for value in others]
    chart = separation(run_in(tmp_path / "run", rows))
    share = np.mean([a > b for a, b in product(about, others)])
    assert isinstance(chart, Chart)
    assert f"AUROC of edits and rephrases: {share:.3f} against unrelated prompts." in chart.words


def test_a_prompt_that_names_no_subject_counts_as_nothing(tmp_path):
    """The key router gives it -1 and no threshold; without any threshold there is no picture."""
    rows = [row("edit", 3.0), row("locality", -1.0, None), row("locality", 1.0)]
    chart = separation(run_in(tmp_path / "run", rows), bins=15)
    assert isinstance(chart, Chart)
    assert chart.part("prompts", "unrelated (2)")["share"][0] == 50
    assert "1.000 against unrelated prompts" in chart.words
    assert isinstance(separation(run_in(tmp_path / "run", [row("edit", 0.0, None), rows[1]])), str)


def test_a_prompt_may_name_no_subject_with_the_key_router_alone(tmp_path):
    run_in(tmp_path / "run", [row("edit", 3.0)])
    words = "names no edited subject"
    assert words in separation(Artefacts.read(tmp_path / "run")).words  # type: ignore[union-attr]
    (tmp_path / "run" / "config.yaml").write_text("model: {init_args: {routing: {router: activation}}}")
    assert words not in separation(Artefacts.read(tmp_path / "run")).words  # type: ignore[union-attr]


def ledger_in(folder: Path, number: int) -> Ledger:
    ledger = Ledger()
    ledger.arrive([Edit(f"e{i}", f"Who is {i}?", "She") for i in range(number)], 0)
    ledger.written([EditReport(f"e{i}", i % 3, 0.1, 0.0, 3) for i in range(number)])
    ledger.to_parquet(folder / "edits.parquet")
    return ledger


def test_retention_by_age(tmp_path):
    """Four edits in two groups: the older two, of which one is lost, have 2.5 later edits in the mean."""
    rows = [row("edit", 1, id=f"e{i}", correct=i != 0) for i in (2, 0, 3, 1)]
    rows += [row("rephrase", 1, id="e3", correct=False)]
    run_in(tmp_path / "run", rows)
    ledger_in(tmp_path / "run", 4)
    chart = retention(Artefacts.read(tmp_path / "run"), bins=2)
    assert isinstance(chart, Chart)
    assert [tuple(line.values()) for line in chart.rows()] == [
        (2.5, "Rel at the end", 50.0, 2),
        (0.5, "Rel at the end", 100.0, 2),
        (0.0, "Gen at the end", 0.0, 1),
    ]
    assert "100.0 % for the newest edits and 50.0 % for the oldest" in chart.words


def test_the_first_score_after_the_last_write():
    def event(kind: str, id: str, score: float | None = None, shard: int | None = 1) -> dict[str, Any]:
        return {"kind": kind, "id": id, "score": score, "shard": shard}

    events = [event("written", "a"), event("evaluated", "a", 0.0), event("requeued", "a", 0.0, None)]
    events += [event("written", "a"), event("evaluated", "a", 1.0), event("evaluated", "a", 0.5)]
    events += [event("written", "b"), event("evaluated", "c", 1.0, None)]
    assert first_scores(events) == {"a": 1.0}


def curve(edits: int, seconds: float, **live: float | None) -> dict[str, Any]:
    scores = {"live": {"autoregressive": live, "teacher_forced": live}, "live_edits": 2} if live else {}
    return {"window": 1, "edits": edits, "seconds": seconds} | scores


def test_live_and_cost_follow_the_curve(tmp_path):
    run_in(tmp_path / "run")
    lines = [curve(2, 1.0, rel=0.5, near=None), curve(4, 3.0), curve(4, 3.5, rel=1.0)]
    (tmp_path / "run" / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Artefacts.read(tmp_path / "run")
    shown = live(run)
    assert isinstance(shown, Chart)
    assert shown.rows() == [
        {"edits": 2, "score": "Rel", "value": 50.0},
        {"edits": 4, "score": "Rel", "value": 100.0},
    ]
    assert costs_of(run, "x") == [Cost("x", 2, 1.0), Cost("x", 4, 3.0), Cost("x", 4, 3.5)]


def test_a_run_without_a_curve_costs_what_it_cost(tmp_path):
    assert costs_of(run_in(tmp_path / "run"), "old") == [Cost("old", 4, 2.0)]


def test_thinned_keeps_the_last():
    rows = [{"i": i} for i in range(1001)]
    found = thinned(rows, 400)
    assert len(found) == 334
    assert found[-1] == {"i": 1000}
    assert {b["i"] - a["i"] for a, b in pairwise(found)} == {3}
    assert thinned(rows[:5], 400) == rows[:5]
    assert thinned([]) == []


def test_features_have_names_while_shards_are_few(tmp_path):
    run_in(tmp_path / "run")
    places = {f"e{i}": [float(i), 0.0] for i in range(5)}
    (tmp_path / "run" / "features.json").write_text(json.dumps({"explained": [0.5, 0.25], "edits": places}))
    ledger_in(tmp_path / "run", 4)
    chart = feature_points(Artefacts.read(tmp_path / "run"))
    assert isinstance(chart, Chart)
    assert chart.columns["shard"] == ["shard 0", "shard 1", "shard 2", "shard 0", "none"]
    assert "(50.0 % and 25.0 % of it); 3 shards own them" in chart.words


def test_what_is_missing_is_one_line(tmp_path):
    run = run_in(tmp_path / "run")
    for name, make in RUN_CHARTS.items():
        found = make(run)
        assert isinstance(found, str) == (name != "cost"), name
        if isinstance(found, str):
            assert found.startswith(f"{name}: ")
            assert "\n" not in found


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RepairError, match="holds no finished run"):
        Artefacts.read(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(RepairError, match="has no 'base'"):
        Artefacts.read(tmp_path)
    (tmp_path / "metrics.json").write_text("[")
    with pytest.raises(RepairError, match="is damaged"):
        Artefacts.read(tmp_path)


# -- of several runs ---------------------------------------------------------------------------------------------------


def result(variant: str, size: int, seed: int, op: float | None, edit: float = 3.0, base: str = "org/small") -> Result:
    scores = {"rel": 1.0, "gen": op, "loc": 1.0, "near": None, "op": op}
    metrics = {
        "base": {"name": base},
        "n_edits": size,
        "seconds": {"edit": edit},
        "final": {"autoregressive": scores, "teacher_forced": scores},
    }
    return Result(variant, "", size, seed, "finished", metrics=metrics)


def test_components_at_the_size_that_most_variants_have():
    found = [
        result("all", 30, 0, 0.9),
        result("all", 30, 1, 0.7),
        result("none", 30, 0, 0.5),
        result("all", 90, 0, 0.1),
    ]
    found.append(Result("broken", "", 30, 0, "failed", error="no"))
    chart = components(found)
    assert isinstance(chart, Chart)
    ops = [(line["variant"], line["value"], line["sd"]) for line in chart.rows() if line["score"] == "OP"]
    assert ops == [("all", 80.0, pytest.approx(14.142, abs=1e-3)), ("none", 50.0, None)]
    assert "30 edits" in chart.title
    assert isinstance(components(found[:2]), str)


GRID = Grid({"a.steps": (1, 2), "a.lr": (0.1, 0.5)}, {"a.steps": 2, "a.lr": 0.1}, {"a.form": "dense"})


def test_sensitivity():
    ops = {"steps 1 lr 0.1": 0.5, "steps 2 lr 0.1": 0.75, "steps 2 lr 0.5": 0.25}
    chart = sensitivity(GRID, [result(name, 30, 0, op) for name, op in ops.items()], "grid")
    assert isinstance(chart, Chart)
    values = {(line["lr"], line["steps"]): line["OP"] for line in chart.rows()}
    assert values == {(0.1, 1): 50.0, (0.5, 1): None, (0.1, 2): 75.0, (0.5, 2): 25.0}
    assert chart.mark == (0.1, 2)
    assert "Best 75.0 at steps 2 and lr 0.1; worst 25.0 at steps 2 and lr 0.5." in chart.words
    assert sensitivity(GRID, [], "grid") == "grid: no cell of the grid has finished"


def test_a_table_is_read_back(tmp_path):
    found = [result("all", 30, 0, 0.9), Result("broken", "", 30, 0, "failed", error="no")]
    write_tables(tmp_path, found, GRID)
    results, grid = read_tables(tmp_path)
    assert [one.status for one in results] == ["finished", "failed"]
    assert results[0].figure(("final", "autoregressive", "op")) == 0.9
    assert grid is not None
    assert [name for name, _ in grid.cells()] == [name for name, _ in GRID.cells()]
    assert dict(grid.cells())["steps 1 lr 0.1"] == {"a.form": "dense", "a.steps": 1, "a.lr": 0.1}
    (tmp_path / "table.json").write_text('{"runs": [{}]}')
    with pytest.raises(RepairError, match="is no table of a comparison"):
        read_tables(tmp_path)


def test_scale_has_a_line_where_the_number_of_edits_differs(tmp_path):
    found = [
        result("all", 30, 0, 0.9),
        result("all", 30, 1, 0.7),
        result("all", 90, 0, 0.6),
        result("none", 30, 0, 0.1),
    ]
    found.append(result("all", 30, 0, 0.95, base="large/"))
    found.append(result("all", 300, 0, 0.85, base="large/"))
    chart = scale(scored_results(found))
    assert isinstance(chart, Chart)
    assert [(line["of"], line["edits"], line["OP"]) for line in chart.rows()] == [
        ("small", 30, 80.0),
        ("small", 90, 60.0),
        ("large", 30, 95.0),
        ("large", 300, 85.0),
    ]
    assert isinstance(scale([Scored("b", "v", 30, (50.0,))]), str)
    assert scored_runs([run_in(tmp_path / "run")]) == [Scored("small", "repair", 4, (100 * 0.7937,))]


def test_cost_leaves_out_points_beside_lines():
    spent = costs_of_results([result("a", 10, 0, 0.9, 2.0), result("a", 10, 1, 0.9, 4.0), result("b", 10, 0, 0.9, 5.0)])
    assert spent == [Cost("a", 10, 3.0), Cost("b", 10, 5.0)]
    alone = cost(spent)
    assert isinstance(alone, Chart)
    assert alone.values("of") == ["a", "b"]
    chart = cost([*spent, Cost("a", 20, 6.0)])
    assert isinstance(chart, Chart)
    assert chart.rows() == [{"of": "a", "edits": 10, "seconds": 3.0}, {"of": "a", "edits": 20, "seconds": 6.0}]
    assert "a: 20 edits in 6.0 s, 200 a minute" in chart.words
    assert isinstance(cost([]), str)
