"""The tables of a run's report: scores, what failed and why, edits, events. Their texts are escaped by the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from repair_lightning.edits.ledger import EditStatus, LedgerEntry
from repair_lightning.reports.artefacts import Artefacts, Row
from repair_lightning.reports.charts import SCORES_IN_WORDS, Chart
from repair_lightning.reports.report import stages
from repair_lightning.scoring.protocols import PROTOCOLS
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE

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

FORMS_IN_WORDS = {
    "bare": "as bare text",
    "chat": "in the chat template",
    "system": "behind a system message",
    "second_turn": "in a second turn",
    "wrapped": "inside courtesy",
    "long": "behind other text",
}
FIGURES_IN_WORDS = {
    "rel": "answered exactly",
    "contains": "target in the answer",
    "fires": "a shard answers",
    "garbled": "garbled",
}


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
    """A table of the page; `groups` are titles over some columns each, with their number."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Line]
    note: str = ""
    groups: Sequence[tuple[str, int]] = ()


# -- scores ------------------------------------------------------------------------------------------------------------


def examples(run: Artefacts, number: int = 3) -> PageTable:
    """A few edits, before and after."""
    before = answers_before(run)
    gone = {id for id, entry in run.entries.items() if entry.status in (EditStatus.SUPERSEDED, EditStatus.UNDONE)}
    rows = [row for row in run.rows.get("final", ()) if row["kind"] == "edit" and row["id"] not in gone]
    shown = [row for row in rows if row["correct"] and row["answer"] != before.get(row["id"])][:number]
    columns = [Column(name, "text") for name in ("asked", "answer before", "answer now")]
    lines = [Line([asked(row["prompt"]), text(before.get(row["id"])), text(row["answer"])]) for row in shown]
    return PageTable("examples", "examples", columns, lines)


def score_table(run: Artefacts) -> PageTable:
    """A row per protocol and stage, in per cent."""
    lines, kinds = [], [kind for kind in SCORES_IN_WORDS if run.score(kind) is not None]
    for protocol in PROTOCOLS:
        for stage, words in stages(run.metrics).items():
            scores = [run.score(kind, stage, protocol) for kind in kinds]
            cells = [Cell("-" if s is None else f"{100 * s:.1f}", "" if s is None else s) for s in scores]
            lines.append(Line([Cell(protocol.replace("_", " ")), Cell(words), *cells], strong=stage == "final"))
    columns = [Column("protocol"), Column("model"), *(Column(SCORES_IN_WORDS[kind], "number") for kind in kinds)]
    return PageTable("score-table", "scores", columns, lines, "In per cent; higher is better everywhere.")


def forms_table(run: Artefacts) -> PageTable:
    """How the edits hold in each form in which the base can be asked, in per cent; no rows where none was asked."""
    columns = [Column("asked"), *(Column(title, "number") for title in FIGURES_IN_WORDS.values())]
    lines = []
    for form, found in (run.metrics["final"].get("forms") or {}).items():
        if found["rel"] is not None:
            cells = [Cell(f"{100 * found[name]:.1f}", found[name]) for name in FIGURES_IN_WORDS]
            lines.append(Line([Cell(FORMS_IN_WORDS.get(form, form)), *cells]))
    note = "In per cent of the edits that were asked; garbled: a shard said what neither it nor the base should say."
    return PageTable("forms-table", "edits in other forms", columns, lines, note)


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
            found[id] = why_failed(entry)
            if row is not None and not row["correct"] and entry.shard is not None:
                found[id] += f"; {why_wrong(row, entry)}"
        elif row is not None and not row["correct"]:
            found[id] = why_wrong(row, entry)
    unknown = {id: row for id, row in rows.items() if id not in run.entries and not row["correct"]}
    return found | {id: why_wrong(row, None) for id, row in unknown.items()}


def why_failed(entry: LedgerEntry) -> str:
    """Why an edit stands where it stands, from the ledger."""
    words = f"{entry.status}: {entry.reason}" if entry.reason else str(entry.status)
    if entry.loss is not None:
        words += f" (its loss after the last write was {entry.loss:.3g} nats a token)"
    return words if entry.shard is not None else f"{words}; the base answers it"


def why_wrong(row: Row, entry: LedgerEntry | None) -> str:
    """Why a prompt is answered wrong, from who answered it."""
    owner, memory = (entry.shard if entry else None), row["memory"]
    score = (
        ""
        if row["score"] is None or row["threshold"] is None
        else f"score {row['score']:.2f}, needed {row['threshold']:.2f}"
    )
    kept = row["kind"] in ("locality", "near")
    if memory == BASE:
        if kept:
            return "the base answered, and its own weights have changed"
        if owner == BASE:
            return "the base answered, into whose weights the edit is written"
        above = bool(score) and row["score"] > row["threshold"]
        nameless = row["score"] is not None and row["score"] < 0 and row["threshold"] is None
        words = "it names nothing that an edit is about" if nameless else score
        words = "the nearest edit's shard would not say its target here" if above else words
        return "no shard answered" + (f": {words}" if words else "")
    nearest = f", nearest edit {row['nearest']}" if row.get("nearest") else ""
    if kept:
        return f"shard {memory} answered in place of the base ({score}{nearest})"
    if memory == owner:
        return "its own shard answered, in other words than the target"
    return f"another edit's shard answered: {memory} ({score}{nearest})"


