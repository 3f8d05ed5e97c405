"""The workspace's layout: it names series that a run logs, and says in one line what it lacks."""

from __future__ import annotations

import sys
import threading

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
    assert workspace._to_model().display_name == "REPAIR"  # what the server would get
    panels = [panel for section in workspace.sections for panel in section.panels]
    drawn = {key for panel in panels for key in getattr(panel, "y", ())}
    assert drawn == {key for charts in LINES.values() for keys in charts.values() for key in keys}
    editor = world_editor(capacity=4)
    stream = world_stream(write_edits(tmp_path / "edits.jsonl", hard_edits(4)))
    loop = [ProbeGate(), ErrorSampleMonitor(), RoutingDashboard(), PruneAndRetrigger(max_attempts=1), Scoreboard()]
    fit(editor, stream, [*loop, LossAwareTiesMerge()], tmp_path, logger=CSVLogger(tmp_path, "csv"), log_every_n_steps=1)
    (file,) = tmp_path.glob("csv/version_0/metrics.csv")
    assert drawn - set(file.read_text().splitlines()[0].split(",")) == {"memory/gpu_peak_mib"}  # there is none here


class Server:
    """In the place of a workspace: what saving it comes to."""

    url = "https://wandb.test/us/facts"

    def __init__(self, outcome: Exception | None = None, hangs: bool = False) -> None:
        self.outcome, self.hangs, self.never = outcome, hangs, threading.Event()

    def save(self) -> Server:
        if self.hangs:
            self.never.wait(20)
        if self.outcome:
            raise self.outcome
        return self


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (Server(OSError("no route\nto host")), r"did not take the layout \(no route\); check key"),
        (Server(hangs=True), r"did not take the layout \(no answer within"),
        (Server(), None),
    ],
)
def test_no_network_is_one_line_and_does_not_hang(monkeypatch, server, words):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    monkeypatch.setattr(tracking, "unreachable", lambda: None)
    monkeypatch.setattr(tracking, "layout", lambda *_: server)
    if words is None:
        assert create("us", "facts") == Server.url
        return
    with pytest.raises(RepairError, match=words) as refused:
        create("us", "facts")
    assert "\n" not in str(refused.value)
    server.never.set()


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
