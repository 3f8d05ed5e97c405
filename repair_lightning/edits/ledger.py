"""The ledger: what became of every edit. The one source of truth between writers, monitors and callbacks.

States, and the commands that lead from one to another:

    pending --written--> written --evaluated--> written | failed
                 |  `--> residual (high distillation loss)  --written--> ...
                 `-----> failed (write was rolled back)
    written, failed, residual --requeue--> requeued --written--> ...
    anything but superseded, undone --quarantine--> quarantined
    anything but undone --supersede--> superseded (final)
    anything but superseded --undo--> undone (final)

Pending, residual, requeued, quarantined, superseded and undone edits have no owner shard. A command that is refused
changes nothing. Where a journal is attached, a command is on the disk before it counts.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from repair_lightning.edits.entries import (
    ALL,
    FINAL,
    REQUEUABLE,
    STORED,
    WRITABLE,
    EditStatus,
    Entries,
    LedgerEntry,
    after_write,
    verdict,
)
from repair_lightning.errors import LedgerError, RepairError
from repair_lightning.storage.files import replace_bytes
from repair_lightning.types import Edit, EditReport

VERSION = 1


class KeptElsewhere:
    """The record of a ledger whose history another process keeps; see `journal` for one's own."""

    def append(self, kind: str, entries: Sequence[LedgerEntry]) -> None:
        """What became of some edits: on the disk, where there is one, when this returns."""


