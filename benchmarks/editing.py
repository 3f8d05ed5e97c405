"""How much faster than WISE, and at what quality? The same edits through the real `train.py --config zsre_small`, each
variant in a process of its own, without merge, logger and live scores.

*ours, 70 steps*: as many inner steps as WISE takes, no early stop. *WISE, prefix cache*: `--config wise`; *WISE, whole
model*: without the cache, every step runs the whole base, as its published code does. *Edits/min*: of the fit, without
loading and scoring; the fast ones run `--repeats` times around the slow ones and their median counts. Scores are the
final model's, in per cent: AR autoregressive, TF teacher forced.

*Where the time goes*: ours once more, each moment of it under the part that ran. The roofline is one forward pass of
the frozen base over each edit's own prompt and target, the best of three.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from benchmarks.context import REPOSITORY, Context
from benchmarks.report import Rows, percent

OURS = "ours"
STEPS_OF_WISE = ("--model.writing.steps", "70", "--model.writing.stop_margin", "null")


@dataclass(frozen=True)
class Variant:
    """One way to run `train.py`; `slow` ones run once."""

    name: str
    options: tuple[str, ...] = ()
    slow: bool = False


VARIANTS = (
    Variant(OURS),
    Variant("ours, 70 steps", STEPS_OF_WISE),
    Variant("REPAIR", ("--config", "repair_small")),
    Variant("WISE, prefix cache", ("--config", "wise"), slow=True),
    Variant("WISE, whole model", ("--config", "wise", "--model.cache_mib", "0"), slow=True),
)


def run_part(context: Context, variants: tuple[Variant, ...] = VARIANTS) -> dict[str, Rows]:
    """All variants beside each other, then where the time of ours goes."""
    return {"Against WISE": compared(context, variants), "Where the time goes": parts_of(context)}


def parts_of(context: Context) -> Rows:
    """How long each part of a run takes, in ms per edit, and its share of the editing; what is not editing has none."""
    file = context.work / "parts.json"
    command = command_of(context, VARIANTS[0], -1)
    run([sys.executable, "-m", "benchmarks.timed", str(file), *command[2:]], context)
    found = json.loads(file.read_text())
    spent = {"one forward pass (roofline)": found["least"]} | found["seconds"]
    aside = ("scoring", "irrelevant prompts", "other", "one forward pass (roofline)")
    editing = sum(seconds for part, seconds in spent.items() if part not in aside)
    spent["editing, in all"] = editing
    names = {
        "irrelevant prompts": "irrelevant prompts, before the first edit",
        "other": "loading, writing files, others",
    }
    return [
        {
            "part": names.get(part, part),
            "ms/edit": 1e3 * seconds / found["edits"],
            "of editing, %": None if part in aside[:3] else 100 * seconds / editing,
        }
        for part, seconds in sorted(spent.items(), key=lambda both: -both[1])
    ]


def compared(context: Context, variants: tuple[Variant, ...]) -> Rows:
    """Run every variant on the same edits: the fast ones `repeats` times, each slow one once, between them."""
    fast, slow = ([variant for variant in variants if variant.slow is kind] for kind in (False, True))
    turns = zip_longest([fast] * context.repeats, slow)
    rows = runs_of(context, [variant for turn, between in turns for variant in (*(turn or ()), between) if variant])
    ours = rows[OURS]["edits/min"]
    faster = {name: {"ours is faster by": ours / row["edits/min"]} for name, row in rows.items()}
    return [{"variant": name} | faster[name] | row for name, row in rows.items()]


def runs_of(context: Context, order: list[Variant]) -> dict[str, dict[str, Any]]:
    """Run variants in an order, each in a process of its own; by name its runs' median speed, and the first one's
    scores."""
    found: dict[str, list[dict[str, Any]]] = {}
    for turn, variant in enumerate(order):
        command = command_of(context, variant, turn)
        run(command, context)
        metrics = json.loads((context.work / str(turn) / "metrics.json").read_text())
        told = shlex.join(["python", *command[1:]]).replace(f"{REPOSITORY}/", "").replace(f"{context.work}/", "")
        found.setdefault(variant.name, []).append(metrics | {"command": told})
    return {name: _row(runs) for name, runs in found.items()}


def run(command: list[str], context: Context) -> None:
    """Run a command on the context's threads. RuntimeError, with the end of what it said, where it fails."""
    count = str(context.threads)
    env = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    speeds = [run["edits_per_minute"] for run in runs]
    scores = {
        f"{name} ({short})": percent(first["final"][protocol].get(name.lower()))
        for short, protocol in (("AR", "autoregressive"), ("TF", "teacher_forced"))
        for name in ("Rel", "Gen", "Loc", "OP")
    }
    return {
        "edits": sum(first["edits"].values()),
        "edits/min": median(speeds),
        "scoring s": median(run["seconds"]["evaluate"] for run in runs),
        **scores,
        "all edits/min": speeds,
        "command": [first["command"]],
    }


def command_of(context: Context, variant: Variant, turn: int) -> list[str]:
    """The call of `train.py`, without merge, logger and live scores; its run directory is `work/<turn>`."""
    options = {
        "model.base": context.base,
        "data.path": context.data,
        "data.format": context.format,
        "data.irrelevant": context.irrelevant,
        "data.irrelevant_prefix": context.irrelevant_prefix,
        "data.max_edits": str(context.edits),
        "seed_everything": str(context.seed),
        "trainer.logger": "false",
        "merge.enabled": "false",
        "scoreboard.live": "0",
        "run_dir": str(context.work / str(turn)),
    }
    given = [word for key, value in options.items() if value for word in (f"--{key}", value)]
    return [sys.executable, str(REPOSITORY / "train.py"), "--config", "zsre_small", *variant.options, *given]
