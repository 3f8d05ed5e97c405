"""The paper's figures from our own runs: every chart as PNG, as SVG, and its data as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from repair_lightning.errors import ConfigError
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import RUN_CHARTS, cost, costs_of
from repair_lightning.reports.comparison import TABLE, Grid, Result, read_tables
from repair_lightning.reports.comparison_charts import (
    COSTS,
    components,
    costs_of_results,
    finished,
    op_against,
    scale,
    scored_runs,
    sensitivity,
)
from repair_lightning.reports.drawing import Chart


class Comparison(NamedTuple):
    """What a comparison measured."""

    name: str
    results: Sequence[Result]
    grid: Grid | None


def draw_figures(folders: Sequence[Path], to: Path) -> tuple[list[Path], list[str]]:
    """Draw all figures that some runs, comparisons, or folders of either provide, into a folder, which is made.

    Returns:
        The files, and a line for every figure that is left out, with what it misses.

    Raises:
        ConfigError: a folder holds no finished run.
    """
    made = list(charts_of(*gather(folders)))
    to.mkdir(parents=True, exist_ok=True)
    files = [file for chart in made if isinstance(chart, Chart) for file in chart.write(to)]
    return files, [words for words in made if isinstance(words, str)]


def draw_costs(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draw OP against what an edit costs; returns the PNG files."""
    charts = [op_against(cost, results) for cost in COSTS]
    return [chart.write(folder)[0] for chart in charts if isinstance(chart, Chart)]


def draw_grid(folder: Path, grid: Grid, results: Sequence[Result]) -> list[Path]:
    """Draw OP over a grid as `heat_map.png` and `heat_map.svg`; returns them, nothing where no cell has an OP."""
    chart = sensitivity(grid, results, "heat_map")
    return chart.write(folder, ("png", "svg")) if isinstance(chart, Chart) else []


def gather(folders: Sequence[Path]) -> tuple[list[Artefacts], list[Comparison]]:
    """The runs and comparisons in some folders. A comparison's own runs are its results, and not runs besides."""
    runs: list[Artefacts] = []
    comparisons: list[Comparison] = []
    for folder in folders:
        tables = [file.parent for file in sorted(folder.rglob(TABLE))]
        inside = [file.parent for file in sorted(folder.rglob("metrics.json"))]
        alone = [run for run in inside if not any(run.is_relative_to(table) for table in tables)]
        if not tables and not alone:
            raise ConfigError(
                f"'{folder}' holds no finished run and no comparison; give a run directory or a folder of them"
            )
        comparisons += [Comparison(table.resolve().name, *read_tables(table)) for table in tables]
        runs += [Artefacts.read(run) for run in alone]
    return runs, comparisons


def charts_of(runs: Sequence[Artefacts], comparisons: Sequence[Comparison]) -> Iterable[Chart | str]:
    """Every chart, or why there is none: of each run, of each comparison, and of all together."""
    for run in runs:
        for name, make in RUN_CHARTS.items():
            if name != "cost":
                yield _named(make(run), run.name if len(runs) > 1 else "")
    if not runs:
        yield f"{', '.join(name for name in RUN_CHARTS if name != 'cost')}: need the directory of a run"
    plain = [one for one in comparisons if one.grid is None]
    several = [one for one in plain if len({result.variant for result in one.results}) > 1]
    for one in several:
        for chart in (components(one.results), *(op_against(spent, one.results) for spent in COSTS)):
            yield _named(chart, one.name if len(several) > 1 else "")
    if not several:
        yield components([])
    for one in comparisons:
        if one.grid is not None:
            yield sensitivity(one.grid, one.results, f"sensitivity-{_plain(one.name)}")
    if len(plain) == len(comparisons):
        yield "sensitivity: needs a comparison over a grid, as configs/compare/shards_mask.yaml"
    yield scale(pd.concat([scored_runs(runs), *(finished(one.results) for one in plain)]))
    yield cost(pd.concat([costs_of(runs), *(costs_of_results(one.results, f"{one.name}: ") for one in plain)]))


def _named(chart: Chart | str, of: str) -> Chart | str:
    """A chart whose files, or a line that, says what it is of."""
    if not of:
        return chart
    return f"{of}: {chart}" if isinstance(chart, str) else replace(chart, name=f"{chart.name}-{_plain(of)}")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
