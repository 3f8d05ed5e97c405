"""`report.html`: a finished run for a reader who never saw the project, in one file that asks nothing of the network.

Everything that comes from the data is escaped by Jinja. Pictures are SVG images in the page: in those no script runs.
"""

from __future__ import annotations

import base64
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import RUN_CHARTS
from repair_lightning.reports.drawing import Chart
from repair_lightning.reports.report import form_frame, loop_words, percent, score_frame, side_words
from repair_lightning.reports.report_tables import (
    edits_table,
    event_table,
    failed_table,
    others_table,
    problems,
    skipped_table,
    table,
)
from repair_lightning.reports.tables import Table
from repair_lightning.storage.files import replace_text

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
POINTS_SHOWN = 60
"""Rows of a picture's table."""
UNDONE = "{} of the edits were taken back after the run; scores and answers are those before that."


@dataclass(frozen=True)
class Section:
    """A part of a page: sentences, tables, pictures, facts by their names, texts to be shown as they are; whether its
    table can be searched, and whether the terms of scores are explained."""

    id: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[tuple[Chart, str, Table]] = ()
    facts: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, str]] = ()
    searched: bool = False
    terms: bool = False


@dataclass(frozen=True)
class Page:
    """A page: its head and its parts; `tiles` are the headline scores."""

    title: str
    subtitle: str
    lead: Sequence[str]
    sections: Sequence[Section]
    notices: Sequence[str] = ()
    tiles: Mapping[str, str] = field(default_factory=dict)
    made: str = ""


# -- making one --------------------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path) -> Path:
    """Make `report.html` of a finished run from its artefacts, in place of an earlier one; returns the file.

    Raises:
        RepairError: there is no finished run, or its files are damaged.
    """
    run = Artefacts.read(run_dir)
    return write_page(run.path, page_of(run))


def try_report(run_dir: str | Path) -> Path | None:
    """The same where nothing may fail: a run is not lost because its report cannot be made. None: it was not."""
    try:
        return write_report(run_dir)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        again = f"`repair-lightning report --run {run_dir}` tries again"
        log.warning("%s could not be made (%s); the run is whole: %s", REPORT_FILE, words, again)
        return None


def write_page(folder: Path, page: Page) -> Path:
    """Write a page into a folder; everything that it holds is escaped. Returns the file."""
    loader = PackageLoader("repair_lightning.reports")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["shown"] = shown
    pages.tests["figure"] = lambda cell: re.match(r"[\d.,-]+( ±|$)", shown(cell)) is not None
    replace_text(folder / REPORT_FILE, pages.get_template("report.html.j2").render(page=page))
    return folder / REPORT_FILE


def shown(cell: Any) -> str:
    """A cell's text; a dash for nothing."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    return f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def pictures(drawn: Sequence[Chart | str]) -> Section:
    """Pictures with their words and their numbers, and a line for each that is left out."""
    charts = []
    for chart in (one for one in drawn if isinstance(one, Chart)):
        rest = "what `repair-lightning figures` writes as CSV"
        rows = [list(row.values()) for row in chart.rows]
        numbers = table(f"table-{chart.name}", "", list(chart.rows[0]), rows, rest, POINTS_SHOWN)
        charts.append((chart, base64.b64encode(chart.svg().encode()).decode(), numbers))
    missing = [f"Left out: {words}" for words in drawn if isinstance(words, str)]
    return Section("pictures", "Pictures", words=missing, charts=charts)


def page_of(run: Artefacts) -> Page:
    """The report of a run."""
    m = run.metrics
    scores = [
        Table("", score_frame(m), id="score-table"),
        Table("Edits in other forms", form_frame(m["final"].get("forms")), id="forms-table"),
    ]
    known = Counter(str(entry.status) for entry in run.entries.values())
    undone = known[EditStatus.UNDONE]
    counts = ", ".join(f"{number:,} {status}" for status, number in known.items())
    texts = [("The command", run.provenance.get("command", "")), ("The complete configuration", run.config_text)]
    failed = [failed_table(run), others_table(run), skipped_table(run)]
    sections = [
        Section("scores", "Scores", list(side_words(m)), scores, terms=True),
        Section("failed", "What failed, and why", [failed_words(run)], failed),
        pictures([make(run) for make in RUN_CHARTS.values()]),
        Section("edits", "All edits", [f"Failed ones come first. {counts}"], [edits_table(run)], searched=True),
        Section("loop", "What happened", [loop_words(m)], [event_table(run)]),
        Section("how", "Configuration", facts=setup(run), texts=[one for one in texts if one[1]]),
    ]
    ended = [event["time"] for event in run.events]
    when = f", {datetime.fromtimestamp(max(ended), timezone.utc):%Y-%m-%d %H:%M} UTC" if ended else ""
    return Page(
        title=f"{m['n_edits']:,} corrections of {run.base}",
        subtitle=f"Run {run.name}{when}",
        lead=[lead(run)],
        sections=sections,
        notices=[UNDONE.format(undone)] if undone else [],
        tiles={kind: percent(run.score(kind)) for kind in ("rel", "gen", "loc", "near", "op")},
        made=f"Made by REPAIR-Lightning; `repair-lightning report --run {run.path}` makes it again.",
    )


# -- what was asked and what came of it --------------------------------------------------------------------------------


def lead(run: Artefacts) -> str:
    """What was asked and how it was done, in plain words."""
    m = run.metrics
    data, changed = run.option("data.path"), "deviation" in m.get("method", {})
    words = f"A language model was wrong about some facts. {m['n_edits']:,} corrections were written into {run.base}, "
    words += "one after the other, as they would arrive in use. " + (f"They come from {data}. " if data else "")
    words += "They change some of its own weights" if changed else "The model itself was not retrained"
    if changed and not m.get("shards"):
        return f"{words}, for every question."
    model = f"the {'changed' if changed else 'unchanged'} model"
    words += f". Corrections are kept in memories beside it (shards; {m.get('shards', 0):,} at the end). For every "
    return words + f"question a router decides, from its words alone, whether one of them or {model} answers."


def failed_words(run: Artefacts) -> str:
    """How many edits failed."""
    failed, quarantined = len(problems(run)), run.metrics.get("closed_loop", {}).get("quarantined", 0)
    words = f"{failed:,} of {run.metrics['n_edits']:,} edits failed"
    return words + (f"; {quarantined:,} of them were quarantined, so the base answers them." if quarantined else ".")


def setup(run: Artefacts) -> list[tuple[str, str]]:
    """What was run, where and with what."""
    m = run.metrics
    found = {name: m.get(name) for name in ("editor", "seed", "layer", "shards", "memory_bytes", "edits_per_minute")}
    found["base"] = f"{m['base']['name']} ({str(m['base'].get('sha256', ''))[:12]})"
    parts = {"seconds": m.get("seconds", {}), "versions": run.provenance.get("versions", {})}
    parts["change of the base's own weights, by layer"] = m.get("method", {}).get("deviation") or {}
    found |= {name: ", ".join(f"{part} {shown(one)}" for part, one in each.items()) for name, each in parts.items()}
    return [(word.replace("_", " "), shown(value)) for word, value in found.items() if value not in (None, "")]
