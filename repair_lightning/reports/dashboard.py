"""The layout of the W&B workspace as code: which of a run's series stand beside each other (an extra: wandb)."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.reports.tracking import unreachable

NAME = "REPAIR"
PATIENCE = 30.0
"""Seconds that the server has to take the layout."""
_KINDS = ("rel", "gen", "loc", "near", "op")

LINES: Mapping[str, Mapping[str, Sequence[str]]] = {
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
    "Writing": {"loss, nats": ["write/loss"], "distillation loss, nats": ["write/kd"], "steps": ["write/steps"]},
    "Cost": {
        "edits per minute": ["speed/edits_per_minute"],
        "memory, MiB": ["memory/peak_mib", "memory/shards_mib", "memory/gpu_peak_mib"],
    },
}
"""Section -> title of a chart over the number of edits -> the series in it."""
TABLES: Mapping[str, Sequence[str]] = {
    "Scores": ("tables/failed",),
    "Routing": ("tables/confusion",),
    "Closed loop": ("tables/events",),
}
HISTOGRAMS = [f"separation/score/{part}" for part in ("edit", "rephrase", "locality", "near", "limit")]


def layout(entity: str, project: str) -> Any:
    """The workspace; nothing is sent.

    Raises:
        ConfigError: the package `wandb-workspaces` is missing.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError('the layout needs wandb-workspaces; pip install -e ".[wandb]"') from error

    sections = []
    for name, charts in LINES.items():
        drawn: list[Any] = [panels.LinePlot(title=title, x="edits", y=list(keys)) for title, keys in charts.items()]
        drawn += [panels.WeavePanelSummaryTable(table_name=key) for key in TABLES.get(name, ())]
        drawn += [panels.MediaBrowser(title="scores", media_keys=HISTOGRAMS)] if name == "Routing" else []
        sections.append(workspaces.Section(name=name, panels=drawn, is_open=True))
    settings = workspaces.WorkspaceSettings(x_axis="edits")
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def create(entity: str, project: str) -> str:
    """Make the workspace on the server; returns its address.

    Raises:
        ConfigError: no key, or the package is missing.
        RepairError: the server does not take it.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise ConfigError("the layout is made on the server of W&B: set WANDB_API_KEY")
    workspace = layout(entity, project)
    problem = unreachable()
    if problem is not None:
        raise RepairError(f"W&B did not take the layout ({problem}); check the network")
    outcome: list[Any] = []

    def send() -> None:
        try:
            outcome.append(workspace.save().url)
        except Exception as error:  # its client raises a dozen unrelated types
            outcome.append(error)

    thread = threading.Thread(target=send, daemon=True)  # it tries again for minutes where there is no network
    thread.start()
    thread.join(PATIENCE)
    found = outcome[0] if outcome else TimeoutError(f"no answer within {PATIENCE:.0f} s")
    if isinstance(found, Exception):
        reason = next(iter(str(found).strip().splitlines()), type(found).__name__)
        raise RepairError(f"W&B did not take the layout ({reason}); check key, entity, project and network")
    return str(found)
