"""The stream of edits as a LightningDataModule: an epoch is a window, its batches are homogeneous clusters.

Each window's worklist is sized and holds the arrivals, the residual pool and what the closed loop requeued; nothing
of the future is looked at. Everything waits in the ledger, so nothing is lost between windows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from repair_lightning.edits.clustering import form_batches
from repair_lightning.edits.formats import AUTO
from repair_lightning.edits.ledger import FINAL, EditStatus, Ledger, LedgerEntry
from repair_lightning.edits.records import (
    RecordSet,
    check_lengths,
    load_irrelevant,
    load_records,
    named,
    same_question_key,
)
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.texts.dialogue import question_of
from repair_lightning.texts.naming import named_in_each
from repair_lightning.types import Edit, EditBatch, Probe
from repair_lightning.world import WORLD, edits_path, irrelevant_path

if TYPE_CHECKING:
    from repair_lightning.models.forms import Forms

log = logging.getLogger(__name__)

HELD_BACK = 5
"""One irrelevant prompt of so many is kept for scoring, where records have no locality and all would be used."""


@dataclass(frozen=True)
class Joined:
    """How new records follow the edits of a pack.

    Attributes:
        inherited: how many edits the pack holds; they stand first in the ledger.
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


class EditStream(pl.LightningDataModule):
    """Edits in the order in which they arrive, `window` of them at a time.

    Args:
        path: a local file, a hub data set, or `world` for the embedded one.
        format: of the records, see `repair_lightning.edits.formats`; `auto` is the one that they look like.
        max_edits: take the first so many good records.
        on_bad_record: `stop` writes nothing when a record is bad, `skip` writes the good ones and lists the bad ones.
        window: edits that arrive and are handled together; 1 is the paper's strict stream.
        batch_size: most edits of a batch.
        clustering: form batches by the similarity of the base's features; else in the order of arrival.
        irrelevant: file of unrelated questions, `world` for the embedded ones; None lets the base write its own.
        irrelevant_prefix: put before each of them.
        max_irrelevant: take so many of them; half train, a quarter calibrates the router, a quarter guards.
        sample_seed: draw `max_edits` of the good records at random with this seed, None takes the first; they arrive in
            the file's order, and a larger draw holds every smaller one of its seed.
        singles: every edit by itself: a window holds one, and when all has been done for it and it is scored, the
            editor goes back to the model that it began with. Scores are then means over single edits (N = 1).
        propose_subjects: an edit without a subject gets the name in its prompt that most other prompts do not share.
    """

    max_regroups = 2
    """An edit that left this many batches is written alone."""

    def __init__(
        self,
        path: str = WORLD,
        format: str = AUTO,
        max_edits: int | None = None,
        on_bad_record: Literal["stop", "skip"] = "stop",
        window: int = 128,
        batch_size: int = 128,
        clustering: bool = True,
        irrelevant: str | None = None,
        irrelevant_prefix: str = "",
        max_irrelevant: int = 1000,
        sample_seed: int | None = None,
        singles: bool = False,
        propose_subjects: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("window", window), ("batch_size", batch_size), ("max_irrelevant", max_irrelevant)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        self.path, self.format = path, format
        self.file = str(edits_path()) if path == WORLD else path
        self.max_edits, self.sample_seed, self.on_bad_record = max_edits, sample_seed, on_bad_record
        self.irrelevant, self.irrelevant_prefix, self.max_irrelevant = irrelevant, irrelevant_prefix, max_irrelevant
        self.window, self.batch_size = 1 if singles else window, batch_size
        self.singles, self.clustering, self.propose_subjects = singles, clustering, propose_subjects
        self.also_scored: tuple[str, ...] = ()
        """Further prompts that score the model: like the edits' own they may serve for nothing else."""
        self.ledger = Ledger()
        self.joined: Joined | None = None
        """How the records follow an earlier model's edits, where there is one."""
        self.arrived, self.windows = 0, 0  # edits, and windows that have begun
        self._own_records: RecordSet | None = None
        self._asked: set[str] | None = None
        self._open: list[EditBatch] = []  # handed out; still the same as long as nothing of it was written
        self._open_entries: dict[str, LedgerEntry] = {}

    @cached_property
    def records(self) -> RecordSet:
        """What the source holds, all of it read and checked before the first write."""
        found = load_records(self.file, self.format, self.max_edits, self.on_bad_record, self.sample_seed)
        if not found.edits:
            raise ConfigError(f"'{self.file}' holds no edit that can be written; see the messages above")
        self.format = found.format
        edits = with_subjects(found.edits) if self.propose_subjects else found.edits
        return replace(found, edits=asked_for_loc(edits, self._irrelevant, self.max_irrelevant))

    @cached_property
    def _irrelevant(self) -> tuple[str, ...] | None:
        """The irrelevant prompts that were given; None where the base writes its own."""
        path = irrelevant_path() if self.irrelevant == WORLD else self.irrelevant
        return None if path is None else load_irrelevant(path, self.irrelevant_prefix)

    def setup(self, stage: str = "fit") -> None:
        """Read the records."""
        assert self.records

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits of the stream in their order; superseded ones and duplicates are not among them."""
        return self.records.edits

    def check_fit(self, forms: Forms, max_tokens: int) -> None:
        """Refuse edits that are too long for the base, or leave them out where bad records are skipped."""
        too_long = check_lengths(self.edits, forms, max_tokens)
        if too_long and (self.on_bad_record == "stop" or len(too_long) == len(self.edits)):
            first, *_ = too_long.values()
            raise RepairError(f"{self.path}: {first} ({counted(len(too_long), 'such edit')} in all)")
        self.records = self.records.without(too_long)

    def join(self, earlier: Ledger) -> None:
        """Go on after the edits of a pack: drop what it says already, and supersede what it says otherwise.

        ConfigError where there is nothing that the pack does not say, or edits are to be written one by one.
        """
        if self.singles:
            raise ConfigError("data.singles begins with the plain base for every edit; leave --from_pack out")
        joined = join(self.records, earlier)
        if (known := len(joined.known)) == len(self.edits):
            own = f"all {known} are its own already; give new records"
            raise ConfigError(f"'{self.path}' holds no edit that the pack lacks: {own}")
        self._follow(joined)

    def inherit(self, earlier: Ledger) -> None:
        """Start with the ledger of the pack that was joined."""
        self.ledger.inherit(earlier)
        self.windows = self.joined.windows  # type: ignore[union-attr]

    def _follow(self, joined: Joined) -> None:
        self._own_records = self._own_records or self.records
        self._asked, self.joined, self.records = None, joined, apply(self._own_records, joined)

    @property
    def inherited(self) -> list[str]:
        """The ids of the edits that came with a pack."""
        return list(self.ledger)[: self.joined.inherited] if self.joined else []

    def written(self) -> list[str]:
        """The ids of the stream's own edits that a shard holds."""
        before = set(self.inherited)
        return [id for id in self.ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED) if id not in before]

    def unrelated(self, texts: Sequence[str]) -> list[str]:
        """Those texts, once each, that no edit's record asks and `also_scored` does not hold."""
        if self._asked is None:
            asked = asked_of((*self.edits, *map(self.ledger.edit, self.inherited)))
            self._asked = asked.union(map(folded, self.also_scored))
        return [text for text in dict.fromkeys(texts) if folded(text) not in self._asked]

    def irrelevant_parts(self, editor: Any) -> tuple[list[str], list[str], list[str]]:
        """Irrelevant prompts in three parts, so that what guards can fail: half for losses and centring, a quarter for
        thresholds, and a quarter that the gate and the merge guard alone ask."""
        number = self.max_irrelevant
        found = self._irrelevant or editor.base_texts(number)
        texts = self.unrelated(found)
        if left := len(found) - len(texts):
            log.info("left out: %s that another repeats or scoring asks", counted(left, "irrelevant prompt"))
        texts = texts[:number]
        if len(texts) < 4:
            raise ConfigError(f"data.irrelevant: at least 4 unrelated prompts are needed, got {len(texts)}")
        return texts[::2], texts[1::4], texts[3::4]

    def train_dataloader(self) -> DataLoader:
        """The next window's batches. Lightning asks for it at the start of every epoch, and twice when it resumes.

        Where ranks share the work, each gets its own, and as many as the others: empty ones fill up.
        """
        if not self._open or any(self.ledger.entry(id) is not entry for id, entry in self._open_entries.items()):
            self._open = self.next_window()
            self._open_entries = {id: self.ledger[id] for batch in self._open for id in batch.ids}
        batches = _dealt_out(self._open, self._editor) if self._editor.shares else self._open
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]

    def verdict(self) -> list[Any]:
        """What became of the window's edits and of the stream, in plain types: the same on every rank."""
        entries = map(self.ledger.entry, self._open_entries)
        known = [[entry.edit.id, str(entry.status), entry.shard, entry.attempts, entry.score] for entry in entries]
        return [self.ledger.counts(), self.arrived, self.windows, known]

    def next_window(self) -> list[EditBatch]:
        """Let the next edits arrive and form batches of all that waits to be written."""
        number = 0 if self.singles and self.waiting() else self.window
        coming = self.edits[self.arrived : self.arrived + number]
        self._arrive(coming)
        self.arrived += len(coming)
        self.windows += 1
        waiting = self.waiting()
        alone = [id for id in waiting if self.ledger.entry(id).regroups >= self.max_regroups]
        batches = [EditBatch((self.ledger.edit(id),)) for id in alone]
        together = [self.ledger.entry(id) for id in waiting if id not in set(alone)]
        for attempts in sorted({entry.attempts for entry in together}, reverse=True):
            # What failed together is not written together again: the editor grants it less company.
            batches[:0] = self._batches([entry.edit for entry in together if entry.attempts == attempts])
        return batches

    def _arrive(self, coming: Sequence[Edit]) -> None:
        """Enter arrivals in the ledger, each behind the edits that it supersedes."""
        replaced = {edit.id: edit for edit in self.records.superseded_edits}
        expected: dict[str, list[str]] = {edit.id: [] for edit in coming}
        for id, newer in self.records.superseded.items():
            if newer in expected:
                expected[newer].append(id)
        arriving = [[*(replaced[id] for id in expected[edit.id] if id in replaced), edit] for edit in coming]
        self.ledger.arrive([edit for group in arriving for edit in group], self.windows)
        for newer, older in expected.items():
            for id in older:
                self.ledger.supersede(id, newer)
            if written := [id for id in older if id not in replaced]:  # into an earlier model
                self._editor.forget(written)

    def waiting(self) -> list[str]:
        """Ids of the edits that no shard holds yet."""
        return self.ledger.with_status(EditStatus.PENDING, EditStatus.RESIDUAL, EditStatus.REQUEUED)

    def _batches(self, edits: Sequence[Edit]) -> list[EditBatch]:
        share = -(-len(edits) // self._editor.team.size) if self._editor.shares else len(edits)
        size = max(1, min(self.batch_size, self._editor.batch_limit(edits), share))
        if not self.clustering or len(edits) <= 1 or size == 1:
            groups = [list(range(at, min(at + size, len(edits)))) for at in range(0, len(edits), size)]
        else:
            features = self._editor.features(edits)
            finite = np.isfinite(features).all(-1)  # where it is not, the base makes nothing of the edit: it goes alone
            groups = [[int(i)] for i in np.flatnonzero(~finite)]
            like = np.flatnonzero(finite).tolist()
            groups += [[like[i] for i in group] for group in form_batches(features[finite], size)]
        return [EditBatch(tuple(edits[i] for i in group)) for group in groups]

    @property
    def _editor(self) -> Any:  # an `Editor`, whose part of the house may import this one and not be imported
        return self.trainer.lightning_module  # type: ignore[union-attr]

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to arrive or to be written."""
        return self.arrived >= len(self.edits) and not self.waiting()

    @property
    def complete(self) -> bool:
        """Whether nothing that has arrived waits, and nothing else will join it: at the end, or of a single edit."""
        return self.exhausted or (self.singles and not self.waiting())

    def transfer_batch_to_device(self, batch: EditBatch, device: Any, dataloader_idx: int) -> EditBatch:
        """Batches are plain text and stay where they are."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and the ledger; where a journal holds it, only how many edits are in which state."""
        return {
            "ledger": {"counts": self.ledger.counts()} if self.ledger.journal else self.ledger.state_dict(),
            "arrived": self.arrived,
            "windows": self.windows,
            "joined": asdict(self.joined) if self.joined else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; RepairError where the journal tells of another ledger than was saved."""
        if state_dict.get("joined"):
            self._follow(Joined(**state_dict["joined"]))
        saved = state_dict["ledger"]
        if "counts" not in saved:
            self.ledger.load_state_dict(saved)
        elif saved["counts"] != self.ledger.counts():
            raise RepairError(_damaged(self.ledger.counts(), saved["counts"]))
        self.arrived, self.windows = state_dict["arrived"], state_dict["windows"]
        self._open, self._open_entries = [], {}


def _dealt_out(batches: list[EditBatch], editor: Any) -> list[EditBatch]:
    """A rank's own batches, and empty ones up to as many as the others have; the longest go round first."""
    costs = [float(sum(len(editor.encode(edit).target) for edit in batch.edits)) for batch in batches]
    mine = [batches[i] for i in editor.team.mine(len(batches), costs)]
    return mine + [EditBatch(())] * (-(-len(batches) // editor.team.size) - len(mine))


def _damaged(told: dict[str, int], saved: dict[str, int]) -> str:
    both = f"it tells of edits {_told(told)}, the checkpoint of {_told(saved)}"
    return f"the journal is damaged: {both}; restore it from a copy, or --overwrite starts the run anew"


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "none"


def with_subjects(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits; those without a subject get the name in their prompt that most others do not share, where it has one,
    and the log shows the first."""
    names = named_in_each([question_of(edit.prompt) for edit in edits])
    proposed = {edit.id: name for edit, name in zip(edits, names, strict=True) if name and edit.subject is None}
    if proposed:
        some = named([f"'{name}' ({id})" for id, name in proposed.items()])
        words = "(data.propose_subjects false leaves them out)"
        log.info("%s without 'subject', taken from the prompt %s: %s", counted(len(proposed), "edit"), words, some)
    return tuple(replace(edit, subject=proposed.get(edit.id, edit.subject)) for edit in edits)


def asked_for_loc(edits: Sequence[Edit], given: Sequence[str] | None, used: int) -> tuple[Edit, ...]:
    """The edits; those without locality prompts are scored on irrelevant ones that serve for nothing else.

    These are the prompts beyond the first `used` of those that were `given`, or a part of them that is held back; where
    none were given and the base writes its own, the embedded ones.
    """
    lacking = sum(not edit.locality for edit in edits)
    if not lacking:
        return tuple(edits)
    asked = asked_of(edits)
    free = [text for text in dict.fromkeys(given or load_irrelevant(irrelevant_path())) if folded(text) not in asked]
    if given:
        free = free[used:] or free[len(free) - len(free) // HELD_BACK :]
    if not free:
        words = "and data.irrelevant has no prompt to spare: Loc and OP lack them"
        log.warning("%s without 'locality', %s", counted(lacking, "edit"), words)
        return tuple(edits)
    number = counted(min(lacking, len(free)), "prompt")
    log.info("%s without 'locality': Loc asks %s used for nothing else", counted(lacking, "edit"), number)
    return with_locality(edits, free)


def with_locality(edits: Iterable[Edit], prompts: Sequence[str]) -> tuple[Edit, ...]:
    """The edits; those without a locality prompt get one each, in turn."""
    turn = cycle(prompts)
    return tuple(edit if edit.locality else replace(edit, locality=(Probe(next(turn)),)) for edit in edits)


def asked_of(edits: Iterable[Edit]) -> set[str]:
    """Everything that some edits' records ask, folded: none of it may serve as another prompt."""
    found: set[str] = set()
    for edit in edits:
        probes = (probe.prompt for probe in (*edit.locality, *edit.near))
        further = (one.prompt for one in edit.further)
        found.update(map(folded, (edit.prompt, *edit.rephrases, *probes, *further)))
    return found


def folded(text: str) -> str:
    """A text without case, with single spaces."""
    return " ".join(text.casefold().split())


def join(found: RecordSet, ledger: Ledger) -> Joined:
    """What becomes of new records beside a pack's ledger. One with a live edit's question repeats or replaces it.

    A pack may hold several live edits of one question, each with a prompt of its own: its last one counts, and a record
    that replaces it replaces them all.
    """
    live: dict[str, list[str]] = {}
    for id in ledger:
        if ledger.entry(id).status not in FINAL:
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
    for id in filter(ledger.__contains__, new):
        renamed[id] = next(name for n in count(2) if (name := f"{id}~{n}") not in taken)
        taken.add(renamed[id])
    replaced = {old: renamed.get(id, id) for old, id in replaced.items()}
    windows = max((ledger.entry(id).window + 1 for id in ledger), default=0)
    held = counted(len(ledger), "edit")
    log.info("the pack holds %s; new records supersede %d and repeat %d (dropped)", held, len(replaced), len(known))
    if some := [f"'{old}' is '{new}'" for old, new in renamed.items()]:
        log.info("ids that belong to other edits of the pack: %s", named(some))
    return Joined(len(ledger), windows, renamed, known, replaced)


def apply(found: RecordSet, joined: Joined) -> RecordSet:
    """The records under their new ids, without those that the pack holds already."""
    name = {**joined.renamed, **joined.known}
    kept = tuple(replace(edit, id=name.get(edit.id, edit.id)) for edit in found.edits if edit.id not in joined.known)
    older = [edit for edit in found.superseded_edits if found.superseded[edit.id] not in joined.known]
    superseded = {joined.renamed.get(old, old): name.get(new, new) for old, new in found.superseded.items()}
    return replace(
        found,
        edits=kept,
        superseded=superseded | dict(joined.replaced),
        duplicates=(*found.duplicates, *joined.known),
        superseded_edits=tuple(replace(edit, id=joined.renamed.get(edit.id, edit.id)) for edit in older),
    )
