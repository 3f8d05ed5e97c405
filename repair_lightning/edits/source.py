"""Where a stream's edits come from: their records, the pack that they follow, and irrelevant prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl

from repair_lightning.edits.joining import Joined, apply, join
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.records import RecordSet, check_lengths, load_irrelevant, load_records
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.types import Edit
from repair_lightning.world import WORLD, edits_path, irrelevant_path

if TYPE_CHECKING:
    from repair_lightning.models.forms import Forms

log = logging.getLogger(__name__)


class EditSource(pl.LightningDataModule):
    """Records and irrelevant prompts, read and checked once; see `EditStream` for the arguments."""

    singles = False
    """Whether every edit is written into the model that the stream began with."""
    windows = 0
    """How many have begun."""

    def __init__(
        self,
        path: str,
        format: str,
        max_edits: int | None,
        on_bad_record: Literal["stop", "skip"],
        irrelevant: str | None,
        irrelevant_prefix: str,
        max_irrelevant: int,
        sample_seed: int | None,
    ) -> None:
        super().__init__()
        self.path, self.format = path, format
        self.max_edits, self.sample_seed, self.on_bad_record = max_edits, sample_seed, on_bad_record
        self.irrelevant, self.irrelevant_prefix, self.max_irrelevant = irrelevant, irrelevant_prefix, max_irrelevant
        self.also_scored: tuple[str, ...] = ()
        """Further prompts that score the model: like the edits' own they may serve for nothing else."""
        self.ledger = Ledger()
        self.records: RecordSet | None = None
        self.joined: Joined | None = None
        """How the records follow an earlier model's edits, where there is one."""
        self._own_records: RecordSet | None = None
        self._asked: set[str] | None = None

    @property
    def file(self) -> str:
        """Where the records lie."""
        return str(edits_path()) if self.path == WORLD else self.path

    def setup(self, stage: str = "fit") -> None:
        """Read and check every record before the first write; does nothing the second time."""
        if self.records is not None:
            return
        self.records = load_records(self.file, self.format, self.max_edits, self.on_bad_record, self.sample_seed)
        if not self.records.edits:
            raise ConfigError(f"'{self.file}' holds no edit that can be written; see the messages above")

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits of the stream in their order; superseded ones and duplicates are not among them."""
        self.setup()
        assert self.records is not None
        return self.records.edits

    def check_fit(self, forms: Forms, max_tokens: int) -> None:
        """Refuse edits that are too long for the base, or leave them out where bad records are skipped."""
        too_long = check_lengths(self.edits, forms, max_tokens)
        if not too_long:
            return
        if self.on_bad_record == "stop" or len(too_long) == len(self.edits):
            raise RepairError(
                f"{self.path}: {next(iter(too_long.values()))} ({counted(len(too_long), 'such edit')} in all)"
            )
        assert self.records is not None
        found = self.records
        kept = tuple(edit for edit in found.edits if edit.id not in too_long)
        orphans = {old: new for old, new in found.superseded.items() if new in too_long}
        lost = [f"edit '{old}': its successor '{new}' is too long; give one that fits" for old, new in orphans.items()]
        self.records = replace(
            found,
            edits=kept,
            bad=(*found.bad, *too_long.values(), *lost),
            superseded={old: new for old, new in found.superseded.items() if old not in orphans},
            superseded_edits=tuple(edit for edit in found.superseded_edits if edit.id not in orphans),
        )

    def join(self, earlier: Ledger) -> None:
        """Go on after the edits of a pack: drop what it says already, and supersede what it says otherwise.

        Raises:
            ConfigError: there is nothing that the pack does not say, or edits are to be written one by one.
        """
        if self.singles:
            raise ConfigError("data.singles begins with the plain base for every edit; leave --from_pack out")
        self.setup()
        assert self.records is not None
        joined = join(self.records, earlier)
        if len(joined.known) == len(self.records.edits):
            raise ConfigError(
                f"'{self.path}' holds no edit that the pack lacks: all {len(joined.known)} are its own already; give "
                "new records"
            )
        self._follow(joined)

    def inherit(self, earlier: Ledger) -> None:
        """Start with the ledger of the pack that was joined."""
        assert self.joined is not None
        self.ledger.inherit(earlier)
        self.windows = self.joined.windows

    def _follow(self, joined: Joined) -> None:
        self.setup()
        self._own_records = self._own_records or self.records
        self._asked = None
        self.joined, self.records = joined, apply(self._own_records, joined)  # type: ignore[arg-type]

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
            self._asked = asked_of((*self.edits, *map(self.ledger.edit, self.inherited)))
            self._asked |= {folded(text) for text in self.also_scored}
        return [text for text in dict.fromkeys(texts) if folded(text) not in self._asked]

    def irrelevant_parts(self, editor: Any) -> tuple[list[str], list[str], list[str]]:
        """Irrelevant prompts in three parts, so that what guards can fail: half for losses and centring, a quarter for
        thresholds, and a quarter that the gate and the merge guard alone ask."""
        if self.irrelevant is None:
            found: Sequence[str] = editor.base_texts(self.max_irrelevant)
        else:
            path = irrelevant_path() if self.irrelevant == WORLD else self.irrelevant
            found = load_irrelevant(path, self.irrelevant_prefix)
        texts = self.unrelated(found)
        if len(texts) < len(found):
            left_out = counted(len(found) - len(texts), "irrelevant prompt")
            log.info("left out: %s that another repeats or scoring asks", left_out)
        texts = texts[: self.max_irrelevant]
        if len(texts) < 4:
            raise ConfigError(f"data.irrelevant: at least 4 unrelated prompts are needed, got {len(texts)}")
        return list(texts[::2]), list(texts[1::4]), list(texts[3::4])


def asked_of(edits: Iterable[Edit]) -> set[str]:
    """Everything that some edits' records ask, folded: none of it may serve as another prompt."""
    found: set[str] = set()
    for edit in edits:
        probes = (probe.prompt for probe in (*edit.locality, *edit.near))
        found.update(map(folded, (edit.prompt, *edit.rephrases, *probes)))
    return found


def folded(text: str) -> str:
    """A text without case, with single spaces."""
    return " ".join(text.casefold().split())
