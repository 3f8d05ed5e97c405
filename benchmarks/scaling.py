"""What a second process brings: the same stream through the real `train.py` on one, two, ... ranks of this machine."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from benchmarks.child import run
from benchmarks.context import Context
from benchmarks.editing import Variant, command_of, without_places
from benchmarks.report import Table, number, percent

TITLE = "Scaling: the same stream on several ranks"


def run_part(context: Context) -> dict[str, Any]:
    """Each number of ranks in turn, `repeats` times round; every rank has `--threads` threads."""
    found: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in context.ranks}
    commands = {}
    for turn in range(context.repeats):
        for ranks in context.ranks:
            folder = context.work / f"scaling-{ranks}-{turn}"
            variant = Variant(str(ranks), ("--trainer.devices", str(ranks), "--data.window", str(context.ranks_window)))
            command = command_of(context, variant, folder)
            commands[ranks] = without_places(command, folder)
            run(command, context)
            found[ranks].append(json.loads((folder / "metrics.json").read_text()))
    rows = [row_of(ranks, runs, commands[ranks]) for ranks, runs in found.items()]
    for row in rows:
        row["speedup"] = row["edits_per_minute"] / rows[0]["edits_per_minute"]
        row["speedup_of_scoring"] = rows[0]["scoring_seconds"] / row["scoring_seconds"]
    return {"edits": context.edits, "window": context.ranks_window, "rows": rows}


def row_of(ranks: int, runs: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The figures of one number of ranks: the median run's speed, and the first one's scores."""
    speeds = [run["edits_per_minute"] for run in runs]
    return {
        "ranks": ranks,
        "command": command,
        "edits_per_minute": median(speeds),
        "all_edits_per_minute": speeds,
        "scoring_seconds": median(run["seconds"]["evaluate"] for run in runs),
        "written_per_minute": [pace["edits_per_minute"] for pace in runs[0].get("ranks", [])],
        "edits": runs[0]["edits"],
        "scores": {protocol: runs[0]["final"][protocol] for protocol in ("autoregressive", "teacher_forced")},
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Speed, and that it costs nothing."""
    header = ("ranks", "edits/min", "runs", "faster by", "scoring, s", "faster by", "OP (AR)", "OP (TF)", "lost")
    rows = []
    for row in result["rows"]:
        lost = result["edits"] - sum(row["edits"].values())
        speeds = " ".join(number(speed) for speed in row["all_edits_per_minute"])
        rows.append(
            (
                str(row["ranks"]),
                number(row["edits_per_minute"]),
                speeds,
                number(row["speedup"], "x"),
                number(row["scoring_seconds"]),
                number(row["speedup_of_scoring"], "x"),
                *(percent(scores["op"]) for scores in row["scores"].values()),
                str(lost),
            )
        )
    note = (
        f"{result['edits']} edits in windows of {result['window']}; edits/min without loading and scoring; each rank a "
        "process of its own with the threads that the header names."
    )
    return [Table(TITLE, header, rows, note)]
