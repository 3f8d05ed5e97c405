"""Edits, editors and real streams for the parts that look inside: the trainer's own loop, without the scoreboard."""

from __future__ import annotations

import itertools
import json
import logging
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.context import Context
from benchmarks.machine import rss
from callbacks import ErrorSampleMonitor, PruneAndRetrigger
from repair_lightning.editors import Keyed, Repair
from repair_lightning.edits.records import load_records
from repair_lightning.edits.stream import EditStream
from repair_lightning.types import Edit, EditBatch, EditReport
from repair_lightning.world import WORLD, edits_path


def records(context: Context, most: int | None = None) -> list[Edit]:
    """The context's records, or the first of them."""
    path = edits_path() if context.data == WORLD else context.data
    return list(load_records(path, context.format, most, on_bad_record="skip").edits)


def load_edits(context: Context, number: int) -> tuple[list[Edit], int]:
    """`number` edits without their scoring prompts, and how many of them had to be invented."""
    known = [replace(edit, rephrases=(), locality=(), near=()) for edit in records(context)][:number]
    more = list(itertools.islice(inventing(known, context.seed), number - len(known)))
    return known + more, len(more)


def inventing(edits: Sequence[Edit], seed: int) -> Iterator[Edit]:
    """Endless edits about people who do not exist: the words of known edits about names glued from known subjects.

    Every name is used once, so no made-up edit supersedes another.

    Raises:
        ValueError: no edit's prompt holds its subject.
    """
    patterns = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
    if not patterns:
        raise ValueError("no edit's prompt holds its subject: nothing to make further edits from; give fewer edits")
    generator = random.Random(f"invented-{seed}")
    for i, name in enumerate(_names([str(edit.subject) for edit in patterns], generator)):
        like = generator.choice(patterns)
        prompt, *rephrases = (text.replace(str(like.subject), name) for text in (like.prompt, *like.rephrases))
        yield replace(like, id=f"invented-{i}", prompt=prompt, rephrases=tuple(rephrases), subject=name)


def _names(subjects: Sequence[str], generator: random.Random) -> Iterator[str]:
    """Endless names `first [middle ...] last` that no subject has, each once; more middle names when they run out."""
    firsts = sorted({subject.split()[0] for subject in subjects})
    lasts = sorted({subject.split()[-1] for subject in subjects})
    used = set(subjects)
    for words in itertools.count(1):
        for _ in range(len(firsts) * len(lasts)):
            name = " ".join([*generator.choices(firsts, k=words), generator.choice(lasts)])
            if name not in used:
                used.add(name)
                yield name


def make_stream(context: Context, edits: Sequence[Edit], kind: type[EditStream] = EditStream, **options: Any) -> Any:
    """A stream of edits, with the context's irrelevant prompts."""
    context.work.mkdir(parents=True, exist_ok=True)
    path = context.work / "stream.jsonl"
    path.write_text("".join(json.dumps(edit.as_dict()) + "\n" for edit in edits))
    irrelevant = {"irrelevant": context.irrelevant or None, "irrelevant_prefix": context.irrelevant_prefix}
    return kind(str(path), **(irrelevant | {"on_bad_record": "skip"} | options))


def loaded(context: Context, kind: type[Any] = Keyed, **options: Any) -> Any:
    """An editor with its base."""
    editor = kind(context.base, seed=context.seed, **options)
    editor.load()
    return editor


def prepared(context: Context, edits: Sequence[Edit], kind: type[Any] = Keyed, **options: Any) -> Any:
    """An editor that is ready to write without a trainer, in float32."""
    editor = loaded(context, kind, precision="float32", **options)
    editor.prepare(*make_stream(context, edits).irrelevant_parts(editor)[:2])
    return editor


def write(editor: Keyed | Repair, edits: Sequence[Edit]) -> list[EditReport]:
    """Write edits in one batch, as a stream does; the router knows them after that."""
    editor.ledger.arrive(edits, 0)
    reports = editor.write(EditBatch(tuple(edits)))
    editor.ledger.written(reports)
    editor.finish_window()
    return reports


def base_bytes(editor: Keyed | Repair) -> int:
    """Bytes of the base's weights, tied ones counted once."""
    assert editor.base is not None
    return sum(parameter.nbytes for parameter in editor.base.model.parameters())


def shard_bytes(editor: Keyed | Repair) -> int:
    """Bytes of all shards."""
    return editor.memory.nbytes


class TimedStream(EditStream):
    """Notes the time whenever a window is asked for: Lightning does that before any hook of a callback."""

    marks: list[dict[str, Any]]

    def next_window(self) -> Any:
        """The next window's batches."""
        self.mark()
        return super().next_window()

    def mark(self) -> None:
        """Time on the clock and of the processor, memory, and what has been written by now."""
        editor: Any = self._editor
        known = {"edits": self.arrived, "rss": rss(), "shards": len(editor.memory)}
        self.marks.append(known | {"clock": time.perf_counter(), "cpu": time.process_time()})

    def costs(self) -> list[dict[str, Any]]:
        """Every window's seconds, on the clock and of the processor."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [b | {"seconds": b["clock"] - a["clock"], "cpu": b["cpu"] - a["cpu"]} for a, b in pairs]


def stream(context: Context, number: int, window: int, warm: bool = False, **options: Any) -> dict[str, Any]:
    """Write a whole stream with the real trainer, monitor and closed loop, without scoring; what it took."""
    if warm:
        stream(context, 8, 8)
    edits, made_up = load_edits(context, number)
    written = make_stream(context, edits, TimedStream, window=window)
    written.marks = []
    editor = Keyed(context.base, seed=context.seed, **options)
    written.setup()
    editor.load()
    written.check_fit(editor.edited.forms, editor.edited.longest)
    monitor = ErrorSampleMonitor()
    monitor.seed = context.seed
    fit(editor, written, [monitor, PruneAndRetrigger()], context.work)
    written.mark()
    return {
        "edits": len(written.edits),
        "invented": made_up,
        "windows": written.costs(),
        "shard_bytes": shard_bytes(editor),
        "router_bytes": sum(getattr(value, "nbytes", 0) for value in editor.router.state_dict().values()),
        "cache_used": getattr(editor.edited.prefixes, "used", None),
    }


def fit(
    editor: Keyed | Repair,
    stream: EditStream,
    callbacks: list[pl.Callback],
    folder: Path,
    checkpoint: Path | None = None,
    plugins: Sequence[Any] = (),
) -> None:
    """Run the stream as train.py does, without loggers and scoring, from a checkpoint where there is one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            **off,  # type: ignore[arg-type]
            accelerator="auto",
            devices=1,
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            default_root_dir=folder,
            callbacks=callbacks,
            enable_checkpointing=bool(plugins),
            plugins=[*plugins],
        )
        trainer.fit(editor, datamodule=stream, ckpt_path=checkpoint)
