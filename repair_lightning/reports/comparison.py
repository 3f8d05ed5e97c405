"""The tables of a comparison: variants against numbers of edits, over seeds, for people, papers and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd

from repair_lightning.errors import RepairError, counted
from repair_lightning.reports.artefacts import base_name
from repair_lightning.reports.report import Table, latex, markdown
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, PROTOCOLS, TEACHER_FORCED
from repair_lightning.storage.files import replace_text, write_json

TABLE = "table.json"
"""The file with everything that a comparison measured."""


Status = Literal["finished", "failed", "not run", "stopped", "missing"]
BEST_FIRST: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Result:
    """What one run came to: `failed` also where it ended well without figures, `missing` where it was not run to its
    end, `stopped` where its time was over, `not run` where the comparison does not ask for it. `size` is what was asked
    for; `error` is a failed run's last line, or why the others have no figures."""

    variant: str
    note: str
    size: int
    seed: int
    status: Status
    command: str = ""
    error: str | None = None
    metrics: Mapping[str, Any] | None = None

    def figure(self, path: Sequence[str]) -> Any:
        """A figure of the run, or one per edit; None where it has none."""
        found: Any = {**costs(self.metrics), **self.metrics} if self.metrics else None
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    @property
    def edits(self) -> int:
        """How many edits the model was given at once; the data may hold fewer than were asked for."""
        return self.size if self.figure(("singles",)) else int(self.figure(("n_edits",)) or self.size)


class Column(NamedTuple):
    """A figure as a table shows it: its place in `metrics.json`, its unit and its digits after the point."""

    path: Sequence[str]
    scale: float = 100.0
    digits: int = 1

    def of(self, result: Result) -> float | None:
        """The figure of a run in the column's unit; None where the run has none."""
        value = result.figure(self.path)
        return None if value is None else self.scale * value


@dataclass(frozen=True)
class Grid:
    """Variants that differ in two dotted options alone: the heat map's rows and columns. `default` are the values that
    it frames, `fixed` the options of every cell."""

    options: Mapping[str, Sequence[Any]]
    default: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, dict[str, Any]]]:
        """Each variant's name (`lr 0.5 stop_margin 2.0`) and options, row by row."""
        found = [dict(zip(self.options, values, strict=True)) for values in product(*self.options.values())]
        words = [" ".join(f"{short(option)} {value}" for option, value in cell.items()) for cell in found]
        return [(name, {**self.fixed, **cell}) for name, cell in zip(words, found, strict=True)]


def short(option: str) -> str:
    """An option without the parts before it."""
    return option.rsplit(".", 1)[-1]


COLUMNS = {
    **{name: Column(("final", AUTOREGRESSIVE, name.lower())) for name in ("Rel", "Gen", "Loc", "Near", "OP")},
    "OP low": Column(("final", "op_interval", "low")),
    "OP high": Column(("final", "op_interval", "high")),
    "OP forced": Column(("final", TEACHER_FORCED, "op")),
    "OP oracle": Column(("oracle_routing", AUTOREGRESSIVE, "op")),
    "subject changed": Column(("final", "same_subject", "changed")),
    "in text": Column(("final", "in_text", "both")),
    "quarantined": Column(("closed_loop", "quarantined"), scale=1.0),
    "bytes/edit": Column(("bytes_per_edit",), scale=1.0, digits=0),
    "edits/min": Column(("edits_per_minute",), scale=1.0, digits=0),
}
"""The columns of the table of one size; scores are of free generation unless they say otherwise. `OP low` and `OP high`
are the bounds of the bootstrap over the edits (95 %)."""
BEFORE = "(no edit)"
"""The row of the base as it was."""
COSTS = {
    "s/edit": Column(("seconds_per_edit",), scale=1.0, digits=2),
    "kB/edit": Column(("bytes_per_edit",), scale=1e-3, digits=1),
    "peak MiB": Column(("peak_bytes", "host"), scale=2.0**-20, digits=0),
    "GPU MiB": Column(("peak_bytes", "device"), scale=2.0**-20, digits=0),
    "dev": Column(("deviation",), scale=1.0, digits=4),
}
COSTS_IN_WORDS = (
    "s/edit: seconds of editing, the closed loop and what is trained before the first edit included (at N = 1 all of "
    "that), without loading and scoring. kB/edit: what the edits left, as a pack stores it beside their texts. peak "
    "MiB, GPU MiB: the most memory that editing took above what was taken before, of the process and of the GPU. dev: "
    "the Frobenius norm of the change of the base's own W_v over its own, mean over the layers written into; a dash "
    "where the base was not touched."
)


