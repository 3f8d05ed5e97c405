"""`report.html`: a finished run, or a comparison, for a reader who never saw the project, in one file that asks nothing
of the network.

Everything that comes from the data is escaped by Jinja. Pictures are SVG images in the page: in those no script runs.
"""

from __future__ import annotations

import base64
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.errors import counted
from repair_lightning.reports import comparison, report
from repair_lightning.reports.artefacts import Artefacts, base_name
from repair_lightning.reports.charts import RUN_CHARTS, op_against, scale
from repair_lightning.reports.drawing import Chart
from repair_lightning.reports.report import Table, percent
from repair_lightning.scoring.protocols import AUTOREGRESSIVE
from repair_lightning.storage.files import replace_text

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"


class Section(NamedTuple):
    """A part of a page: sentences, tables, pictures, facts by their names, texts to be shown as they are."""

    id: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    facts: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, str]] = ()


def write_report(run_dir: str | Path) -> Path:
    """Make `report.html` of a finished run from its artefacts, in place of an earlier one; returns the file. Raises
    `RepairError` where there is no finished run, or its files are damaged."""
    run = Artefacts.read(run_dir)
    ended = max((event["time"] for event in run.events), default=None)
    when = f", {datetime.fromtimestamp(ended, timezone.utc):%Y-%m-%d %H:%M} UTC" if ended else ""
    final = run.metrics["final"].get(AUTOREGRESSIVE, {})
    return _write(
        run.path,
        title=f"{counted(run.metrics['n_edits'], 'correction')} of {base_name(run.metrics)}",
        subtitle=f"Run {run.name}{when}",
        lead=_lead(run),
        sections=_sections(run),
        tiles={kind: percent(final.get(kind)) for kind in ("rel", "gen", "loc", "near", "op")} | _changed(run),
        made=f"Made by REPAIR-Lightning; `repair-lightning report --run {run.path}` makes it again.",
    )


def try_report(run_dir: str | Path) -> Path | None:
    """The same where nothing may fail: a run is not lost because its report cannot be made. None: it was not."""
    try:
        return write_report(run_dir)
    except Exception as error:
        again = f"the run is whole: `repair-lightning report --run {run_dir}` tries again"
        log.warning("%s could not be made (%s: %s); %s", REPORT_FILE, type(error).__name__, error, again)
        return None


def write_comparison_page(folder: Path, results: Sequence[comparison.Result]) -> Path:
    """Write a comparison's `report.html` beside its tables; returns it."""
    bases = dict.fromkeys(str(run.figure(("base", "name"))) for run in results if run.metrics)
    sizes = ", ".join(f"{size:,}" for size in sorted({run.size for run in results}))
    runs = pd.DataFrame([asdict(run) for run in results]).drop(columns="metrics")
    tables = [part.table() for part in comparison.editor_parts(results)]
    return _write(
        folder,
        title=f"{counted(len({run.variant for run in results}), 'editor')} of {', '.join(bases) or 'a base'}",
        subtitle=f"{folder.resolve().name}, numbers of edits: {sizes}",
        lead=comparison.lead(results),
        sections=[
            Section("scores", "Scores and costs", comparison.remarks(results), tables),
            _pictures([scale(results), *op_against(results)]),
            Section("how", "What was run", tables=[Table("", runs, id="runs")]),
        ],
        tiles={},
        made="",
    )


def _write(folder: Path, **page: Any) -> Path:
    loader = PackageLoader("repair_lightning.reports")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"shown": _shown, "numbers": _numbers}
    pages.filters["image"] = lambda chart: base64.b64encode(chart.svg().encode()).decode()
    pages.tests["figure"] = lambda cell: re.match(r"[\d.,-]+( ±|$)", _shown(cell)) is not None
    replace_text(folder / REPORT_FILE, pages.get_template("report.html.j2").render(page))
    return folder / REPORT_FILE


