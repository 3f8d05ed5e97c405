"""New records for a model that was edited before: what of them it holds already, and what they replace."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.records import RecordSet, named, same_question_key
from repair_lightning.errors import counted
from repair_lightning.types import Edit

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
        alike: ids (pack's edit, record's (new) id) where both ask the same question in prompts that differ.
    """

    inherited: int
    windows: int
    renamed: Mapping[str, str]
    known: Mapping[str, str]
    replaced: Mapping[str, str]
    alike: Sequence[tuple[str, str]] = ()

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self)


def join(found: RecordSet, ledger: Ledger) -> Joined:
    """What becomes of new records beside a pack's ledger. One with a live edit's question repeats or replaces it.

    A pack may hold several live edits of one question, each with a prompt of its own: its last one counts, and a record
    that replaces it replaces them all.
    """
    live: dict[str, list[str]] = {}
    for id in ledger:
        if ledger.entry(id).status not in _FINAL:
            live.setdefault(same_question_key(ledger.edit(id).prompt), []).append(id)
    known: dict[str, str] = {}
    replaced: dict[str, str] = {}
    alike: list[tuple[str, str]] = []
    for edit in found.edits:
        ids = live.get(same_question_key(edit.prompt), [])
        alike += [(id, edit.id) for id in ids if ledger.edit(id).prompt != edit.prompt]
        if ids and _says(ledger, ids[-1], edit):
            known[edit.id] = ids[-1]
        else:
            replaced |= dict.fromkeys(ids, edit.id)
    new = [edit.id for edit in (*found.superseded_edits, *found.edits) if edit.id not in known]
    taken = {*ledger, *new}
    renamed: dict[str, str] = {}
    for id in new:
        if id in ledger:
            renamed[id] = _fresh(id, taken)
            taken.add(renamed[id])
    replaced = {old: renamed.get(id, id) for old, id in replaced.items()}
    windows = max((ledger.entry(id).window + 1 for id in ledger), default=0)
    pairs = tuple((old, renamed.get(id, id)) for old, id in alike)
    return Joined(len(ledger), windows, renamed, known, replaced, pairs)


def _says(ledger: Ledger, id: str, edit: Edit) -> bool:
    """Whether the edit of the ledger says what another does, and was written."""
    entry = ledger.entry(id)
    return entry.edit.target == edit.target and entry.status is not EditStatus.QUARANTINED


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
        (*((joined.renamed.get(a, a), joined.renamed.get(b, b)) for a, b in found.alike), *map(_pair, joined.alike)),
    )


def _pair(ids: Sequence[str]) -> tuple[str, str]:
    """Two ids, which a checkpoint may hold as a list."""
    earlier, later = ids
    return earlier, later


def log_joined(joined: Joined) -> None:
    """Say in a line or two what was joined with what."""
    numbers = (counted(joined.inherited, "edit"), len(joined.replaced), len(joined.known))
    log.info("the pack holds %s; new records supersede %d and repeat %d (dropped)", *numbers)
    if joined.alike:
        pairs = named([f"'{old}' and '{new}'" for old, new in joined.alike])
        log.warning("the same question as in the pack but for case, blanks or the final mark: %s", pairs)
    if joined.renamed:
        some = ", ".join(f"'{old}' is '{new}'" for old, new in list(joined.renamed.items())[:5])
        more = ", ..." if len(joined.renamed) > 5 else ""
        log.info("ids that belong to other edits of the pack: %s%s", some, more)


def _fresh(id: str, taken: set[str]) -> str:
    number = 2
    while f"{id}~{number}" in taken:
        number += 1
    return f"{id}~{number}"
