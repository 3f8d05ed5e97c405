"""What a checkpoint costs when many edits are held: written whole, and as what came since the last one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.context import Context
from benchmarks.report import Table, mib, number
from benchmarks.routing import Invented
from benchmarks.streams import made_up_names
from benchmarks.timing import seconds_of
from repair_lightning.commands.run_dir import DurableCheckpointIO
from repair_lightning.editors import Repair
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.segments import Segments
from repair_lightning.edits.stream import EditStream
from repair_lightning.types import Edit, EditReport

TITLE = "Checkpoints: seconds and bytes"
RANK = 4
"""Of the synthetic shards: target tokens of an edit."""
LAST = 5
"""Checkpoints before a size whose median is its figure."""


def run_part(context: Context) -> dict[str, Any]:
    """One growing editor; at every size a checkpoint as it was, between those that it writes on the way."""
    sizes = context.within_limit(context.checkpointed)
    if not sizes:
        return {"skipped": "the limit leaves no size"}
    stream = Growing(context)
    rows = list(stream.grow(sizes))
    stream.close()
    return {"window": context.window, "rank": RANK, "shape": list(stream.editor.memory.shape), "sizes": rows}


class Growing:
    """An editor to which synthetic edits are added as if they had been written, with its ledger, journal and stream."""

    def __init__(self, context: Context) -> None:
        self.window = context.window
        self.source = Invented.from_base(context)
        self.names = made_up_names(self.source.subjects, context.seed)
        self.generator = torch.Generator().manual_seed(context.seed)
        self.editor = Repair(context.base, seed=context.seed)
        self.editor.load()
        self.source.prepared(self.editor.router)
        self.stream = EditStream()
        self.folder = context.work / "checkpoints"
        self.folder.mkdir(parents=True)
        self.journal = Journal(self.folder / "journal.sqlite")
        self.stream.ledger = self.editor.ledger = Ledger()
        self.stream.ledger.journal = self.journal
        self.written = 0

    def close(self) -> None:
        """Let go of the journal and remove everything."""
        self.journal.close()
        shutil.rmtree(self.folder)

    def grow(self, sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        """A row for every size, measured when so many edits are there."""
        segments = Segments(self.folder / "apart" / "segments")
        apart = DurableCheckpointIO(lambda sha256: None, segments)
        whole = DurableCheckpointIO(lambda sha256: None, Segments(self.folder / "whole" / "segments"))
        saved: list[dict[str, float]] = []
        for size in sizes:
            while self.written < size:
                self.add(min(self.window, size - self.written))
                saved.append(self.saved(apart, rows_apart=True))
            row = {"edits": self.written, "whole": self.saved(whole, rows_apart=False)}
            last = {key: median(one[key] for one in saved[-LAST:]) for key in ("seconds", "bytes")}
            files = len(list(segments.folder.iterdir()))
            held = sum(file.stat().st_size for file in segments.folder.iterdir())
            total = {
                "all_bytes": sum(one["bytes"] for one in saved),
                "all_seconds": sum(one["seconds"] for one in saved),
            }
            yield row | {"apart": last | total | {"files": files, "held": held, "checkpoints": len(saved)}}

    def add(self, count: int) -> None:
        """Edits as if they had been written: in the ledger, with a shard each, with their keys."""
        about = [(self.source.pick(), next(self.names)) for _ in range(count)]
        width, inner = self.editor.memory.shape
        edits, reports = [], []
        for place, (like, name) in enumerate(about, start=self.written):
            pattern = self.source.patterns[like]
            prompt = self.source.said((like, name))
            edits.append(Edit(str(place), prompt, pattern.target, name, pattern.rephrases, pattern.locality))
            left = torch.randn(width, RANK, generator=self.generator)
            shard = self.editor.memory.add(left, torch.randn(RANK, inner, generator=self.generator))
            reports.append(EditReport(str(place), shard, 0.1, 0.0, 10))
        self.stream.ledger.arrive(edits, 0)
        self.stream.ledger.written(reports)
        self.source.add(self.editor.router, about, self.written)
        self.written += count

    def saved(self, io: DurableCheckpointIO, rows_apart: bool) -> dict[str, float]:
        """Seconds and bytes of one checkpoint as the trainer saves it: in segments, or whole and with the ledger."""
        path = self.folder / ("apart" if rows_apart else "whole") / "last.ckpt"
        self.editor.rows_apart = self.editor.memory.rows_apart = rows_apart
        self.stream.ledger.journal = self.journal if rows_apart else None
        before = set(names_in(path.parent))
        seconds = seconds_of(lambda: self.save(io, path))
        self.stream.ledger.journal = self.journal
        new = [file for file in names_in(path.parent) if file not in before or file == path]
        return {"seconds": seconds, "bytes": sum(file.stat().st_size for file in new)}

    def save(self, io: DurableCheckpointIO, path: Path) -> None:
        """What Lightning does: gather the state, give it to the plugin."""
        checkpoint = {"state_dict": self.editor.state_dict(), "EditStream": self.stream.state_dict()}
        self.editor.on_save_checkpoint(checkpoint)
        io.save_checkpoint(checkpoint, path)


def names_in(folder: Path) -> list[Path]:
    """The files below a folder."""
    return [file for file in folder.rglob("*") if file.is_file()]


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per size."""
    if "skipped" in result:
        return [Table(TITLE, ("result",), [(f"skipped: {result['skipped']}",)])]
    header = (
        "edits",
        "whole s",
        "whole MiB",
        "s",
        "MiB",
        "ratio, s",
        "ratio, MiB",
        "files",
        "held MiB",
        "all MiB",
        "all s",
    )
    rows = []
    for row in result["sizes"]:
        whole, apart = row["whole"], row["apart"]
        ratios = (number(apart[key] / whole[key], "x") for key in ("seconds", "bytes"))
        figures = (
            number(whole["seconds"]),
            mib(whole["bytes"]),
            number(apart["seconds"]),
            mib(apart["bytes"]),
            *ratios,
        )
        sums = (str(apart["files"]), mib(apart["held"]), mib(apart["all_bytes"]), number(apart["all_seconds"]))
        rows.append((f"{row['edits']:,}", *figures, *sums))
    width, inner = result["shape"]
    note = (
        f"Synthetic low-rank shards of rank {result['rank']} for {width} x {inner}, one per edit, with keys, ledger "
        f"and journal; a checkpoint every {result['window']} edits. Whole: one that holds everything. Then: median of "
        f"the last {LAST} checkpoints in segments; segments and bytes on the disk; bytes and seconds of all "
        "checkpoints since the first edit, joining of segments included."
    )
    return [Table(TITLE, header, rows, note)]
