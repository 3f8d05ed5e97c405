"""`report.html`: a finished run for a reader who never saw the project, in one file that asks nothing of the network.

Everything that comes from the data is escaped: by Jinja in the page, by `textContent` in its script, by `tojson` between
the two. plotly.js lies in it once, compressed; the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from repair_lightning.data.ledger import EditStatus, LedgerEntry
from repair_lightning.evaluation.artefacts import Artefacts, Row
from repair_lightning.evaluation.charts import RUN_CHARTS, SCORES_IN_WORDS, Chart, percent
from repair_lightning.evaluation.plotly_charts import figure
from repair_lightning.evaluation.protocols import PROTOCOLS
from repair_lightning.evaluation.report import STAGES, replace_text
from repair_lightning.types import BASE

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
EDITS_SHOWN, ROWS_SHOWN, POINTS_SHOWN, TEXT_SHOWN = 2000, 200, 60, 240
"""Most edits in the searchable table, rows of another table, rows of a picture's table, characters of a text."""

FAILED = (
    EditStatus.FAILED,
    EditStatus.QUARANTINED,
    EditStatus.PENDING,
    EditStatus.RESIDUAL,
    EditStatus.REQUEUED,
)
"""What an edit of a finished run should not be."""

GLOSSARY = (
    ("Rel", "reliability: corrected prompts that get the new answer"),
    ("Gen", "generalisation: the same questions in other words that get the new answer"),
    ("Loc", "locality: unrelated prompts that are answered as before"),
    ("Near", "neighbours: the same question about another subject, answered as before"),
    ("OP", "overall performance: the cube root of Rel × Gen × Loc"),
    ("autoregressive", "the model writes its answer freely; it counts if it is exactly the expected one"),
    ("teacher forced", "the expected answer is fed in; the share of its tokens that the model would have chosen"),
    ("before merge", "behind the last edit, before side memories were fused, if they were"),
    ("oracle routing", "what the same memories score if every prompt is sent to the right one"),
)


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, what it is sorted by (None: the text), and how it is coloured."""

    text: str
    key: float | str | None = None
    mood: str = ""


@dataclass(frozen=True)
class Column:
    """A column's title and its look: `text`, `reason` or `number`."""

    title: str
    kind: str = ""


@dataclass(frozen=True)
class Line:
    """A table's row."""

    cells: Sequence[Cell]
    strong: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table of the page."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Line]
    note: str = ""


# -- making one --------------------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path) -> Path:
    """Make `report.html` of a finished run from its artefacts, in place of an earlier one; returns the file.

    Raises:
        RepairError: there is no finished run, or its files are damaged.
    """
    run = Artefacts.read(run_dir)
    page = _environment().get_template("report.html.j2").render(context(run))
    replace_text(run.path / REPORT_FILE, page)
    return run.path / REPORT_FILE


def try_report(run_dir: str | Path) -> Path | None:
    """The same where nothing may fail: a run is not lost because its report cannot be made. None says that it was not."""
    try:
        return write_report(run_dir)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        log.warning(
            "%s could not be made (%s); the run is whole: `repair-lightning report --run %s` tries again",
            REPORT_FILE,
            words,
            run_dir,
        )
        return None


