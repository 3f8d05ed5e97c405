"""Edits, editors and real streams for the parts that look inside: the trainer's own loop, without the scoreboard."""

from __future__ import annotations

import itertools
import json
import logging
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.context import Context
from benchmarks.machine import rss
from benchmarks.timing import Stopwatch
from callbacks import ErrorSampleMonitor, PruneAndRetrigger
from repair_lightning.editors import Repair
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.records import load_records
from repair_lightning.edits.stream import EditStream
from repair_lightning.types import Edit
from repair_lightning.world import WORLD, edits_path


def load_edits(context: Context, number: int) -> tuple[list[Edit], int]:
    """`number` edits without their scoring prompts, and how many of them had to be invented."""
    path = edits_path() if context.data == WORLD else context.data
    known = [
        replace(edit, rephrases=(), locality=(), near=())
        for edit in load_records(path, context.format, on_bad_record="skip").edits
    ]
    more = invented(known, max(0, number - len(known)), context.seed)
    return (known + more)[:number], len(more)


def invented(edits: Sequence[Edit], number: int, seed: int = 0) -> list[Edit]:
    """Edits about people who do not exist: the words of known edits about names glued from known subjects.

    Every name is used once, so no made-up edit supersedes another. Needs an edit whose prompt holds its subject.
    """
    patterns = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
    if not number:
        return []
    if not patterns:
        raise ValueError("no edit's prompt holds its subject: nothing to make further edits from; give fewer edits")
    names = made_up_names([str(edit.subject) for edit in patterns], seed)
    generator = random.Random(f"invented-{seed}")
    found = []
    for i, name in enumerate(itertools.islice(names, number)):
        like = generator.choice(patterns)
        prompt = like.prompt.replace(str(like.subject), name)
        found.append(replace(like, id=f"invented-{i}", prompt=prompt, subject=name))
    return found


def made_up_names(subjects: Sequence[str], seed: int) -> Any:
    """Endless names `first [middle ...] last` that no subject has, each once; more middle names when they run out."""
    generator = random.Random(f"names-{seed}")
    firsts = sorted({subject.split()[0] for subject in subjects})
    lasts = sorted({subject.split()[-1] for subject in subjects})
    used = set(subjects)
    for middle in itertools.count():
        for _ in range(len(firsts) * len(lasts)):
            words = [generator.choice(firsts), *(generator.choice(firsts) for _ in range(middle))]
            name = " ".join([*words, generator.choice(lasts)])
            if name not in used:
                used.add(name)
                yield name


def write_edits(path: Path, edits: Sequence[Edit]) -> str:
    """The edits as a `jsonl` file; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(edit.as_dict()) + "\n" for edit in edits))
    return str(path)


def make_stream(context: Context, path: str, kind: type[EditStream] = EditStream, **options: Any) -> Any:
    """A stream of the edits in a `jsonl` file, with the context's irrelevant prompts."""
    irrelevant = {"irrelevant": context.irrelevant or None, "irrelevant_prefix": context.irrelevant_prefix}
    return kind(path, **(irrelevant | {"on_bad_record": "skip"} | options))


def prepared(context: Context, edits: Sequence[Edit], **options: Any) -> Repair:
    """An editor that is ready to write without a trainer."""
    editor = Repair(context.base, seed=context.seed, **options)
    editor.load()
    stream = make_stream(context, write_edits(context.work / "prepared.jsonl", edits))
    editor.prepare(*stream.irrelevant_halves(editor))
    return editor


def clear(editor: Repair, empty: Any) -> None:
    """Make the editor one that has written nothing; `empty` is its bank's snapshot from then."""
    editor.router.forget(list(editor.ledger))
    editor.memory.restore((dict(empty[0]), empty[1]))
    editor.ledger = Ledger()


class WindowClock(pl.Callback):
    """After every window: its seconds, on the clock and of the processor, memory, and where the time went."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.windows: list[dict[str, Any]] = []
        self.mark = self.cpu = 0.0

    def start(self) -> None:
        """Now the first window begins."""
        self.watch.take()
        self.mark, self.cpu = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stands behind the other callbacks, so their work counts."""
        seconds, cpu = time.perf_counter() - self.mark, time.process_time() - self.cpu
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        known = {"edits": stream.arrived, "seconds": seconds, "cpu": cpu, "shards": len(pl_module.memory)}
        self.windows.append(known | {"rss": rss(), "parts": self.watch.take()})
        self.start()


class TimedStream(EditStream):
    """Starts the clock when the first window is asked for: Lightning does that before any hook of a callback."""

    clock: WindowClock

    def next_window(self) -> Any:
        """The next window's batches."""
        if not self.windows:
            self.clock.start()
        return super().next_window()


def run_stream(context: Context, path: str, folder: Path, window: int, **editor_options: Any) -> tuple[Repair, Any]:
    """Write a stream with the real trainer, monitor and closed loop; returns the editor and the timed stream."""
    editor = Repair(context.base, seed=context.seed, **editor_options)
    stream = make_stream(context, path, TimedStream, window=window)
    stream.setup()
    editor.load()
    stream.check_fit(editor.edited.forms, editor.max_tokens)
    monitor, feedback, watch = ErrorSampleMonitor(seed=context.seed), PruneAndRetrigger(), Stopwatch()
    stream.clock = WindowClock(watch)
    watch.wrap(stream, "next_window", "cluster")
    watch.wrap(editor, "write")
    watch.wrap(editor, "calibrate")
    watch.wrap(monitor, "on_train_epoch_end", "monitor")
    watch.wrap(feedback, "on_train_epoch_end", "feedback")
    fit(editor, stream, [monitor, feedback, stream.clock], folder)
    return editor, stream


def fit(editor: Repair, stream: EditStream, callbacks: list[pl.Callback], folder: Path) -> None:
    """Run the stream as train.py does, without loggers, scoring and checkpoints."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        trainer.fit(editor, datamodule=stream)
