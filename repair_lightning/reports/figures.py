"""The paper's figures from our own runs: every chart as PNG, as SVG, and its data as CSV."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repair_lightning.errors import ConfigError
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import RUN_CHARTS, Chart, cost, costs_of
from repair_lightning.reports.comparison import TABLE, Grid, Result, read_tables
from repair_lightning.reports.comparison_charts import (
    COSTS,
    components,
    costs_of_results,
    op_against,
    scale,
    scored_results,
    scored_runs,
    sensitivity,
)

COLOURS = ("#0b6e99", "#d97706", "#2f855a", "#a23b72", "#6b5fb5", "#b93a20", "#7a8790", "#8a6d1f")
DASHES = ("-", "--", ":", "-.")
"""Lines that lie on each other show through, and colour is not all that tells them apart."""
MARKERS = ("o", "^", "s", "D")
"""Colours come again with another mark."""
MARK, DARK, FAINT = "#b93a20", "#20282d", "#eceff1"
DPI = 130


@dataclass(frozen=True)
class Comparison:
    """What a comparison measured."""

    name: str
    results: Sequence[Result]
    grid: Grid | None


# -- what is drawn -----------------------------------------------------------------------------------------------------


def draw_figures(folders: Sequence[Path], to: Path) -> tuple[list[Path], list[str]]:
    """Draw all figures that some runs provide.

    Args:
        folders: run directories, results of `repair_lightning.commands.compare`, or folders of either.
        to: where the files go; made if missing.

    Returns:
        The files, and a line for every figure that is left out, with what it misses.

    Raises:
        ConfigError: matplotlib is missing, or a folder holds no finished run.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures are drawn by matplotlib, which is missing; pip install 'repair-lightning[figures]'")
    made = list(charts_of(*gather(folders)))
    to.mkdir(parents=True, exist_ok=True)
    files = [file for chart in made if isinstance(chart, Chart) for file in write_chart(chart, to)]
    return files, [words for words in made if isinstance(words, str)]


def draw_costs(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draw OP against what an edit costs; returns the PNG files, none where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    charts = [op_against(cost, results) for cost in COSTS]
    return [write_chart(chart, folder)[0] for chart in charts if isinstance(chart, Chart)]


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
    grids = [one for one in comparisons if one.grid is not None]
    several = [one for one in plain if len({result.variant for result in one.results}) > 1]
    for one in several:
        yield _named(components(one.results), one.name if len(several) > 1 else "")
    if not several:
        yield components([])
    for one in several:
        for spent in COSTS:
            yield _named(op_against(spent, one.results), one.name if len(several) > 1 else "")
    for one in grids:
        assert one.grid is not None
        yield sensitivity(one.grid, one.results, f"sensitivity-{_plain(one.name)}")
    if not grids:
        yield "sensitivity: needs a comparison over a grid, as configs/compare/shards_mask.yaml"
    yield scale([*scored_runs(runs), *(found for one in plain for found in scored_results(one.results))])
    labels = [run.name for run in runs]
    found = [spent for run, label in zip(runs, labels, strict=True) for spent in costs_of(run, label)]
    yield cost([*found, *(spent for one in plain for spent in costs_of_results(one.results, f"{one.name}: "))])


def _named(chart: Chart | str, of: str) -> Chart | str:
    """A chart whose files, or a line that, says what it is of."""
    if not of:
        return chart
    return f"{of}: {chart}" if isinstance(chart, str) else replace(chart, name=f"{chart.name}-{_plain(of)}")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)


# -- drawing -----------------------------------------------------------------------------------------------------------


def write_chart(chart: Chart, to: Path) -> list[Path]:
    """Draw one chart; returns `NAME.png`, `NAME.svg` and `NAME.csv`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(style()):
        figure = Figure(layout="constrained")
        DRAWN[chart.kind](figure, chart)
        figure.suptitle(_as_it_is(chart.title), x=0.01, ha="left", fontsize=10, fontweight="bold")
        for suffix in ("png", "svg"):
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(to / f"{chart.name}.{suffix}", dpi=DPI, metadata=metadata)
    with open(to / f"{chart.name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(chart.columns)
        writer.writerows(zip(*chart.columns.values(), strict=True))
    return [to / f"{chart.name}.{suffix}" for suffix in ("png", "svg", "csv")]


def style() -> Any:
    """Quiet axes; texts of the user's are no formulas."""
    return {
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a949b",
        "axes.labelcolor": "#3d464c",
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "xtick.color": "#3d464c",
        "ytick.color": "#3d464c",
        "grid.color": FAINT,
        "legend.frameon": False,
        "svg.hashsalt": "repair",
        "text.parse_math": False,
    }


