"""`train.py --from_pack`: an edited model is edited further, killed and resumed too; nothing of the pack is lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_runs import command, main_here, succeeded, world_edits, write_edits

from repair_lightning import load_edited
from repair_lightning.edits.ledger import EditStatus
from repair_lightning.packs.pack import load_ledger
from repair_lightning.types import BASE

pytestmark = pytest.mark.slow

QUIET = ["--trainer.logger", "false", "--scoreboard.live", "0", "--data.irrelevant", "world"]
QUIET += ["--data.max_irrelevant", "60", "--trainer.accelerator", "cpu", "--merge.enabled", "false"]
OLD = world_edits(8)
NEW = [
    replace(OLD[0], target=OLD[1].target),  # supersedes, under a fresh id
    replace(OLD[2], id="known"),  # is there already
    replace(world_edits(1, 300)[0], id=OLD[3].id),  # another edit under a known id
    *world_edits(5, 310),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`first` is a run of eight edits; `second` goes on with its pack, without any configuration."""
    folder = tmp_path_factory.mktemp("from_pack")
    old = write_edits(folder / "old.jsonl", OLD)
    write_edits(folder / "new.jsonl", NEW)
    options = ["--config", "quickstart", "--data.path", old, "--model.writing.steps", "60", "--run_dir", "first"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main_here(patch, "train.py", *options, *QUIET) == 0
        assert main_here(patch, "train.py", *GOING_ON, "--run_dir", "second", *QUIET) == 0
    return folder


GOING_ON = ["--from_pack", "first/pack", "--data.path", "new.jsonl", "--data.window", "3"]


def test_the_new_pack_holds_all(folder):
    """Merging is off: one low-rank shard for each live edit."""
    ledger = load_ledger(folder / "second" / "pack")
    fresh = [f"{OLD[0].id}~2", f"{OLD[3].id}~2", *(edit.id for edit in NEW[3:])]
    assert list(ledger) == [edit.id for edit in OLD] + fresh
    assert ledger.with_status(EditStatus.SUPERSEDED) == [OLD[0].id]
    assert len(ledger.with_status(EditStatus.WRITTEN)) == 14
    model, _ = load_edited(folder / "second" / "pack")
    routes = model.route([edit.prompt for edit in (*OLD, *NEW[3:])])
    assert BASE not in [route.memory for route in routes]
    assert routes[0].nearest == f"{OLD[0].id}~2"
    assert len(model.memory) == 14  # that of the superseded edit is gone
    assert model.card["options"]["writing"]["steps"] == 60  # the pack's, though no configuration was given


def test_the_metrics_tell_old_from_new(folder):
    metrics = json.loads((folder / "second" / "metrics.json").read_text())
    assert metrics["n_edits"] == 7
    assert metrics["pre_edit"]["autoregressive"]["rel"] == 0
    assert metrics["final"]["autoregressive"]["rel"] >= 0.85
    assert metrics["closed_loop"]["windows"] == 3
    earlier = metrics["earlier"]
    assert (earlier["n_edits"], earlier["superseded"], earlier["lost"]) == (7, 1, [])
    assert earlier["before"]["rel"] == earlier["after"]["rel"] == 1
    assert metrics["records"]["duplicates"] == ["known"]
    assert metrics["records"]["superseded"] == {OLD[0].id: f"{OLD[0].id}~2"}
    assert metrics["records"]["renamed"] == {edit.id: f"{edit.id}~2" for edit in (OLD[0], OLD[3])}
    assert "earlier" not in json.loads((folder / "first" / "metrics.json").read_text())


def test_old_edits_keep_their_bits(folder):
    """Low-rank shards of edits that nothing superseded are carried over as they are."""
    first, second = (load_edited(folder / name / "pack")[0] for name in ("first", "second"))
    for edit in OLD[1:]:
        owner = first.ledger.owner_of(edit.id)
        assert second.ledger.owner_of(edit.id) == owner
        assert second.memory[owner].fingerprint() == first.memory[owner].fingerprint()


def test_killed_and_resumed_it_ends_the_same(folder, tmp_path):
    """Before there is a checkpoint, and from one."""
    shutil.copytree(folder / "first", tmp_path / "first")
    shutil.copy(folder / "new.jsonl", tmp_path)
    again = [*GOING_ON, "--run_dir", "second", *QUIET]
    for moment in ("before the first checkpoint's rename", "behind the second checkpoint's rename"):
        assert command("tests/faults/killer.py", moment, *again, cwd=tmp_path).returncode == -9
    succeeded("train.py", *again, cwd=tmp_path)
    packs = [root / "second" / "pack" / "side_memory.safetensors" for root in (folder, tmp_path)]
    assert packs[0].read_bytes() == packs[1].read_bytes()
    assert load_ledger(packs[0].parent) == load_ledger(packs[1].parent)
    metrics = [json.loads((root / "second" / "metrics.json").read_text()) for root in (folder, tmp_path)]
    for name in ("earlier", "final", "pre_edit", "routing", "records", "edits"):
        assert metrics[0][name] == metrics[1][name], name


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--model", "Repair"], "was made with"), (["--run_dir", "first"], "would be replaced; give another --run_dir")],
)
def test_refused(folder, monkeypatch, capsys, options, words):
    """In one line, and before the run directory is begun."""
    monkeypatch.chdir(folder)
    assert main_here(monkeypatch, "train.py", *GOING_ON, "--run_dir", "refused", *options, *QUIET) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "refused" / "run.json").exists()
