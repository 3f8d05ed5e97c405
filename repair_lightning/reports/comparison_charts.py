"""The pictures of several runs as data: the parts of the method, sensitivity, growth with the number of edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import SCORES_IN_WORDS, Chart, Cost
from repair_lightning.reports.comparison import Grid, Result
from repair_lightning.reports.editor_tables import costs
from repair_lightning.scoring.protocols import AUTOREGRESSIVE

PANELS = ("rel", "gen", "loc", "op")
TOLD = 3
"""Most lines whose every point the words name."""


def finished(results: Iterable[Result]) -> list[Result]:
    """Those that have figures."""
    return [result for result in results if result.status == "finished"]


def _values(results: Sequence[Result], kind: str) -> list[float]:
    found = [result.figure(("final", AUTOREGRESSIVE, kind)) for result in finished(results)]
    return [100 * value for value in found if value is not None]


def _spread(values: Sequence[float]) -> float | None:
    return round(stdev(values), 3) if len(values) > 1 else None


def _highest(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """The row with the highest OP for each value of a column."""
    values = dict.fromkeys(row[by] for row in rows)
    return [max((row for row in rows if row[by] == value), key=lambda row: float(row["OP"])) for value in values]


def _table(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def components(results: Sequence[Result]) -> Chart | str:
    """Rel, Gen, Loc and OP of every variant (paper, Fig. 5), at the size at which most variants were run."""
    done = finished(results)
    sizes = sorted({result.size for result in done})
    if not sizes or len({result.variant for result in done}) < 2:
        return "components: needs a comparison (python -m repair_lightning.compare) with two finished variants"
    size = max(sizes, key=lambda size: (len({run.variant for run in done if run.size == size}), size))
    shown = [result for result in done if result.size == size]
    rows: list[dict[str, Any]] = []
    for variant in dict.fromkeys(result.variant for result in shown):
        runs = [result for result in shown if result.variant == variant]
        for kind in PANELS:
            values = _values(runs, kind)
            if values:
                name = SCORES_IN_WORDS[kind]
                rows.append({"variant": variant, "score": name, "value": round(mean(values), 3), "sd": _spread(values)})
    if not rows:
        return "components: no finished variant has a score"
    ops = {row["variant"]: row["value"] for row in rows if row["score"] == "OP"}
    ranked = sorted(ops, key=lambda name: -ops[name])
    seeds = len({result.seed for result in shown})
    return Chart(
        name="components",
        title=f"Which parts help, {size:,} edits",
        words=f"Free generation, mean over {seeds} seed{'s' * (seeds > 1)}. OP: "
        + "; ".join(f"{name} {ops[name]:.1f}" for name in ranked)
        + ".",
        kind="bars",
        columns=_table(rows),
        x="value",
        y="variant",
        panel="score",
        spread="sd",
        labels={"value": "per cent", "variant": ""},
        limits=(0, 100),
    )


def sensitivity(grid: Grid, results: Sequence[Result], name: str) -> Chart | str:
    """OP over a grid of two options (paper, Fig. 6), at the largest size of which a run has finished."""
    done = finished(results)
    if not done:
        return f"{name}: no cell of the grid has finished"
    size = max(result.size for result in done)
    (row, ys), (column, xs) = grid.options.items()
    rows = []
    for y in ys:
        for x in xs:
            variant = Grid.name({row: y, column: x})
            values = _values([run for run in done if run.variant == variant and run.size == size], "op")
            rows.append({_short(column): x, _short(row): y, "OP": round(mean(values), 3) if values else None})
    known = [line for line in rows if line["OP"] is not None]
    if not known:
        return f"{name}: no cell of the grid has an OP"
    best, worst = (pick(known, key=lambda line: line["OP"]) for pick in (max, min))
    said = [
        f"{line['OP']:.1f} at {_short(row)} {line[_short(row)]} and {_short(column)} {line[_short(column)]}"
        for line in (best, worst)
    ]
    default = (grid.default[column], grid.default[row]) if len(grid.default) == 2 else None
    return Chart(
        name=name,
        title=f"OP over {size:,} edits",
        words=f"Best {said[0]}; worst {said[1]}." + " The frame marks the default." * bool(default),
        kind="heat",
        columns=_table(rows),
        x=_short(column),
        y=_short(row),
        group="OP",
        labels={_short(option): _in_words(option) for option in grid.options},
        mark=default,
    )


def _short(option: str) -> str:
    return option.rsplit(".", 1)[-1]


OPTIONS_IN_WORDS = {
    "model.writing.capacity": "edits per shard",
    "model.writing.mask_ratio": "mask ratio",
    "model.writing.steps": "inner steps",
    "model.writing.lr": "learning rate",
    "model.writing.stop_margin": "stop margin, nats",
    "monitor.tau_correct": "error threshold",
}


def _in_words(option: str) -> str:
    return OPTIONS_IN_WORDS.get(option, _short(option))


@dataclass(frozen=True)
class Scored:
    """The final OP of some runs that differ in their seed alone, in per cent."""

    base: str
    variant: str
    edits: int
    values: tuple[float, ...]


def scored_runs(runs: Sequence[Artefacts]) -> list[Scored]:
    """Single runs; the editor's name is the variant."""
    found = [(run, run.score("op")) for run in runs]
    return [
        Scored(run.base, str(run.metrics.get("editor", "run")), run.metrics["n_edits"], (100 * op,))
        for run, op in found
        if op is not None
    ]


