"""`report.html` of a comparison: its tables and pictures in one file, in the form of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
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
    runs = pd.DataFrame([asdict(run) for run in results]).drop(columns="metrics")
    page = Page(
        title=f"{len({run.variant for run in results})} editors of {', '.join(bases) or 'a base'}",
        subtitle=f"{folder.resolve().name}, numbers of edits: {sizes}",
        lead=lead(results),
        sections=[
            Section("scores", "Scores and costs", tables=editor_tables(results), words=remarks(results), terms=True),
            pictures([scale(finished(results)), *(op_against(spent, results) for spent in COSTS)]),
            Section("how", "What was run", tables=[Table("", runs, id="runs")]),
        ],
    )
    return write_page(folder, page)
