"""Loggers by name, what reaches all of them at a run's end, and Weights & Biases for machines that may have no network
and no account: on the disk first; and the workspace's layout.

The layout says which of a run's series stand beside each other; it needs an extra, `wandb`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from repair_lightning.errors import ConfigError, RepairError, first_line

log = logging.getLogger(__name__)

LOGGERS = {
    "wandb": "repair_lightning.reports.tracking.OfflineFirstWandbLogger",
    "csv": "lightning.pytorch.loggers.CSVLogger",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
}
"""What `trainer.logger` may be, as an option and in a configuration, beside the classes of Lightning."""
WAIT, FINISH, PATIENCE = 10.0, 60.0, 30.0
"""Seconds that the server has to answer at the start, to take what is left at the end, and to take the layout."""
_KINDS = ("rel", "gen", "loc", "near", "op")
LINES = {
    "Scores": {
        "free generation": [f"live/{kind}" for kind in _KINDS],
        "teacher forced": [f"live_forced/{kind}" for kind in _KINDS],
        "failed among those asked": ["monitor/error_rate"],
        "unrelated answers lost": ["gate/probe_loss"],
    },
    "Routing": {
        "overlap (AUROC; 1 is none, 0.5 all)": ["routing/auroc", "routing/auroc_near"],
        "reached who must answer": [f"routing/{kind}_right" for kind in ("edit", "rephrase", "locality", "near")],
    },
    "Shards": {
        "error rate": ["shards/worst_error", "shards/mean_error"],
        "failing": ["shards/failing"],
        "number": ["shards/number"],
    },
    "Closed loop": {
        "waiting": ["pool/residual", "pool/feedback", "pool/requeued", "pool/quarantined"],
        "per window": ["loop/pruned", "loop/requeued", "loop/rolled_back", "loop/quarantined"],
    },
    "Merge": {"share that stays, and the most that one costs": ["merge/accepted", "merge/cost"]},
    "Writing": {"loss, nats": ["write/loss"], "distillation loss, nats": ["write/kd"], "steps": ["write/steps"]},
    "Cost": {
        "edits per minute": ["speed/edits_per_minute"],
        "memory, MiB": ["memory/peak_mib", "memory/shards_mib", "memory/gpu_peak_mib"],
    },
}
"""Section -> title of a chart over the number of edits -> the series in it."""
TABLES = {"Scores": "tables/failed", "Routing": "tables/confusion", "Closed loop": "tables/events"}
HISTOGRAMS = [f"separation/score/{part}" for part in ("edit", "rephrase", "locality", "near", "limit")]


def named_loggers(argv: Sequence[str]) -> list[str]:
    """The arguments, where a name of `LOGGERS` stands for the class; its files go where the command line says."""
    found: list[str] = []
    for before, argument in zip(["", *argv], argv, strict=False):
        start = "--trainer.logger=" if argument.startswith("--trainer.logger=") else ""
        kind = LOGGERS.get(argument.removeprefix(start)) if start or before == "--trainer.logger" else None
        found += [argument] if kind is None else [f"{start}{kind}", "--trainer.logger.save_dir", "."]
    return found


def with_named_logger(file: Path) -> str:
    """A configuration as the parser takes it: its path; where its `trainer.logger` is a name of `LOGGERS`, its content
    in one line, with the class in the name's place."""
    try:
        content = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # the parser says what is wrong
        return str(file)
    trainer = content.get("trainer") if isinstance(content, dict) else None
    if not isinstance(trainer, dict) or trainer.get("logger") not in list(LOGGERS):
        return str(file)
    trainer["logger"] = {"class_path": LOGGERS[trainer["logger"]], "init_args": {"save_dir": "."}}
    return yaml.safe_dump(content, default_flow_style=True, width=math.inf)


def check_logger(class_path: str) -> None:
    """A ConfigError where the package of a logger is not installed."""
    if class_path.endswith("TensorBoardLogger") and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        others = ", ".join(name for name in LOGGERS if name != "tensorboard")
        raise ConfigError(f"trainer.logger tensorboard needs its package: pip install tensorboard; or give {others}")