def _environment() -> Environment:
    loader = PackageLoader("repair_lightning.evaluation")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def packed_plotly() -> str:
    """plotly.js, compressed, as base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def context(run: Artefacts) -> dict[str, Any]:
    """Everything that the page shows."""
    drawn = {name: make(run) for name, make in RUN_CHARTS.items()}
    charts = [chart for chart in drawn.values() if isinstance(chart, Chart)]
    number = f"{run.metrics['n_edits']:,}"
    return {
        "title": f"{number} corrections of {run.base}",
        "subtitle": subtitle(run),
        "lead": lead(run),
        "notices": notices(run),
        "tiles": tiles(run),
        "examples": examples(run),
        "scores": score_table(run),
        "glossary": glossary(run),
        "further": further(run),
        "failed_words": failed_words(run),
        "failed": failed_table(run),
        "others_words": "Routing decides from a prompt's words alone which memory answers. Where it chose well and the answer is "
        "wrong all the same, the memory itself has not learnt it in these words.",
        "others": others_table(run),
        "skipped": skipped_table(run),
        "charts": [_chart(chart) for chart in charts],
        "figures": {chart.name: figure(chart) for chart in charts},
        "missing": [words for words in drawn.values() if isinstance(words, str)],
        "edits": edits_table(run),
        "edits_words": edits_words(run),
        "loop_words": loop_words(run),
        "events": event_table(run),
        "command": run.provenance.get("command", ""),
        "setup": setup(run),
        "config": run.config_text,
        "made": f"Made by REPAIR-Lightning from the run's own files; `repair-lightning report --run {run.path}` makes it anew.",
        "plotly": packed_plotly(),
    }


# -- what was asked and what came of it --------------------------------------------------------------------------------


def subtitle(run: Artefacts) -> str:
    """The run's name, when it ended, how long it took."""
    seconds = run.metrics.get("seconds", {}).get("total")
    ended = [event["time"] for event in run.events]
    when = f", {datetime.fromtimestamp(max(ended), timezone.utc):%Y-%m-%d %H:%M} UTC" if ended else ""
    return f"Run {run.name}{when}" + (f", {duration(seconds)} in all" if seconds else "")


def lead(run: Artefacts) -> list[str]:
    """What was asked and what it came to, in plain words."""
    m = run.metrics
    data, many = run.option("data.path"), f"{m['n_edits']:,}"
    size = m["base"].get("parameters")
    base = f"the language model {run.base}" + (f" ({size / 1e6:,.1f} million parameters)" if size else "")
    source = f" They come from {data}." if data else ""
    asked = (
        f"A language model was wrong about some facts. {many} corrections were written into {base}, one after the other, as they "
        f"would arrive in use.{source} The model itself was not retrained: corrections are kept in small side memories (shards; "
        f"{m.get('shards', 0):,} at the end), and for every question a router decides, from its words alone, whether one of "
        "them or the unchanged model answers."
    )
    rel, gen, loc = (run.score(kind) for kind in ("rel", "gen", "loc"))
    parts = [f"{percent(rel)} of the corrected prompts get the new answer ({percent(run.score('rel', 'pre_edit'))} before)"]
    parts += [f"{percent(gen)} of the same questions in other words"] * (gen is not None)
    parts += [f"{percent(loc)} of unrelated prompts are answered as before"] * (loc is not None)
    return [asked, f"With all corrections in place, {'; '.join(parts)}."]


def notices(run: Artefacts) -> list[str]:
    """What a reader must know beforehand."""
    statuses = [entry.status for entry in run.entries.values()]
    undone = statuses.count(EditStatus.UNDONE)
    found = []
    if undone:
        found.append(
            f"{undone} of the edits were taken back after the run. The scores and the answers are those at the end of the run, "
            "before that."
        )
    bad = len(run.metrics.get("records", {}).get("bad", ()))
    if bad:
        found.append(f"{bad} records of the data were bad and were not written; they are listed below.")
    return found


def tiles(run: Artefacts) -> list[dict[str, str]]:
    """The headline figures."""
    words = {
        "rel": "of the edits answered right (Rel)",
        "gen": "in other words (Gen)",
        "loc": "unrelated answers kept (Loc)",
        "near": "neighbours' answers kept (Near)",
        "op": "overall (OP)",
    }
    found = [
        {"value": percent(run.score(kind)), "words": text, "mood": ""}
        for kind, text in words.items()
        if run.score(kind) is not None
    ]
    failed = len(problems(run))
    found.append({"value": f"{failed:,}", "words": "edits failed", "mood": "bad" if failed else "good"})
    speed = run.metrics.get("edits_per_minute")
    return found + ([{"value": f"{speed:,.0f}", "words": "edits a minute", "mood": ""}] if speed else [])


