"""Weights & Biases, on the disk first: no key, no network, nothing hangs; its workspace."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import wandb
from helpers_wandb import offline_run, series, start_afresh

from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.reports import tracking
from repair_lightning.reports.tracking import LINES, OfflineFirstWandbLogger, create, layout


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the logger sets
        monkeypatch.delenv(name)
    start_afresh()
    yield
    start_afresh()


@pytest.mark.parametrize(
    ("environment", "given", "offline"),
    [
        ({}, None, True),
        ({"WANDB_API_KEY": "k"}, None, False),
        ({"WANDB_MODE": "disabled"}, None, False),  # wandb itself follows its variable
        ({}, False, False),
    ],
)
def test_a_key_or_the_user_decides(monkeypatch, environment, given, offline):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert OfflineFirstWandbLogger(offline=given)._offline is offline


def test_a_server_that_does_not_answer_leaves_it_on_the_disk(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    real = wandb.init

    def init(**options):
        if options.get("mode") != "offline":
            raise wandb.errors.CommError("no route\nand more")
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "unreachable", lambda: None)
    logger = OfflineFirstWandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"a": 2.0}, step=3)
    logger.experiment.finish()
    found = offline_run(tmp_path)
    assert series(found, "a") == [2.0]
    assert series(found, "trainer/global_step") == [3]
    assert "wandb: no server (no route); the run is kept on the disk" in caplog.text


def test_no_network_is_noticed_before_wandb_is_asked(monkeypatch, tmp_path, caplog):
    """A real attempt, at an address where nobody listens: its client would try again for minutes."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logger = OfflineFirstWandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"a": 3.0})
    logger.experiment.finish()
    assert series(offline_run(tmp_path), "a") == [3.0]
    assert "wandb: no server (http://127.0.0.1:9: ConnectionError)" in caplog.text
    assert not list(tmp_path.glob("wandb/run-*"))


class TestWorkspace:
    @pytest.fixture(autouse=True)
    def _extra(self):
        pytest.importorskip("wandb_workspaces", reason="needs the extra: wandb")

    def test_its_charts_are_the_listed_series(self):
        workspace = layout("us", "facts")
        assert (workspace.entity, workspace.project, workspace.settings.x_axis) == ("us", "facts", "edits")
        drawn = {key for section in workspace.sections for panel in section.panels for key in getattr(panel, "y", ())}
        assert drawn == {key for charts in LINES.values() for keys in charts.values() for key in keys}

    def test_a_server_that_refuses_or_hangs_is_one_line(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "k")
        monkeypatch.setattr(tracking, "PATIENCE", 0.2)
        monkeypatch.setattr(tracking, "unreachable", lambda: None)
        refuses, never = Mock(side_effect=OSError("no route\nto host")), threading.Event()
        hangs = lambda: never.wait(20)  # noqa: E731
        for save, words in ((refuses, r"layout \(no route\); check key"), (hangs, r"\(no answer within")):
            monkeypatch.setattr(tracking, "layout", lambda *_, save=save: SimpleNamespace(save=save))
            with pytest.raises(RepairError, match=words):
                create("us", "facts")
        never.set()

    def test_what_is_missing_is_one_line(self, monkeypatch):
        with pytest.raises(ConfigError, match="set WANDB_API_KEY"):
            create("us", "facts")
        monkeypatch.setenv("WANDB_API_KEY", "k")
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(RepairError, match=r"\(http://127.0.0.1:9: ConnectionError\); check the network"):
            create("us", "facts")
        monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
        with pytest.raises(ConfigError, match=r'needs wandb-workspaces; pip install -e "\.\[wandb\]"'):
            layout("us", "facts")