class Ledger(Entries):
    """Every edit that ever arrived, and the commands that change where it stands.

    Every command raises `UnknownEditError` for an unknown id, and `LedgerError` where an edit's state forbids it; then
    nothing has changed.

    Attributes:
        journal: its `append` is told of every change before it counts; None keeps no history.
    """

    def __init__(self) -> None:
        super().__init__()
        self.journal: Any = None

    def arrive(self, edits: Iterable[Edit], window: int) -> None:
        """Enters new edits as pending; no id may be here already, or occur twice."""
        edits = list(edits)
        repeated = [id for id, n in Counter(edit.id for edit in edits).items() if n > 1 or id in self._entries]
        if repeated:
            raise LedgerError(f"edit {repeated[0]!r} has arrived already; give each edit its own id")
        first = len(self._entries)
        self._enter("arrived", [LedgerEntry(edit, first + i, int(window)) for i, edit in enumerate(edits)])

    def inherit(self, earlier: Ledger) -> None:
        """Takes over the edits of an earlier model as they stand, before anything arrives."""
        self._enter("inherited", [earlier.entry(id) for id in earlier])

    def written(self, reports: Iterable[EditReport]) -> None:
        """Takes over what a writer reports; the score is open again until the next evaluation.

        A report with an error makes the edit failed (the write was rolled back: its owner stays as it was), one with
        `residual` sends it to the residual pool without an owner, any other makes its shard the owner.
        """
        reports = list(reports)
        self._check([report.id for report in reports], WRITABLE, "write")
        self._enter("written", [after_write(self._entries[report.id], report) for report in reports])

    def evaluated(self, scores: Mapping[str, float], tau_correct: float) -> None:
        """Takes over scores in [0, 1]: an edit that a shard owns is now written where `score >= tau_correct`, else
        failed; others keep their state and only remember the score."""
        self._check(scores, ALL, "score")
        wrong = [id for id, score in scores.items() if not 0.0 <= float(score) <= 1.0]
        if wrong:
            raise LedgerError(f"a score must be in [0, 1], got {scores[wrong[0]]} for edit {wrong[0]!r}")
        found = ((self._entries[id], float(score)) for id, score in scores.items())
        self._enter("evaluated", [replace(entry, **verdict(entry, score, tau_correct)) for entry, score in found])

    def requeue(self, ids: Iterable[str], reason: str, attempts: Mapping[str, int] | None = None) -> None:
        """Sends edits back to be written anew; they have no owner until then.

        Of some, `attempts` says how many writes are to count: another's fault is not held against them.
        """
        self._move(ids, REQUEUABLE, "requeue", EditStatus.REQUEUED, reason, attempts or {})

    def quarantine(self, ids: Iterable[str], reason: str) -> None:
        """Gives up on edits: they are reported, never written again, and no shard answers for them."""
        self._move(ids, ALL - FINAL, "quarantine", EditStatus.QUARANTINED, reason)

    def supersede(self, old: str, new: str) -> None:
        """Marks `old` as replaced by the later edit `new`, for good."""
        if self.entry(new).arrival <= self.entry(old).arrival:
            raise LedgerError(f"edit {new!r} cannot supersede {old!r}: it did not arrive after it")
        self._move([old], ALL - FINAL, "supersede", EditStatus.SUPERSEDED, f"superseded by {new}")

    def undo(self, ids: Iterable[str], reason: str) -> None:
        """Takes edits back for good: no shard answers for them."""
        self._move(ids, ALL - FINAL, "undo", EditStatus.UNDONE, reason)

    def reassign(self, ids: Iterable[str], shard: int, kind: str = "merged") -> None:
        """Makes `shard` the owner of edits that had another one, as after a merge; `kind` is the journal's word."""
        ids = list(ids)
        self._check(ids, STORED, "reassign")
        homeless = [id for id in ids if self._entries[id].shard is None]
        if homeless:
            raise LedgerError(f"cannot reassign edit {homeless[0]!r}: no shard owns it; write it first")
        self._enter(kind, [replace(self._entries[id], shard=int(shard)) for id in ids])

    def state_dict(self) -> dict[str, Any]:
        """The ledger in plain types (it survives `torch.load(weights_only=True)`)."""
        return {"version": VERSION, "entries": [entry.as_dict() for entry in self._entries.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the content by a :meth:`state_dict`.

        Raises:
            LedgerError: if `state` is none; the ledger is left as it was.
        """
        try:
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']}, this program reads {VERSION}")
            entries = [LedgerEntry.from_dict(entry) for entry in state["entries"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(
                f"this is not the state of a ledger ({error!r}); use one that `state_dict` made"
            ) from error
        Entries.__init__(self)  # empty again
        for entry in entries:
            self._put(entry)

    def to_parquet(self, path: str | Path) -> None:
        """Writes the ledger as a Parquet table, one row per edit; the file appears whole or not at all.

        Raises:
            RepairError: if it cannot be written (a full disk, a missing folder).
        """
        rows = [(row := entry.as_dict()).pop("edit") | row for entry in self._entries.values()]
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), content)
        try:
            replace_bytes(Path(path), content.getvalue())
        except OSError as error:
            raise RepairError(
                f"{path}: the ledger cannot be written ({error.strerror or error}); free the path"
            ) from error

    @classmethod
    def from_parquet(cls, path: str | Path) -> Ledger:
        """Reads a ledger that :meth:`to_parquet` wrote.

        Raises:
            LedgerError: if the file is missing, truncated or no ledger.
        """
        ledger = cls()
        try:
            table = pq.read_table(path)
            version = int((table.schema.metadata or {}).get(b"repair_ledger", b"0"))
            ledger.load_state_dict({"version": version, "entries": [_from_row(row) for row in table.to_pylist()]})
        except (OSError, pa.ArrowException, KeyError, ValueError, LedgerError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LedgerError(f"{path}: no readable ledger ({reason}); use one that `to_parquet` wrote") from error
        return ledger

    def _check(self, ids: Iterable[str], allowed: frozenset[EditStatus], verb: str) -> None:
        for id in ids:
            status = self.entry(id).status
            if status not in allowed:
                names = ", ".join(s.value for s in EditStatus if s in allowed)
                raise LedgerError(f"cannot {verb} edit {id!r}: it is {status}; it must be one of {names}")

    def _enter(self, kind: str, entries: list[LedgerEntry]) -> None:
        if self.journal is not None and entries:
            self.journal.append(kind, entries)
        for entry in entries:
            self._put(entry)

    def _move(
        self,
        ids: Iterable[str],
        allowed: frozenset[EditStatus],
        verb: str,
        status: EditStatus,
        reason: str,
        attempts: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        ids = list(ids)
        self._check(ids, allowed, verb)
        entries = [replace(self._entries[id], status=status, shard=None, reason=reason) for id in ids]
        self._enter(status.value, [replace(e, attempts=attempts.get(e.edit.id, e.attempts)) for e in entries])


def _from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {field.name for field in fields(LedgerEntry)}
    entry = {name: value for name, value in row.items() if name in own}
    return {**entry, "edit": {name: value for name, value in row.items() if name not in own}}


def _schema() -> pa.Schema:
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    probes = pa.list_(pa.struct([("prompt", text), ("answer", text)]))
    edit = [("id", text), ("prompt", text), ("target", text), ("subject", text)]
    lists = [("rephrases", pa.list_(text)), ("locality", probes), ("near", probes)]
    state = [("arrival", whole), ("window", whole), ("status", text), ("shard", whole), ("attempts", whole)]
    more = [("regroups", whole), ("loss", real), ("kd", real), ("score", real), ("reason", text)]
    return pa.schema(edit + lists + state + more, metadata={"repair_ledger": str(VERSION)})


__all__ = ["EditStatus", "KeptElsewhere", "Ledger", "LedgerEntry"]
