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
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from repair_lightning.errors import LedgerError, RepairError, UnknownEditError, first_line
from repair_lightning.storage.files import replace_bytes
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


FINAL = frozenset({EditStatus.SUPERSEDED, EditStatus.UNDONE})
STORED = frozenset({EditStatus.WRITTEN, EditStatus.FAILED})
_OPEN = frozenset(EditStatus) - FINAL
_WRITABLE = _OPEN - {EditStatus.QUARANTINED}
_REQUEUABLE = STORED | {EditStatus.RESIDUAL, EditStatus.REQUEUED}


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is known about one edit.

    Attributes:
        arrival: its place in the order of arrival, from 0.
        window: the window it arrived in.
        shard: the shard that owns it, `BASE` where a merge wrote it into the base's own weights, or None.
        attempts: how often it was written, residual writes not counted.
        regroups: how often it was moved to the residual pool.
        loss: edit loss after its last write, in nats per token; None before that or where it was not finite.
        kd: distillation loss after its last write, in nats; None as for `loss`.
        score: correctness in [0, 1] when it was last evaluated; None since its last write.
        reason: why it stands where it stands.
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
        return {"edit": self.edit.as_dict()} | self.state()

    def state(self) -> dict[str, Any]:
        """The entry in plain types, without its edit."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "edit"}
        return found | {"status": self.status.value}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> LedgerEntry:
        """The inverse of :meth:`as_dict`."""
        return cls(**{**entry, "edit": Edit.from_dict(entry["edit"]), "status": EditStatus(entry["status"])})


class Entries(Mapping[str, LedgerEntry]):
    """Entries by id in order of arrival; asking for an unknown id raises `UnknownEditError`."""

    def __init__(self) -> None:
        self._entries: dict[str, LedgerEntry] = {}
        self._ids: dict[Any, set[str]] = defaultdict(set)  # by status, and by owner

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, id: str) -> LedgerEntry:
        if id not in self._entries:
            raise UnknownEditError(id, self._entries)
        return self._entries[id]

    def entries(self) -> list[LedgerEntry]:
        """All of them at one moment, whatever another thread does."""
        return list(self._entries.values())

    def entry(self, id: str) -> LedgerEntry:
        """All that is known about an edit."""
        return self[id]

    def edit(self, id: str) -> Edit:
        """The edit with this id."""
        return self[id].edit

    def owner_of(self, id: str) -> int | None:
        """The shard that owns the edit, or None."""
        return self[id].shard

    def owned_by(self, shard: int) -> list[str]:
        """The ids of the edits that `shard` owns, in order of arrival."""
        return self._in_order([shard])

    def sizes(self) -> dict[int, int]:
        """How many edits each shard owns; shards without any are left out."""
        return {key: len(self._ids[key]) for key in sorted(k for k in self._ids if type(k) is int) if self._ids[key]}

    def owns(self, shard: int) -> bool:
        """Whether a shard owns edits."""
        return bool(self._ids.get(shard))

    def with_status(self, *statuses: EditStatus | str) -> list[str]:
        """The ids of the edits in one of `statuses`, in order of arrival."""
        return self._in_order(set(map(EditStatus, statuses)))

    def error_rates(self, shards: Iterable[int] | None = None) -> dict[int, tuple[float, int]]:
        """For each shard that owns edits, or for some: the share of failed ones among those evaluated, and how many
        were evaluated.

        An edit counts as evaluated if it was scored since it was last written. A shard without any has (0.0, 0).
        """
        rates = {}
        for shard in self.sizes() if shards is None else shards:
            evaluated = [entry for entry in map(self.entry, self.owned_by(shard)) if entry.score is not None]
            failed = sum(entry.status is EditStatus.FAILED for entry in evaluated)
            rates[shard] = (failed / max(len(evaluated), 1), len(evaluated))
        return rates

    def counts(self) -> dict[str, int]:
        """How many edits are in each status; every status is listed."""
        return {status.value: len(self._ids[status]) for status in EditStatus}

    def _put(self, entry: LedgerEntry) -> None:
        """Enters or replaces an entry; the only place where the ledger changes, so its index stays true."""
        id, old = entry.edit.id, self._entries.get(entry.edit.id)
        for key in (old.status, old.shard) if old else ():
            self._ids[key].discard(id)
        self._entries[id] = entry
        for key in (entry.status, entry.shard):
            self._ids[key].add(id)

    def _in_order(self, keys: Iterable[Any]) -> list[str]:
        found = {id for key in keys for id in self._ids.get(key, ())}
        if 2 * len(found) > len(self._entries):  # they are held in their order
            return [id for id in self._entries if id in found]
        return sorted(found, key=lambda id: self[id].arrival)


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

    journal: Any = None

    def arrive(self, edits: Iterable[Edit], window: int, reason: str = "") -> None:
        """Enters new edits as pending, with a reason where there is one; no id may be here already, or occur twice."""
        edits = list(edits)
        repeated = [id for id, n in Counter(edit.id for edit in edits).items() if n > 1 or id in self]
        if repeated:
            raise LedgerError(f"edit {repeated[0]!r} has arrived already; give each edit its own id")
        self._enter(
            "arrived", [LedgerEntry(edit, len(self) + i, int(window), reason=reason) for i, edit in enumerate(edits)]
        )

    def inherit(self, earlier: Ledger) -> None:
        """Takes over the edits of an earlier model as they stand, before anything arrives."""
        self._enter("inherited", list(earlier.values()))

    def written(self, reports: Iterable[EditReport]) -> None:
        """Takes over what a writer reports; the score is open again until the next evaluation.

        A report with an error makes the edit failed (the write was rolled back: its owner stays as it was), one with
        `residual` sends it to the residual pool without an owner, any other makes its shard the owner.
        """
        reports = list(reports)
        self._check([report.id for report in reports], _WRITABLE, "write")
        self._enter("written", [_after_write(self[report.id], report) for report in reports])

    def evaluated(self, scores: Mapping[str, float], tau_correct: float) -> None:
        """Takes over scores in [0, 1]: an edit that a shard owns is now written where `score >= tau_correct`, else
        failed; others keep their state and only remember the score."""
        entries = []
        for entry, score in [(self[id], float(score)) for id, score in scores.items()]:
            if not 0.0 <= score <= 1.0:
                raise LedgerError(f"a score must be in [0, 1], got {score} for edit {entry.edit.id!r}")
            status, reason = entry.status, entry.reason
            if status in STORED and entry.shard is not None:
                right = score >= tau_correct
                status = EditStatus.WRITTEN if right else EditStatus.FAILED
                reason = "" if right else f"score {score:.4g} < {tau_correct:.4g}"
            entries.append(replace(entry, score=score, status=status, reason=reason))
        self._enter("evaluated", entries)

    def requeue(self, ids: Iterable[str], reason: str, attempts: Mapping[str, int] | None = None) -> None:
        """Sends edits back to be written anew; they have no owner until then.

        Of some, `attempts` says how many writes are to count: another's fault is not held against them.
        """
        self._move(ids, _REQUEUABLE, "requeue", EditStatus.REQUEUED, reason, attempts)

    def quarantine(self, ids: Iterable[str], reason: str) -> None:
        """Gives up on edits: they are reported, never written again, and no shard answers for them."""
        self._move(ids, _OPEN, "quarantine", EditStatus.QUARANTINED, reason)

    def supersede(self, old: str, new: str) -> None:
        """Marks `old` as replaced by the later edit `new`, for good."""
        if self[new].arrival <= self[old].arrival:
            raise LedgerError(f"edit {new!r} cannot supersede {old!r}: it did not arrive after it")
        self._move([old], _OPEN, "supersede", EditStatus.SUPERSEDED, f"superseded by {new}")

    def undo(self, ids: Iterable[str], reason: str) -> None:
        """Takes edits back for good: no shard answers for them."""
        self._move(ids, _OPEN, "undo", EditStatus.UNDONE, reason)

    def reassign(self, ids: Iterable[str], shard: int, kind: str = "merged") -> None:
        """Makes `shard` the owner of edits that had another one, as after a merge; `kind` is the journal's word."""
        ids = list(ids)
        self._check(ids, STORED, "reassign")
        homeless = [id for id in ids if self[id].shard is None]
        if homeless:
            raise LedgerError(f"cannot reassign edit {homeless[0]!r}: no shard owns it; write it first")
        self._enter(kind, [replace(self[id], shard=int(shard)) for id in ids])

    def go_back(self, entries: Iterable[LedgerEntry]) -> None:
        """Replaces the content by entries that it held before; the journal is the caller's to rewind."""
        entries = list(entries)
        Entries.__init__(self)  # empty again
        for entry in entries:
            self._put(entry)

    def state_dict(self) -> dict[str, Any]:
        """The ledger in plain types (it survives `torch.load(weights_only=True)`)."""
        return {"version": VERSION, "entries": [entry.as_dict() for entry in self.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the content by a :meth:`state_dict`; LedgerError where it is none, and the content stays."""
        try:
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']}, this program reads {VERSION}")
            entries = [LedgerEntry.from_dict(entry) for entry in state["entries"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(
                f"this is not the state of a ledger ({error!r}); use one that `state_dict` made"
            ) from error
        self.go_back(entries)

    def to_parquet(self, path: str | Path) -> None:
        """Writes the ledger as a Parquet table, one row per edit; the file appears whole or not at all.

        RepairError if it cannot be written (a full disk, a missing folder).
        """
        rows = [(row := entry.as_dict()).pop("edit") | row for entry in self.values()]
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
        """A ledger that :meth:`to_parquet` wrote; LedgerError where the file is missing, truncated or none."""
        ledger, own = cls(), {field.name for field in fields(LedgerEntry)}
        try:
            table = pq.read_table(path)
            version = int((table.schema.metadata or {}).get(b"repair_ledger", b"0"))
            rows = table.to_pylist()
            entries = [{name: value for name, value in row.items() if name in own} | {"edit": row} for row in rows]
            ledger.load_state_dict({"version": version, "entries": entries})
        except (OSError, pa.ArrowException, KeyError, ValueError, LedgerError) as error:
            why = f"no readable ledger ({first_line(error)}); use one that `to_parquet` wrote"
            raise LedgerError(f"{path}: {why}") from error
        return ledger

    def _check(self, ids: Iterable[str], allowed: frozenset[EditStatus], verb: str) -> None:
        for id in ids:
            status = self[id].status
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
        attempts: Mapping[str, int] | None = None,
    ) -> None:
        ids, counted = list(ids), attempts or {}
        self._check(ids, allowed, verb)
        more: dict[str, Any] = {"status": status, "shard": None, "reason": reason}
        self._enter(status.value, [replace(self[i], attempts=counted.get(i, self[i].attempts), **more) for i in ids])


def _after_write(entry: LedgerEntry, report: EditReport) -> LedgerEntry:
    """The entry after its edit was written, or could not be."""
    loss, kd = (value if math.isfinite(value) else None for value in map(float, (report.loss, report.kd)))
    found = replace(entry, loss=loss, kd=kd, score=None)
    if report.error is not None:
        return replace(found, status=EditStatus.FAILED, attempts=entry.attempts + 1, reason=report.error)
    if report.residual:
        reason = f"distillation loss {report.kd:.4g} stayed high in shard {report.shard}"
        return replace(found, status=EditStatus.RESIDUAL, shard=None, regroups=entry.regroups + 1, reason=reason)
    owner, attempts = int(report.shard), entry.attempts + 1
    return replace(found, status=EditStatus.WRITTEN, shard=owner, attempts=attempts, reason="")


def _schema() -> pa.Schema:
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    probes = pa.list_(pa.struct([("prompt", text), ("answer", text)]))
    edit = [("id", text), ("prompt", text), ("target", text), ("subject", text)]
    lists = [("rephrases", pa.list_(text)), ("locality", probes), ("near", probes), ("aliases", pa.list_(text))]
    further = pa.list_(pa.struct([("kind", text), ("prompt", text), ("answers", pa.list_(text))]))
    lists += [("old_answer", text), ("further", further)]
    state = [("arrival", whole), ("window", whole), ("status", text), ("shard", whole), ("attempts", whole)]
    more = [("regroups", whole), ("loss", real), ("kd", real), ("score", real), ("reason", text)]
    return pa.schema(edit + lists + state + more, metadata={"repair_ledger": str(VERSION)})
