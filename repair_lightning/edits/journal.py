"""The journal: a run's one durable store, in SQLite. Here an edit becomes durable.

- *Events* are the ledger's append-only history: every change of the ledger is a transaction here before it counts
  there. An event holds the edit's whole state after the change, so the ledger can be rebuilt.
- *Rows* are what an edit needs to be restored and what never changes, such as a low-rank shard or a router's key.
- The *checkpoint* is the last event that is to be gone on from, with the hash of the file that holds all else.

Rows and checkpoint change together, in one transaction. A run that was killed goes on from its checkpoint: what the
events say beyond it did not come to pass, stays readable, and is marked by the event that says so.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load, save
from torch import Tensor

from repair_lightning.edits.ledger import VERSION as LEDGER_VERSION
from repair_lightning.edits.ledger import Ledger, LedgerEntry
from repair_lightning.errors import RepairError, UnknownEditError

VERSION = 2
FILE = "journal.sqlite"
RESUMED = "resumed"
"""The event of a run that goes on from a checkpoint; what lies between the two is void."""

_STATE = tuple(field.name for field in fields(LedgerEntry) if field.name != "edit")
_SAID = ("time", "kind", "id", *_STATE, "edit")
_TABLES = f"""
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, id TEXT, arrival INTEGER, window INTEGER,
    status TEXT, shard INTEGER, attempts INTEGER, regroups INTEGER, loss REAL, kd REAL, score REAL, reason TEXT,
    edit TEXT, back_to INTEGER, void INTEGER NOT NULL DEFAULT 0);
CREATE INDEX events_of_an_edit ON events (id);
CREATE TABLE rows (
    name TEXT NOT NULL, number INTEGER NOT NULL, sha256 BLOB NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (name, number));
CREATE TABLE checkpoint (
    id INTEGER PRIMARY KEY CHECK (id = 1), sha256 TEXT NOT NULL, seq INTEGER NOT NULL, windows INTEGER NOT NULL,
    time REAL NOT NULL);
PRAGMA user_version = {VERSION};
"""


Tables = Mapping[str, Mapping[int, Mapping[str, Tensor]]]
"""Rows by table and number: under one number a table never holds two different rows."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a killed run goes on: after event `seq` and `windows` windows, with the file of this hash."""

    sha256: str
    seq: int
    windows: int


class JournalError(RepairError):
    """The journal cannot be written or read."""


