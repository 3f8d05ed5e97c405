"""The paper's figures from our own runs: every chart as PNG, as SVG, and its data as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from repair_lightning.errors import ConfigError
from repair_lightning.reports import charts
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.comparison import TABLE, Grid, Result, read_tables
from repair_lightning.reports.drawing import Chart


class Comparison(NamedTuple):
    """What a comparison measured."""

    name: str
    results: Sequence[Result]
    grid: Grid | None


def draw_figures(folders: Sequence[Path], to: Path) -> tuple[list[Path], list[str]]:
    """Draw all figures that some runs, comparisons, or folders of either provide, into a folder, which is made.
    Returns the files, and a line for every figure that is left out, with what it misses."""
    made = list(charts_of(*gather(folders)))
    to.mkdir(parents=True, exist_ok=True)
    files = [file for chart in made if isinstance(chart, Chart) for file in chart.write(to)]
    return files, [words for words in made if isinstance(words, str)]


def draw_comparison(folder: Path, results: Sequence[Result], grid: Grid | None = None) -> list[Path]:
    """Draw OP over a grid as `heat_map`, or against what an edit costs; returns the PNG files, none without an OP."""
    drawn = charts.op_against(results) if grid is None else [charts.sensitivity(grid, results, "heat_map")]
    return [chart.write(folder)[0] for chart in drawn if isinstance(chart, Chart)]


def gather(folders: Sequence[Path]) -> tuple[list[Artefacts], list[Comparison]]:
    """The runs and comparisons in some folders; a ConfigError where one holds none. A comparison's own runs are its
    results, and not runs besides."""
    runs: list[Artefacts] = []
    comparisons: list[Comparison] = []
    for folder in folders:
        tables = [file.parent for file in sorted(folder.rglob(TABLE))]
        inside = [file.parent for file in sorted(folder.rglob("metrics.json"))]
        alone = [run for run in inside if not any(run.is_relative_to(table) for table in tables)]
        if not tables and not alone:
            words = "holds no finished run and no comparison; give a run directory or a folder of them"
            raise ConfigError(f"'{folder}' {words}")
        comparisons += [Comparison(table.resolve().name, *read_tables(table)) for table in tables]
        runs += [Artefacts.read(run) for run in alone]
    return runs, comparisons


def charts_of(runs: Sequence[Artefacts], comparisons: Sequence[Comparison]) -> Iterator[Chart | str]:
    """Every chart, or why there is none: of each run, of each comparison, and of all together."""
    of_runs = {name: make for name, make in charts.RUN_CHARTS.items() if name != "cost"}
    for run in runs:
        yield from (_named(make(run), run.name, len(runs)) for make in of_runs.values())
    if not runs:
        yield f"{', '.join(of_runs)}: need the directory of a run"
    plain = [one for one in comparisons if one.grid is None]
    several = [one for one in plain if len({result.variant for result in one.results}) > 1]
    for one in several:
        drawn = (charts.components(one.results), *charts.op_against(one.results))
        yield from (_named(chart, one.name, len(several)) for chart in drawn)
    if not several:
        yield charts.components([])
    for one in comparisons:
        if one.grid is not None:
            yield charts.sensitivity(one.grid, one.results, f"sensitivity-{_plain(one.name)}")
    if len(plain) == len(comparisons):
        yield "sensitivity: needs a comparison over a grid, as configs/compare/shards_mask.yaml"
    yield charts.scale([*map(charts.result_of, runs), *(result for one in plain for result in one.results)])
    spent = [charts.costs_of_results(one.results, f"{one.name}: ") for one in plain]
    yield charts.cost(pd.concat([charts.costs_of(runs), *spent]))


def _named(chart: Chart | str, of: str, among: int) -> Chart | str:
    """A chart whose files, or a line that, says what it is of, where it is one among several."""
    if among < 2:
        return chart
    return f"{of}: {chart}" if isinstance(chart, str) else replace(chart, name=f"{chart.name}-{_plain(of)}")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
