"""Edits per minute, and what they are worth: ours against its ancestor WISE, each through the real `train.py`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import run
from benchmarks.context import REPOSITORY, Context
from benchmarks.report import Table, number, percent

TITLE = "Editing: edits per minute"
OURS = "ours"
WISE_WHOLE = "WISE, whole model"
WISE_STEPS = "model:\n  init_args:\n    writing: {steps: 70, stop_margin: null}\n"
"""As many inner steps as WISE takes, without stopping early, as a configuration: the command line refuses null."""
PROTOCOLS = ("autoregressive", "teacher_forced")


@dataclass(frozen=True)
class Variant:
    """One way to run `train.py`; `slow` ones run once."""

    name: str
    options: tuple[str, ...] = ()
    overlay: str | None = None
    slow: bool = False


VARIANTS = (
    Variant(OURS),
    Variant("ours, 70 steps", overlay=WISE_STEPS),
    Variant("WISE, prefix cache", ("--config", "wise"), slow=True),
    Variant(WISE_WHOLE, ("--config", "wise", "--model.cache_mib", "0"), slow=True),
)


def run_part(context: Context, variants: tuple[Variant, ...] = VARIANTS) -> dict[str, Any]:
    """Run every variant on the same edits, interleaved; the fast ones around each slow one."""
    found: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    commands = {}
    for turn, variant in enumerate(schedule(variants, context.repeats)):
        folder = context.work / f"editing-{turn}"
        command = command_of(context, variant, folder)
        commands[variant.name] = without_places(command, folder)
        run(command, context)
        found[variant.name].append(json.loads((folder / "metrics.json").read_text()))
    rows = [row_of(variant.name, found[variant.name], commands[variant.name]) for variant in variants]
    ours = next((row["edits_per_minute"] for row in rows if row["name"] == OURS), None)
    for row in rows:
        row["ours_is_faster"] = ours / row["edits_per_minute"] if ours else None
    headline = next((row["ours_is_faster"] for row in rows if row["name"] == WISE_WHOLE), None)
    return {"edits": context.edits, "variants": rows, "ours_over_wise_whole_model": headline}


def schedule(variants: tuple[Variant, ...], repeats: int) -> list[Variant]:
    """The order of the runs: fast variants `repeats` times, slow ones once, between them."""
    fast, slow = [v for v in variants if not v.slow], [v for v in variants if v.slow]
    order: list[Variant] = []
    for turn in range(max(repeats, len(slow))):
        order += fast if turn < repeats else []
        order += slow[turn : turn + 1]
    return order


def without_places(command: list[str], folder: Path) -> str:
    """A command as it is told: without the folders of the machine that it ran on."""
    words = shlex.join(["python", *command[1:]])
    return words.replace(f"{REPOSITORY}/", "").replace(f"{folder.parent}/", "")


def command_of(context: Context, variant: Variant, folder: Path) -> list[str]:
    """The call of `train.py`."""
    configs = ["--config", "zsre_small"]
    if variant.overlay:
        context.work.mkdir(parents=True, exist_ok=True)
        file = context.work / "overlay.yaml"
        file.write_text(variant.overlay)
        configs += ["--config", str(file)]
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
        "run_dir": str(folder),
    }
    given = [word for key, value in options.items() if value for word in (f"--{key}", value)]
    return [sys.executable, str(REPOSITORY / "train.py"), *configs, *variant.options, *given]


def row_of(name: str, runs: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """One variant's figures: the median run's speed, and the final model's scores."""
    speeds = [run["edits_per_minute"] for run in runs]
    return {
        "name": name,
        "command": command,
        "edits_per_minute": median(speeds),
        "all_edits_per_minute": speeds,
        "seconds": runs[0]["seconds"],
        "shards": runs[0]["shards"],
        "scores": {protocol: runs[0]["final"][protocol] for protocol in PROTOCOLS},
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Speed and quality side by side."""
    header: tuple[str, ...] = ("variant", "edits/min", "runs", "ours is faster by")
    header += tuple(f"{kind} ({short})" for short in ("AR", "TF") for kind in ("Rel", "Gen", "Loc", "OP"))
    rows = []
    for row in result["variants"]:
        scores = [percent(row["scores"][p].get(kind)) for p in PROTOCOLS for kind in ("rel", "gen", "loc", "op")]
        runs = " ".join(number(speed) for speed in row["all_edits_per_minute"])
        rows.append((row["name"], number(row["edits_per_minute"]), runs, number(row["ours_is_faster"], "x"), *scores))
    note = (
        f"{result['edits']} edits; median of the runs; scores of the final model, in per cent, AR autoregressive, TF "
        f"teacher forced. Headline: ours / WISE running the whole model at every step = "
        f"{number(result['ours_over_wise_whole_model'], 'x')}."
    )
    return [Table(TITLE, header, rows, note)]
