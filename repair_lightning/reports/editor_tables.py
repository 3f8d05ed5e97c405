"""Editors against numbers of edits in the form of the paper's Tables 3, 4, 7 and 8: a group of columns for each number.

Scores are shares, as the paper has them; several seeds give `mean ± standard deviation`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from repair_lightning.reports.comparison import Column, Result, by_variant, markdown_row, tex
from repair_lightning.scoring.protocols import PROTOCOLS
from repair_lightning.storage.files import replace_text

NAME = "scores"
"""The files' name."""
BEFORE = "(no edit)"
"""The row of the base as it was."""
KEYS = {"Rel": "rel", "Gen": "gen", "Loc": "loc", "OP": "op"}
COSTS = {
    "s/edit": Column(("seconds_per_edit",), scale=1.0, digits=2),
    "kB/edit": Column(("bytes_per_edit",), scale=1e-3, digits=1),
    "peak MiB": Column(("peak_bytes", "host"), scale=2.0**-20, digits=0),
    "GPU MiB": Column(("peak_bytes", "device"), scale=2.0**-20, digits=0),
    "dev": Column(("deviation",), scale=1.0, digits=4),
}
COSTS_IN_WORDS = (
    "s/edit: seconds of editing, the closed loop included, and what a method measures and trains before the first edit "
    "(at N = 1 all of that), without loading and scoring. kB/edit: what the edits left, as a pack stores it beside "
    "their texts. peak MiB, GPU MiB: the most memory that editing took above what was taken before the first edit, of "
    "the process and of the GPU. dev: the Frobenius norm of the change of the base's own W_v over its own, mean over "
    "the layers that were written into; a dash where the base was not touched."
)


@dataclass(frozen=True)
class Entry:
    """What a row says of one number of edits.

    Attributes:
        cells: a text per column.
        instead: a text in the place of them all.
        values: per column, what each seed has.
    """

    cells: tuple[str, ...]
    instead: str = ""
    values: tuple[tuple[float, ...], ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """A text per column; what stands in their place is in the first."""
        return (self.instead, *("" for _ in self.cells[1:])) if self.instead else self.cells


@dataclass(frozen=True)
class GroupedTable:
    """A table whose columns come again for each number of edits."""

    name: str
    title: str
    sizes: Sequence[int]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Entry]]]
    note: str = ""

    @property
    def header(self) -> tuple[str, ...]:
        """One line that stands for both of the paper's."""
        return ("editor", *(f"{column}, N = {size}" for size in self.sizes for column in self.columns))


def editor_tables(results: Sequence[Result]) -> list[GroupedTable]:
    """Rel, Gen, Loc and OP in both protocols; perplexity and Loc where targets' perplexity was asked; costs."""
    results = [_with_costs(result) for result in results]
    tables = []
    for protocol in PROTOCOLS:
        columns = {name: Column(("final", protocol, key), scale=1.0, digits=2) for name, key in KEYS.items()}
        before = {name: Column(("pre_edit", protocol, key), scale=1.0, digits=2) for name, key in KEYS.items()}
        tables.append(_table(protocol, f"Scores, {protocol.replace('_', ' ')}", results, columns, before))
    if any(result.figure(("perplexity",)) for result in results):
        loc = Column(("final", PROTOCOLS[0], "loc"), scale=1.0, digits=2)
        columns = {"PPL": Column(("perplexity", "final"), scale=1.0, digits=2), "Loc": loc}
        before = {"PPL": Column(("perplexity", "pre"), scale=1.0, digits=2), "Loc": Column(("", ""))}
        tables.append(
            _table("perplexity", "Perplexity of the targets (lower is better) and Loc", results, columns, before)
        )
    columns = {
        name: column
        for name, column in COSTS.items()
        if name != "GPU MiB" or any(column.of(result) is not None for result in results)
    }
    return [*tables, _table("costs", "What editing costs", results, columns, None, COSTS_IN_WORDS)]


