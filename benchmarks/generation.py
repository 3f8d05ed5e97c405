"""What do routing and shards cost a user? `generate` of the edited model and of a second, plain copy of its base on the
same prompts, of the shards in turn: greedy, exactly `--tokens` new tokens, interleaved in turning order.

*Ratio*: of the medians; *of best*: of the fastest. *By shards*: prompts that a shard answers, in per cent.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.context import Context
from benchmarks.machine import interleaved
from benchmarks.report import Rows
from benchmarks.streams import load_edits, prepared, write
from repair_lightning.editors import Keyed
from repair_lightning.models.base import load_base
from repair_lightning.models.prefix import pad_left
from repair_lightning.types import BASE


def run_part(context: Context) -> Rows:
    """A row per size of bank and batch."""
    edits, _ = load_edits(context, max(context.shards))
    plain = load_base(context.base, "float32").model
    editor = prepared(context, edits)
    cells = []
    for shards in sorted(context.shards):
        write(editor, edits[len(editor.memory) : shards])
        prompts = [edits[i % shards].prompt for i in range(max(context.batches))]
        cells += [cell(context, editor, plain, prompts[:batch]) for batch in context.batches]
    return cells


def cell(context: Context, editor: Keyed, plain: Any, prompts: list[str]) -> dict[str, Any]:
    """One batch of prompts on one bank, greedy, always the same number of new tokens."""
    ids, mask = pad_left(editor.tokenizer(prompts)["input_ids"], device=editor.edited.device)
    options = {
        "input_ids": ids,
        "attention_mask": mask,
        "do_sample": False,
        "min_new_tokens": context.tokens,
        "max_new_tokens": context.tokens,
        "pad_token_id": editor.tokenizer.pad_token_id,
    }
    calls = {"routed": lambda: editor.edited.generate(**options), "plain": lambda: plain.generate(**options)}
    assert all(call().shape[1] == ids.shape[1] + context.tokens for call in calls.values())
    seconds = interleaved(calls, context.repeats * (10 if len(prompts) < 16 else 4))
    chosen = editor.choose(prompts).memory
    return {
        "batch": len(prompts),
        "shards": len(editor.memory),
        "memories in batch": len(chosen.unique()),
        "by shards": 100 * float((chosen != BASE).float().mean()),
        "plain ms": 1e3 * median(seconds["plain"]),
        "routed ms": 1e3 * median(seconds["routed"]),
        "ratio": median(seconds["routed"]) / median(seconds["plain"]),
        "of best": min(seconds["routed"]) / min(seconds["plain"]),
        "seconds": [seconds],
    }
