"""Where each edit stands: the ledger's entries, what may become of them, and what can be asked of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from repair_lightning.errors import UnknownEditError
from repair_lightning.types import Edit, EditReport


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


ALL = frozenset(EditStatus)
FINAL = frozenset({EditStatus.SUPERSEDED, EditStatus.UNDONE})
STORED = frozenset({EditStatus.WRITTEN, EditStatus.FAILED})
WRITABLE = ALL - FINAL - {EditStatus.QUARANTINED}
REQUEUABLE = STORED | {EditStatus.RESIDUAL, EditStatus.REQUEUED}


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
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "edit": self.edit.as_dict(), "status": self.status.value}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> LedgerEntry:
        """The inverse of :meth:`as_dict`."""
        return cls(**{**entry, "edit": Edit.from_dict(entry["edit"]), "status": EditStatus(entry["status"])})


class Entries:
    """Entries in order of arrival, with indexes by status and by owner."""

    def __init__(self) -> None:
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
        return self._entries == other._entries if isinstance(other, Entries) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def entry(self, id: str) -> LedgerEntry:
        """All that is known about an edit. Raises `UnknownEditError`."""
        if id not in self._entries:
            raise UnknownEditError(id)
        return self._entries[id]

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
        """The ids of the edits in one of `statuses`, in order of arrival."""
        return self._in_order(id for status in set(map(EditStatus, statuses)) for id in self._with_status[status])

    def error_rates(self) -> dict[int, tuple[float, int]]:
        """For each shard that owns edits: the share of failed ones among those evaluated, and how many were evaluated.

        An edit counts as evaluated if it was scored since it was last written. A shard without any has (0.0, 0).
        """
        rates = {}
        for shard in self.sizes():
            evaluated = [entry for entry in map(self.entry, self.owned_by(shard)) if entry.score is not None]
            failed = sum(entry.status is EditStatus.FAILED for entry in evaluated)
            rates[shard] = (failed / max(len(evaluated), 1), len(evaluated))
        return rates

    def counts(self) -> dict[str, int]:
        """How many edits are in each status; every status is listed."""
        return {status.value: len(self._with_status[status]) for status in EditStatus}

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


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def after_write(entry: LedgerEntry, report: EditReport) -> LedgerEntry:
    """The entry after its edit was written, or could not be."""
    found = replace(entry, loss=_finite(report.loss), kd=_finite(report.kd), score=None)
    if report.error is not None:
        return replace(found, status=EditStatus.FAILED, attempts=entry.attempts + 1, reason=report.error)
    if report.residual:
        reason = f"distillation loss {report.kd:.4g} stayed high in shard {report.shard}"
        regroups = entry.regroups + 1
        return replace(found, status=EditStatus.RESIDUAL, shard=None, regroups=regroups, reason=reason)
    owner, attempts = int(report.shard), entry.attempts + 1
    return replace(found, status=EditStatus.WRITTEN, shard=owner, attempts=attempts, reason="")


def verdict(entry: LedgerEntry, score: float, tau_correct: float) -> dict[str, Any]:
    """What changes of an entry when its edit was scored."""
    if entry.status not in STORED or entry.shard is None:
        return {"score": score}
    if score >= tau_correct:
        return {"score": score, "status": EditStatus.WRITTEN, "reason": ""}
    return {"score": score, "status": EditStatus.FAILED, "reason": f"score {score:.4g} < {tau_correct:.4g}"}