def _shown(cell: Any) -> str:
    """A cell's text; a dash for nothing."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    return f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def _numbers(chart: Chart) -> Table:
    rest = "what `repair-lightning figures` writes as CSV"
    return report.table(f"table-{chart.name}", "", chart.rows, rest, most=60)  # type: ignore[arg-type]


def _pictures(drawn: Sequence[Chart | str]) -> Section:
    """Pictures, and a line for each that is left out."""
    missing = [f"Left out: {words}" for words in drawn if isinstance(words, str)]
    return Section("pictures", "Pictures", missing, charts=[chart for chart in drawn if isinstance(chart, Chart)])


def _sections(run: Artefacts) -> list[Section]:
    m, known = run.metrics, Counter(str(entry.status) for entry in run.entries.values())
    forms = Table("Edits in other forms", report.form_frame(m["final"].get("forms")), id="forms-table")
    sample = report.sample_words(m).removeprefix(", ").capitalize()
    further = Table("Further scores", report.further_frame(m["final"]), id="further-table")
    scores = [Table(sample, report.score_frame(m), id="score-table"), forms, further]
    failed = len(report.problems(run))
    said = f"{failed:,} of {counted(m['n_edits'], 'edit')} failed" if failed else "No edit failed"
    said += " as far as asked" * bool(sample)
    quarantined = m.get("closed_loop", {}).get("quarantined", 0)
    said += f"; {quarantined:,} quarantined, so the base answers." if quarantined else "."
    counts = "Failed ones come first. " * bool(failed)
    counts += f"{', '.join(f'{number:,} {status}' for status, number in known.items())}."
    edits = [report.edits_table(run), report.others_table(run), report.changed_table(run)]
    loop = [report.merge_table(m), report.event_table(run)]
    texts = [("The command", _provenance(run).get("command")), ("The complete configuration", run.config_text)]
    return [
        Section("scores", "Scores", list(report.side_words(m)), scores),
        Section("edits", "The edits, and why some failed" if failed else "The edits", [said, counts], edits),
        _pictures([make(run) for make in RUN_CHARTS.values()]),
        Section("loop", "What happened", [report.loop_words(m)], loop),
        Section("how", "Configuration", facts=_setup(run), texts=[(name, text) for name, text in texts if text]),
    ]


def _changed(run: Artefacts) -> dict[str, str]:
    """The tile with how many other questions about edited subjects are answered in another way; none where none was
    asked."""
    about = run.metrics["final"].get("same_subject")
    return {"changed": f"{round(about['changed'] * about['asked']):,} of {about['asked']:,}"} if about else {}


def _provenance(run: Artefacts) -> dict[str, Any]:
    """The command, the seed and the versions, from the pack."""
    return next(iter(run.objects("pack/repair_config.json")), {}).get("provenance", {})


def _lead(run: Artefacts) -> list[str]:
    """What was asked and how it was done, in plain words."""
    m, data = run.metrics, run.option("data.path")
    changed, shards = "deviation" in m.get("method", {}), m.get("shards", 0)
    one = m["n_edits"] == 1
    words = f"A language model was wrong about {'a fact' if one else 'some facts'}. "
    words += f"{counted(m['n_edits'], 'correction')} {'was' if one else 'were'} written into {base_name(m)}"
    words += ". " if one else ", one after the other, as they would arrive in use. "
    words += f"{'It comes' if one else 'They come'} from {data}. " if data else ""
    words += "Some of its own weights are changed. " if changed else "The model itself was not retrained. "
    if shards or not changed:
        words += f"Corrections are kept in memories beside it ({counted(shards, 'shard')} at the end): for every "
        words += "question a router decides, from its words alone, whether one of them or the model answers."
    undone = sum(entry.status == EditStatus.UNDONE for entry in run.entries.values())
    was = "was" if undone == 1 else "were"
    back = f"{counted(undone, 'edit')} {was} taken back after the run; scores and answers are from before."
    return [words] + [back] * bool(undone)


def _setup(run: Artefacts) -> list[tuple[str, str]]:
    """What was run, where and with what."""
    m = run.metrics
    found = {name: m.get(name) for name in ("editor", "seed", "layer", "shards", "memory_bytes", "edits_per_minute")}
    found["base"] = f"{m['base']['name']} ({str(m['base'].get('sha256', ''))[:12]})"
    parts = {"seconds": m.get("seconds", {}), "versions": _provenance(run).get("versions", {})}
    parts["change of the base's own weights, by layer"] = m.get("method", {}).get("deviation") or {}
    found |= {name: ", ".join(f"{part} {_shown(one)}" for part, one in each.items()) for name, each in parts.items()}
    return [(word.replace("_", " "), _shown(value)) for word, value in found.items() if value not in (None, "")]
