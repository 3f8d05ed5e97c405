"""The dashboard: what a run tells its loggers, read back from the offline run of W&B and from the CSV file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_runs import fit, hard_edits, world_editor, world_stream, write_edits
from helpers_wandb import offline_run, rows, series, start_afresh
from lightning.pytorch.loggers import CSVLogger

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger, RoutingDashboard, Scoreboard
from callbacks.routing_dashboard import FAILED, histograms, loop_counts, shard_errors
from repair_lightning.edits.ledger import EditStatus, LedgerEntry
from repair_lightning.errors import ConfigError
from repair_lightning.packs.pack import save_pack
from repair_lightning.reports.tracking import OfflineFirstWandbLogger
from repair_lightning.types import BASE

KINDS = ("rel", "gen", "loc", "near", "op")


def run(folder: Path, dashboard: RoutingDashboard, loggers: Any = False) -> SimpleNamespace:
    """Two windows of edits of which every second cannot be written, in shards of four, with a merge at the end."""
    editor = world_editor(capacity=4)
    path = write_edits(folder / "edits.jsonl", hard_edits(8))
    stream = world_stream(path, window=4, batch_size=4)
    feedback, merge = PruneAndRetrigger(max_attempts=2), LossAwareTiesMerge(max_op_drop=1.0)
    callbacks = [ErrorSampleMonitor(), dashboard, feedback, Scoreboard(live=4), merge]
    fit(editor, stream, callbacks, folder, logger=loggers, log_every_n_steps=1)
    return SimpleNamespace(editor=editor, stream=stream, feedback=feedback, merge=merge, folder=folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> SimpleNamespace:
    start_afresh()
    folder = tmp_path_factory.mktemp("dashboard")
    loggers = [OfflineFirstWandbLogger(save_dir=str(folder), group="g"), CSVLogger(folder, "csv")]
    dashboard = RoutingDashboard(sample=6)
    done = run(folder, dashboard, loggers)
    loggers[0].experiment.finish()
    done.dashboard, done.records = dashboard, offline_run(folder)
    return done


def table(ran: SimpleNamespace, key: str) -> list[dict[str, Any]]:
    """The rows of the last table that was logged under a key."""
    (*_, path) = series(ran.records, f"{key}/path")
    (file,) = ran.folder.glob(f"wandb/offline-run-*/files/{path}")
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_the_premise_is_a_run_in_which_things_happen(ran):
    assert ran.feedback.pruned > 0
    assert ran.feedback.retriggered > 0
    assert ran.stream.ledger.with_status(EditStatus.QUARANTINED)
    assert ran.merge.weights


def test_everything_is_drawn_over_the_number_of_edits(ran):
    defined = [record.metric for record in ran.records if record.HasField("metric")]
    assert [metric.step_metric for metric in defined if metric.glob_name == "*"][-1] == "edits"
    assert all("edits" in row for row in rows(ran.records))
    (info,) = {(r.run.run_group, r.run.project) for r in ran.records if r.HasField("run")}
    assert info == ("g", "repair-lightning")


def test_a_value_per_window_of_every_series(ran):
    windows = ran.stream.windows
    per_window = ["monitor/error_rate", "shards/worst_error", "shards/failing", "routing/auroc", "routing/near_right"]
    per_window += ["speed/edits_per_minute", "memory/shards_mib", "memory/peak_mib"]
    per_window += ["pool/residual", "pool/feedback", "pool/quarantined", "loop/pruned", "loop/requeued"]
    for key in per_window:
        assert len(series(ran.records, key)) == windows, key
    live = [f"{name}/{kind}" for name in ("live", "live_forced") for kind in KINDS]
    for key in (*live, "shards/error/0"):  # after the first window all edits wait to be written anew
        assert len(series(ran.records, key)) in (windows - 1, windows), key
    assert len(series(ran.records, "write/loss")) >= windows
    for key in ("monitor/error_rate", "routing/auroc", "live/rel", "routing/edit_right"):
        assert all(0 <= value <= 1 for value in series(ran.records, key)), key


def test_the_values_are_those_of_the_run(ran):
    ledger, merge = ran.stream.ledger, ran.merge
    assert sum(series(ran.records, "loop/pruned")) == ran.feedback.pruned
    assert sum(series(ran.records, "loop/requeued")) == ran.feedback.retriggered
    assert sum(series(ran.records, "loop/quarantined")) == len(ledger.with_status(EditStatus.QUARANTINED))
    assert series(ran.records, "pool/quarantined")[-1] == len(ledger.with_status(EditStatus.QUARANTINED))
    assert series(ran.records, "merge/accepted") == [float(bool(merge.outcome))]
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


def test_the_closed_loops_reasons_are_there_as_text(ran):
    found = table(ran, "tables/events")
    assert {row["became"] for row in found} == {"requeued", "quarantined"}
    reasons = {row["reason"] for row in found}
    assert any(reason.startswith("pruned: shard 0: error 0.50 > 0.35 over 4 edits") for reason in reasons)
    assert "still wrong after 2 attempts" in reasons
    assert found[0]["window"] == 1


def test_separation_is_drawn_per_kind_over_the_same_bins(ran):
    last = [row for row in rows(ran.records) if "separation/score/edit/_type" in row][-1]
    bins = {key: tuple(last[key]) for key in last if key.startswith("separation/score/") and key.endswith("/bins")}
    assert {key.split("/")[2] for key in bins} == {"edit", "rephrase", "locality", "near", "limit"}
    assert len(set(bins.values())) == 1
    assert any(key.startswith("separation/shard 0/score/") for row in rows(ran.records) for key in row)
    confusion = {row["prompt"]: row for row in table(ran, "tables/confusion")}
    assert set(confusion) == {"edit", "rephrase", "locality", "near"}
    assert all(row["base"] + row["right shard"] + row["wrong shard"] == pytest.approx(1) for row in confusion.values())


def test_scalars_reach_other_loggers_too(ran):
    (file,) = ran.folder.glob("csv/version_0/metrics.csv")
    found = list(csv.DictReader(file.read_text().splitlines()))
    for key in ("live/rel", "live_forced/op", "routing/auroc", "shards/worst_error", "pool/quarantined", "loop/pruned"):
        values = [float(row[key]) for row in found if row.get(key)]
        assert values == pytest.approx(series(ran.records, key)), key
    assert not any(name.startswith(("tables", "separation")) for name in found[0])


def test_it_only_reports(ran, tmp_path):
    """Without it the memory and the ledger are the same to the bit; without a logger it does nothing."""
    silent = RoutingDashboard()
    other = run(tmp_path, silent)
    assert silent.seconds == 0 < ran.dashboard.seconds
    assert other.stream.ledger == ran.stream.ledger
    for name, done in (("with", ran), ("without", other)):
        save_pack(done.editor, tmp_path / name, {})
    weights = [(tmp_path / name / "side_memory.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


def test_off_is_off(tmp_path):
    dashboard = RoutingDashboard(enabled=False)
    run(tmp_path, dashboard, CSVLogger(tmp_path, "csv"))
    (file,) = tmp_path.glob("csv/version_0/metrics.csv")
    assert "routing/" not in file.read_text().splitlines()[0]
    assert dashboard.seconds == 0


@pytest.mark.parametrize(("name", "value"), [("sample", 0), ("shards", -1), ("rows", 0)])
def test_bad_options(name, value):
    with pytest.raises(ConfigError, match=rf"dashboard\.{name} must be at least"):
        RoutingDashboard(**{name: value})


# -- parts -------------------------------------------------------------------------------------------------------------


def test_many_shards_are_summed_up():
    rates = {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.5}
    summary = {"shards/number": 4, "shards/failing": 3, "shards/worst_error": 1.0, "shards/mean_error": 0.5}
    assert shard_errors(rates, most=3) == summary
    assert shard_errors(rates, most=4) == summary | {f"shards/error/{shard}": rate for shard, rate in rates.items()}
    assert shard_errors({}, most=3) == {}


def test_each_prune_and_each_roll_back_counts_once():
    def entry(status: EditStatus, reason: str) -> LedgerEntry:
        return LedgerEntry(hard_edits(1)[0], 0, 0, status=status, reason=reason)

    acted = [entry(EditStatus.REQUEUED, "pruned: shard 1: error 1")] * 3
    acted += [entry(EditStatus.REQUEUED, "window rolled back: 0.1 of")] * 2 + [entry(EditStatus.QUARANTINED, "wrong")]
    found = {"loop/requeued": 5, "loop/quarantined": 1, "loop/pruned": 1, "loop/rolled_back": 1}
    assert loop_counts(acted) == found
    assert loop_counts([]) == dict.fromkeys(found, 0)


def test_histograms_leave_out_what_is_not_finite():
    parts = {"a": torch.tensor([0.0, 1.0, float("inf")]), "b": torch.tensor([2.0]), "c": torch.tensor([])}
    found = histograms(parts)
    assert set(found) == {"a", "b"}
    assert (sum(found["a"].histogram), sum(found["b"].histogram)) == (2, 1)
    assert (found["a"].bins[0], found["a"].bins[-1]) == (0, 2)
