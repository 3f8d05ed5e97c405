"""Does an edit cost more when thousands are already written? One stream through the real trainer, error monitor and
closed loop, without scoring, after a short one to warm up.

*ms/edit* at a size: a window's time over the edits that arrived in it, median of the last three windows up to that
size; *cumulative*: all time so far over all edits. *Ratio*: to the first size, by the clock and by the processor's own
time, which stands still while others hold the core. Where the data holds too few edits, more are *invented*: the words
of known edits about names glued from known subjects' words.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.context import Context
from benchmarks.machine import in_child
from benchmarks.report import MIB, Rows
from benchmarks.streams import stream

LAST = 3
"""Windows before a size whose median is its figure."""


def run_part(context: Context) -> Rows:
    """A row per size, of one stream in a process of its own."""
    found = in_child(context.threads, stream, context, max(context.sizes), context.window, True)
    rows = [row_of(found["windows"], size) for size in sorted(context.sizes)]
    for row in rows:
        row["ratio"] = row["ms/edit"] / rows[0]["ms/edit"]
        row["ratio, CPU"] = row["CPU ms/edit"] / rows[0]["CPU ms/edit"]
        row["invented"] = found["invented"]
    return rows


def row_of(windows: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """What an edit costs around the moment at which `size` edits have arrived; windows in which none arrived (what
    failed was written again) count in the sum alone."""
    end = next((i for i, window in enumerate(windows) if window["edits"] >= size), len(windows) - 1)
    so_far, before = windows[: end + 1], [0, *(window["edits"] for window in windows)]
    last = [(w, w["edits"] - b) for w, b in zip(so_far, before, strict=False) if w["edits"] > b][-LAST:]
    return {
        "edits": windows[end]["edits"],
        "ms/edit": median(1e3 * window["seconds"] / arrived for window, arrived in last),
        "CPU ms/edit": median(1e3 * window["cpu"] / arrived for window, arrived in last),
        "cumulative": 1e3 * sum(window["seconds"] for window in so_far) / windows[end]["edits"],
        "shards": windows[end]["shards"],
        "RSS MiB": windows[end]["rss"] / MIB,
        "windows": [window["seconds"] for window in so_far],
    }
