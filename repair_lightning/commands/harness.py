"""The usual benchmarks before and after the edits, by EleutherAI's lm-evaluation-harness: `repair-lightning harness`.

`lm_eval` is an extra (`pip install "repair-lightning[lm-eval]"`) and imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.models.edited import EditedModel
from repair_lightning.packs.pack import Pack, download
from repair_lightning.reports.report import Table


def harness(
    pack: str | Path,
    tasks: Sequence[str],
    base: str | None = None,
    precision: str = "auto",
    include_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a pack's base scores on tasks, and what the edited model does; the options are those of the command.

    `base` and `edited` each have `scores` (task -> metric -> number), `requests` (how many there were) and `by_shards`
    (how many a shard answered); `lm_eval` is the version. Raises `ConfigError` where `lm_eval` is not installed, there
    is no such task or no chat template, and `RepairError` where the pack or a task's data cannot be loaded.
    """
    manager = task_manager(tasks, include_path)
    content = Pack.read(download(str(pack)))
    model = content.open(base, precision).to("cuda" if torch.cuda.is_available() else "cpu")
    before = _scores(model, tasks, manager, routed=False, **options)
    model.weights.load(content.weights)  # only now: a merged W_v is not the plain base's
    return {"lm_eval": version("lm_eval"), "base": before, "edited": _scores(model, tasks, manager, **options)}


def _scores(
    model: EditedModel,
    tasks: Sequence[str],
    manager: Any,
    routed: bool = True,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    **asked: Any,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from repair_lightning.scoring.lm_eval_model import EditedLM

    lm = EditedLM(model, routed, batch_size)
    asked |= {"apply_chat_template": True, "fewshot_as_multiturn": True} if apply_chat_template else {}
    try:
        found = simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, log_samples=False, **asked)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RepairError(f"{', '.join(tasks)}: {reason}; check the task's data, the network and the disk") from error
    scores = {  # `acc,none` and the like, without the names and notes between them
        task: {key: value for key, value in values.items() if "," in key and isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
    return {"scores": scores, "requests": lm.requests, "by_shards": lm.by_shards}


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of all its tasks, which takes seconds to make, with those of a folder. A ConfigError where
    `lm_eval` is not installed, or one of `tasks` is not known."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f'the benchmarks need lm-eval ({error}): pip install "repair-lightning[lm-eval]"') from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include_path '{include_path}' is no folder; give one with tasks in YAML")
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=3)
            alike = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise ConfigError(f"no task '{name}'; {alike}--include_path names a folder with more tasks")
    return manager


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """For a person: a row per task and metric with the base, the edited model, and how far they are apart."""
    rows, edited = [], found["edited"]
    for task, before in found["base"]["scores"].items():
        for metric, value in before.items():
            now = edited["scores"][task][metric]
            change = "" if "_stderr" in metric else f"{now - value:+.4f}"
            rows.append([task, metric.removesuffix(",none"), f"{value:.4f}", f"{now:.4f}", change])
    table = Table("", pd.DataFrame(rows, columns=["task", "metric", "base", "edited", "change"]))
    who = f"{edited['by_shards']} of {edited['requests']} requests were answered by a shard, the others by the base."
    return [table.text("simple"), who]