def examples(run: Artefacts, number: int = 3) -> PageTable:
    """A few edits, before and after."""
    before = answers_before(run)
    rows = [row for row in run.rows.get("final", ()) if row["kind"] == "edit"]
    shown = [row for row in rows if row["correct"] and row["answer"] != before.get(row["id"])][:number]
    columns = [Column(name, "text") for name in ("asked", "answer before", "answer now")]
    lines = [Line([text(row["prompt"]), text(before.get(row["id"])), text(row["answer"])]) for row in shown]
    return PageTable("examples", "examples", columns, lines)


def score_table(run: Artefacts) -> PageTable:
    """A row per protocol and stage, in per cent."""
    lines, kinds = [], [kind for kind in SCORES_IN_WORDS if run.score(kind) is not None]
    for protocol in PROTOCOLS:
        for stage, words in STAGES.items():
            if run.metrics.get(stage):
                scores = [run.score(kind, stage, protocol) for kind in kinds]
                cells = [Cell("-" if s is None else f"{100 * s:.1f}", "" if s is None else s) for s in scores]
                lines.append(Line([Cell(protocol.replace("_", " ")), Cell(words), *cells], strong=stage == "final"))
    columns = [Column("protocol"), Column("model"), *(Column(SCORES_IN_WORDS[kind], "number") for kind in kinds)]
    return PageTable("score-table", "scores", columns, lines, "In per cent; higher is better everywhere.")


def glossary(run: Artefacts) -> list[tuple[str, str]]:
    """What the words of the score table mean, for those that it uses."""
    unused = {name for kind, name in SCORES_IN_WORDS.items() if run.score(kind) is None}
    return [(word, meaning) for word, meaning in GLOSSARY if word not in unused]


def further(run: Artefacts) -> list[str]:
    """Figures that only some runs have."""
    m, found = run.metrics, []
    if m.get("perplexity"):
        both = m["perplexity"]
        found.append(f"Perplexity of the targets: {both['pre']:.2f} before, {both['final']:.3f} after.")
    if m.get("probes"):
        kept = m["probes"]
        found.append(
            f"{kept['number']:,} questions that no edit touches: {percent(kept['pre'])} right before, {percent(kept['final'])} "
            f"after; {percent(kept['same'])} of the answers are unchanged."
        )
    if m.get("earlier"):
        earlier = m["earlier"]
        shares = ", ".join(
            f"{SCORES_IN_WORDS.get(kind, kind)} {percent(earlier['before'][kind])} before, {percent(earlier['after'][kind])} after"
            for kind in earlier["before"]
        )
        found.append(
            f"The run went on with an edited model: of its edits {earlier['n_edits']:,} are live ({shares}) and "
            f"{earlier['superseded']:,} superseded."
        )
    return found


# -- what failed -------------------------------------------------------------------------------------------------------


def answers_before(run: Artefacts) -> dict[str, str]:
    """Id -> what the base said to the edit's own prompt."""
    return {row["id"]: row["base_answer"] for row in run.rows.get("final", ()) if row["kind"] == "edit"}


def edit_rows(run: Artefacts) -> dict[str, Row]:
    """Id -> the final model's line for the edit's own prompt."""
    return {row["id"]: row for row in run.rows.get("final", ()) if row["kind"] == "edit"}


def problems(run: Artefacts) -> dict[str, str]:
    """Id -> why, for every edit that is not answered right at the end or whose place in the ledger says so."""
    rows, found = edit_rows(run), {}
    for id, entry in run.entries.items():
        row = rows.get(id)
        if entry.status in (EditStatus.SUPERSEDED, EditStatus.UNDONE):
            continue
        if entry.status in FAILED:
            found[id] = f"{entry.status}: {entry.reason}" if entry.reason else str(entry.status)
            if row is not None and not row["correct"]:
                found[id] += f"; {why_wrong(row, entry)}"
        elif row is not None and not row["correct"]:
            found[id] = why_wrong(row, entry)
    unknown = {id: row for id, row in rows.items() if id not in run.entries and not row["correct"]}
    return found | {id: why_wrong(row, None) for id, row in unknown.items()}


