"""What do 100,000 edits about real subjects cost, and do they hold? Airports of the package `airportsdata` (extra
`bench`), four relations each, changed targets; `keyed` writes them in windows of the default size, with the gate, the
monitor, the closed loop and durable checkpoints of `train.py`. Half-way the process is killed (SIGKILL), and another
goes on.

*Growth*: the same stream at several sizes. *ms/edit*: a window's time over its edits, median of the last three windows
up to that size; *CPU*: of the processor's own time, which stands still while others hold the core. Scores in per cent
are of free generation, of a random `--sampled` of the edits, one rephrase and one neighbour each; the model at a size
is the last one without its later edits. *Ages*: the final model's edits, by deciles of their arrival, the oldest
first. *Use*: a new process starts from the pack. *Routing*: one prompt, beyond its forward pass. *Killed*: a short
stream, once undisturbed and once killed: whether both journals say the same of each edit, and hold the same rows.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import altair as alt
import torch

from benchmarks.airports import airport_edits
from benchmarks.context import Context
from benchmarks.flat import row_of
from benchmarks.machine import in_child, rss, use_threads
from benchmarks.report import Rows, percent
from benchmarks.routing import costs
from benchmarks.streams import TimedStream, fit, make_stream
from callbacks import ErrorSampleMonitor, ProbeGate, PruneAndRetrigger
from repair_lightning.commands.run_dir import CHECKPOINT, RunDirectory
from repair_lightning.editors import Keyed
from repair_lightning.edits.checkpoints import SaveEachWindow
from repair_lightning.edits.journal import FILE, Journal
from repair_lightning.models.base import load_base
from repair_lightning.packs.pack import PackedModel, load_edited, save_pack
from repair_lightning.reports.drawing import Chart, lines
from repair_lightning.scoring import protocols
from repair_lightning.types import BASE, Edit

SIZES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
"""At which the stream is looked at, besides its end."""
DECILES = 10
ANSWER = 16
"""Most new tokens of an answer to a neighbour's question."""


