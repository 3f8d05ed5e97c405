"""New records for a model that was edited before: what of them it holds already, and what they replace."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.records import RecordSet, named, same_question_key
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
    alike: list[str] = []
    for edit in found.edits:
        ids = live.get(same_question_key(edit.prompt), [])
        alike += [f"'{id}' and '{edit.id}'" for id in ids if ledger.edit(id).prompt != edit.prompt]
        last = ledger.entry(ids[-1]) if ids else None
        if last and last.edit.target == edit.target and last.status is not EditStatus.QUARANTINED:
            known[edit.id] = ids[-1]
        else:
            replaced |= dict.fromkeys(ids, edit.id)
    if alike:
        log.warning("the same question as in the pack but for case, blanks or the final mark: %s", named(alike))
    new = [edit.id for edit in (*found.superseded_edits, *found.edits) if edit.id not in known]
    taken = {*ledger, *new}
    renamed: dict[str, str] = {}
    for id in new:
        if id in ledger:
            renamed[id] = next(name for n in count(2) if (name := f"{id}~{n}") not in taken)
            taken.add(renamed[id])
    replaced = {old: renamed.get(id, id) for old, id in replaced.items()}
    windows = max((ledger.entry(id).window + 1 for id in ledger), default=0)
    numbers = (counted(len(ledger), "edit"), len(replaced), len(known))
    log.info("the pack holds %s; new records supersede %d and repeat %d (dropped)", *numbers)
    if renamed:
        some = named([f"'{old}' is '{new}'" for old, new in renamed.items()])
        log.info("ids that belong to other edits of the pack: %s", some)
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
