"""What does a durable checkpoint cost when thousands of edits are held? An editor, router, ledger and journal grow by
synthetic edits, each with a random shard of rank 4, and save every `--window` edits with the run's own writer.

*Whole*: one checkpoint that holds everything, with the ledger. Then: median of the last five *in segments*, as a run
saves them; *held*: all segments on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from benchmarks.context import Context
from benchmarks.machine import seconds_of
from benchmarks.report import MIB, Rows
from benchmarks.routing import add, said_again
from benchmarks.streams import inventing, prepared
from repair_lightning.commands.run_dir import DurableCheckpointIO
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.segments import Segments
from repair_lightning.edits.stream import EditStream
from repair_lightning.types import Edit, EditReport

RANK = 4
"""Of the synthetic shards: target tokens of an edit."""
LAST = 5
"""Checkpoints before a size whose median is its figure."""


def run_part(context: Context) -> Rows:
    """One growing editor that saves every window in segments; at every size, one checkpoint that holds everything."""
    growing = Growing(context)
    edits = inventing(growing.known, context.seed)
    apart, whole = growing.writer("apart"), growing.writer("whole")
    rows: Rows = []
    saved = []
    for size in sorted(context.checkpointed):
        while growing.written < size:
            growing.add([*islice(edits, min(context.window, size - growing.written))])
            saved.append(growing.saved(*apart, in_segments=True))
        rows.append({"edits": size})
        for key, all_at_once in growing.saved(*whole, in_segments=False).items():
            since = median(one[key] for one in saved[-LAST:])
            rows[-1] |= {f"whole {key}": all_at_once, f"in segments {key}": since, f"ratio {key}": since / all_at_once}
        rows[-1]["held MiB"] = sum(file.stat().st_size for file in apart[0].segments.folder.iterdir()) / MIB
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

    def writer(self, name: str) -> tuple[DurableCheckpointIO, Path]:
        """The writer that a run has, and where it writes."""
        folder = self.folder / name
        return DurableCheckpointIO(lambda sha256: None, Segments(folder / "segments")), folder / "last.ckpt"

    def saved(self, io: DurableCheckpointIO, path: Path, in_segments: bool) -> dict[str, float]:
        """Seconds and new MiB of one checkpoint as the trainer saves it: in segments, or whole and with the
        ledger."""
        self.editor.rows_apart = self.editor.memory.rows_apart = in_segments
        self.stream.ledger.journal = self.journal if in_segments else None
        before = {*path.parent.rglob("*")} - {path}

        def save() -> None:
            checkpoint = {"state_dict": self.editor.state_dict(), "EditStream": self.stream.state_dict()}
            self.editor.on_save_checkpoint(checkpoint)
            io.save_checkpoint(checkpoint, path)

        seconds = seconds_of(save)
        self.stream.ledger.journal = self.journal
        new = [file for file in {*path.parent.rglob("*")} - before if file.is_file()]
        return {"s": seconds, "MiB": sum(file.stat().st_size for file in new) / MIB}
