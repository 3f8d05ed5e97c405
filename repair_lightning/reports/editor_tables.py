"""Editors against numbers of edits in the form of the paper's Tables 3, 4, 7 and 8: a group of columns for each number.

Scores are shares, as the paper has them; several seeds give `mean ± standard deviation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from repair_lightning.reports.comparison import Column, Result, by_variant, cell, costs, remarks, standing, values_of
from repair_lightning.reports.tables import Table, latex, markdown
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
class Part:
    """One of the tables: its columns, and where the base as it was has the same figures."""

    name: str
    title: str
    columns: Mapping[str, Column]
    before: Mapping[str, Column]
    note: str = ""

    def rows(self, results: Sequence[Result]) -> dict[str, tuple[Mapping[str, Column], list[Result]]]:
        """Editor -> the columns and the runs of its row; the base first, where a run has measured it."""
        found = {variant: (self.columns, runs) for variant, runs in by_variant(results).items()}
        first = {(run.size, run.seed): run for run in reversed(results) if run.status == "finished"}
        known = any(values_of(results, column) for column in self.before.values())
        return {BEFORE: (self.before, list(first.values())), **found} if known else found


def parts(results: Sequence[Result]) -> list[Part]:
    """Rel, Gen, Loc and OP in both protocols; perplexity and Loc where targets' perplexity was asked; costs."""
    found = []
    for protocol in PROTOCOLS:
        columns, before = (
            {name: Column((stage, protocol, key), scale=1.0, digits=2) for name, key in KEYS.items()}
            for stage in ("final", "pre_edit")
        )
        found.append(Part(protocol, f"Scores, {protocol.replace('_', ' ')}", columns, before))
    if any(result.figure(("perplexity",)) for result in results):
        pre, final = (Column(("perplexity", stage), scale=1.0, digits=2) for stage in ("pre", "final"))
        both = {"PPL": final, "Loc": found[0].columns["Loc"]}
        title = "Perplexity of the targets (lower is better) and Loc"
        found.append(Part("perplexity", title, both, {"PPL": pre, "Loc": Column(("", ""))}))
    spent = {name: column for name, column in COSTS.items() if name != "GPU MiB" or values_of(results, column)}
    return [*found, Part("costs", "What editing costs", spent, {}, COSTS_IN_WORDS)]


def with_costs(results: Sequence[Result]) -> list[Result]:
    """The results with figures per edit beside the others."""
    return [replace(run, metrics={**costs(run.metrics), **run.metrics}) if run.metrics else run for run in results]


def editor_tables(results: Sequence[Result]) -> list[Table]:
    """The tables, with a group of columns for each number of edits."""
    results = with_costs(results)
    sizes = sorted({result.size for result in results})
    tables = []
    for part in parts(results):
        heads = [("", "editor"), *((f"N = {size}", name) for size in sizes for name in part.columns)]
        lines = [
            [name, *(cell([run for run in runs if run.size == n], one) for n in sizes for one in columns.values())]
            for name, (columns, runs) in part.rows(results).items()
        ]
        frame = pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(heads))
        tables.append(Table(part.title, frame, part.note, f"table-{part.name}"))
    return tables


def scores_csv(results: Sequence[Result]) -> str:
    """A line per editor, number of edits, table and column: mean, standard deviation and number of seeds, unrounded."""
    results = with_costs(results)
    lines = []
    for part in parts(results):
        for editor, (columns, runs) in part.rows(results).items():
            for size in sorted({result.size for result in results}):
                same = [run for run in runs if run.size == size]
                for name, column in columns.items():
                    found = values_of(same, column)
                    centre = f"{mean(found):.8g}" if found else ""
                    spread = f"{stdev(found):.8g}" if len(found) > 1 else ""
                    lines.append([part.name, editor, size, name, centre, spread, len(found), standing(same)])
    heads = ["table", "editor", "N", "column", "mean", "sd", "seeds", "status"]
    return pd.DataFrame(lines, columns=heads).to_csv(index=False)


def write_editor_tables(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write `scores.md`, `scores.csv` and `scores.tex`; returns them."""
    tables = editor_tables(results)
    texts = {"md": markdown(tables, lead(results), remarks(results)), "csv": scores_csv(results)}
    texts["tex"] = latex(tables, document=True)
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
    return words