def why_wrong(row: Row, entry: LedgerEntry | None) -> str:
    """Why a prompt is answered wrong, from who answered it."""
    owner, memory = (entry.shard if entry else None), row["memory"]
    score = "" if row["score"] is None or row["threshold"] is None else f"score {row['score']:.2f}, needed {row['threshold']:.2f}"
    kept = row["kind"] in ("locality", "near")
    if memory == BASE:
        if kept:
            return "the base answered, and its own weights have changed"
        above = bool(score) and row["score"] > row["threshold"]
        words = "it does not ask what the nearest edit asks" if above else score
        return "no shard answered" + (f": {words}" if words else "")
    nearest = f", nearest edit {row['nearest']}" if row.get("nearest") else ""
    if kept:
        return f"shard {memory} answered in place of the base ({score}{nearest})"
    if memory == owner:
        return "its own shard answered, in other words than the target"
    return f"another edit's shard answered: {memory} ({score}{nearest})"


def failed_words(run: Artefacts) -> str:
    """How many edits failed."""
    failed, quarantined = len(problems(run)), run.metrics.get("closed_loop", {}).get("quarantined", 0)
    if not failed:
        return "No edit failed: each corrected prompt gets its new answer, and none was given up (quarantined)."
    given_up = f"; {quarantined:,} of them were quarantined: given up after repeated attempts, so the base answers them"
    return f"{failed:,} of {run.metrics['n_edits']:,} edits failed{given_up if quarantined else ''}."


def failed_table(run: Artefacts) -> PageTable:
    """The edits that failed, with the reason."""
    rows, why = edit_rows(run), problems(run)
    columns = [Column("edit"), Column("asked", "text"), Column("should say", "text"), Column("says", "text")]
    columns += [Column("before", "text"), Column("why", "reason"), Column("attempts", "number")]
    lines = []
    for id in list(why)[:ROWS_SHOWN]:
        row, entry = rows.get(id, {}), run.entries.get(id)
        prompt, target = (entry.edit.prompt, entry.edit.target) if entry else (row["prompt"], row["expected"])
        said = [text(prompt), text(target), text(row.get("answer")), text(row.get("base_answer"))]
        attempts = Cell(str(entry.attempts) if entry else "-")
        lines.append(Line([text(id), *said, text(why[id], 4 * TEXT_SHOWN), attempts]))
    return PageTable("failed-table", "edits that failed", columns, lines, cut(len(lines), len(why)))


def others_table(run: Artefacts) -> PageTable:
    """Rephrases, unrelated prompts and neighbours that are answered wrong, with the reason."""
    wrong = [row for row in run.rows.get("final", ()) if row["kind"] != "edit" and not row["correct"]]
    columns = [Column("kind"), Column("of edit"), Column("asked", "text"), Column("should say", "text")]
    columns += [Column("says", "text"), Column("why", "reason")]
    names = {"rephrase": "in other words", "locality": "unrelated", "near": "neighbour"}
    lines = []
    for row in wrong[:ROWS_SHOWN]:
        right = row["expected"] if row["kind"] == "rephrase" else row["base_answer"]
        said = [text(row["prompt"]), text(right), text(row["answer"])]
        why = text(why_wrong(row, run.entries.get(row["id"])))
        lines.append(Line([Cell(names.get(row["kind"], row["kind"])), text(row["id"]), *said, why]))
    note = cut(len(lines), len(wrong), "generations.jsonl")
    return PageTable("others-table", "other prompts answered wrong", columns, lines, note)


