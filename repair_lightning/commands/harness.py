"""The usual benchmarks before and after the edits, by EleutherAI's lm-evaluation-harness: `repair-lightning harness`.

`lm_eval` is an extra (`pip install "repair-lightning[lm-eval]"`) and imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.models.edited import EditedModel
from repair_lightning.packs.hub import download
from repair_lightning.packs.pack import fold_into, open_pack, read_pack


def harness(
    pack: str | Path,
    tasks: Sequence[str],
    base: str | None = None,
    precision: str = "auto",
    include_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a pack's base scores on tasks, and what the edited model does.

    Args:
        pack: its folder, or its name on the Hugging Face hub.
        tasks: the harness's names of tasks or groups.
        base: the base's folder or hub name; None takes the one in the pack's folder, else the name that it remembers.
        precision: of the base.
        include_path: a folder with more tasks, in YAML.
        options: as :func:`run_tasks` takes them.

    Returns:
        `base` and `edited`, each as :func:`run_tasks` returns it, and the version of `lm_eval`.

    Raises:
        ConfigError: `lm_eval` is not installed, or there is no such task.
        RepairError: the pack or a task's data cannot be loaded.
    """
    manager = task_manager(tasks, include_path)
    folder = download(str(pack))
    config, tensors = read_pack(folder)
    model = open_pack(folder, config, tensors, base, precision)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = run_tasks(model, tasks, manager, routed=False, **options)
    fold_into(model, tensors)  # only now: a merged W_v is not the plain base's
    after = run_tasks(model, tasks, manager, **options)
    return {"lm_eval": version("lm_eval"), "base": before, "edited": after}


def run_tasks(
    model: EditedModel,
    tasks: Sequence[str],
    manager: Any = None,
    routed: bool = True,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> dict[str, Any]:
    """Ask a model the requests of tasks.

    Args:
        model: the edited model.
        tasks: the harness's names of tasks or groups.
        manager: knows the tasks, see :func:`task_manager`; None makes one.
        routed: False leaves every request to the base.
        batch_size: requests per call.
        limit: most documents of each task.
        num_fewshot: examples before each question; None leaves it to the task.
        apply_chat_template: put questions, and examples as earlier turns, through the base's chat template.
        system_instruction: a system message before them.

    Returns:
        `scores`: task -> metric -> number; `requests`: how many there were; `by_shards`: how many a shard answered.

    Raises:
        ConfigError: `lm_eval` is not installed, there is no such task, or no chat template.
        RepairError: a task's data cannot be loaded.
    """
    manager = manager or task_manager(tasks)
    from lm_eval import simple_evaluate

    from repair_lightning.scoring.lm_eval_model import EditedLM

    lm = EditedLM(model, routed, batch_size)
    asked = {"tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit, "task_manager": manager}
    asked["system_instruction"] = system_instruction
    asked |= {"apply_chat_template": True, "fewshot_as_multiturn": True} if apply_chat_template else {}
    try:
        found = simple_evaluate(model=lm, log_samples=False, **asked)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RepairError(f"{', '.join(tasks)}: {reason}; check the task's data, the network and the disk") from error
    scores = {task: _numbers(values) for task, values in found["results"].items()}
    return {"scores": scores, "requests": lm.requests, "by_shards": lm.by_shards}


def task_manager(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """The harness's index of all its tasks, which takes seconds to make, with those of a folder.

    Raises:
        ConfigError: `lm_eval` is not installed, or one of `tasks` is not known.
    """
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


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task: `acc,none` and the like, without the names and notes between them."""
    return {key: value for key, value in values.items() if "," in key and isinstance(value, (int, float))}


def comparison_table(found: Mapping[str, Any]) -> Table:
    """A row per task and metric: the base, the edited model, and how far they are apart."""
    table = Table(header_style="bold")
    for column, justify in (("task", "left"), ("metric", "left"), ("base", "right"), ("edited", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("change", justify="right")
    for task, before in found["base"]["scores"].items():
        for metric, value in before.items():
            now = found["edited"]["scores"][task][metric]
            name = metric.removesuffix(",none")
            change = "" if "_stderr" in metric else f"{now - value:+.4f}"
            table.add_row(escape(task), escape(name), f"{value:.4f}", f"{now:.4f}", change)
    return table


def who_answered(found: Mapping[str, Any]) -> str:
    """How many requests of the edited model the base answered still."""
    edited = found["edited"]
    return f"{edited['by_shards']} of {edited['requests']} requests were answered by a shard, the others by the base."
