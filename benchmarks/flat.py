"""Does an edit cost more when thousands are already written? Seconds per edit along one long stream."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.child import run_child
from benchmarks.context import Context
from benchmarks.report import Table, mib, number

TITLE = "Flatness: seconds per edit along the stream"
LAST = 3
"""Windows before a size whose median is its figure."""


def run_part(context: Context) -> dict[str, Any]:
    """One stream through the real trainer, monitor and closed loop, without scoring, in a process of its own."""
    sizes = context.within_limit(context.sizes)
    if not sizes:
        return {"skipped": "the limit leaves no size"}
    job = {"name": "flat", "kind": "stream", "edits": max(sizes), "window": context.window, "warm": True}
    found = run_child(context, job)
    rows = [row_of(found["windows"], size) for size in sizes]
    for row in rows:
        row["ratio"] = row["seconds_per_edit"] / rows[0]["seconds_per_edit"]
        row["ratio_cpu"] = row["cpu_per_edit"] / rows[0]["cpu_per_edit"]
    return {"window": context.window, "sizes": rows, **found}


def row_of(windows: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """What an edit costs around the moment at which `size` edits have arrived."""
    end = next((i for i, window in enumerate(windows) if window["edits"] >= size), len(windows) - 1)
    costs = [cost for cost in map(cost_of, windows[: end + 1], [None, *windows[:end]]) if cost]
    last = costs[-LAST:]
    parts = {name: median(cost["parts"][name] for cost in last) for name in last[0]["parts"]}
    return {
        "size": size,
        "edits": windows[end]["edits"],
        "seconds_per_edit": median(cost["seconds"] for cost in last),
        "cpu_per_edit": median(cost["cpu"] for cost in last),
        "cumulative": sum(window["seconds"] for window in windows[: end + 1]) / windows[end]["edits"],
        "parts": parts,
        "rss": windows[end]["rss"],
        "shards": windows[end]["shards"],
    }


def cost_of(window: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any] | None:
    """Seconds per arrived edit of one window; None where nothing arrived (only what failed was written again)."""
    arrived = window["edits"] - (before["edits"] if before else 0)
    if not arrived:
        return None
    parts = {name: spent / arrived for name, spent in window["parts"].items()}
    return {"seconds": window["seconds"] / arrived, "cpu": window["cpu"] / arrived, "parts": parts}


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per size."""
    if "skipped" in result:
        return [Table(TITLE, ("result",), [(f"skipped: {result['skipped']}",)])]
    parts = list(result["sizes"][0]["parts"])
    header = ("edits", "ms/edit", "ratio", "ratio, CPU", "cumulative ms/edit", "shards", "RSS MiB", *parts)
    rows = [
        (
            str(row["edits"]),
            number(1e3 * row["seconds_per_edit"]),
            number(row["ratio"], "x"),
            number(row["ratio_cpu"], "x"),
            number(1e3 * row["cumulative"]),
            str(row["shards"]),
            mib(row["rss"]),
            *(number(1e3 * row["parts"][name]) for name in parts),
        )
        for row in result["sizes"]
    ]
    source = f"{result['invented']} of them invented" if result["invented"] else "all from the data"
    statuses = ", ".join(f"{count} {status}" for status, count in result["ledger"].items() if count)
    note = (
        f"{result['edits']} edits ({source}) in windows of {result['window']}; median of the last {LAST} windows "
        "before each size. Ratio: to the first size, by the clock and by the processor's time. The last columns are "
        "ms per edit in the parts (feedback includes calibrations it asks for). Ledger at the end: "
        f"{statuses}."
    )
    return [Table(TITLE, header, rows, note)]