def skipped_table(run: Artefacts) -> PageTable:
    """Bad records, duplicates and superseded ones."""
    records = run.metrics.get("records", {})
    lines = [Line([Cell("bad"), text(words, 4 * TEXT_SHOWN)]) for words in records.get("bad", ())]
    lines += [Line([Cell("duplicate"), text(words)]) for words in records.get("duplicates", ())]
    lines += [
        Line([Cell("superseded"), text(f"{old}, by {new}")]) for old, new in records.get("superseded", {}).items()
    ]
    columns = [Column("kind"), Column("which", "reason")]
    note = cut(min(len(lines), ROWS_SHOWN), len(lines), "metrics.json")
    return PageTable("skipped-table", "records that were not written", columns, lines[:ROWS_SHOWN], note)


# -- pictures, edits, events -------------------------------------------------------------------------------------------


def _chart(chart: Chart) -> dict[str, Any]:
    """A chart's words and its numbers as a table."""
    rows = chart.rows()
    named = [(name, chart.label(name) or name) for name in chart.columns]
    kinds = ["number" if isinstance(rows[0][name], (int, float)) else "" for name, _ in named]
    columns = [Column(title, kind) for (_, title), kind in zip(named, kinds, strict=True)]
    lines = [Line([_number(row[name]) for name in chart.columns]) for row in rows[:POINTS_SHOWN]]
    note = cut(len(lines), len(rows), "`repair-lightning figures`, which writes all of them as CSV")
    table = PageTable(f"table-{chart.name}", f"the numbers of: {chart.title}", columns, lines, note)
    return {"name": chart.name, "title": chart.title, "words": chart.words, "table": table}


def _number(value: Any) -> Cell:
    if isinstance(value, (int, float)):
        return Cell(f"{value:,}" if isinstance(value, int) else f"{value:,.4g}", value)
    return text(value)


def edits_table(run: Artefacts) -> dict[str, Any]:
    """The data of the searchable table: failed edits first, then in order of arrival."""
    columns = [
        {"name": "id", "title": "edit", "kind": ""},
        {"name": "prompt", "title": "asked", "kind": "text"},
        {"name": "target", "title": "should say", "kind": "text"},
        {"name": "answer", "title": "says", "kind": "text"},
        {"name": "before", "title": "before", "kind": "text"},
        {"name": "now", "title": "now", "kind": ""},
        {"name": "memory", "title": "answered by", "kind": ""},
        {"name": "status", "title": "status", "kind": ""},
        {"name": "attempts", "title": "attempts", "kind": "number"},
        {"name": "reason", "title": "why", "kind": "reason"},
    ]
    rows, why = edit_rows(run), problems(run)
    ids = dict.fromkeys([*why, *run.entries, *rows])
    return {"columns": columns, "rows": [_edit_row(run, id, rows.get(id), why) for id in list(ids)[:EDITS_SHOWN]]}


def _edit_row(run: Artefacts, id: str, row: Row | None, why: Mapping[str, str]) -> list[Any]:
    entry = run.entries.get(id)
    prompt, target = (entry.edit.prompt, entry.edit.target) if entry else ((row or {})["prompt"], (row or {})["expected"])
    now = "not asked" if row is None else "right" if row["correct"] else "wrong"
    memory = None if row is None else "base" if row["memory"] == BASE else f"shard {row['memory']}"
    reason = why.get(id) or (entry.reason if entry else "") or ""
    said = [shortened(row["answer"]), shortened(row["base_answer"])] if row else [None, None]
    status = str(entry.status) if entry else None
    place = [shortened(prompt), shortened(target), *said, now, memory, status]
    return [id, *place, entry.attempts if entry else None, shortened(reason, 2 * TEXT_SHOWN)]


def edits_words(run: Artefacts) -> str:
    """How many edits the table holds, and what became of them."""
    total = len({**run.entries, **edit_rows(run)})
    counts = ", ".join(f"{number:,} {status}" for status, number in run.metrics.get("edits", {}).items() if number)
    rest = f" The table holds the first {EDITS_SHOWN:,} of them, failed ones first; all are in edits.parquet."
    return f"{total:,} edits" + (f": {counts}." if counts else ".") + (rest if total > EDITS_SHOWN else "")