def _with_costs(result: Result) -> Result:
    """The result with figures per edit beside the others."""
    if result.metrics is None:
        return result
    return replace(result, metrics={**costs(result.metrics), **result.metrics})


def costs(metrics: Mapping[str, object]) -> dict[str, float]:
    """Seconds of editing per edit and the mean deviation of the base's own weights, where a run has them."""
    found: dict[str, float] = {}
    seconds, edits, method = (metrics.get(name) for name in ("seconds", "n_edits", "method"))
    if isinstance(seconds, Mapping) and "edit" in seconds and isinstance(edits, int) and edits:
        whole = seconds.get("prepare", 0.0) if metrics.get("singles") else 0.0  # each single edit would need it
        found["seconds_per_edit"] = whole + (seconds["edit"] - whole) / edits
    deviation = method.get("deviation") if isinstance(method, Mapping) else None
    if deviation:
        found["deviation"] = mean(deviation.values())
    return found


def _table(
    name: str,
    title: str,
    results: Sequence[Result],
    columns: Mapping[str, Column],
    before: Mapping[str, Column] | None,
    note: str = "",
) -> GroupedTable:
    sizes = sorted({result.size for result in results})
    rows: list[tuple[str, Sequence[Entry]]] = []
    if before is not None:
        first = {(run.size, run.seed): run for run in reversed(results) if run.status == "finished"}
        found = [_entry([run for run in first.values() if run.size == size], before) for size in sizes]
        rows.append((BEFORE, found))
    for variant, runs in by_variant(results).items():
        rows.append((variant, [_entry([run for run in runs if run.size == size], columns) for size in sizes]))
    return GroupedTable(name, title, sizes, tuple(columns), rows, note)


def _entry(runs: Sequence[Result], columns: Mapping[str, Column]) -> Entry:
    """What some runs that differ in their seed alone came to."""
    finished = [run for run in runs if run.status == "finished"]
    values = tuple(
        tuple(value for run in finished if (value := column.of(run)) is not None) for column in columns.values()
    )
    cells = tuple(_cell(each, column, len(runs)) for each, column in zip(values, columns.values(), strict=True))
    if finished or not runs:
        return Entry(cells, values=values)
    first = min(runs, key=lambda run: ("not run", "stopped", "failed", "missing").index(run.status))
    instead = {"missing": "-", "failed": "failed"}.get(first.status, f"{first.status}: {first.error}")
    return Entry(cells, instead, values)


def _cell(values: Sequence[float], column: Column, seeds: int) -> str:
    if not values:
        return "-"
    text = f"{mean(values):.{column.digits}f}"
    text += f" ± {stdev(values):.{column.digits}f}" if len(values) > 1 else ""
    return text + (f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else "")


# -- files -------------------------------------------------------------------------------------------------------------


