"""The tables of a comparison: variants against numbers of edits, over seeds, for people, papers and programs."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from repair_lightning.errors import RepairError
from repair_lightning.scoring.metrics import KINDS
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, PROTOCOLS, TEACHER_FORCED
from repair_lightning.storage.files import write_json

TABLE = "table.json"
"""The file with everything that a comparison measured."""

Place = tuple[str, ...]
"""Where a figure stands in `metrics.json`."""


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        variant: its name.
        note: what is special about it.
        size: edits that were asked for; the data may hold fewer (`metrics["n_edits"]`).
        seed: of the draw of edits and of the run.
        status: `failed` also where the run ended well without figures; `missing` where it was not run to its end;
            `stopped` where its time was over; `not run` where the comparison does not ask this size of the variant.
        command: what was run.
        error: the last line that a failed run said; the time of one that was stopped; why one is not run.
        metrics: the content of a finished run's `metrics.json`.
    """

    variant: str
    note: str
    size: int
    seed: int
    status: Literal["finished", "failed", "missing", "stopped", "not run"]
    command: str = ""
    error: str | None = None
    metrics: Mapping[str, Any] | None = None

    def figure(self, path: Place) -> float | None:
        """A figure of the run; None where it has none."""
        found: Any = self.metrics
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    @property
    def edits(self) -> int:
        """How many edits the model was given at once; the data may hold fewer than were asked for."""
        return self.size if self.figure(("singles",)) else int(self.figure(("n_edits",)) or self.size)


@dataclass(frozen=True)
class Column:
    """A figure as a table shows it: its place, its unit and its digits after the point."""

    path: Place
    scale: float = 100.0
    digits: int = 1

    def of(self, result: Result) -> float | None:
        """The figure of a run in the column's unit; None where the run has none."""
        value = result.figure(self.path)
        return None if value is None else self.scale * value


@dataclass(frozen=True)
class Table:
    """A table of strings."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Grid:
    """Variants that differ in two options alone.

    Attributes:
        options: dotted option -> its values; the first is the heat map's rows, the second its columns.
        default: the values that the heat map marks.
        fixed: dotted option -> value, in every cell.
    """

    options: Mapping[str, Sequence[Any]]
    default: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, dict[str, Any]]]:
        """Each variant's name and options, row by row."""
        found = [dict(zip(self.options, values, strict=True)) for values in product(*self.options.values())]
        return [(self.name(cell), {**self.fixed, **cell}) for cell in found]

    @staticmethod
    def name(cell: Mapping[str, Any]) -> str:
        """`lr 0.5 stop_margin 2.0`."""
        return " ".join(f"{_short(option)} {value}" for option, value in cell.items())


COLUMNS = {
    "Rel": Column(("final", AUTOREGRESSIVE, "rel")),
    "Gen": Column(("final", AUTOREGRESSIVE, "gen")),
    "Loc": Column(("final", AUTOREGRESSIVE, "loc")),
    "Near": Column(("final", AUTOREGRESSIVE, "near")),
    "OP": Column(("final", AUTOREGRESSIVE, "op")),
    "OP forced": Column(("final", TEACHER_FORCED, "op")),
    "OP oracle": Column(("oracle_routing", AUTOREGRESSIVE, "op")),
    "quarantined": Column(("closed_loop", "quarantined"), scale=1.0),
    "bytes/edit": Column(("bytes_per_edit",), scale=1.0, digits=0),
    "edits/min": Column(("edits_per_minute",), scale=1.0, digits=0),
}
"""The columns of the table of one size; scores are autoregressive unless they say otherwise, bytes those
that the edits left."""

