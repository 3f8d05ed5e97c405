"""`python -m benchmarks.timed FILE OPTIONS`: run `train.py` with some options, and write how long its parts took.

Each moment counts once: for the innermost part that runs, but all that happens in scoring, in the gate, in the monitor
and before the first edit is theirs.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.context import REPOSITORY
from benchmarks.machine import seconds_of

WHOLE = ("scoring", "irrelevant prompts", "gate", "error monitor")
"""Parts that keep what runs inside them."""
OTHER = "other"


class Clock:
    """Who is running, and how long everybody has run so far, in seconds of the clock."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._running, self._since = [OTHER], time.perf_counter()

    def _count(self) -> None:
        now = time.perf_counter()
        self.spent[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Let a class's method count as a part."""
        plain = getattr(owner, method)

        @functools.wraps(plain)
        def timed(*args: Any, **options: Any) -> Any:
            self._count()
            self._running.append(self._running[-1] if self._running[-1] in WHOLE else part)
            try:
                return plain(*args, **options)
            finally:
                self._count()
                self._running.pop()

        setattr(owner, method, timed)


def watch(clock: Clock) -> list[Any]:
    """Put the clock on what a run of `keyed` or `repair` does; the list holds its editor once it has begun."""
    import callbacks
    from repair_lightning.editors import Keyed, Repair
    from repair_lightning.editors.dense import DenseWriter
    from repair_lightning.editors.low_rank import LowRankWriter
    from repair_lightning.edits.checkpoints import SaveEachWindow
    from repair_lightning.edits.journal import Journal
    from repair_lightning.memory.routers.key import KeyRouter
    from repair_lightning.models.edited import EditedModel

    hooks = ("on_fit_start", "on_train_start", "on_train_epoch_end", "on_train_end", "on_fit_end")
    found: list[Any] = []
    for hook in hooks:
        clock.wrap(callbacks.Scoreboard, hook, "scoring")
    for kind in (Keyed, Repair):
        clock.wrap(kind, "prepare", "irrelevant prompts")
        clock.wrap(kind, "finish_window", "router")
    clock.wrap(callbacks.ErrorSampleMonitor, "on_train_epoch_end", "error monitor")
    clock.wrap(callbacks.ProbeGate, "on_train_epoch_end", "gate")
    clock.wrap(SaveEachWindow, "on_train_epoch_end", "journal and checkpoints")
    clock.wrap(callbacks.ProbeGate, "on_train_epoch_start", "gate")
    clock.wrap(callbacks.LossAwareTiesMerge, "on_train_end", "merge")
    clock.wrap(EditedModel, "captures", "forward passes of the edits, in all forms")
    for writer in (LowRankWriter, DenseWriter):
        clock.wrap(writer, "train", "inner steps")
    for method in ("describe", "route", "insert"):
        clock.wrap(KeyRouter, method, "router")
    for method in ("append", "save"):
        clock.wrap(Journal, method, "journal and checkpoints")
    begun = callbacks.Scoreboard.on_fit_start

    def on_fit_start(scoreboard: Any, trainer: Any, editor: Any) -> None:
        found.append(editor)
        begun(scoreboard, trainer, editor)

    setattr(callbacks.Scoreboard, "on_fit_start", on_fit_start)  # noqa: B010 - mypy holds that methods stay
    return found


@torch.no_grad()
def own_pass(editor: Any, repeats: int = 3) -> tuple[int, float]:
    """How many edits an editor was given, and the seconds of one forward pass over their own prompts and targets: the
    least that writing them could cost."""
    edits = [editor.ledger.edit(id) for id in editor.ledger]
    rows = sorted((list(editor.encode(edit).ids) for edit in edits), key=len)
    batches = [torch.tensor([row + [0] * (len(part[-1]) - len(row)) for row in part]) for part in _parts(rows)]

    def run() -> None:
        with editor.edited.forced(None):
            for batch in batches:
                editor.base.model(batch.to(editor.edited.device), use_cache=False, logits_to_keep=1)

    return len(edits), min(seconds_of(run) for _ in range(repeats))


def _parts(rows: list[list[int]], size: int = 64) -> list[list[list[int]]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def main(argv: list[str]) -> None:
    """Run and write."""
    file, sys.argv = Path(argv[0]), [str(REPOSITORY / "train.py"), *argv[1:]]
    sys.path.insert(0, str(REPOSITORY))
    clock = Clock()
    editors = watch(clock)
    runpy.run_path(sys.argv[0], run_name="__main__")
    clock._count()
    number, least = own_pass(editors[0])
    file.write_text(json.dumps({"edits": number, "least": least, "seconds": dict(clock.spent)}))


if __name__ == "__main__":
    main(sys.argv[1:])
