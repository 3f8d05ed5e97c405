"""`report.html` of a comparison: its tables and pictures in one file, in the form of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repair_lightning.reports.charts import Chart
from repair_lightning.reports.comparison import Result
from repair_lightning.reports.comparison_charts import COSTS, op_against, scale, scored_results
from repair_lightning.reports.editor_tables import BEFORE, GroupedTable, editor_tables, lead
from repair_lightning.reports.html_report import GLOSSARY, REPORT_FILE, chart_in_words, environment, packed_plotly
from repair_lightning.reports.plotly_charts import figure
from repair_lightning.reports.report_tables import Cell, Column, Line, PageTable, duration, text
from repair_lightning.storage.files import replace_text

WORDS = {"Rel", "Gen", "Loc", "OP", "autoregressive", "teacher forced"}
"""What the glossary says of a comparison."""


def write_comparison_page(folder: Path, results: Sequence[Result]) -> Path:
    """Write `report.html` beside the tables; returns it."""
    drawn = [scale(scored_results(results)), *(op_against(spent, results) for spent in COSTS)]
    charts = [chart for chart in drawn if isinstance(chart, Chart)]
    bases = dict.fromkeys(str(run.figure(("base", "name"))) for run in results if run.metrics)
    sizes = sorted({run.size for run in results})
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            title=f"{len({run.variant for run in results})} editors of {', '.join(bases) or 'a base'}",
            subtitle=f"{folder.resolve().name}, numbers of edits: {', '.join(f'{size:,}' for size in sizes)}",
            lead=lead(results),
            tables=[page_table(table) for table in editor_tables(results)],
            glossary=[(word, meaning) for word, meaning in GLOSSARY if word in WORDS],
            charts=[chart_in_words(chart) for chart in charts],
            figures={chart.name: figure(chart) for chart in charts},
            missing=[words for words in drawn if isinstance(words, str)],
            runs=runs_table(results),
            plotly=packed_plotly(),
        )
    )
    replace_text(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def page_table(table: GroupedTable) -> PageTable:
    """A grouped table for the page; it can be sorted by any of its columns."""
    columns = [Column("editor"), *(Column(title, "number") for _ in table.sizes for title in table.columns)]
    groups = [("", 1), *((f"N = {size:,}", len(table.columns)) for size in table.sizes)]
    lines = []
    for name, entries in table.rows:
        cells = [cell for entry in entries for cell in entry.texts]
        lines.append(Line([text(name), *(Cell(cell, "" if cell in ("", "-") else _key(cell)) for cell in cells)]))
    lines = [line for line in lines if line.cells[0].text != BEFORE or any(c.text != "-" for c in line.cells[1:])]
    return PageTable(f"table-{table.name}", table.title, columns, lines, table.note, groups)


def _key(cell: str) -> str | float:
    """What a cell is sorted by: its mean; its words behind all numbers."""
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return ""


def runs_table(results: Sequence[Result]) -> PageTable:
    """Every run with how it went and its command."""
    columns = [Column("editor"), Column("edits", "number"), Column("seed", "number"), Column("how it went", "reason")]
    lines = []
    for run in results:
        seconds = run.figure(("seconds", "total"))
        went = f"{run.status}: {run.error}" if run.error else run.status
        said = [text(run.variant), Cell(f"{run.size:,}", run.size), Cell(str(run.seed), run.seed), text(went, 1000)]
        took = Cell(duration(seconds) if seconds else "-", seconds or "")
        lines.append(Line([*said, took, text(run.note), text(run.command, 2000)]))
    columns += [Column("took", "number"), Column("what it is", "text"), Column("command", "text")]
    return PageTable("runs", "runs", columns, lines)