def costs(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of editing per edit and the mean deviation of the base's own weights, where a run has them."""
    found: dict[str, float] = {}
    seconds, edits = metrics.get("seconds") or {}, metrics.get("n_edits")
    if "edit" in seconds and edits:
        whole = seconds.get("prepare", 0.0) if metrics.get("singles") else 0.0  # each single edit would need it
        found["seconds_per_edit"] = whole + (seconds["edit"] - whole) / edits
    deviation = (metrics.get("method") or {}).get("deviation")
    return found | ({"deviation": mean(deviation.values())} if deviation else {})


def standing(results: Sequence[Result]) -> str:
    """How some runs that differ in their seed alone went, in one word: the best that one of them came to."""
    return min((result.status for result in results), key=BEST_FIRST.index, default="missing")


def values_of(results: Sequence[Result], column: Column) -> list[float]:
    """A figure of the finished runs that have it."""
    found = (column.of(result) for result in results if result.status == "finished")
    return [value for value in found if value is not None]


def cell(results: Sequence[Result], column: Column) -> str:
    """`mean ± deviation` over the finished runs, and how many failed; where none is finished, how they stand."""
    values, word = values_of(results, column), standing(results)
    if not values:
        return "-" if word in ("finished", "missing") else word
    spread = f" ± {stdev(values):.{column.digits}f}" if len(values) > 1 else ""
    failed = sum(result.status == "failed" for result in results)
    return f"{mean(values):.{column.digits}f}{spread}" + (f" ({failed} failed)" if failed else "")


class Part(NamedTuple):
    """One of the tables: its columns, the runs that it is of, and what a reader must know."""

    name: str
    title: str
    columns: Mapping[str, Column]
    results: Sequence[Result]
    note: str = ""

    def rows(self) -> dict[str, dict[int, list[Result]]]:
        """Variant -> number of edits -> its runs, for every number of edits in the table."""
        sizes = sorted({run.size for run in self.results})
        found: dict[str, dict[int, list[Result]]] = {}
        for run in self.results:
            found.setdefault(run.variant, {size: [] for size in sizes})[run.size].append(run)
        return found

    def table(self) -> Table:
        """The cells, with a group of columns for each number of edits."""
        rows = self.rows()
        sizes = next(iter(rows.values()))
        heads = [("", "variant"), *((f"N = {size}", name) for size in sizes for name in self.columns)]
        wanted = self.columns.values()
        lines = [[name, *(cell(of, one) for of in runs.values() for one in wanted)] for name, runs in rows.items()]
        frame = pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(heads))
        return Table(self.title, frame, self.note, f"table-{self.name}")


def tables_of(results: Sequence[Result]) -> list[Table]:
    """OP of variants against sizes for each protocol, and all columns for the largest size of which a run finished."""
    titles = {one: f"OP, {one.replace('_', ' ')}, per cent" for one in PROTOCOLS}
    parts = [Part(one, title, {"": Column(("final", one, "op"))}, results) for one, title in titles.items()]
    largest = max((result.status == "finished", result.size) for result in results)[1]
    parts.append(Part("all", "All figures", COLUMNS, [result for result in results if result.size == largest]))
    return [part.table() for part in parts]


def editor_parts(results: Sequence[Result]) -> list[Part]:
    """The paper's Tables 3, 4, 7 and 8 with scores as shares: Rel, Gen, Loc and OP in both protocols; perplexity and
    Loc where targets' perplexity was asked; costs. Their first row is the base as it was."""
    both, found = list(results), []
    for run in {(run.size, run.seed): run for run in reversed(results) if run.figure(["pre_edit"])}.values():
        before = {"final": run.figure(["pre_edit"]), "perplexity": {"final": run.figure(("perplexity", "pre"))}}
        both.insert(0, replace(run, variant=BEFORE, metrics=before))
    for one in PROTOCOLS:
        shares = {name: Column(("final", one, name.lower()), 1.0, 2) for name in ("Rel", "Gen", "Loc", "OP")}
        found.append(Part(one, f"Scores, {one.replace('_', ' ')}", shares, both))
    if any(result.figure(("perplexity",)) for result in results):
        figures = {"PPL": Column(("perplexity", "final"), scale=1.0, digits=2), "Loc": found[0].columns["Loc"]}
        found.append(Part("perplexity", "Perplexity of the targets (lower is better) and Loc", figures, both))
    spent = {name: column for name, column in COSTS.items() if name != "GPU MiB" or values_of(results, column)}
    return [*found, Part("costs", "What editing costs", spent, results, COSTS_IN_WORDS)]


