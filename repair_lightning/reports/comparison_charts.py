"""The pictures of several runs: the parts of the method, sensitivity, growth with the number of edits, costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from repair_lightning.reports import drawing
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import costs_of
from repair_lightning.reports.comparison import COLUMNS, Grid, Result, cell, short
from repair_lightning.reports.drawing import Chart, records

PANELS = ("Rel", "Gen", "Loc", "OP")
TOLD = 3
"""Most lines whose every point the words name."""
COSTS = {
    "seconds": "seconds per edit",
    "kept": "kB per edit that are kept",
    "peak": "MiB at the peak of editing, above the base",
}
"""What OP is drawn against, in words."""


def finished(results: Sequence[Result]) -> pd.DataFrame:
    """A row per finished run: `variant`, `size`, `seed`, `base`, `edits`, scores in per cent, what it cost."""
    rows: list[dict[str, Any]] = []
    for run in (run for run in results if run.status == "finished"):
        base = str(run.figure(("base", "name")) or "base").rstrip("/").split("/")[-1]
        peak = run.figure(("peak_bytes", "device")) or run.figure(("peak_bytes", "host"))
        kept = run.figure(("bytes_per_edit",))
        rows.append(
            {
                **{"variant": run.variant, "size": run.size, "seed": run.seed, "base": base, "edits": run.edits},
                **{name: COLUMNS[name].of(run) for name in PANELS},
                "spent": run.figure(("seconds", "edit")),
                "written": run.figure(("n_edits",)),
                "seconds": run.figure(("seconds_per_edit",)),
                "kept": kept and kept * 1e-3,
                "peak": peak and peak * 2.0**-20,
            }
        )
    return pd.DataFrame(rows or None, columns=list(rows[0]) if rows else ["variant", "size", *PANELS, *COSTS])


def averaged(frame: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """The mean of a column in each group, and as `sd` its standard deviation where there are several."""
    found = frame.dropna(subset=[value]).groupby(by, sort=False)[value].agg(["mean", "std"]).round(3)
    return found.reset_index().rename(columns={"mean": value, "std": "sd"})


def _highest(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The row with the highest OP for each value of a column."""
    return frame.loc[frame.groupby(by, sort=False)["OP"].idxmax()]


def components(results: Sequence[Result]) -> Chart | str:
    """Rel, Gen, Loc and OP of every variant (paper, Fig. 5), at the size at which most variants were run."""
    frame = finished(results)
    variants = frame.groupby("size")["variant"].nunique()
    if frame["variant"].nunique() < 2:
        return "components: needs a comparison (python -m repair_lightning.compare) with two finished variants"
    size = max(variants.index, key=lambda size: (variants[size], size))
    shown = frame[frame["size"] == size]
    found = averaged(shown.melt("variant", PANELS, "score", "value"), ["variant", "score"], "value")
    if found.empty:
        return "components: no finished variant has a score"
    seeds = shown["seed"].nunique()
    ops = records(found[found["score"] == "OP"].sort_values("value", ascending=False))
    words = f"Free generation, mean over {seeds} seed{'s' * (seeds > 1)}. OP: "
    words += "; ".join(f"{row['variant']} {row['value']:.1f}" for row in ops) + "."
    rows = records(found)
    picture = drawing.bars(rows, "value", "variant", "score", "sd", "per cent")
    return Chart("components", f"Which parts help, {size:,} edits", words, rows, picture)


def sensitivity(grid: Grid, results: Sequence[Result], name: str) -> Chart | str:
    """OP over a grid of two options (paper, Fig. 6), at the largest size; the default has a frame."""
    size = max((run.size for run in results if run.status == "finished"), default=0)
    (row, ys), (column, xs) = grid.options.items()
    x, y = short(column), short(row)
    found = finished(results)
    ops = averaged(found[found["size"] == size], ["variant"], "OP").set_index("variant")["OP"].to_dict()
    rows = []
    for variant, cell_options in [(grid.name({row: b, column: a}), {x: a, y: b}) for b in ys for a in xs]:
        runs = [run for run in results if run.variant == variant and run.size == size]
        rows.append({**cell_options, "OP": ops.get(variant), "shown": cell(runs, COLUMNS["OP"])})
    known = [line for line in rows if line["OP"] is not None]
    if not known:
        return f"{name}: no cell of the grid has an OP"
    best, worst = (pick(known, key=lambda line: line["OP"]) for pick in (max, min))
    said = [f"{line['OP']:.1f} at {y} {line[y]} and {x} {line[x]}" for line in (best, worst)]
    default = (grid.default[column], grid.default[row]) if len(grid.default) == 2 else None
    words = f"Best {said[0]}; worst {said[1]}." + " The frame marks the default." * bool(default)
    picture = drawing.heat(rows, x, y, "OP", "shown", default)
    return Chart(name, f"OP over {size:,} edits", words, rows, picture)


