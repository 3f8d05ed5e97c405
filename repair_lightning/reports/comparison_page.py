"""`report.html` of a comparison: its tables and pictures in one file, in the form of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from repair_lightning.reports.comparison import Result, editor_tables, lead, remarks
from repair_lightning.reports.comparison_charts import COSTS, finished, op_against, scale
from repair_lightning.reports.html_report import Page, Section, pictures, write_page
from repair_lightning.reports.tables import Table


def write_comparison_page(folder: Path, results: Sequence[Result]) -> Path:
    """Write `report.html` beside the tables; returns it."""
    bases = dict.fromkeys(str(run.figure(("base", "name"))) for run in results if run.metrics)
    sizes = ", ".join(f"{size:,}" for size in sorted({run.size for run in results}))
    page = Page(
        title=f"{len({run.variant for run in results})} editors of {', '.join(bases) or 'a base'}",
        subtitle=f"{folder.resolve().name}, numbers of edits: {sizes}",
        lead=lead(results),
        sections=[
            Section("scores", "Scores and costs", tables=editor_tables(results), words=remarks(results), terms=True),
            pictures([scale(finished(results)), *(op_against(spent, results) for spent in COSTS)]),
            Section("how", "What was run", tables=[runs_table(results)]),
        ],
    )
    return write_page(folder, page)


def runs_table(results: Sequence[Result]) -> Table:
    """Every run with how it went and its command."""
    rows = [
        {
            "editor": run.variant,
            "edits": run.size,
            "seed": run.seed,
            "how it went": f"{run.status}: {run.error}" if run.error else run.status,
            "seconds": run.figure(("seconds", "total")),
            "what it is": run.note,
            "command": run.command,
        }
        for run in results
    ]
    return Table("Runs", pd.DataFrame(rows, dtype=object), id="runs")