FIGURES: dict[str, Place] = {
    "n_edits": ("n_edits",),
    **{f"{protocol}_{kind}": ("final", protocol, kind) for protocol in PROTOCOLS for kind in (*KINDS, "op")},
    **{f"before_merge_{protocol}_op": ("before_merge", protocol, "op") for protocol in PROTOCOLS},
    **{f"oracle_{protocol}_op": ("oracle_routing", protocol, "op") for protocol in PROTOCOLS},
    **{name: ("closed_loop", name) for name in ("windows", "pruned", "retriggered", "quarantined")},
    "merge_accepted": ("merge", "accepted"),
    "shards": ("shards",),
    "memory_bytes": ("memory_bytes",),
    "edits_per_minute": ("edits_per_minute",),
    "seconds": ("seconds", "total"),
}
"""The figures of a run in the CSV file; scores are shares."""


def cell(results: Sequence[Result], column: Column) -> str:
    """`mean ± deviation` over the finished runs, and how many failed; where none is finished, how they stand."""
    found = [column.of(result) for result in results if result.status == "finished"]
    values = [value for value in found if value is not None]
    failed = sum(result.status == "failed" for result in results)
    if not values:
        standing = {result.status for result in results}
        order = ("finished", "failed", "not run", "stopped")
        first = next((status for status in order if status in standing), "finished")
        return "-" if first == "finished" else first
    text = f"{mean(values):.{column.digits}f}"
    text += f" ± {stdev(values):.{column.digits}f}" if len(values) > 1 else ""
    return text + (f" ({failed} failed)" if failed else "")


def tables_of(results: Sequence[Result]) -> list[Table]:
    """OP of variants against sizes for each protocol, and all columns for the largest size of which a run finished."""
    sizes = sorted({result.size for result in results})
    largest = max((result.size for result in results if result.status == "finished"), default=max(sizes, default=0))
    tables = []
    for protocol in PROTOCOLS:
        column = Column(("final", protocol, "op"))
        header = ("variant", *(f"N = {size}" for size in sizes))
        rows = [
            (name, *(cell([run for run in runs if run.size == size], column) for size in sizes))
            for name, runs in by_variant(results).items()
        ]
        tables.append(Table(f"OP, {protocol.replace('_', ' ')}, per cent", header, rows))
    shown = {name: [run for run in runs if run.size == largest] for name, runs in by_variant(results).items()}
    rows = [(name, *(cell(runs, column) for column in COLUMNS.values())) for name, runs in shown.items() if runs]
    return [*tables, Table(f"All figures, N = {largest}", ("variant", *COLUMNS), rows)]


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each variant, in the order in which they first come."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.variant, []).append(result)
    return found


def _short(option: str) -> str:
    return option.rsplit(".", 1)[-1]


