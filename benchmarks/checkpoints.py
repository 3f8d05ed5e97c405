"""What does a durable checkpoint cost when thousands of edits are held? An editor, router, ledger and journal grow by
synthetic edits, each with a random shard of rank 4, and save every `--window` edits with the run's own writer.

*Whole*: one checkpoint that holds everything, with the ledger. Then: median of the last five *in the journal*, as a run
saves them; *held*: the journal on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import median

import torch

from benchmarks.context import Context
from benchmarks.machine import seconds_of
from benchmarks.report import MIB, Rows
from benchmarks.routing import add, said_again
from benchmarks.streams import inventing, prepared
from repair_lightning.edits.checkpoints import JournaledCheckpointIO
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.stream import EditStream
from repair_lightning.types import Edit, EditReport

RANK = 4
"""Of the synthetic shards: target tokens of an edit."""
LAST = 5
"""Checkpoints before a size whose median is its figure."""


def run_part(context: Context) -> Rows:
    """One growing editor that saves every window; at every size, one checkpoint that holds everything."""
    growing = Growing(context)
    edits = inventing(growing.known, context.seed)
    rows: Rows = []
    saved = []
    for size in sorted(context.checkpointed):
        while growing.written < size:
            growing.add([*islice(edits, min(context.window, size - growing.written))])
            saved.append(growing.saved("last.ckpt"))
        rows.append({"edits": size})
        for key, all_at_once in growing.saved("whole.ckpt").items():
            since = median(one[key] for one in saved[-LAST:])
            rows[-1] |= {f"whole {key}": all_at_once, f"in journal {key}": since, f"ratio {key}": since / all_at_once}
        rows[-1]["held MiB"] = growing.size("journal.sqlite*") / MIB
    growing.journal.close()
    return rows


class Growing:
    """An editor to which synthetic edits are added as if they had been written, with its ledger, journal and stream."""

    def __init__(self, context: Context) -> None:
        self.known = said_again(context)
        self.generator = torch.Generator().manual_seed(context.seed)
        self.editor = prepared(context, self.known)
        self.folder = context.work / "checkpoints"
        self.folder.mkdir(parents=True)
        self.journal = Journal(self.folder / "journal.sqlite")
        self.stream = EditStream()
        self.stream.ledger = self.editor.ledger = Ledger()
        self.stream.ledger.journal = self.journal

    @property
    def written(self) -> int:
        """How many edits there are."""
        return len(self.editor.memory)

    def add(self, edits: Sequence[Edit]) -> None:
        """Edits as if they had been written: in the ledger, with a shard each, with their keys."""
        width, inner = self.editor.memory.shape
        add(self.editor.router, edits, self.written)  # type: ignore[arg-type]
        factors = [torch.randn(len(edits), *size, generator=self.generator) for size in ((width, RANK), (RANK, inner))]
        shards = [self.editor.memory.add(left, right) for left, right in zip(*factors, strict=True)]
        self.stream.ledger.arrive(edits, 0)
        self.stream.ledger.written(
            [EditReport(edit.id, shard, 0.1, 0.0, 10) for edit, shard in zip(edits, shards, strict=True)]
        )

    @property
    def stored(self) -> int:
        """Bytes of the journal's pages."""
        pages, size = (self.journal._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        return int(pages * size)

    def size(self, pattern: str) -> int:
        """Bytes of the files of this name."""
        return sum(file.stat().st_size for file in self.folder.glob(pattern))

    def saved(self, name: str) -> dict[str, float]:
        """Seconds and new MiB of one checkpoint: the run's own, or whole and with the ledger."""
        own = self.folder / "last.ckpt"
        io = JournaledCheckpointIO(own, lambda sha256, rows: self.journal.save(sha256, 0, rows), self.journal.tables)
        self.stream.ledger.journal = self.journal if name == own.name else None
        pages = self.stored

        def save() -> None:
            checkpoint = {"state_dict": self.editor.state_dict(), "EditStream": self.stream.state_dict()}
            self.editor.on_save_checkpoint(checkpoint)
            io.save_checkpoint(checkpoint, self.folder / name)

        seconds = seconds_of(save)
        self.stream.ledger.journal = self.journal
        return {"s": seconds, "MiB": (self.size(name) + self.stored - pages) / MIB}
