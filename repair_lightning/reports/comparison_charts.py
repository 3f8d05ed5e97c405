"""The pictures of several runs: the parts of the method, sensitivity, growth with the number of edits, costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, TypeVar

from repair_lightning.reports import drawing
from repair_lightning.reports.artefacts import Artefacts, Row
from repair_lightning.reports.charts import SCORES_IN_WORDS, Cost
from repair_lightning.reports.comparison import COLUMNS, Grid, Result, cell, costs, short
from repair_lightning.reports.drawing import Chart
from repair_lightning.scoring.protocols import AUTOREGRESSIVE

T = TypeVar("T")

PANELS = ("rel", "gen", "loc", "op")
TOLD = 3
"""Most lines whose every point the words name."""
OPTIONS_IN_WORDS = {
    "model.writing.capacity": "edits per shard",
    "model.writing.mask_ratio": "mask ratio",
    "model.writing.steps": "inner steps",
    "model.writing.lr": "learning rate",
    "model.writing.stop_margin": "stop margin, nats",
    "monitor.tau_correct": "error threshold",
}
COSTS = {
    "seconds": ("seconds per edit", "seconds_per_edit", 1.0),
    "kept": ("kB per edit that are kept", "bytes_per_edit", 1e-3),
    "peak": ("MiB at the peak of editing, above the base", "peak", 2.0**-20),
}
"""What OP is drawn against: its words, its figure, its unit."""


def finished(results: Iterable[Result]) -> list[Result]:
    """Those that have figures."""
    return [result for result in results if result.status == "finished"]


def _grouped(results: Iterable[Result], key: Callable[[Result], T]) -> dict[T, list[Result]]:
    groups: dict[T, list[Result]] = {}
    for result in finished(results):
        groups.setdefault(key(result), []).append(result)
    return groups


def _values(results: Sequence[Result], kind: str = "op") -> list[float]:
    found = [result.figure(("final", AUTOREGRESSIVE, kind)) for result in finished(results)]
    return [100 * value for value in found if value is not None]


def _spread(values: Sequence[float]) -> float | None:
    return round(stdev(values), 3) if len(values) > 1 else None


def _highest(rows: Sequence[Row], by: str) -> list[Row]:
    """The row with the highest OP for each value of a column."""
    return [max((row for row in rows if row[by] == at), key=lambda row: row["OP"]) for at in drawing.values(rows, by)]


def components(results: Sequence[Result]) -> Chart | str:
    """Rel, Gen, Loc and OP of every variant (paper, Fig. 5), at the size at which most variants were run."""
    variants = {size: {run.variant for run in runs} for size, runs in _grouped(results, lambda run: run.size).items()}
    if len(set().union(*variants.values())) < 2:
        return "components: needs a comparison (python -m repair_lightning.compare) with two finished variants"
    size = max(variants, key=lambda size: (len(variants[size]), size))
    shown = [result for result in finished(results) if result.size == size]
    rows: list[dict[str, Any]] = []
    for variant, runs in _grouped(shown, lambda run: run.variant).items():
        for kind in PANELS:
            if found := _values(runs, kind):
                score = {"score": SCORES_IN_WORDS[kind], "value": round(mean(found), 3), "sd": _spread(found)}
                rows.append({"variant": variant, **score})
    if not rows:
        return "components: no finished variant has a score"
    ops = sorted((row for row in rows if row["score"] == "OP"), key=lambda row: -row["value"])
    seeds = len({result.seed for result in shown})
    words = f"Free generation, mean over {seeds} seed{'s' * (seeds > 1)}. OP: "
    words += "; ".join(f"{row['variant']} {row['value']:.1f}" for row in ops) + "."
    picture = drawing.bars(rows, "value", "variant", "score", "sd", "per cent")
    return Chart("components", f"Which parts help, {size:,} edits", words, rows, picture)


def sensitivity(grid: Grid, results: Sequence[Result], name: str) -> Chart | str:
    """OP over a grid of two options (paper, Fig. 6), at the largest size; the default has a frame."""
    size = max((result.size for result in finished(results)), default=0)
    (row, ys), (column, xs) = grid.options.items()
    x, y = short(column), short(row)
    rows: list[dict[str, Any]] = []
    for value in ys:
        for other in xs:
            variant = grid.name({row: value, column: other})
            runs = [run for run in results if run.variant == variant and run.size == size]
            op = round(mean(ops), 3) if (ops := _values(runs)) else None
            rows.append({x: other, y: value, "OP": op, "shown": cell(runs, COLUMNS["OP"])})
    known = [line for line in rows if line["OP"] is not None]
    if not known:
        return f"{name}: no cell of the grid has an OP"
    best, worst = (pick(known, key=lambda line: line["OP"]) for pick in (max, min))
    said = [f"{line['OP']:.1f} at {y} {line[y]} and {x} {line[x]}" for line in (best, worst)]
    default = (grid.default[column], grid.default[row]) if len(grid.default) == 2 else None
    words = f"Best {said[0]}; worst {said[1]}." + " The frame marks the default." * bool(default)
    titles = [OPTIONS_IN_WORDS.get(option, short(option)) for option in (column, row)]
    return Chart(name, f"OP over {size:,} edits", words, rows, drawing.heat(rows, x, y, "OP", "shown", titles, default))


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

    def key(run: Result) -> tuple[str, str, int]:
        return str(run.figure(("base", "name")) or "base").rstrip("/").split("/")[-1], run.variant, run.edits

    found = [Scored(*of, tuple(_values(runs))) for of, runs in _grouped(results, key).items()]
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
    words = f"Free generation, final model; {'' if told is rows else 'highest: '}{ends}."
    picture = drawing.lines(rows, "edits", "OP", "of", ("edits", "OP, per cent"), log="x", spread="sd")
    return Chart("scale", "OP against the number of edits", words, rows, picture)


def costs_of_results(results: Sequence[Result], before: str = "") -> list[Cost]:
    """Mean seconds of editing of a comparison's variants and sizes; `before` leads their labels."""
    found = []
    for (variant, edits), runs in _grouped(results, lambda run: (run.variant, run.figure(("n_edits",)))).items():
        spent = [seconds for run in runs if (seconds := run.figure(("seconds", "edit")))]
        if spent and edits:
            found.append(Cost(f"{before}{variant}", int(edits), mean(spent)))
    return found