def final_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a run came to, for every logger: all scores of `metrics.json`, its speed and what the edits left, under
    `final/`, as `final/autoregressive/op`; over the number of edits, as all else."""
    named = {name: metrics[name] for name in ("edits_per_minute", "shards", "memory_bytes")}
    return {"edits": float(metrics["n_edits"])} | dict(_flat("final", {**metrics["final"], **named}))


def _flat(start: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{start}/{name}", value)
        elif isinstance(value, (int, float)):
            yield f"{start}/{name}", float(value)


def unreachable() -> str | None:
    """Why the server of W&B does not answer; None where it does. Asked first: its client tries again for minutes."""
    import requests
    import wandb

    address = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    try:
        requests.head(address, timeout=WAIT)
    except requests.RequestException as error:
        return f"{address}: {type(error).__name__}"
    return None


class OfflineFirstWandbLogger(WandbLogger):
    """Lightning's `WandbLogger`, which writes to the disk unless a key is set and the server answers.

    What was written to the disk alone is sent by `wandb sync` whenever you like. `offline` None writes to the disk
    alone unless `WANDB_API_KEY` or `WANDB_MODE` says otherwise; `group` joins the processes and the resumed parts of
    one run; `options` are those of `wandb.init`.
    """

    def __init__(
        self,
        project: str = "repair-lightning",
        offline: bool | None = None,
        name: str | None = None,
        group: str | None = None,
        save_dir: str = ".",
        **options: Any,
    ) -> None:
        if offline is None:
            offline = not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"))
        settings = {"init_timeout": WAIT, "finish_timeout": FINISH, "silent": True}
        options = {"group": group, "settings": settings} | options
        super().__init__(name, save_dir, offline=offline, project=project, **options)
        self._wandb_init.pop("anonymous", None)  # has no effect but a warning

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B; where the server does not answer, one on the disk."""
        import wandb

        begins = self._experiment is None and not self._offline
        reason = unreachable() if begins and "WANDB_MODE" not in os.environ else None
        if reason is None:
            try:
                return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
            except (wandb.errors.CommError, wandb.errors.UsageError) as error:
                if self._offline:
                    raise
                reason = str(error).splitlines()[0]
        log.warning("wandb: no server (%s); the run is kept on the disk", reason)
        self._offline, self._wandb_init["mode"] = True, "offline"
        return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]


def layout(entity: str, project: str) -> Any:
    """The workspace; nothing is sent. A ConfigError where the package `wandb-workspaces` is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError('the layout needs wandb-workspaces; pip install -e ".[wandb]"') from error

    sections = []
    for name, charts in LINES.items():
        drawn: list[Any] = [panels.LinePlot(title=title, x="edits", y=list(keys)) for title, keys in charts.items()]
        drawn += [panels.WeavePanelSummaryTable(table_name=TABLES[name])] if name in TABLES else []
        drawn += [panels.MediaBrowser(title="scores", media_keys=HISTOGRAMS)] if name == "Routing" else []
        sections.append(workspaces.Section(name=name, panels=drawn, is_open=True))
    settings = workspaces.WorkspaceSettings(x_axis="edits")
    return workspaces.Workspace(entity=entity, project=project, name="REPAIR", sections=sections, settings=settings)


def create(entity: str, project: str) -> str:
    """Make the workspace on the server; returns its address. Raises `RepairError` where there is no key, the package
    is missing, or the server does not take it."""
    if not os.environ.get("WANDB_API_KEY"):
        raise ConfigError("the layout is made on the server of W&B: set WANDB_API_KEY")
    workspace = layout(entity, project)
    if problem := unreachable():
        raise RepairError(f"W&B did not take the layout ({problem}); check the network")
    outcome: list[Any] = [TimeoutError(f"no answer within {PATIENCE:.0f} s")]

    def send() -> None:
        try:
            outcome[:] = [workspace.save().url]
        except Exception as error:  # its client raises a dozen unrelated types
            outcome[:] = [error]

    thread = threading.Thread(target=send, daemon=True)  # it tries again for minutes where there is no network
    thread.start()
    thread.join(PATIENCE)
    if isinstance(outcome[0], Exception):
        reason = first_line(outcome[0])
        raise RepairError(f"W&B did not take the layout ({reason}); check key, entity, project and network")
    return str(outcome[0])
