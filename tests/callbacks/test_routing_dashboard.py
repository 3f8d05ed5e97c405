"""Scoreboard and dashboard: what a run reports and tells its loggers, read back from the offline run of W&B."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_runs import fit, hard_edits, world_editor, world_stream, write_edits
from helpers_wandb import offline_run, rows, series, start_afresh
from lightning.pytorch.loggers import CSVLogger

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, ProbeGate, PruneAndRetrigger, RoutingDashboard, Scoreboard
from callbacks.routing_dashboard import FAILED
from repair_lightning.edits.ledger import EditStatus
from repair_lightning.packs.pack import save_pack
from repair_lightning.reports.tracking import LINES, OfflineFirstWandbLogger
from repair_lightning.types import BASE


def run(folder: Path, dashboard: RoutingDashboard, board: Scoreboard, loggers: Any = False) -> SimpleNamespace:
    """Two windows of edits of which every second cannot be written, in shards of four, with a merge at the end."""
    editor = world_editor(capacity=4)
    path = write_edits(folder / "edits.jsonl", hard_edits(8))
    stream = world_stream(path, window=4, batch_size=4)
    feedback, merge = PruneAndRetrigger(max_attempts=2), LossAwareTiesMerge(max_op_drop=1.0)
    callbacks = [ProbeGate(), ErrorSampleMonitor(), dashboard, feedback, board, merge]
    fit(editor, stream, callbacks, folder, logger=loggers, log_every_n_steps=1)
    return SimpleNamespace(editor=editor, stream=stream, feedback=feedback, merge=merge, board=board, folder=folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> SimpleNamespace:
    start_afresh()
    folder = tmp_path_factory.mktemp("dashboard")
    loggers = [OfflineFirstWandbLogger(save_dir=str(folder), group="g"), CSVLogger(folder, "csv")]
    dashboard = RoutingDashboard()
    dashboard.sample = 6
    done = run(folder, dashboard, Scoreboard(live=4), loggers)
    loggers[0].experiment.finish()
    done.dashboard, done.records = dashboard, offline_run(folder)
    start_afresh()  # else the processes that later tests start would use this one's service
    return done


def table(ran: SimpleNamespace, key: str) -> list[dict[str, Any]]:
    """The rows of the last table that was logged under a key."""
    (*_, path) = series(ran.records, f"{key}/path")
    (file,) = ran.folder.glob(f"wandb/offline-run-*/files/{path}")
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_all_stages_in_both_protocols(ran):
    board = ran.board
    assert set(board.results) == {"pre_edit", "before_merge", "final"}
    questions = sum(1 + len(e.rephrases) + len(e.locality) + len(e.near) for e in ran.stream.edits)
    for stage, result in board.results.items():
        assert (result.stage, len(result.rows)) == (stage, questions)
        assert set(result.scores) == {"autoregressive", "teacher_forced"}
    pre = board.results["pre_edit"]
    assert pre.scores["autoregressive"]["loc"] == pre.scores["autoregressive"]["near"] == 1.0  # the base against itself
    assert pre.routing["edit"] == {"base": 1.0, "right": 0.0, "wrong": 0.0}
    assert board.results["final"].scores["autoregressive"]["rel"] > pre.scores["autoregressive"]["rel"]
    assert board.perplexity is None


def test_every_series_of_the_workspace_is_one_that_a_run_logs(ran):
    drawn = {key for charts in LINES.values() for keys in charts.values() for key in keys}
    (file,) = ran.folder.glob("csv/version_0/metrics.csv")
    assert drawn - set(file.read_text().splitlines()[0].split(",")) == {"memory/gpu_peak_mib"}  # there is none here


def test_the_values_are_those_of_the_run(ran):
    ledger, merge = ran.stream.ledger, ran.merge
    assert sum(series(ran.records, "loop/pruned")) == ran.feedback.pruned
    assert sum(series(ran.records, "loop/requeued")) == ran.feedback.retriggered
    assert sum(series(ran.records, "loop/quarantined")) == len(ledger.with_status(EditStatus.QUARANTINED))
    assert series(ran.records, "pool/quarantined")[-1] == len(ledger.with_status(EditStatus.QUARANTINED))
    assert series(ran.records, "merge/accepted") == [float(bool(merge.outcome))]
    costs = [one["before"] - one["after"] for one in merge.merges]
    assert series(ran.records, "merge/cost") == ([pytest.approx(max(costs))] if costs else [])
    for shard, weight in merge.weights.items():
        assert series(ran.records, f"merge/weight/{shard}") == [pytest.approx(weight)]
    first = next(row for row in rows(ran.records) if "shards/worst_error" in row)
    assert first["shards/worst_error"] == 0.5  # every second edit of the first shard cannot be right
    assert (first["shards/number"], first["shards/failing"], first["edits"]) == (1, 1, 4)


def test_failed_edits_are_listed_with_what_was_said_instead(ran):
    found = table(ran, "tables/failed")
    assert tuple(found[0]) == FAILED
    edits = {edit.id: edit for edit in ran.stream.edits}
    assert {row["edit"] for row in found} == {edit.id for edit in edits.values() if "<pad>" in edit.target}
    for row in found:
        assert row["prompt"] == edits[row["edit"]].prompt
        assert row["target"] == edits[row["edit"]].target != row["answer"]
        assert row["correctness"] == 0
        assert row["memory"] == BASE, "what a shard says instead of its target it does not say"
        assert row["score"] > row["threshold"]


def test_dashboard_and_scoreboard_only_report(ran, tmp_path):
    """Live scores or none, other batches, other seed, no logger: memory and ledger are the same to the bit."""
    silent, board = RoutingDashboard(), Scoreboard(live=0)
    board.batch_size, board.seed, board.max_new_tokens = 7, 5, 20
    other = run(tmp_path, silent, board)
    assert silent.seconds == 0 < ran.dashboard.seconds
    assert ran.feedback.retriggered > 0, "the premise: the closed loop acted"
    assert other.stream.ledger == ran.stream.ledger
    for name, done in (("with", ran), ("without", other)):
        save_pack(done.editor, tmp_path / name, {})
    weights = [(tmp_path / name / "side_memory.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