class Journal:
    """The events of one run, in an SQLite file that is made where it is missing, unless one only asks.

    A single writer at a time, any number of readers. JournalError where it cannot be opened, is damaged, or of a
    version that this release does not read.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self._stored: dict[str, set[int]] | None = None  # the numbers of the rows, once they are known
        if read_only and not self.path.is_file():
            raise JournalError(f"'{path}' is no journal: there is no such file; give the directory of a run")
        with self._explained("opened"):
            address = f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._db = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
            if not read_only:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")  # a transaction that has returned is on the disk
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not read_only:
                self._db.executescript(f"BEGIN; {_TABLES} COMMIT")
            elif version != VERSION:
                raise JournalError(
                    f"journal '{path}' has version {version}; this release reads {VERSION}: --overwrite starts "
                    "the run anew"
                )

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it; the journal is of no use afterwards."""
        self._db.close()

    def append(self, kind: str, entries: Sequence[LedgerEntry]) -> None:
        """What became of some edits, in one transaction that is on the disk when this returns."""
        said = kind in ("arrived", "inherited")  # the edit itself is said once
        rows = []
        for entry in entries:
            edit = json.dumps(entry.edit.as_dict(), ensure_ascii=False) if said else None
            rows.append(entry.state() | {"time": time.time(), "kind": kind, "id": entry.edit.id, "edit": edit})
        names, marks = (", ".join(f"{sign}{name}" for name in _SAID) for sign in ("", ":"))
        with self._transaction():
            self._db.executemany(f"INSERT INTO events ({names}) VALUES ({marks})", rows)

    def follow(self, ledger: Ledger) -> None:
        """Be told of all that a ledger does from now on; what a new run's ledger holds already comes along."""
        with self._explained("read"):
            told = self._db.execute("SELECT 1 FROM events WHERE id IS NOT NULL AND void = 0 LIMIT 1").fetchone()
        if told is None and len(ledger):
            self.append("inherited", list(ledger.values()))
        ledger.journal = self

    def note(self, kind: str, reason: str) -> None:
        """Something that concerns no single edit, as that the run has finished."""
        with self._transaction():
            self._db.execute("INSERT INTO events (time, kind, reason) VALUES (?, ?, ?)", (time.time(), kind, reason))

    def save(self, sha256: str, windows: int, tables: Tables | None = None) -> None:
        """Make all that was said so far the checkpoint, with these rows and no others, in one transaction.

        The file with this hash, which holds all else, is on the disk, and gets its name when this has returned. Only
        rows that are not stored yet are written.
        """
        found = tables or {}
        with self._transaction():
            stored = self._stored if self._stored is not None else self._numbers()
            for name in sorted(found.keys() | stored.keys()):
                rows, known = found.get(name, {}), stored.get(name, set())
                gone = ((name, number) for number in known - rows.keys())
                self._db.executemany("DELETE FROM rows WHERE name = ? AND number = ?", gone)
                new = ((name, number, *_encoded(rows[number])) for number in sorted(rows.keys() - known))
                self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", new)
            row = (sha256, self.last, windows, time.time())
            self._db.execute("INSERT OR REPLACE INTO checkpoint VALUES (1, ?, ?, ?, ?)", row)
        self._stored = {name: set(rows) for name, rows in found.items()}

    def _numbers(self) -> dict[str, set[int]]:
        """Of each table the numbers of its rows."""
        found: dict[str, set[int]] = {}
        for name, number in self._db.execute("SELECT name, number FROM rows"):
            found.setdefault(name, set()).add(number)
        return found

    def rewind(self, seq: int, reason: str) -> int:
        """Go on after event `seq`: all later ones are void. Returns how many."""
        with self._transaction():
            void = self._db.execute("UPDATE events SET void = 1 WHERE seq > ? AND void = 0", (seq,)).rowcount
            row = (time.time(), RESUMED, reason, seq)
            self._db.execute("INSERT INTO events (time, kind, reason, back_to) VALUES (?, ?, ?, ?)", row)
        return int(void)

    @property
    def last(self) -> int:
        """The number of the last event; 0 before the first."""
        with self._explained("read"):
            return int(self._db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where a killed run goes on; None where nothing was saved."""
        with self._explained("read"):
            row = self._db.execute("SELECT sha256, seq, windows FROM checkpoint").fetchone()
        return None if row is None else Checkpoint(*row)

    def check_rows(self) -> None:
        """Read every row: a `JournalError` where one is not as it was written."""
        with self._explained("read"):
            for name, number, sha256, content in self._db.execute("SELECT name, number, sha256, content FROM rows"):
                if hashlib.sha256(content).digest() != sha256:
                    raise JournalError(
                        f"journal '{self.path}' is damaged: row {number} of {name} is not as it was written; restore "
                        "it from a copy, or --overwrite starts the run anew"
                    )

    def tables(self) -> dict[str, dict[int, dict[str, Tensor]]]:
        """The checkpoint's rows."""
        found: dict[str, dict[int, dict[str, Tensor]]] = {}
        with self._explained("read"):
            for name, number, content in self._db.execute("SELECT name, number, content FROM rows ORDER BY number"):
                found.setdefault(name, {})[number] = load(content)
        return found

    def events(self, id: str | None = None) -> Iterator[dict[str, Any]]:
        """All events in their order, or those of one edit: `UnknownEditError` where nothing was ever said of it."""
        where, what = ("", ()) if id is None else ("WHERE id = ?", (id,))
        with self._explained("read"):
            found = self._db.execute(f"SELECT * FROM events {where} ORDER BY seq", what)
            names, row = [column[0] for column in found.description], None
            for row in found:
                yield dict(zip(names, row, strict=True))
            if row is None and id is not None:
                known = self._db.execute("SELECT id FROM events WHERE id IS NOT NULL GROUP BY id ORDER BY min(seq)")
                raise UnknownEditError(id, [one for (one,) in known])

    def rebuild(self) -> Ledger:
        """The ledger as the events left it; void ones do not count."""
        edits: dict[str, dict[str, Any]] = {}
        entries: dict[str, dict[str, Any]] = {}
        for event in self.events():
            if event["id"] is None or event["void"]:
                continue
            if event["edit"] is not None:
                edits[event["id"]] = json.loads(event["edit"])
            entries[event["id"]] = {"edit": edits[event["id"]], **{name: event[name] for name in _STATE}}
        ledger, in_order = Ledger(), sorted(entries.values(), key=lambda entry: entry["arrival"])
        ledger.load_state_dict({"version": LEDGER_VERSION, "entries": in_order})
        return ledger

    def last_note(self, *kinds: str) -> tuple[int, str] | None:
        """Number and kind of the last event that counts of some kinds; None where there is none."""
        marks = ", ".join("?" * len(kinds))
        query = f"SELECT seq, kind FROM events WHERE void = 0 AND kind IN ({marks}) ORDER BY seq DESC LIMIT 1"
        with self._explained("read"):
            return self._db.execute(query, kinds).fetchone()

    def to_parquet(self, path: str | Path) -> None:
        """All events as a Parquet table."""
        types = {"INTEGER": pa.int64(), "REAL": pa.float64(), "TEXT": pa.string()}
        with self._explained("read"):
            columns = self._db.execute("SELECT name, type FROM pragma_table_info('events')").fetchall()
        schema = pa.schema([(name, types[kind]) for name, kind in columns])
        pq.write_table(pa.Table.from_pylist(list(self.events()), schema=schema), path)

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Say in one line what SQLite has to complain about."""
        try:
            yield
        except sqlite3.Error as error:
            remedy = "free disk space" if "full" in str(error) else "restore it from a copy, or free the path"
            raise JournalError(f"journal '{self.path}' cannot be {verb} ({error}); {remedy}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and on the disk at the end."""
        with self._explained("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _encoded(row: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """A row's hash and content."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in row.items()})
    return hashlib.sha256(content).digest(), content
