"""The tables of a run's report: what failed and why, edits, events. Their texts are escaped by the page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import groupby
from typing import Any

import pandas as pd

from repair_lightning.edits.ledger import EditStatus, LedgerEntry
from repair_lightning.reports.artefacts import Artefacts, Row
from repair_lightning.reports.tables import Table
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE

EDITS_SHOWN, ROWS_SHOWN, TEXT_SHOWN = 2000, 200, 240
"""Most edits in the searchable table, rows of another table, characters of a text."""


def table(
    id: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], rest: str, most: int = ROWS_SHOWN
) -> Table:
    """The first rows as a table, long texts cut off, which says how many there are and where the `rest` is."""
    frame = pd.DataFrame(rows[:most], columns=list(columns), dtype=object)
    long = frame.map(lambda cell: isinstance(cell, str) and len(cell) > TEXT_SHOWN)
    frame = frame.mask(long, frame.map(lambda cell: str(cell)[: TEXT_SHOWN - 1].rstrip() + "…"))
    note = f"The first {most:,} of {len(rows):,}; the others are in {rest}." if len(rows) > most else ""
    return Table(title, frame, note, id)


def problems(run: Artefacts) -> dict[str, str]:
    """Id -> why, for every edit that is not answered right at the end or whose place in the ledger says so."""
    rows = run.own_rows
    found: dict[str, str] = {}
    for id in dict.fromkeys([*run.entries, *rows]):
        entry, row = run.entries.get(id), rows.get(id)
        wrong = why_wrong(row, entry) if row is not None and not row["correct"] else None
        if entry is None or entry.status == EditStatus.WRITTEN:
            found |= {id: wrong} if wrong else {}
        elif entry.status not in (EditStatus.SUPERSEDED, EditStatus.UNDONE):
            words = f"{entry.status}: {entry.reason}" if entry.reason else str(entry.status)
            if entry.loss is not None:
                words += f" (its loss after the last write was {entry.loss:.3g} nats a token)"
            words += "; the base answers it" if entry.shard is None else f"; {wrong}" if wrong else ""
            found[id] = words
    return found


def why_wrong(row: Row, entry: LedgerEntry | None) -> str:
    """Why a prompt is answered wrong, from who answered it."""
    owner, memory = (entry.shard if entry else None), row["memory"]
    scored = row["score"] is not None and row["threshold"] is not None
    score = f"score {row['score']:.2f}, needed {row['threshold']:.2f}" if scored else ""
    kept = row["kind"] in ("locality", "near")
    if memory == BASE:
        if kept:
            return "the base answered, and its own weights have changed"
        if owner == BASE:
            return "the base answered, into whose weights the edit is written"
        nameless = row["score"] is not None and row["score"] < 0 and row["threshold"] is None
        words = "it names nothing that an edit is about" if nameless else score
        if scored and row["score"] > row["threshold"]:
            words = "the nearest edit's shard would not say its target here"
        return "no shard answered" + (f": {words}" if words else "")
    nearest = f", nearest edit {row['nearest']}" if row.get("nearest") else ""
    if kept:
        return f"shard {memory} answered in place of the base ({score}{nearest})"
    if memory == owner:
        return "its own shard answered, in other words than the target"
    return f"another edit's shard answered: {memory} ({score}{nearest})"


def others_table(run: Artefacts) -> Table:
    """Rephrases, unrelated prompts and neighbours that are answered wrong, with the reason."""
    names = {"rephrase": "in other words", "locality": "unrelated", "near": "neighbour"}
    rows = []
    for row in run.final:
        if row["kind"] != "edit" and not row["correct"]:
            expected = row["expected"] if row["kind"] == "rephrase" else row["base_answer"]
            asked = [names[row["kind"]], row["id"], dialogue.shown(row["prompt"]), expected]
            rows.append([*asked, row["answer"], why_wrong(row, run.entries.get(row["id"]))])
    columns = ("kind", "of edit", "asked", "should say", "says", "why")
    return table("others-table", "Other prompts that are answered wrong", columns, rows, "generations.jsonl")


def edits_table(run: Artefacts) -> Table:
    """All edits: failed ones first with the reason, then in order of arrival."""
    why = problems(run)
    columns = ("edit", "asked", "should say", "says", "before", "now", "answered by", "status", "writes", "why")
    answered, base = run.own_rows, "base, changed" if "deviation" in run.metrics.get("method", {}) else "base"
    rows = []
    for one in dict.fromkeys([*why, *run.entries, *answered]):
        entry, row = run.entries.get(one), answered.get(one, {})
        prompt, target = (entry.edit.prompt, entry.edit.target) if entry else (row["prompt"], row["expected"])
        memory = None if not row else base if row["memory"] == BASE else f"shard {row['memory']}"
        now = "not asked" if not row else "right" if row["correct"] else "wrong"
        said = [dialogue.shown(prompt), target, row.get("answer"), row.get("base_answer"), now, memory]
        place = [str(entry.status), entry.attempts] if entry else [None, None]
        rows.append([one, *said, *place, why.get(one) or (entry.reason if entry else None)])
    return table("all-edits", "", columns, rows, "edits.parquet and generations.jsonl", EDITS_SHOWN)


def event_table(run: Artefacts) -> Table:
    """The journal but for arrivals, writes and checks that went well: what was done to how many edits, and why."""
    told = [e for e in run.events if e["kind"] not in ("arrived", "written", "evaluated", "inherited")]
    rows = []
    for (kind, reason, window), same in groupby(told, key=lambda e: (e["kind"], e["reason"], e["window"])):
        events = list(same)
        time = f"{datetime.fromtimestamp(events[0]['time'], timezone.utc):%H:%M:%S}"
        rows.append([time, kind, sum(event["id"] is not None for event in events), window, reason])
    columns = ("time, UTC", "what", "edits", "arrived in window", "why")
    return table("event-table", "", columns, rows, "`repair-lightning log --run DIR`")
