"""What does a second process bring? The first `--edits` records through the real `train.py` on each of `--ranks`
processes of this machine in turn, `--repeats` times round, each with `--threads` threads.

*Lost* counts edits that are in no state of the ledger: 0 is the only right answer.
"""

from __future__ import annotations

from benchmarks.context import Context
from benchmarks.editing import Variant, runs_of
from benchmarks.report import Rows


def run_part(context: Context) -> Rows:
    """A row per number of ranks."""
    window = ("--data.window", str(context.ranks_window))
    variants = [Variant(str(ranks), ("--trainer.devices", str(ranks), *window)) for ranks in context.ranks]
    rows = [{"ranks": int(name)} | row for name, row in runs_of(context, variants * context.repeats).items()]
    for row in rows:
        row["faster by"] = row["edits/min"] / rows[0]["edits/min"]
        row["scoring faster by"] = rows[0]["scoring s"] / row["scoring s"]
        row["lost"] = context.edits - row["edits"]
    return rows