def loop_words(run: Artefacts) -> str:
    """The closed loop and the merge in a few sentences."""
    m = run.metrics
    loop, merge = m.get("closed_loop", {}), m.get("merge", {})
    words = (
        f"The edits arrived in {loop.get('windows', 0):,} windows. After each, unrelated questions were asked ("
        f"{loop.get('rolled_back', 0):,} windows were taken back because too many had changed), then the edits themselves: "
        f"{loop.get('pruned', 0):,} shards were emptied because they failed too often, {loop.get('retriggered', 0):,} times an "
        f"edit was sent back to be written anew, {loop.get('quarantined', 0):,} edits were given up."
    )
    if merge:
        words += f" Fusing the side memories: {'accepted' if merge['accepted'] else 'not applied'} ({merge['reason']})."
    return words


def event_table(run: Artefacts) -> PageTable:
    """The journal but for arrivals, writes and checks that went well: what was done to how many edits, and why."""
    found: list[dict[str, Any]] = []
    for event in run.events:
        if event["kind"] in ("arrived", "written", "evaluated", "inherited"):
            continue
        told = (event["kind"], event["reason"] or "", event["window"])
        if found and event["id"] is not None and found[-1]["told"] == told:
            found[-1]["edits"] += 1
        else:
            found.append({"told": told, "time": event["time"], "edits": int(event["id"] is not None)})
    columns = [Column("time, UTC"), Column("what"), Column("edits", "number"), Column("arrived in window", "number")]
    lines = [
        Line(
            [
                Cell(f"{datetime.fromtimestamp(one['time'], timezone.utc):%H:%M:%S}", one["time"]),
                text(one["told"][0]),
                Cell(f"{one['edits']:,}" if one["edits"] else "-", one["edits"]),
                Cell("-" if one["told"][2] is None else str(one["told"][2])),
                text(one["told"][1]),
            ]
        )
        for one in found[:ROWS_SHOWN]
    ]
    note = cut(len(lines), len(found), "`repair-lightning log --run DIR`")
    return PageTable("event-table", "events", [*columns, Column("why", "reason")], lines, note)


def setup(run: Artefacts) -> list[tuple[str, str]]:
    """What was run, where and with what."""
    m, seconds = run.metrics, run.metrics.get("seconds", {})
    options = {
        "router": "model.routing.router",
        "form of a shard": "model.writing.form",
        "edits per window": "data.window",
        "records": "data.path",
        "their format": "data.format",
        "unrelated prompts": "data.irrelevant",
    }
    found = [("base", f"{m['base']['name']} ({str(m['base'].get('sha256', ''))[:12]})")]
    found += [(word, str(m[name])) for word, name in (("editor", "editor"), ("edited layer", "layer"), ("seed", "seed")) if name in m]
    found += [(word, str(value)) for word, name in options.items() if (value := run.option(name)) is not None]
    if m.get("memory_bytes") is not None:
        found.append(("side memory", f"{m['memory_bytes'] / 2**20:.2f} MiB in {m.get('shards', 0):,} shards"))
    if seconds:
        parts = (("loading", "load"), ("editing", "edit"), ("scoring", "evaluate"))
        found.append(("time", ", ".join(f"{duration(seconds[key])} {word}" for word, key in parts if key in seconds)))
    versions = run.provenance.get("versions", {})
    if versions:
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return found


# -- words -------------------------------------------------------------------------------------------------------------


def shortened(value: Any, most: int = TEXT_SHOWN) -> str:
    """A text with its end cut off where it is long."""
    words = str(value)
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def text(value: Any, most: int = TEXT_SHOWN) -> Cell:
    """A text as a cell; a dash for nothing."""
    return Cell("-" if value is None or value == "" else shortened(value, most))


def cut(shown: int, total: int, rest: str = "edits.parquet and generations.jsonl") -> str:
    """Says that a table does not hold everything."""
    return f"The first {shown:,} of {total:,}; the others are in {rest}." if shown < total else ""


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

