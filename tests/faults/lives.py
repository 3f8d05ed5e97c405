"""Real runs in real processes that are really killed, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from repair_lightning.world import edits_path

REPOSITORY = Path(__file__).parents[2]
KILLER = Path(__file__).with_name("killer.py")


def plain_edits(path: Path, number: int) -> Path:
    """The first embedded edits with their prompts and targets alone: nothing but the editing takes time."""
    named = ("id", "subject", "prompt", "target")
    lines = edits_path().read_text().splitlines()[:number]
    records = [{name: record[name] for name in named} for record in map(json.loads, lines)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(edits: Path, run_dir: Path, *options: str, window: int = 8) -> list[str]:
    """The arguments of the quickstart on other edits, without logger and live scores. Its configuration names a logger,
    which would be imported."""
    given = ["--model", "Keyed", "--model.base", "world", "--data.irrelevant", "world"]
    given += ["--data.path", str(edits), "--data.window", str(window), "--run_dir", str(run_dir)]
    quiet = ["--data.max_edits", "1000000", "--data.max_irrelevant", "100", "--trainer.logger", "false"]
    return [*given, *quiet, "--scoreboard.live", "0", "--trainer.accelerator", "cpu", *options]


def start(arguments: Sequence[str], kill_at: str | None = None, ranks: int = 0) -> subprocess.Popen[str]:
    """A run in a process of its own; `kill_at` names the moment at which it kills itself, see `killer.py`; with `ranks`
    torchrun starts so many."""
    script = [str(KILLER), kill_at] if kill_at else [str(REPOSITORY / "train.py")]
    script = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *script] if ranks else script
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    call, pipe = [sys.executable, *script, *arguments], subprocess.PIPE
    return subprocess.Popen(call, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(arguments: Sequence[str], kill_at: str | None = None, ranks: int = 0) -> tuple[int, str]:
    """Let a run come to its end; its exit status and all that it printed."""
    process = start(arguments, kill_at, ranks)
    output, _ = process.communicate()
    return process.returncode, output


def events(run_dir: Path) -> int:
    """How many events the journal holds; 0 without one."""
    path = run_dir / "journal.sqlite"
    if not path.is_file():
        return 0
    try:
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])
    except sqlite3.OperationalError:  # it is about to be made
        return 0


def kill_after(arguments: Sequence[str], run_dir: Path, delay: float, how: int = signal.SIGKILL) -> bool:
    """Start a run and kill it `delay` seconds after it has begun to write events; False where it ended before."""
    known = events(run_dir)
    process = start(arguments)
    while process.poll() is None and events(run_dir) <= known:
        time.sleep(0.02)
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(how)
    output, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), output
    return alive


def fingerprint(run_dir: Path) -> str:
    """SHA-256 of the side memory that a finished run saved."""
    return hashlib.sha256((run_dir / "pack/side_memory.safetensors").read_bytes()).hexdigest()
