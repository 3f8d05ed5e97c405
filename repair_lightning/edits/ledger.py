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

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from repair_lightning.errors import LedgerError, RepairError, UnknownEditError
from repair_lightning.types import Edit, EditReport

VERSION = 1


class EditStatus(str, Enum):
    """Where an edit stands."""

    PENDING = "pending"
    WRITTEN = "written"
    FAILED = "failed"
    RESIDUAL = "residual"
    REQUEUED = "requeued"
    QUARANTINED = "quarantined"
    SUPERSEDED = "superseded"
    UNDONE = "undone"

    def __str__(self) -> str:
        return self.value


_ALL = frozenset(EditStatus)
_FINAL = frozenset({EditStatus.SUPERSEDED, EditStatus.UNDONE})
_STORED = frozenset({EditStatus.WRITTEN, EditStatus.FAILED})
_WRITABLE = _ALL - _FINAL - {EditStatus.QUARANTINED}
_REQUEUABLE = _STORED | {EditStatus.RESIDUAL, EditStatus.REQUEUED}


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is known about one edit.

    Attributes:
        edit: The edit itself.
        arrival: Its place in the order of arrival, from 0.
        window: The window it arrived in.
        status: Where it stands.
        shard: The shard that owns it, `BASE` where a merge wrote it into the base's own weights, or None.
        attempts: How often it was written, residual writes not counted.
        regroups: How often it was moved to the residual pool.
        loss: Edit loss after its last write, in nats per token; None before that or where it was not finite.
        kd: Distillation loss after its last write, in nats; None as for `loss`.
        score: Correctness in [0, 1] when it was last evaluated; None since its last write.
        reason: Why it stands where it stands.
    """

    edit: Edit
    arrival: int
    window: int
    status: EditStatus = EditStatus.PENDING
    shard: int | None = None
    attempts: int = 0
    regroups: int = 0
    loss: float | None = None
    kd: float | None = None
    score: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The entry in plain types, the edit as its `jsonl` record."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "edit": self.edit.as_dict(), "status": self.status.value}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> LedgerEntry:
        """The inverse of :meth:`as_dict`."""
        return cls(**{**entry, "edit": Edit.from_dict(entry["edit"]), "status": EditStatus(entry["status"])})


class Record(Protocol):
    """Where the ledger's changes are kept; see `repair_lightning.edits.journal`."""

    def append(self, kind: str, entries: Sequence[LedgerEntry]) -> None:
        """What became of some edits: on the disk when this returns."""


class KeptElsewhere:
    """The record of a ledger whose history another process keeps."""

    def append(self, kind: str, entries: Sequence[LedgerEntry]) -> None:
        """Nothing to do."""