def lead(results: Sequence[Result]) -> list[str]:
    """What the numbers are of."""
    bases = dict.fromkeys(base_name(run.metrics) for run in results if run.metrics)
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
    over = f"mean ± standard deviation over the seeds {seeds}" if "," in seeds else f"seed {seeds}"
    singles = max((int(run.figure(("singles",)) or 0) for run in results), default=0)
    words = f"N = 1 is the mean over {singles:,} single edits, each written into the base as it was."
    variants = {run.variant for run in results}
    first = f"{counted(len(variants), 'variant')} of {', '.join(bases) or 'a base'}, {over}: the final model."
    return [first] + [words] * bool(singles)


def remarks(results: Sequence[Result]) -> list[str]:
    """What the variants are, what failed or was not run, and where the data were too few."""
    found = [f"`{name}`: {note}." for name, note in {run.variant: run.note for run in results if run.note}.items()]
    bad = [run for run in results if run.status in ("failed", "stopped")]
    found += [
        f"{r.status.capitalize()}: `{r.variant}`, {counted(r.size, 'edit')}, seed {r.seed}: {r.error}" for r in bad
    ]
    unasked = {(run.variant, run.size): run.error for run in results if run.status == "not run"}
    found += [f"Not run: `{name}`, {counted(size, 'edit')}: {why}." for (name, size), why in unasked.items()]
    sampled = sorted({scored["edits"] for run in results if (scored := run.figure(("scored",)))})
    found += [f"Scores are of a sample of {counted(number, 'edit')} where there are more." for number in sampled]
    few = {run.size: run.edits for run in results if run.metrics}
    return found + [
        f"The data hold no {counted(size, 'edit')}, but {held:,}." for size, held in few.items() if held != size
    ]


def scores_frame(parts: Sequence[Part]) -> pd.DataFrame:
    """A row per table, editor, number of edits and column: mean, standard deviation, number of seeds, unrounded."""
    lines = []
    for part in parts:
        for editor, by_size in part.rows().items():
            for (size, runs), (name, column) in product(by_size.items(), part.columns.items()):
                found = values_of(runs, column)
                figures = f"{mean(found):.8g}" if found else "", f"{stdev(found):.8g}" if len(found) > 1 else ""
                lines.append([part.name, editor, size, name, *figures, len(found), standing(runs)])
    return pd.DataFrame(lines, columns=["table", "editor", "N", "column", "mean", "sd", "seeds", "status"])


def write_tables(folder: Path, results: Sequence[Result], grid: Grid | None = None) -> None:
    """Write `table.json` (everything), `table.csv` (a line per run), `table.md` and `table.tex`; without a grid also
    the paper's tables, `scores.md`, `scores.csv` and `scores.tex`."""
    rows = [asdict(result) for result in results]
    write_json(folder / TABLE, {"runs": rows} | ({"grid": asdict(grid)} if grid else {}))
    runs = pd.DataFrame(rows).drop(columns="metrics")
    figures = pd.json_normalize([row["metrics"] or {} for row in rows])  # named `final.autoregressive.op` and so on
    tables, words = tables_of(results), [*lead(results), "Every run's command and figures are in `table.json`."]
    parts = editor_parts(results) if grid is None else []
    written = [("table", pd.concat([runs, figures], axis=1), tables, words)]
    written += [("scores", scores_frame(parts), [part.table() for part in parts], lead(results))] if parts else []
    for name, frame, shown, first in written:
        replace_text(folder / f"{name}.csv", frame.to_csv(index=False))
        replace_text(folder / f"{name}.tex", latex(shown))
        replace_text(folder / f"{name}.md", markdown(shown, first, remarks(results)))


def read_tables(folder: Path) -> tuple[list[Result], Grid | None]:
    """What `write_tables` wrote to `table.json`; a RepairError where there is none, or it is damaged."""
    file = folder / TABLE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        grid = Grid(**content["grid"]) if content.get("grid") else None
        return [Result(**run) for run in content["runs"]], grid
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = f"'{file}' is no table of a comparison ({error}); the comparison's command writes it"
        raise RepairError(words) from error
