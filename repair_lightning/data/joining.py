"""New records for a model that was edited before: what of them it holds already, and what they replace."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from repair_lightning.data.ledger import EditStatus, Ledger
from repair_lightning.data.records import RecordSet
from repair_lightning.errors import counted

log = logging.getLogger(__name__)

_FINAL = (EditStatus.SUPERSEDED, EditStatus.UNDONE)


@dataclass(frozen=True)
class Joined:
    """How new records follow the edits of a pack.

    Attributes:
        inherited: the pack's edits; they stand first in the ledger.
        windows: the windows in which they arrived.
        renamed: new id of a record whose own id the pack uses for another edit.
        known: for a record that says what a live edit of the pack says, that edit's id.
        replaced: for an edit of the pack that a record contradicts, the record's (new) id.
    """

    inherited: int
    windows: int
    renamed: Mapping[str, str]
    known: Mapping[str, str]
    replaced: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self)


def join(found: RecordSet, ledger: Ledger) -> Joined:
    """What becomes of new records beside a pack's ledger. One with the prompt of a live edit repeats or replaces it."""
    live = {ledger.edit(id).prompt: id for id in ledger if ledger.entry(id).status not in _FINAL}
    known: dict[str, str] = {}
    replaced: dict[str, str] = {}
    for edit in found.edits:
        id = live.get(edit.prompt)
        if id is None:
            continue
        entry = ledger.entry(id)
        if entry.edit.target == edit.target and entry.status is not EditStatus.QUARANTINED:
            known[edit.id] = id
        else:
            replaced[id] = edit.id
    new = [edit.id for edit in (*found.superseded_edits, *found.edits) if edit.id not in known]
    taken = {*ledger, *new}
    renamed: dict[str, str] = {}
    for id in new:
        if id in ledger:
            renamed[id] = _fresh(id, taken)
            taken.add(renamed[id])
    replaced = {old: renamed.get(id, id) for old, id in replaced.items()}
    windows = max((ledger.entry(id).window + 1 for id in ledger), default=0)
    return Joined(len(ledger), windows, renamed, known, replaced)


def apply(found: RecordSet, joined: Joined) -> RecordSet:
    """The records under their new ids, without those that the pack holds already."""
    name = {**joined.renamed, **joined.known}
    kept = tuple(replace(edit, id=name.get(edit.id, edit.id)) for edit in found.edits if edit.id not in joined.known)
    older = [edit for edit in found.superseded_edits if found.superseded[edit.id] not in joined.known]
    superseded = {joined.renamed.get(old, old): name.get(new, new) for old, new in found.superseded.items()}
    return RecordSet(
        kept,
        found.bad,
        superseded | dict(joined.replaced),
        (*found.duplicates, *joined.known),
        tuple(replace(edit, id=joined.renamed.get(edit.id, edit.id)) for edit in older),
    )


def log_joined(joined: Joined) -> None:
    """Say in a line or two what was joined with what."""
    numbers = (counted(joined.inherited, "edit"), len(joined.replaced), len(joined.known))
    log.info("the pack holds %s; new records supersede %d and repeat %d (dropped)", *numbers)
    if joined.renamed:
        some = ", ".join(f"'{old}' is '{new}'" for old, new in list(joined.renamed.items())[:5])
        more = ", ..." if len(joined.renamed) > 5 else ""
        log.info("ids that belong to other edits of the pack: %s%s", some, more)


def _fresh(id: str, taken: set[str]) -> str:
    number = 2
    while f"{id}~{number}" in taken:
        number += 1
    return f"{id}~{number}"
