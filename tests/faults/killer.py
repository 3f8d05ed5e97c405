"""`train.py` in a process that kills itself at a given moment: `python killer.py MOMENT [options of train.py]`.

Where torchrun starts it, `rank N: MOMENT` kills that rank alone.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))


def before(owner: Any, name: str, when: Callable[..., bool], count: int = 1, call_first: bool = False) -> None:
    """Die right before the `count`th call of a function for which `when` holds, or right behind it."""
    real, seen = getattr(owner, name), [0]

    def watched(*args: Any, **kwargs: Any) -> Any:
        counts = when(*args, **kwargs)
        seen[0] += counts
        dies = counts and seen[0] == count
        if dies and not call_first:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, watched)


after = partial(before, call_first=True)


def arm(moment: str) -> None:
    """Prepare the death."""
    if moment.startswith("rank "):
        rank, moment = moment.removeprefix("rank ").split(": ")
        if os.environ.get("RANK", "0") != rank:
            return
    import torch

    import repair_lightning.commands.cli
    from callbacks import LossAwareTiesMerge, Scoreboard
    from repair_lightning.edits import journal
    from repair_lightning.edits.journal import Journal

    def is_checkpoint(source: Any, target: Any) -> bool:
        return str(target).endswith("last.ckpt")

    def always(*args: Any, **kwargs: Any) -> bool:
        return True

    def merged(self: Any, kind: str, entries: Any) -> bool:
        return kind == "merged"

    moments: dict[str, Callable[[], None]] = {
        "before the first checkpoint's rename": lambda: before(os, "replace", is_checkpoint),
        "before the third checkpoint's rename": lambda: before(os, "replace", is_checkpoint, 3),
        "behind the second checkpoint's rename": lambda: after(os, "replace", is_checkpoint, 2),
        "while the second checkpoint is written": lambda: after(torch, "save", always, 2),
        "before the third checkpoint's rows": lambda: before(Journal, "save", always, 3),
        "amid the second checkpoint's rows": lambda: after(journal, "_encoded", always, 20),
        "before the merge": lambda: before(LossAwareTiesMerge, "merge", always),
        "during the merge": lambda: before(Journal, "append", merged),
        "behind the merge": lambda: after(LossAwareTiesMerge, "merge", always),
        "during the final scoring": lambda: before(Scoreboard, "_score", lambda self, stage, editor: stage == "final"),
        "before the pack is saved": lambda: before(repair_lightning.commands.cli, "save_pack", always),
        "behind the pack, before the metrics": lambda: after(repair_lightning.commands.cli, "save_pack", always),
    }
    moments[moment]()


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.argv = [str(REPOSITORY / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