def draw_grid(folder: Path, grid: Grid, results: Sequence[Result]) -> list[Path]:
    """Draw a heat map of OP over a grid, at the largest size; the default has a frame.

    Returns:
        `heat_map.png` and `heat_map.svg`, or nothing where matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    (row, rows), (column, columns) = grid.options.items()
    largest = max((result.size for result in results), default=0)
    shown = by_variant([result for result in results if result.size == largest])
    runs = [[shown.get(grid.name({row: y, column: x}), []) for x in columns] for y in rows]
    values = [[_mean_op(found) for found in line] for line in runs]
    known = [value for line in values for value in line if value == value]
    top = max(known, default=100.0)
    figure = Figure(figsize=(1.1 * len(columns) + 1.5, 0.7 * len(rows) + 1.4), layout="constrained")
    axis = figure.subplots()
    low = min([*known, top - 20])
    image = axis.imshow(values, cmap="viridis", vmin=low, vmax=top, aspect="auto", origin="lower")
    figure.colorbar(image, label="OP, per cent")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = cell(runs[y][x], COLUMNS["OP"]).replace(" ± ", "\n± ")
            axis.text(x, y, text, ha="center", va="center", color="white" if value < (low + top) / 2 else "black")
            if grid.default and grid.default == {row: rows[y], column: columns[x]}:
                axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="red", lw=2))
    axis.set_xticks(range(len(columns)), [str(value) for value in columns])
    axis.set_yticks(range(len(rows)), [str(value) for value in rows])
    axis.set(
        xlabel=_short(column),
        ylabel=_short(row),
        title=f"OP over {largest} edits" + "; the default is framed" * bool(grid.default),
    )
    files = [folder / "heat_map.png", folder / "heat_map.svg"]
    for file in files:
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _mean_op(results: Sequence[Result]) -> float:
    """The mean OP of finished runs in per cent; not a number where there is none."""
    found = [COLUMNS["OP"].of(result) for result in results if result.status == "finished"]
    values = [value for value in found if value is not None]
    return mean(values) if values else math.nan


def markdown(results: Sequence[Result]) -> str:
    """The tables as Markdown, with what the variants are, what failed, and where the data were too few."""
    seeds = sorted({result.seed for result in results})
    over = (
        f"Seed {seeds[0]}"
        if len(seeds) == 1
        else f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}"
    )
    lines = [f"{over}; every run's command and figures"]
    lines += ["are in `table.json`. Scores are per cent, of the final model.", ""]
    for table in tables_of(results):
        lines += [
            f"## {table.title}",
            "",
            markdown_row(table.header),
            markdown_row(["---", *["---:"] * (len(table.header) - 1)]),
        ]
        lines += [*map(markdown_row, table.rows), ""]
    notes = {result.variant: result.note for result in results if result.note}
    lines += [f"- `{name}`: {note}." for name, note in notes.items()]
    for result in results:
        if result.status == "failed":
            lines.append(f"- Failed: `{result.variant}`, {result.size} edits, seed {result.seed}: {result.error}")
        elif result.status == "stopped":
            lines.append(f"- Stopped: `{result.variant}`, {result.size} edits, seed {result.seed}: {result.error}")
    unasked = {(result.variant, result.size): result.error for result in results if result.status == "not run"}
    lines += [f"- Not run: `{name}`, {size} edits: {why}." for (name, size), why in unasked.items()]
    few = {result.size: result.edits for result in results if result.metrics}
    lines += [f"- The data hold no {size} edits, but {held}." for size, held in few.items() if held != size]
    return "\n".join(lines).rstrip() + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |"


def latex(results: Sequence[Result]) -> str:
    """The tables as LaTeX; they need the package booktabs."""
    return "\n".join(_tabular(table) for table in tables_of(results))


def _tabular(table: Table) -> str:
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule", _tex_row(table.header)]
    lines += [r"\midrule", *map(_tex_row, table.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(tex, cells)) + r" \\"


def tex(text: str) -> str:
    """The text with what LaTeX would take for a command made plain, and signs as signs."""
    plain = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    text = re.sub(r"[\\~^&%$#_{}]", lambda found: plain.get(found[0], rf"\{found[0]}"), text)
    text = "--" if text == "-" else re.sub(r"(?<= )([-+])(?= )", r"$\1$", text)
    return text.replace("±", r"$\pm$")


def csv_text(results: Sequence[Result]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "size", "seed", "status", *FIGURES, "error"])
    for result in results:
        figures = [result.figure(path) for path in FIGURES.values()]
        writer.writerow([result.variant, result.size, result.seed, result.status, *figures, result.error])
    return text.getvalue()


def write_tables(folder: Path, results: Sequence[Result], grid: Grid | None = None) -> None:
    """Write `table.json` (everything), `table.csv` (a line per run), `table.md` and `table.tex`."""
    of_grid = {"grid": asdict(grid)} if grid else {}
    write_json(folder / TABLE, {"runs": [asdict(result) for result in results], **of_grid})
    for suffix, text in (("csv", csv_text(results)), ("md", markdown(results)), ("tex", latex(results))):
        (folder / f"table.{suffix}").write_text(text, encoding="utf-8")


def read_tables(folder: Path) -> tuple[list[Result], Grid | None]:
    """What `write_tables` wrote to `table.json`.

    Raises:
        RepairError: there is none, or it is damaged.
    """
    file = folder / TABLE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        grid = Grid(**content["grid"]) if content.get("grid") else None
        return [Result(**run) for run in content["runs"]], grid
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepairError(
            f"'{file}' is no table of a comparison ({error}); write it anew with --tables_only"
        ) from error