def write_editor_tables(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write `scores.md`, `scores.csv` and `scores.tex`; returns them.

    `scores.tex` compiles as it is, and serves a paper by `\\input` where the package `standalone` is loaded.
    """
    tables = editor_tables(results)
    words = [*lead(results), *notes(results)]
    texts = {"md": grouped_markdown(tables, words), "csv": grouped_csv(results), "tex": grouped_latex(tables, words)}
    for suffix, text in texts.items():
        replace_text(folder / f"{NAME}.{suffix}", text)
    return [folder / f"{NAME}.{suffix}" for suffix in texts]


def lead(results: Sequence[Result]) -> list[str]:
    """What the numbers are of."""
    bases = dict.fromkeys(Path(str(run.figure(("base", "name")))).name for run in results if run.metrics)
    seeds = len({run.seed for run in results})
    words = [
        f"{len({run.variant for run in results})} editors of {', '.join(bases) or 'a base'}. Scores are shares, of the "
        "final model over all edits that it was given"
        + (f"; mean ± standard deviation over {seeds} seeds." if seeds > 1 else ", from one seed.")
    ]
    singles = max((int(run.figure(("singles",)) or 0) for run in results), default=0)
    if singles:
        words.append(
            f"N = 1 is the mean over {singles:,} single edits: each was written into the base as it was, scored, and "
            "taken back."
        )
    few = {run.size: run.edits for run in results if run.metrics and not run.figure(("singles",))}
    words += [
        f"N = {size:,} stands for {held:,} edits: the data hold no more." for size, held in few.items() if held < size
    ]
    return words


def notes(results: Sequence[Result]) -> list[str]:
    """What the comparison says of its variants."""
    return [f"{name}: {note}." for name, note in {run.variant: run.note for run in results if run.note}.items()]


def grouped_markdown(tables: Sequence[GroupedTable], words: Sequence[str] = ()) -> str:
    """The tables as Markdown behind some words; it has no groups of columns: a header names both."""
    lines: list[str] = [line for sentence in words for line in (sentence, "")]
    for table in tables:
        lines += [f"## {table.title}", "", markdown_row(table.header)]
        lines.append(markdown_row(["---", *["---:"] * (len(table.header) - 1)]))
        for name, entries in table.rows:
            lines.append(markdown_row([name, *(text for entry in entries for text in entry.texts)]))
        lines += ["", *([table.note, ""] if table.note else [])]
    return "\n".join(lines).rstrip() + "\n"


def grouped_latex(tables: Sequence[GroupedTable], words: Sequence[str] = ()) -> str:
    """A document of its own for LaTeX: some words and the tables, each in the form of the paper's."""
    lines = [
        r"\documentclass[varwidth=\maxdimen, border=6pt]{standalone}",
        r"\usepackage{booktabs}",
        r"\begin{document}",
    ]
    said = [rf"{tex(sentence)}\par" for sentence in words]
    return "\n".join([*lines, *said, r"\bigskip", *map(_grouped_tabular, tables), r"\end{document}", ""])


def _grouped_tabular(table: GroupedTable) -> str:
    wide, groups = len(table.columns), range(len(table.sizes))
    heads = " & ".join(rf"\multicolumn{{{wide}}}{{c}}{{$N = {size}$}}" for size in table.sizes)
    rules = "".join(rf"\cmidrule(lr){{{2 + i * wide}-{1 + (i + 1) * wide}}}" for i in groups)
    names = " & ".join(tex(column) for _ in groups for column in table.columns)
    lines = [rf"\textbf{{{tex(table.title)}}}\par\smallskip", rf"\begin{{tabular}}{{l{'r' * (wide * len(groups))}}}"]
    lines += [r"\toprule", rf"& {heads} \\", rules, rf"Editor & {names} \\", r"\midrule"]
    for name, entries in table.rows:
        lines.append(" & ".join([tex(name), *(_tex_entry(entry) for entry in entries)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}\par\bigskip"])


def _tex_entry(entry: Entry) -> str:
    if entry.instead:
        return rf"\multicolumn{{{len(entry.cells)}}}{{c}}{{{tex(entry.instead)}}}"
    return " & ".join(map(tex, entry.cells))


def grouped_csv(results: Sequence[Result]) -> str:
    """A line per editor, number of edits, table and column: mean, standard deviation and number of seeds, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "editor", "N", "column", "mean", "sd", "seeds", "status"])
    for table in editor_tables(results):
        for name, entries in table.rows:
            for size, entry in zip(table.sizes, entries, strict=True):
                status = entry.instead or ("finished" if any(entry.values) else "missing")
                for column, values in zip(table.columns, entry.values, strict=True):
                    centre = f"{mean(values):.8g}" if values else ""
                    spread = f"{stdev(values):.8g}" if len(values) > 1 else ""
                    writer.writerow([table.name, name, size, column, centre, spread, len(values), status])
    return text.getvalue()
