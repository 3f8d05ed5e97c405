"""Peak memory of a stream against what it has to hold: base, shards and the prefix cache's budget."""

from __future__ import annotations

from typing import Any

from benchmarks.child import run_child
from benchmarks.context import Context
from benchmarks.report import Table, mib, number

TITLE = "Memory: peak of a stream over base + shards + cache budget"


def run_part(context: Context) -> dict[str, Any]:
    """A child that only loads the base, one with the shortest stream, and one with the stream for every budget."""
    baseline = run_child(context, {"name": "memory-baseline", "kind": "load"})
    short = {"name": "memory-short", "kind": "stream", "edits": 8, "window": 128, "cache_mib": min(context.cache_mib)}
    constant = run_child(context, short)["peak"] - baseline["rss"]
    rows = []
    for budget in context.cache_mib:
        job = {"name": f"memory-{budget}", "kind": "stream", "edits": context.stream, "window": 128}
        rows.append(row_of(run_child(context, job | {"cache_mib": budget}), baseline))
    return {"baseline": baseline, "constant": constant, "streams": rows}


def row_of(found: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """All terms, and the two ratios: against the budget, and against what the cache really held."""
    base = baseline["base_bytes"]
    held = found["peak"] - baseline["rss"] + base
    fixed = base + found["shard_bytes"]
    used = found["cache_used"]
    terms = ("edits", "invented", "peak", "rss", "shard_bytes", "router_bytes", "cache_budget", "cache_used")
    return {
        **{name: found[name] for name in terms},
        "base_bytes": base,
        "baseline_rss": baseline["rss"],
        "held": held,
        "ratio": held / (fixed + found["cache_budget"]),
        "ratio_used": held / (fixed + used) if used is not None else None,
        "windows": [{"edits": window["edits"], "rss": window["rss"]} for window in found["windows"]],
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per cache budget."""
    header: tuple[str, ...] = (
        "edits",
        "peak",
        "baseline",
        "held",
        "base",
        "shards",
        "cache budget",
        "cache used",
        "router",
    )
    header += ("ratio", "ratio to used")
    names = ("peak", "baseline_rss", "held", "base_bytes", "shard_bytes", "cache_budget", "cache_used", "router_bytes")
    rows = [
        (str(row["edits"]), *(mib(row[name]) for name in names), number(row["ratio"]), number(row["ratio_used"]))
        for row in result["streams"]
    ]
    note = (
        "MiB. Baseline: a process that imports everything and loads the base. Held = peak - baseline + base. Ratio = "
        "held / (base + shards + cache budget); the last column puts what the cache held at the end in the budget's "
        f"place. A stream of 8 edits alone adds {mib(result['constant'])} MiB to the baseline."
    )
    return [Table(TITLE, header, rows, note)]
