"""What routing and shards cost while generating: the edited model against the plain base, interleaved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.context import Context
from benchmarks.report import Table, number, percent
from benchmarks.streams import clear, load_edits, prepared
from benchmarks.timing import Stopwatch, interleaved
from repair_lightning.editors import Repair
from repair_lightning.editors.repair import Writing
from repair_lightning.models.base import load_base
from repair_lightning.models.prefix import pad_left
from repair_lightning.types import BASE, Edit, EditBatch

TITLE = "Generation: routed over plain"
_PER_DENSE_SHARD = 8
_ROUTING = ("_new_turn",)
"""Method of the edited model in which prompts are read and routed; it runs once per call of `generate`."""


def run_part(context: Context) -> dict[str, Any]:
    """Time `generate` of the edited model and of a second, plain copy of its base on the same prompts."""
    edits, _ = load_edits(context, max(_PER_DENSE_SHARD * max(context.shards), max(context.batches)))
    plain = load_base(context.base, "float32").model
    cells = []
    for form, size in (("low_rank", 1), ("dense", _PER_DENSE_SHARD)):
        writing = Writing(form=form, steps=1, capacity=size)  # type: ignore[arg-type]  # full with its first batch
        editor = prepared(context, edits, precision="float32", writing=writing)
        watch = Stopwatch()
        for name in _ROUTING:
            watch.wrap(editor.edited, name)
        empty = editor.memory.snapshot()
        for shards in context.shards:
            clear(editor, empty)
            owned = fill(editor, edits, shards, size)
            cells += [{"form": form} | cell(context, editor, plain, owned, batch, watch) for batch in context.batches]
    return {"tokens": context.tokens, "cells": cells}


def fill(editor: Repair, edits: Sequence[Edit], shards: int, size: int) -> list[list[Edit]]:
    """Write edits with a single step each into shards of `size`; the router knows their prompts as after a real stream.

    Returns each shard's edits.
    """
    owned = [list(edits[i * size : (i + 1) * size]) for i in range(shards)]
    owned = [group for group in owned if group]
    for group in owned:
        editor.ledger.arrive(group, 0)
        editor.ledger.written(editor.write(EditBatch(tuple(group))))
    editor.finish_window()
    return owned


def cell(
    context: Context, editor: Repair, plain: Any, owned: list[list[Edit]], batch: int, watch: Stopwatch
) -> dict[str, Any]:
    """One batch size on one bank; neighbouring prompts belong to different shards."""
    turns = list(
        itertools.chain.from_iterable(zip(*owned, strict=False))
    )  # each shard's first, each shard's second, ...
    prompts = [turns[i % len(turns)].prompt for i in range(batch)]
    ids, mask = pad_left(editor.tokenizer(prompts)["input_ids"], device=editor.edited.device)
    options = {
        "input_ids": ids,
        "attention_mask": mask,
        "do_sample": False,
        "min_new_tokens": context.tokens,
        "max_new_tokens": context.tokens,
        "pad_token_id": editor.tokenizer.pad_token_id,
    }
    rounds = context.repeats * (10 if batch < 16 else 4)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "routed": lambda: editor.edited.generate(**options),
        "plain": lambda: plain.generate(**options),
    }
    for call in calls.values():
        assert call().shape[1] == ids.shape[1] + context.tokens
    watch.take()
    seconds = interleaved(calls, rounds, warm=0)
    routing = sum(watch.take().values()) / rounds
    chosen = editor.choose(prompts).memory
    return {
        "batch": batch,
        "shards": len(owned),
        "answered_by_shards": float((chosen != BASE).float().mean()),
        "memories_in_batch": len(chosen.unique()),
        "routed_seconds": median(seconds["routed"]),
        "plain_seconds": median(seconds["plain"]),
        "ratio": median(seconds["routed"]) / median(seconds["plain"]),
        "ratio_of_best": min(seconds["routed"]) / min(seconds["plain"]),
        "routing_share": routing / (sum(seconds["routed"]) / rounds),
        "seconds": seconds,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per batch size and bank."""
    header = (
        "form",
        "batch",
        "shards",
        "memories in batch",
        "plain ms",
        "routed ms",
        "ratio",
        "of best",
        "prefill routing",
    )
    rows = [
        (
            row["form"].replace("_", " "),
            str(row["batch"]),
            str(row["shards"]),
            f"{row['memories_in_batch']} ({percent(row['answered_by_shards'])} % by shards)",
            number(1e3 * row["plain_seconds"]),
            number(1e3 * row["routed_seconds"]),
            number(row["ratio"], "x"),
            number(row["ratio_of_best"], "x"),
            f"{percent(row['routing_share'])} %",
        )
        for row in result["cells"]
    ]
    note = (
        f"Greedy, {result['tokens']} new tokens per prompt; ratio of medians (and of the best) over interleaved "
        "rounds; prefill routing: share of the routed call in which prompts are read, encoded and given their memory."
    )
    return [Table(TITLE, header, rows, note)]