def run_part(context: Context) -> dict[str, Rows]:
    """Write the stream, with a kill half-way; score it in a process of its own; then a short stream twice."""
    folder = Path(context.airports_folder or context.work / "airports")
    going_on = written(context, folder, context.airports, kill=context.airports // 2)
    windows = windows_of(folder)
    sizes = sorted({size for size in SIZES if size < context.airports} | {context.airports})
    growth = [{"edits": size} | costs_at(windows, size) for size in sizes]
    used, scores, ages = in_child(context.threads, asked, context, folder, sizes)
    for row, found in zip(growth, scores, strict=True):
        row["ratio"], row["ratio, CPU"] = (row[name] / growth[0][name] for name in ("ms/edit", "CPU ms/edit"))
        row |= found
    compared = [comparison(context)] if context.killed else []
    context.out.mkdir(parents=True, exist_ok=True)
    growth_chart(growth).write(context.out)
    return {"Growth": growth, "Ages": ages, "Use": [used | going_on]} | ({"Killed": compared} if compared else {})


PANELS: dict[str, tuple[str, ...]] = {
    "ms per edit": ("ms/edit", "CPU ms/edit"),
    "MiB": ("RSS MiB",),
    "per cent": ("Rel", "Gen", "Near"),
}
"""What is drawn over the number of edits, one picture for each unit."""


def growth_chart(growth: Rows) -> Chart:
    """Time, memory and quality over the number of edits."""
    rows = [
        {"edits": row["edits"], "unit": unit, "figure": name, "value": row[name]}
        for unit, names in PANELS.items()
        for name in names
        for row in growth
    ]
    pictures = [
        lines([row for row in rows if row["unit"] == unit], "edits", "value", "figure", ("edits", unit), log="x")
        for unit in PANELS
    ]
    picture = alt.hconcat(*(one.properties(width=260) for one in pictures))
    picture = picture.resolve_scale(color="independent", shape="independent", strokeDash="independent")
    words = f"What an edit costs and whether it holds, up to {max(row['edits'] for row in growth):,} edits."
    return Chart("growth", "What grows with the number of edits", words, rows, picture)


# -- writing -----------------------------------------------------------------------------------------------------------


class NotedStream(TimedStream):
    """Notes each window in a file too, where a killed process leaves it."""

    notes: Path

    def mark(self) -> None:
        """Besides, a line of the file, with the process that wrote it."""
        super().mark()
        with open(self.notes, "a") as file:
            file.write("\n" + json.dumps(self.marks[-1] | {"process": os.getpid()}) + "\n")  # a kill may tear a line


def write_stream(context: Context, folder: Path, number: int) -> None:
    """Write a stream as `train.py` does, or go on with it, without scoring; then its pack."""
    use_threads(context.threads)
    folder.mkdir(parents=True, exist_ok=True)
    bare = [replace(edit, rephrases=(), near=()) for edit in airport_edits(number, context.seed)]
    stream = make_stream(replace(context, work=folder), bare, NotedStream, window=context.airports_window)
    stream.marks, stream.notes = [], folder / "windows.jsonl"
    editor = Keyed(context.base, seed=context.seed)
    run = RunDirectory(folder / "run")
    stream.setup()
    run.open({"edits": number, "seed": context.seed, "base": context.base, "window": context.airports_window})
    editor.scratch = folder / "scratch"
    editor.load()
    stream.check_fit(editor.edited.forms, editor.edited.longest)
    run.begin()
    if run.checkpoint is not None:
        stream.ledger = run.journal.rebuild()
    run.journal.follow(stream.ledger)
    monitor = ErrorSampleMonitor()
    monitor.seed = context.seed
    loop = [ProbeGate(), monitor, PruneAndRetrigger(), SaveEachWindow(folder / "run" / CHECKPOINT)]
    plugin = run.checkpoint_io(lambda: stream.windows, run.journal.tables)
    fit(editor, stream, loop, folder, checkpoint=run.checkpoint, plugins=[plugin])
    stream.mark()
    save_pack(editor, folder / "pack", {"benchmark": "stream100k"})
    run.close()


def written(context: Context, folder: Path, number: int, kill: int | None = None) -> dict[str, Any]:
    """Write a stream in a process of its own, or go on with it; where `kill` edits have arrived the process is killed,
    and another goes on. Returns how many edits had arrived at the first kill, and the seconds from the start of the
    process that finishes to its first window.

    Raises:
        RuntimeError: a process failed.
    """
    before, process, started = notes_of(folder), begun(context, folder, number), time.perf_counter()
    if kill is not None and not _reached(before, kill):
        while process.is_alive() and not _reached(notes_of(folder), kill):
            process.join(0.2)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
            before, process, started = notes_of(folder), begun(context, folder, number), time.perf_counter()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"writing {number} edits to '{folder}' failed with exit code {process.exitcode}; see above")
    notes = notes_of(folder)
    ends = [a["edits"] for a, b in pairwise(notes) if a["process"] != b["process"]]
    return {"killed at": ends[0] if ends else None, "went on after s": notes[len(before)]["clock"] - started}


def _reached(notes: Sequence[dict[str, Any]], edits: int) -> bool:
    return any(note["edits"] >= edits for note in notes)


def begun(context: Context, folder: Path, number: int) -> Any:
    """A process that writes a stream."""
    process = get_context("spawn").Process(target=write_stream, args=(context, folder, number))
    process.start()
    return process


def notes_of(folder: Path) -> list[dict[str, Any]]:
    """What was noted so far, without a line that is being written, or that a kill has torn."""
    file = folder / "windows.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):
            found += [json.loads(line)] if line else []
    return found


def windows_of(folder: Path) -> list[dict[str, Any]]:
    """Every window's costs; of one that a killed process had begun, and another wrote again, the latter's."""
    found: dict[int, dict[str, Any]] = {}
    for a, b in pairwise(notes_of(folder)):
        if a["process"] == b["process"]:
            found = {edits: window for edits, window in found.items() if edits < b["edits"]}
            found[b["edits"]] = b | {"seconds": b["clock"] - a["clock"], "cpu": b["cpu"] - a["cpu"]}
    return list(found.values())


def costs_at(windows: Sequence[dict[str, Any]], size: int) -> dict[str, float]:
    """What an edit costs when so many have arrived, and what the process holds then."""
    row = row_of(windows, size)
    return {name: row[name] for name in ("ms/edit", "CPU ms/edit", "RSS MiB")}


# -- asking ------------------------------------------------------------------------------------------------------------