def scored_results(results: Sequence[Result]) -> list[Scored]:
    """A comparison's variants and sizes."""
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for result in finished(results):
        base = str(result.figure(("base", "name")) or "base").rstrip("/").split("/")[-1]
        groups.setdefault((base, result.variant, result.edits), []).append(result)
    found = [Scored(*key, tuple(_values(runs, "op"))) for key, runs in groups.items()]
    return [one for one in found if one.values]


def scale(found: Sequence[Scored]) -> Chart | str:
    """OP against the number of edits, a line per base and variant (paper, Fig. 3)."""
    of: dict[tuple[str, str], dict[int, list[float]]] = {}
    for one in found:
        of.setdefault((one.base, one.variant), {}).setdefault(one.edits, []).extend(one.values)
    lines = {key: sizes for key, sizes in of.items() if len(sizes) > 1}
    if not lines:
        return "scale: needs runs of one base with different numbers of edits"
    variants, bases = {variant for _, variant in lines}, {base for base, _ in lines}
    rows = [
        {
            "of": base if len(variants) == 1 else variant if len(bases) == 1 else f"{base}, {variant}",
            "edits": edits,
            "OP": round(mean(values), 3),
            "sd": _spread(values),
        }
        for (base, variant), sizes in lines.items()
        for edits, values in sorted(sizes.items())
    ]
    told = rows if len(lines) <= TOLD else _highest(rows, "edits")
    ends = "; ".join(f"{row['of']}, {row['edits']:,} edits: {row['OP']:.1f}" for row in told)
    which = "" if told is rows else "highest: "
    return Chart(
        name="scale",
        title="OP against the number of edits",
        words=f"Free generation, final model; {which}{ends}.",
        kind="lines",
        columns=_table(rows),
        x="edits",
        y="OP",
        group="of",
        spread="sd",
        labels={"edits": "edits", "OP": "OP, per cent"},
        log="x",
        limits=(0, 100),
    )


def costs_of_results(results: Sequence[Result], before: str = "") -> list[Cost]:
    """Mean seconds of editing of a comparison's variants and sizes; `before` leads their labels."""
    groups: dict[tuple[str, int], list[float]] = {}
    for result in finished(results):
        seconds, edits = result.figure(("seconds", "edit")), result.figure(("n_edits",))
        if seconds and edits:
            groups.setdefault((result.variant, int(edits)), []).append(seconds)
    return [Cost(f"{before}{variant}", edits, mean(values)) for (variant, edits), values in groups.items()]


COSTS = {
    "seconds": ("seconds per edit", "seconds_per_edit", 1.0),
    "kept": ("kB per edit that are kept", "bytes_per_edit", 1e-3),
    "peak": ("MiB at the peak of editing, above the base", "peak", 2.0**-20),
}
"""What OP is drawn against: its words, its figure, its unit."""


def op_against(cost: str, results: Sequence[Result]) -> Chart | str:
    """OP of editors against what an edit costs, a point for each number of edits: upper left is best.

    Args:
        cost: `seconds`, `kept` or `peak`.
        results: of a comparison.
    """
    words, name, scale = COSTS[cost]
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in finished(results):
        groups.setdefault((result.variant, result.size), []).append(result)
    rows: list[dict[str, Any]] = []
    for (variant, size), runs in groups.items():
        spent = [value for run in runs if (value := _spent(run, name)) is not None and value > 0]
        ops = _values(runs, "op")
        if spent and ops:
            place = {"cost": float(f"{scale * mean(spent):.4g}"), "OP": round(mean(ops), 3)}
            rows.append({"id": f"N = {size:,}", "editor": variant, **place})
    if not rows:
        return f"op_against_{cost}: needs a comparison with finished runs that say what an edit cost"
    said = "; ".join(
        f"{row['id']}: {row['editor']} {row['OP']:.1f} at {row['cost']:,g}" for row in _highest(rows, "id")
    )
    return Chart(
        name=f"op_against_{cost}",
        title=f"OP against {words}",
        words=f"Free generation, a picture per number of edits; upper left is best. Highest OP at {said}.",
        kind="points",
        columns=_table(rows),
        x="cost",
        y="OP",
        group="editor",
        panel="id",
        labels={"cost": words, "OP": "OP, per cent"},
        log="x",
        limits=(0, 100),
    )


def _spent(result: Result, name: str) -> float | None:
    if result.metrics is None:
        return None
    if name != "peak":
        return {**costs(result.metrics), **result.metrics}.get(name)
    device, host = (result.figure(("peak_bytes", kind)) for kind in ("device", "host"))
    return device or host