def failed_table(run: Artefacts) -> PageTable:
    """The edits that failed, with the reason."""
    rows, why = edit_rows(run), problems(run)
    columns = [Column("edit", "id"), Column("asked", "text"), Column("should say", "text"), Column("says", "text")]
    columns += [Column("before", "text"), Column("why", "reason"), Column("writes", "number")]
    lines = []
    for id in list(why)[:ROWS_SHOWN]:
        row, entry = rows.get(id, {}), run.entries.get(id)
        prompt, target = (entry.edit.prompt, entry.edit.target) if entry else (row["prompt"], row["expected"])
        said = [asked(prompt), text(target), text(row.get("answer")), text(row.get("base_answer"))]
        attempts = Cell(str(entry.attempts) if entry else "-")
        lines.append(Line([text(id), *said, text(why[id], 4 * TEXT_SHOWN), attempts]))
    return PageTable("failed-table", "edits that failed", columns, lines, cut(len(lines), len(why)))


def others_table(run: Artefacts) -> PageTable:
    """Rephrases, unrelated prompts and neighbours that are answered wrong, with the reason."""
    wrong = [row for row in run.rows.get("final", ()) if row["kind"] != "edit" and not row["correct"]]
    columns = [Column("kind"), Column("of edit", "id"), Column("asked", "text"), Column("should say", "text")]
    columns += [Column("says", "text"), Column("why", "reason")]
    names = {"rephrase": "in other words", "locality": "unrelated", "near": "neighbour"}
    lines = []
    for row in wrong[:ROWS_SHOWN]:
        right = row["expected"] if row["kind"] == "rephrase" else row["base_answer"]
        said = [asked(row["prompt"]), text(right), text(row["answer"])]
        why = text(why_wrong(row, run.entries.get(row["id"])))
        lines.append(Line([text(names.get(row["kind"], row["kind"])), text(row["id"]), *said, why]))
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


def chart_table(chart: Chart) -> PageTable:
    """A chart's numbers."""
    rows = chart.rows()
    kinds = ["number" if isinstance(rows[0][name], (int, float)) else "" for name in chart.columns]
    columns = [Column(chart.label(name) or name, kind) for name, kind in zip(chart.columns, kinds, strict=True)]
    lines = [Line([_number(row[name]) for name in chart.columns]) for row in rows[:POINTS_SHOWN]]
    note = cut(len(lines), len(rows), "what `repair-lightning figures` writes as CSV")
    return PageTable(f"table-{chart.name}", f"the numbers of: {chart.title}", columns, lines, note)


def _number(value: Any) -> Cell:
    if isinstance(value, (int, float)):
        return Cell(f"{value:,}" if isinstance(value, int) else f"{value:,.4g}", value)
    return text(value)


def edits_table(run: Artefacts) -> dict[str, Any]:
    """The data of the searchable table: failed edits first, then in order of arrival."""
    columns = [
        {"name": "id", "title": "edit", "kind": "id"},
        {"name": "prompt", "title": "asked", "kind": "text"},
        {"name": "target", "title": "should say", "kind": "text"},
        {"name": "answer", "title": "says", "kind": "text"},
        {"name": "before", "title": "before", "kind": "text"},
        {"name": "now", "title": "now", "kind": ""},
        {"name": "memory", "title": "answered by", "kind": ""},
        {"name": "status", "title": "status", "kind": ""},
        {"name": "attempts", "title": "writes", "kind": "number"},
        {"name": "reason", "title": "why", "kind": "text"},
    ]
    rows, why = edit_rows(run), problems(run)
    ids = dict.fromkeys([*why, *run.entries, *rows])
    return {"columns": columns, "rows": [_edit_row(run, id, rows.get(id), why) for id in list(ids)[:EDITS_SHOWN]]}


def _edit_row(run: Artefacts, id: str, row: Row | None, why: Mapping[str, str]) -> list[Any]:
    entry = run.entries.get(id)
    prompt, target = (
        (entry.edit.prompt, entry.edit.target) if entry else ((row or {})["prompt"], (row or {})["expected"])
    )
    now = "not asked" if row is None else "right" if row["correct"] else "wrong"
    changed = "base, changed" if "deviation" in run.metrics.get("method", {}) else "base"
    memory = None if row is None else changed if row["memory"] == BASE else f"shard {row['memory']}"
    reason = why.get(id) or (entry.reason if entry else "") or ""
    said = [shortened(row["answer"]), shortened(row["base_answer"])] if row else [None, None]
    status = str(entry.status) if entry else None
    place = [shortened(dialogue.shown(prompt)), shortened(target), *said, now, memory, status]
    return [id, *place, entry.attempts if entry else None, shortened(reason, 2 * TEXT_SHOWN)]


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


# -- words -------------------------------------------------------------------------------------------------------------


def shortened(value: Any, most: int = TEXT_SHOWN) -> str:
    """A text with its end cut off where it is long."""
    words = str(value)
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def text(value: Any, most: int = TEXT_SHOWN) -> Cell:
    """A text as a cell; a dash for nothing."""
    return Cell("-" if value is None or value == "" else shortened(value, most))


def asked(prompt: str) -> Cell:
    """A prompt as a cell; messages turn by turn."""
    return text(dialogue.shown(prompt))


def cut(shown: int, total: int, rest: str = "edits.parquet and generations.jsonl") -> str:
    """Says that a table does not hold everything."""
    return f"The first {shown:,} of {total:,}; the others are in {rest}." if shown < total else ""


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