def _as_it_is(value: Any) -> str:
    """A text of the user's on a figure: control characters have no glyph."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _lines(figure: Any, chart: Chart) -> None:
    groups = chart.values(chart.group)
    figure.set_size_inches(5.2, 3.4 + 0.16 * max(0, len(groups) - 4))
    axis = figure.subplots()
    for i, group in enumerate(groups):
        part = chart.part(chart.group, group)
        spread = [value or 0.0 for value in part[chart.spread]] if chart.spread else None
        look = _look(i) | {"linestyle": DASHES[i % len(DASHES)], "label": _as_it_is(group)}
        look |= {"markersize": 4, "linewidth": 1.6, "capsize": 2}
        if len(part[chart.x]) > 60:
            look["marker"] = ""
        axis.errorbar(part[chart.x], part[chart.y], yerr=spread, **look)
    _logarithmic(axis, chart.log)
    _limited(axis, chart)
    axis.grid()
    axis.set(xlabel=chart.label(chart.x), ylabel=chart.label(chart.y))
    figure.legend(loc="outside lower center", ncols=min(4, len(groups)) if len(groups) <= 4 else 2, fontsize=7.5)


def _look(i: int) -> dict[str, Any]:
    """Colour and mark of the i-th group."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}


def _limited(axis: Any, chart: Chart) -> None:
    """The limits, with room for marks that lie on them."""
    if chart.limits:
        room = 0.03 * (chart.limits[1] - chart.limits[0])
        axis.set_ylim(chart.limits[0] - room, chart.limits[1] + room)


