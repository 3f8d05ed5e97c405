"""The workspace's layout: it names series that a run logs, and says in one line what it lacks."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from helpers_runs import fit, hard_edits, world_editor, world_stream, write_edits
from lightning.pytorch.loggers import CSVLogger

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, ProbeGate, PruneAndRetrigger, RoutingDashboard, Scoreboard
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.reports import tracking
from repair_lightning.reports.tracking import LINES, create, layout

pytest.importorskip("wandb_workspaces", reason="needs the extra: wandb")


def test_every_series_of_the_layout_is_one_that_a_run_logs(tmp_path):
    workspace = layout("us", "facts")
    assert (workspace.entity, workspace.project, workspace.settings.x_axis) == ("us", "facts", "edits")
    panels = [panel for section in workspace.sections for panel in section.panels]
    drawn = {key for panel in panels for key in getattr(panel, "y", ())}
    assert drawn == {key for charts in LINES.values() for keys in charts.values() for key in keys}
    editor = world_editor(capacity=4)
    stream = world_stream(write_edits(tmp_path / "edits.jsonl", hard_edits(4)))
    loop = [ProbeGate(), ErrorSampleMonitor(), RoutingDashboard(), PruneAndRetrigger(max_attempts=1), Scoreboard()]
    fit(editor, stream, [*loop, LossAwareTiesMerge()], tmp_path, logger=CSVLogger(tmp_path, "csv"), log_every_n_steps=1)
    (file,) = tmp_path.glob("csv/version_0/metrics.csv")
    assert drawn - set(file.read_text().splitlines()[0].split(",")) == {"memory/gpu_peak_mib"}  # there is none here


def test_a_server_that_refuses_or_hangs_is_one_line(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    monkeypatch.setattr(tracking, "unreachable", lambda: None)
    refuses, never = Mock(side_effect=OSError("no route\nto host")), threading.Event()
    for save, words in ((refuses, r"layout \(no route\); check key"), (lambda: never.wait(20), r"\(no answer within")):
        monkeypatch.setattr(tracking, "layout", lambda *_, save=save: SimpleNamespace(save=save))
        with pytest.raises(RepairError, match=words):
            create("us", "facts")
    never.set()


def test_what_is_missing_is_one_line(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set WANDB_API_KEY"):
        create("us", "facts")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(RepairError, match=r"\(http://127.0.0.1:9: ConnectionError\); check the network"):
        create("us", "facts")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r'needs wandb-workspaces; pip install -e "\.\[wandb\]"'):
        layout("us", "facts")