def op_against(cost: str, results: Sequence[Result]) -> Chart | str:
    """OP of editors against what an edit costs, a point for each number of edits: upper left is best.

    Args:
        cost: `seconds`, `kept` or `peak`.
        results: of a comparison.
    """
    words, name, unit = COSTS[cost]
    rows: list[dict[str, Any]] = []
    for (variant, size), runs in _grouped(results, lambda run: (run.variant, run.size)).items():
        spent = [value for run in runs if (value := _spent(run, name)) is not None and value > 0]
        if spent and (ops := _values(runs)):
            place = {"cost": float(f"{unit * mean(spent):.4g}"), "OP": round(mean(ops), 3)}
            rows.append({"id": f"N = {size:,}", "editor": variant, **place})
    if not rows:
        return f"op_against_{cost}: needs a comparison with finished runs that say what an edit cost"
    said = "; ".join(
        f"{row['id']}: {row['editor']} {row['OP']:.1f} at {row['cost']:,g}" for row in _highest(rows, "id")
    )
    said = f"Free generation, a picture per number of edits; upper left is best. Highest OP at {said}."
    picture = drawing.points(rows, "cost", "OP", "editor", (words, "OP, per cent"), panel="id")
    return Chart(f"op_against_{cost}", f"OP against {words}", said, rows, picture)


def _spent(result: Result, name: str) -> float | None:
    if name != "peak":
        return {**costs(result.metrics or {}), **(result.metrics or {})}.get(name)
    device, host = (result.figure(("peak_bytes", kind)) for kind in ("device", "host"))
    return device or host