class Ledger:
    """Every edit that ever arrived, in order of arrival, with its state.

    Attributes:
        journal: told of every change before it counts; None keeps no history.
    """

    def __init__(self) -> None:
        self.journal: Record | None = None
        self._clear()

    def _clear(self) -> None:
        self._entries: dict[str, LedgerEntry] = {}
        self._with_status: dict[EditStatus, set[str]] = {status: set() for status in EditStatus}
        self._owned_by: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __eq__(self, other: object) -> bool:
        return self._entries == other._entries if isinstance(other, Ledger) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    # -- questions ---------------------------------------------------------------------------------------------------

    def entry(self, id: str) -> LedgerEntry:
        """All that is known about an edit. Raises `UnknownEditError`."""
        try:
            return self._entries[id]
        except KeyError:
            raise UnknownEditError(id) from None

    def edit(self, id: str) -> Edit:
        """The edit with this id. Raises `UnknownEditError`."""
        return self.entry(id).edit

    def owner_of(self, id: str) -> int | None:
        """The shard that owns the edit, or None. Raises `UnknownEditError`."""
        return self.entry(id).shard

    def owned_by(self, shard: int) -> list[str]:
        """The ids of the edits that `shard` owns, in order of arrival."""
        return self._in_order(self._owned_by.get(shard, ()))

    def sizes(self) -> dict[int, int]:
        """How many edits each shard owns; shards without any are left out."""
        return {shard: len(ids) for shard, ids in sorted(self._owned_by.items()) if ids}

    def with_status(self, *statuses: EditStatus | str) -> list[str]:
        """The ids of the edits in one of `statuses`, in order of arrival. Raises `LedgerError` for an unknown one."""
        wanted = {_status(status) for status in statuses}
        return self._in_order(id for status in wanted for id in self._with_status[status])

    def error_rates(self) -> dict[int, tuple[float, int]]:
        """For each shard that owns edits: the share of failed ones among those evaluated, and how many were evaluated.

        An edit counts as evaluated if it was scored since it was last written. A shard without any has (0.0, 0).
        """
        return {shard: _error_rate(map(self._entries.__getitem__, self.owned_by(shard))) for shard in self.sizes()}

    def counts(self) -> dict[str, int]:
        """How many edits are in each status; every status is listed."""
        return {status.value: len(self._with_status[status]) for status in EditStatus}

    # -- commands ----------------------------------------------------------------------------------------------------

    def arrive(self, edits: Iterable[Edit], window: int) -> None:
        """Enters new edits as pending.

        Raises:
            LedgerError: if one of the ids is here already, or occurs twice.
        """
        edits = list(edits)
        repeated = [id for id, n in Counter(edit.id for edit in edits).items() if n > 1 or id in self._entries]
        if repeated:
            raise LedgerError(f"edit {repeated[0]!r} has arrived already; give each edit its own id")
        first = len(self._entries)
        self._enter("arrived", [LedgerEntry(edit, first + i, int(window)) for i, edit in enumerate(edits)])

    def inherit(self, earlier: Ledger) -> None:
        """Takes over the edits of an earlier model as they stand, before anything arrives.

        Raises:
            LedgerError: if something has arrived already.
        """
        if len(self):
            raise LedgerError(f"cannot inherit {len(earlier)} edits: {len(self)} have arrived already; start empty")
        self._enter("inherited", [earlier.entry(id) for id in earlier])

    def written(self, reports: Iterable[EditReport]) -> None:
        """Takes over what a writer reports; the score is open again until the next evaluation.

        A report with an error makes the edit failed (the write was rolled back: its owner stays as it was), one with
        `residual` sends it to the residual pool without an owner, any other makes its shard the owner.

        Raises:
            LedgerError: if an edit is quarantined or superseded.
            UnknownEditError: for an unknown id.
        """
        reports = list(reports)
        self._check([report.id for report in reports], _WRITABLE, "write")
        self._enter("written", [_after_write(self._entries[report.id], report) for report in reports])

    def evaluated(self, scores: Mapping[str, float], tau_correct: float) -> None:
        """Takes over scores: an edit that a shard owns is now written where `score >= tau_correct`, else failed.

        Edits without an owner keep their state and only remember the score.

        Args:
            scores: Correctness per edit, in [0, 1].
            tau_correct: Least score that counts as correct, in [0, 1].

        Raises:
            LedgerError: if a score is outside [0, 1] or not finite.
            UnknownEditError: for an unknown id.
        """
        self._check(scores, _ALL, "score")
        wrong = [id for id, score in scores.items() if not 0.0 <= float(score) <= 1.0]
        if wrong:
            raise LedgerError(f"a score must be in [0, 1], got {scores[wrong[0]]} for edit {wrong[0]!r}")
        found = ((self._entries[id], float(score)) for id, score in scores.items())
        self._enter("evaluated", [replace(entry, **_verdict(entry, score, tau_correct)) for entry, score in found])

    def requeue(self, ids: Iterable[str], reason: str, attempts: Mapping[str, int] | None = None) -> None:
        """Sends edits back to be written anew; they have no owner until then.

        Args:
            ids: of the edits.
            reason: why.
            attempts: of some edits, how many writes are to count: another's fault is not held against them.

        Raises:
            LedgerError: if one is pending, quarantined or superseded.
            UnknownEditError: for an unknown id.
        """
        self._move(ids, _REQUEUABLE, "requeue", EditStatus.REQUEUED, reason, attempts or {})

    def quarantine(self, ids: Iterable[str], reason: str) -> None:
        """Gives up on edits: they are reported, never written again, and no shard answers for them.

        Raises:
            LedgerError: if one is superseded.
            UnknownEditError: for an unknown id.
        """
        self._move(ids, _ALL - _FINAL, "quarantine", EditStatus.QUARANTINED, reason)

    def supersede(self, old: str, new: str) -> None:
        """Marks `old` as replaced by the later edit `new`, for good.

        Raises:
            LedgerError: if `old` is superseded already, or `new` did not arrive after it.
            UnknownEditError: for an unknown id.
        """
        if self.entry(new).arrival <= self.entry(old).arrival:
            raise LedgerError(f"edit {new!r} cannot supersede {old!r}: it did not arrive after it")
        self._move([old], _ALL - _FINAL, "supersede", EditStatus.SUPERSEDED, f"superseded by {new}")

    def undo(self, ids: Iterable[str], reason: str) -> None:
        """Takes edits back for good: no shard answers for them.

        Raises:
            LedgerError: if one is superseded or undone already.
            UnknownEditError: for an unknown id.
        """
        self._move(ids, _ALL - _FINAL, "undo", EditStatus.UNDONE, reason)

    def reassign(self, ids: Iterable[str], shard: int, kind: str = "merged") -> None:
        """Makes `shard` the owner of edits that had another one, as after a merge; `kind` is the journal's word for it.

        Raises:
            LedgerError: if one has no owner.
            UnknownEditError: for an unknown id.
        """
        ids = list(ids)
        self._check(ids, _STORED, "reassign")
        homeless = [id for id in ids if self._entries[id].shard is None]
        if homeless:
            raise LedgerError(f"cannot reassign edit {homeless[0]!r}: no shard owns it; write it first")
        self._enter(kind, [replace(self._entries[id], shard=int(shard)) for id in ids])

    # -- storage -----------------------------------------------------------------------------------------------------

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
        self._clear()
        for entry in entries:
            self._put(entry)

    def to_parquet(self, path: str | Path) -> None:
        """Writes the ledger as a Parquet table, one row per edit; the file appears whole or not at all.

        Raises:
            RepairError: if it cannot be written (a full disk, a missing folder).
        """
        path = Path(path)
        rows = [_to_row(entry) for entry in self._entries.values()]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise RepairError(
                f"{path}: the ledger cannot be written ({error.strerror or error}); free the path"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

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

    # -- inside ------------------------------------------------------------------------------------------------------

    def _check(self, ids: Iterable[str], allowed: frozenset[EditStatus], verb: str) -> None:
        for id in ids:
            status = self.entry(id).status
            if status not in allowed:
                names = ", ".join(s.value for s in EditStatus if s in allowed)
                raise LedgerError(f"cannot {verb} edit {id!r}: it is {status}; it must be one of {names}")

    def _put(self, entry: LedgerEntry) -> None:
        """Enters or replaces an entry; the only place where the ledger changes, so its two indexes stay true."""
        id, old = entry.edit.id, self._entries.get(entry.edit.id)
        if old is not None:
            self._with_status[old.status].discard(id)
            self._owned_by.get(old.shard, set()).discard(id)  # type: ignore[arg-type]
        self._entries[id] = entry
        self._with_status[entry.status].add(id)
        if entry.shard is not None:
            self._owned_by.setdefault(entry.shard, set()).add(id)

    def _in_order(self, ids: Iterable[str]) -> list[str]:
        return sorted(ids, key=lambda id: self._entries[id].arrival)

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


def _status(status: EditStatus | str) -> EditStatus:
    try:
        return EditStatus(status)
    except ValueError:
        known = ", ".join(s.value for s in EditStatus)
        raise LedgerError(f"unknown status '{status}'; known: {known}") from None


def _error_rate(owned: Iterable[LedgerEntry]) -> tuple[float, int]:
    evaluated = [entry for entry in owned if entry.score is not None]
    failed = sum(entry.status is EditStatus.FAILED for entry in evaluated)
    return failed / max(len(evaluated), 1), len(evaluated)


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _after_write(entry: LedgerEntry, report: EditReport) -> LedgerEntry:
    found = replace(entry, loss=_finite(report.loss), kd=_finite(report.kd), score=None)
    if report.error is not None:
        return replace(found, status=EditStatus.FAILED, attempts=entry.attempts + 1, reason=report.error)
    if report.residual:
        reason = f"distillation loss {report.kd:.4g} stayed high in shard {report.shard}"
        regroups = entry.regroups + 1
        return replace(found, status=EditStatus.RESIDUAL, shard=None, regroups=regroups, reason=reason)
    owner, attempts = int(report.shard), entry.attempts + 1
    return replace(found, status=EditStatus.WRITTEN, shard=owner, attempts=attempts, reason="")


def _verdict(entry: LedgerEntry, score: float, tau_correct: float) -> dict[str, Any]:
    if entry.status not in _STORED or entry.shard is None:
        return {"score": score}
    if score >= tau_correct:
        return {"score": score, "status": EditStatus.WRITTEN, "reason": ""}
    return {"score": score, "status": EditStatus.FAILED, "reason": f"score {score:.4g} < {tau_correct:.4g}"}


def _to_row(entry: LedgerEntry) -> dict[str, Any]:
    """The entry as one flat row: the edit's fields beside its own."""
    row = entry.as_dict()
    return {**row.pop("edit"), **row}


def _from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {field.name for field in fields(LedgerEntry)}
    entry = {name: value for name, value in row.items() if name in own}
    return {**entry, "edit": {name: value for name, value in row.items() if name not in own}}


def _schema() -> pa.Schema:
    probes = pa.list_(pa.struct([("prompt", pa.string()), ("answer", pa.string())]))
    edit = [("id", pa.string()), ("prompt", pa.string()), ("target", pa.string()), ("subject", pa.string())]
    lists = [("rephrases", pa.list_(pa.string())), ("locality", probes), ("near", probes)]
    state = [("arrival", pa.int64()), ("window", pa.int64()), ("status", pa.string()), ("shard", pa.int64())]
    numbers = [("attempts", pa.int64()), ("regroups", pa.int64())]
    scores = [("loss", pa.float64()), ("kd", pa.float64()), ("score", pa.float64()), ("reason", pa.string())]
    return pa.schema(edit + lists + state + numbers + scores, metadata={"repair_ledger": str(VERSION)})