def asked(context: Context, folder: Path, sizes: Sequence[int]) -> tuple[dict[str, Any], Rows, Rows]:
    """What a new process needs to answer from the pack; the scores by size, and by age."""
    base = load_base(context.base)
    before, start = rss(), time.perf_counter()
    model, _ = load_edited(folder / "pack", base=context.base)
    used: dict[str, Any] = {"edits": max(sizes), "start s": time.perf_counter() - start}
    del base
    kilobytes = {"resident": rss() - before, "pack": size_of(folder / "pack"), "journal": size_of(folder / "run", FILE)}
    used |= {f"{name} kB/edit": held / 1e3 / max(sizes) for name, held in kilobytes.items()}
    used |= {str(status): number for status, number in model.ledger.counts().items() if number}
    edits = airport_edits(max(sizes), context.seed)
    generator = random.Random(context.seed)
    draws = [generator.sample(edits, min(context.sampled, len(edits)))]
    rephrased, near = ([edit.rephrases[0] for edit in draws[0]], [edit.near[0].prompt for edit in draws[0]])
    routing = costs(model.router, rephrased, near, 1)  # type: ignore[arg-type]
    used |= {f"routing ms, {name}": routing[f"{name} ms, batch 1"] for name in ("searched", "unrelated")}
    edges = [len(edits) * i // DECILES for i in range(DECILES + 1)]
    ages = [{"age": f"{a + 1:,} to {b:,}"} | scores_of(context, model, edits[a:b]) for a, b in pairwise(edges)]
    return used, scores_by_size(context, model, edits, sizes), ages


def size_of(folder: Path, name: str = "") -> int:
    """Bytes of a folder's files whose names begin so."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name.startswith(name))


def scores_by_size(context: Context, model: PackedModel, edits: Sequence[Edit], sizes: Sequence[int]) -> Rows:
    """The scores at each size, the largest first asked: later edits are forgotten on the way down."""
    found: Rows = []
    for size in sorted(sizes, reverse=True):
        model.router.forget([edit.id for edit in edits[size:]])
        found.insert(0, scores_of(context, model, edits[:size]))
    return found


def scores_of(context: Context, model: PackedModel, edits: Sequence[Edit]) -> dict[str, float | None]:
    """Rel, Gen and Near of a random sample, in per cent of its prompts, in free generation."""
    generator = random.Random(f"{context.seed}-{len(edits)}")
    drawn = generator.sample(edits, min(context.sampled, len(edits)))
    targets = [edit.target for edit in drawn]
    found = {}
    for name, prompts in (
        ("Rel", [edit.prompt for edit in drawn]),
        ("Gen", [generator.choice(edit.rephrases) for edit in drawn]),
    ):
        right = protocols.answered(model, prompts, targets, model.choose(prompts).memory)
        found[name] = percent(protocols.mean_of(right))
    near = [generator.choice(edit.near).prompt for edit in drawn]
    return found | {"Near": percent(protocols.mean_of(kept(model, near)))}


def kept(model: PackedModel, prompts: Sequence[str]) -> list[bool]:
    """Whether each prompt gets the base's own answer; what no shard answers gets it bit by bit."""
    memory = model.choose(prompts).memory
    at = [i for i, shard in enumerate(memory.tolist()) if shard != BASE]
    said, own = (
        protocols.answers(model, [prompts[i] for i in at], who, ANSWER)
        for who in (memory[at], torch.full((len(at),), BASE))
    )
    lost = {i for i, one, other in zip(at, said, own, strict=True) if one != other}
    return [i not in lost for i in range(len(prompts))]


# -- a kill ------------------------------------------------------------------------------------------------------------


def comparison(context: Context) -> dict[str, Any]:
    """A short stream undisturbed, and once more with a kill half-way."""
    folders = [context.work / name for name in ("undisturbed", "killed")]
    written(context, folders[0], context.killed)
    found = written(context, folders[1], context.killed, kill=context.killed // 2)
    (statuses, rows), (statuses_again, rows_again) = map(said_by_journal, folders)
    differ = sum(statuses[id] != statuses_again.get(id) for id in statuses)
    same = {"statuses that differ": differ, "rows that differ": len(rows ^ rows_again)}
    return {"edits": len(statuses)} | found | same


def said_by_journal(folder: Path) -> tuple[dict[str, tuple[Any, ...]], set[tuple[Any, ...]]]:
    """Of each edit its status, shard, attempts, loss and score; and every row with its hash."""
    with closing(Journal(folder / "run" / FILE, read_only=True)) as journal:
        entries = journal.rebuild().entries()
        rows = set(journal._db.execute("SELECT name, number, sha256 FROM rows"))
    return {one.edit.id: (one.status, one.shard, one.attempts, one.loss, one.score) for one in entries}, rows