def _logarithmic(axis: Any, sides: str) -> None:
    """Logarithmic scales, with plain numbers on them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in sides:
        axis.set(**{f"{name}scale": "log"})
        side = getattr(axis, f"{name}axis")
        low, high = side.get_data_interval()
        wide = high > 200 * low > 0
        side.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        side.set_major_formatter("{x:,g}")
        side.set_minor_formatter(NullFormatter())


def _histograms(figure: Any, chart: Chart) -> None:
    panels = chart.values(chart.panel)
    figure.set_size_inches(5.2, 1.15 * len(panels) + 0.8)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel, colour in zip(axes, panels, COLOURS, strict=False):
        part = chart.part(chart.panel, panel)
        centres = part[chart.x]
        axis.bar(centres, part[chart.y], width=0.92 * (centres[1] - centres[0]), color=colour)
        axis.set_title(_as_it_is(panel))
        axis.set_ylabel("%")
        axis.grid(axis="y")
        if chart.mark is not None:
            axis.axvline(chart.mark, color=MARK, linewidth=1.2, linestyle="--")
    axes[-1].set_xlabel(chart.label(chart.x))


def _bars(figure: Any, chart: Chart) -> None:
    """Lying bars, a small picture per panel, the categories shared; the first stands on top."""
    panels, names = chart.values(chart.panel), chart.values(chart.y)
    figure.set_size_inches(2.0 * len(panels) + 2.2, 0.24 * len(names) + 1.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel, colour in zip(axes, panels, COLOURS, strict=False):
        part = chart.part(chart.panel, panel)
        places = [names.index(name) for name in part[chart.y]]
        spread = [value or 0.0 for value in part[chart.spread]] if chart.spread else None
        axis.barh(places, part[chart.x], xerr=spread, color=colour, height=0.68, error_kw={"linewidth": 1})
        for place, value in zip(places, part[chart.x], strict=True):
            axis.text(1.5, place, f"{value:.1f}", va="center", fontsize=6.5, color="white" if value > 18 else DARK)
        axis.set_title(_as_it_is(panel or ""), fontweight="bold")
        axis.set_xlabel(chart.label(chart.x))
        if chart.limits:
            axis.set_xlim(*chart.limits)
    axes[0].set_yticks(range(len(names)), [_as_it_is(name) for name in names])
    axes[0].invert_yaxis()


def _stacked(figure: Any, chart: Chart) -> None:
    names, groups = chart.values(chart.y), chart.values(chart.group)
    figure.set_size_inches(5.2, 0.4 * len(names) + 1.3)
    axis, left = figure.subplots(), [0.0] * len(names)
    for group, colour in zip(groups, COLOURS, strict=False):
        part = chart.part(chart.group, group)
        lengths = dict(zip(part[chart.y], part[chart.x], strict=True))
        sizes = [lengths.get(name, 0.0) for name in names]
        axis.barh(range(len(names)), sizes, left=left, color=colour, height=0.62, label=_as_it_is(group))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.set_yticks(range(len(names)), [_as_it_is(name) for name in names])
    axis.invert_yaxis()
    axis.set_xlabel(chart.label(chart.x))
    if chart.limits:
        axis.set_xlim(*chart.limits)
    figure.legend(loc="outside lower center", ncols=len(groups), fontsize=7.5)


def _heat(figure: Any, chart: Chart) -> None:
    from matplotlib.patches import Rectangle

    assert chart.group is not None
    xs, ys = chart.values(chart.x), chart.values(chart.y)
    rows = [row for row in chart.rows() if row[chart.group] is not None]
    known = {(row[chart.x], row[chart.y]): row[chart.group] for row in rows}
    values = [[known.get((x, y), float("nan")) for x in xs] for y in ys]
    measured = [value for row in values for value in row if value == value]
    top = max(measured)
    low = min(*measured, top - 20)  # small differences look small
    figure.set_size_inches(0.85 * len(xs) + 1.9, 0.6 * len(ys) + 1.3)
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis", vmin=low, vmax=top, aspect="auto", origin="lower")
    figure.colorbar(image, label=f"{chart.group}, per cent")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            words = "-" if value != value else f"{value:.1f}"
            axis.text(x, y, words, ha="center", va="center", color="white" if value < (low + top) / 2 else "black")
            if chart.mark == (xs[x], ys[y]):
                axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="red", lw=2))
    axis.set_xticks(range(len(xs)), [str(value) for value in xs])
    axis.set_yticks(range(len(ys)), [str(value) for value in ys])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set(xlabel=chart.label(chart.x), ylabel=chart.label(chart.y))


def _points(figure: Any, chart: Chart) -> None:
    """Places, a small picture per panel; what is named has a colour each, numbers are a scale of colours."""
    groups, panels = chart.values(chart.group), chart.values(chart.panel)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    named = any(isinstance(group, str) for group in groups)
    figure.set_size_inches(5.2 if across == 1 else 7.4, (4.2 if down == 1 else 2.5 * down) + 0.05 * len(groups) * named)
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    look = {"s": 14 if across == 1 else 26, "alpha": 0.8, "linewidths": 0}
    for place, (panel, axis) in enumerate(zip(panels, axes.flat, strict=False)):
        part = chart.part(chart.panel, panel)
        if named:
            for i, group in enumerate(groups):
                mine = [j for j, of in enumerate(part[chart.group or ""]) if of == group]
                x, y = ([part[column][j] for j in mine] for column in (chart.x, chart.y))
                axis.scatter(x, y, label=_as_it_is(group), **_look(i), **look)
        else:
            numbers = [float("nan") if value is None else value for value in part[chart.group or ""]]
            cloud = axis.scatter(part[chart.x], part[chart.y], c=numbers, cmap="viridis", **look)
            figure.colorbar(cloud, label=chart.label(chart.group or ""))
        axis.set_title(_as_it_is(panel or ""))
        _logarithmic(axis, chart.log)
        _limited(axis, chart)
        axis.grid()
        axis.set_ylabel("" if place % across else chart.label(chart.y))
        if place + across >= len(panels):  # nothing below it
            axis.set_xlabel(chart.label(chart.x))
            axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if named:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7.5)


DRAWN: Mapping[str, Callable[[Any, Chart], None]] = {
    "lines": _lines,
    "histograms": _histograms,
    "bars": _bars,
    "stacked": _stacked,
    "heat": _heat,
    "points": _points,
}