def scored_runs(runs: Sequence[Artefacts]) -> pd.DataFrame:
    """What `scale` draws of single runs; the editor's name is the variant."""
    rows = [(run.base, run.metrics.get("editor", "run"), run.metrics["n_edits"], run.score("op")) for run in runs]
    frame = pd.DataFrame(rows, columns=["base", "variant", "edits", "OP"])
    return frame.assign(OP=100 * frame["OP"].astype(float))


def scale(frame: pd.DataFrame) -> Chart | str:
    """OP against the number of edits, a line per base and variant (paper, Fig. 3).

    Args:
        frame: a row per run with `base`, `variant`, `edits` and `OP`.
    """
    missing = "scale: needs runs of one base with different numbers of edits"
    if frame.empty:
        return missing
    found = averaged(frame, ["base", "variant", "edits"], "OP")
    found = found[found.groupby(["base", "variant"])["edits"].transform("nunique") > 1]
    if found.empty:
        return missing
    parts = [name for name in ("base", "variant") if found[name].nunique() > 1] or ["base"]
    found = found.assign(of=found[parts].agg(", ".join, axis=1))[["of", "edits", "OP", "sd"]]
    found = found.sort_values(["of", "edits"])
    told = found if found["of"].nunique() <= TOLD else _highest(found, "edits")
    ends = "; ".join(f"{row['of']}, {row['edits']:,} edits: {row['OP']:.1f}" for row in records(told))
    words = f"Free generation, final model; {'' if told is found else 'highest: '}{ends}."
    rows = records(found)
    picture = drawing.lines(rows, "edits", "OP", "of", ("edits", "OP, per cent"), log="x", spread="sd")
    return Chart("scale", "OP against the number of edits", words, rows, picture)


def costs_of_results(results: Sequence[Result], before: str = "") -> pd.DataFrame:
    """What `cost` draws of a comparison: mean seconds of editing; `before` leads the variants' names."""
    frame = finished(results)
    if frame.empty:
        return costs_of(())
    found = averaged(frame, ["variant", "written"], "spent").rename(columns={"written": "edits", "spent": "seconds"})
    return found.assign(of=before + found["variant"])[["of", "edits", "seconds"]]


def op_against(cost: str, results: Sequence[Result]) -> Chart | str:
    """OP of editors against what an edit costs, a point for each number of edits: upper left is best.

    Args:
        cost: `seconds`, `kept` or `peak`.
        results: of a comparison.
    """
    frame = finished(results).dropna(subset=[cost, "OP"])
    frame = frame[frame[cost] > 0]
    if frame.empty:
        return f"op_against_{cost}: needs a comparison with finished runs that say what an edit cost"
    found = frame.groupby(["size", "variant"], sort=False)[[cost, "OP"]].mean().round(4).reset_index()
    found = found.rename(columns={"variant": "editor", cost: "cost"})
    found = found.assign(id=found["size"].map(lambda size: f"N = {size:,}"))[["id", "editor", "cost", "OP"]]
    best = records(_highest(found, "id"))
    said = "; ".join(f"{row['id']}: {row['editor']} {row['OP']:.1f} at {row['cost']:,g}" for row in best)
    said = f"Free generation, a picture per number of edits; upper left is best. Highest OP at {said}."
    rows = records(found)
    picture = drawing.points(rows, "cost", "OP", "editor", (COSTS[cost], "OP, per cent"), panel="id")
    return Chart(f"op_against_{cost}", f"OP against {COSTS[cost]}", said, rows, picture)
