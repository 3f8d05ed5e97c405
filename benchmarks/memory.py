"""Does a stream hold more than it has to? Peaks (`VmHWM`) of processes of their own, in MiB.

*Baseline*: a process that imports everything and loads the base. *Held* = peak - baseline + base. *Ratio* = held /
(base + shards + cache budget); *to used* puts what the cache held at the end in the budget's place. *Least*: what a
stream of eight edits adds to the baseline; on a small base that constant, which no budget bounds, is most of it.
"""

from __future__ import annotations

import gc
from typing import Any

from benchmarks.context import Context
from benchmarks.machine import in_child, peak_rss, rss
from benchmarks.report import MIB, Rows
from benchmarks.streams import base_bytes, loaded, stream

WINDOW = 128


def run_part(context: Context) -> Rows:
    """A process that only loads the base, one with the shortest stream, and one with the stream for every budget."""
    baseline, base = in_child(context.threads, load_only, context)
    least = in_child(context.threads, stream_of, context, 8, min(context.cache_mib))["peak"] - baseline
    rows = []
    for budget in context.cache_mib:
        found = in_child(context.threads, stream_of, context, context.stream, budget)
        used, held = found["cache_used"] or 0, found["peak"] - baseline + base
        sizes = {"peak": found["peak"], "baseline": baseline, "least": least, "held": held, "base": base}
        sizes |= {"shards": found["shard_bytes"], "cache": used, "router": found["router_bytes"]}
        row = {"edits": found["edits"], "cache budget": budget} | {name: size / MIB for name, size in sizes.items()}
        row["ratio"] = held / (base + found["shard_bytes"] + budget * MIB)
        rows.append(row | {"to used": held / (base + found["shard_bytes"] + used)})
    return rows


def load_only(context: Context) -> tuple[int, int]:
    """Import everything and load the base: bytes that a stream starts from, and of the base."""
    size = base_bytes(loaded(context))
    gc.collect()
    return rss(), size


def stream_of(context: Context, edits: int, budget: int) -> dict[str, Any]:
    """A stream with a budget of the prefix cache, in MiB."""
    return stream(context, edits, WINDOW, cache_mib=budget) | {"peak": peak_rss()}
