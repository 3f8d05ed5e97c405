"""Taking edits back: the base answers them, nothing else changes, and a kill on the way leaves the run as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_runs import REPOSITORY, succeeded, written_editor

from repair_lightning.__main__ import event_line
from repair_lightning.commands.evaluate import evaluate_pack, still_wanted
from repair_lightning.commands.run_dir import RunDirectory
from repair_lightning.commands.undo import report_lines, undo
from repair_lightning.editors import Repair
from repair_lightning.edits.journal import FILE, Journal
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import ConfigError, RepairError, UnknownEditError
from repair_lightning.packs.pack import load_edited, load_ledger, restore_editor, save_pack
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.report import print_report
from repair_lightning.types import BASE, EditReport


def finished_run(folder: Path, change=lambda editor: None, **writing) -> list[str]:
    """A run as `train.py` leaves it, of eight edits; returns their ids."""
    folder.mkdir()
    editor, stream = written_editor(8, **writing)
    journal = Journal(folder / FILE)
    journal.follow(editor.ledger)
    change(editor)
    save_pack(editor, folder / "pack", {"command": "train.py"})
    journal.close()
    (folder / "metrics.json").write_text("{}")
    return [edit.id for edit in stream.edits]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Copies a run of eight edits, with a shard each or several in one, to a folder; returns their ids."""
    made: dict[int, tuple[Path, list[str]]] = {}

    def copy(folder: Path, capacity: int) -> list[str]:
        if capacity not in made:
            whole = tmp_path_factory.mktemp("undo") / "run"
            form = "low_rank" if capacity == 1 else "dense"
            made[capacity] = whole, finished_run(whole, form=form, capacity=capacity)
        shutil.copytree(made[capacity][0], folder)
        return made[capacity][1]

    return copy


def weights(folder: Path) -> bytes:
    return (folder / "pack" / "side_memory.safetensors").read_bytes()


def test_the_base_answers_again_and_the_others_stay(tmp_path, copied):
    ids = copied(tmp_path / "run", 1)
    gone = ids[2:4]
    found = undo(tmp_path / "run", [*gone, gone[0]])
    assert (found["undone"], found["rebuilt"], found["as_base"]) == (gone, [], 1.0)
    assert (found["untouched"], found["shards"], found["remaining"]) == (6, 6, 6)
    assert found["after"] == found["before"]
    assert found["before"]["rel"] == 1
    model, _ = load_edited(tmp_path / "run" / "pack")
    ledger = load_ledger(tmp_path / "run" / "pack")
    assert ledger.with_status(EditStatus.UNDONE) == gone
    routes = model.route([ledger.edit(id).prompt for id in ids])
    assert [route.memory == BASE for route in routes] == [id in gone for id in ids]
    assert ledger == Ledger.from_parquet(tmp_path / "run" / "edits.parquet")
    journal = Journal(tmp_path / "run" / FILE, read_only=True)
    assert journal.rebuild() == ledger
    story = [event_line(event) for event in journal.events(gone[0])]
    assert "undone" in story[-1]
    assert "taken back on request" in story[-1]
    head, shards, of, *scores = report_lines(found)
    assert head == f"undone: {', '.join(gone)}; 100.0 % of their prompts are answered as by the base"
    assert shards == "the other edits' shards: 6 of 6 unchanged, bit by bit"
    assert "of the 6 edits that the pack still holds (the run's own are of all its edits)" in of
    assert [line.split()[0] for line in scores] == ["Rel", "before", "after"]


def test_what_was_taken_back_is_not_scored(tmp_path, copied, capsys):
    """Until the same is written again; without any edit left there is nothing to score."""
    ids = copied(tmp_path / "run", 1)
    undo(tmp_path / "run", ids[2:4])
    pack = tmp_path / "run" / "pack"
    found = evaluate_pack(pack, "world", max_edits=8)
    assert (found["n_edits"], found["undone"]) == (6, ids[2:4])
    assert found["final"]["autoregressive"]["rel"] == 1
    assert found["routing"]["edit"] == {"base": 0.0, "right": 1.0, "wrong": 0.0}
    print_report(found, None)
    said = f"Taken back, and therefore not asked: 2 edits ({', '.join(ids[2:4])})."
    assert said in " ".join(capsys.readouterr().out.split())
    ledger = load_ledger(pack)
    edits = [ledger.edit(id) for id in ids]
    ledger.arrive([replace(edits[2], id="again")], 1)
    assert still_wanted(edits, ledger) == ([edit for edit in edits if edit.id != ids[3]], [ids[3]])
    undo(tmp_path / "run", [id for id in ids if id not in ids[2:4]])
    with pytest.raises(ConfigError, match=r"no edit of 'world' is left to ask: .* all were taken back; give other"):
        evaluate_pack(pack, "world", max_edits=8)


def test_a_shard_that_others_share_is_rebuilt_for_them(tmp_path, copied):
    ids = copied(tmp_path / "run", 4)
    before = restore_editor(tmp_path / "run" / "pack")
    shard = before.ledger.owner_of(ids[0])
    company = [id for id in before.ledger.owned_by(shard) if id != ids[0]]
    found = undo(tmp_path / "run", ids[:1])
    assert sorted(found["rebuilt"]) == sorted(company)
    assert company, "the premise: the shard is shared"
    assert (found["untouched"], found["shards"], found["as_base"]) == (1, 2, 1.0)
    kept = "the other edits' shards: 1 of 2 unchanged, bit by bit"
    assert report_lines(found)[1] == f"{kept}; written again: {len(company)} edits"
    assert found["after"]["rel"] == found["before"]["rel"] == 1
    after = restore_editor(tmp_path / "run" / "pack")
    for other in set(before.memory.ids) - {shard}:
        assert torch.equal(after.memory[other].delta, before.memory[other].delta)
    assert not torch.equal(after.memory[shard].delta, before.memory[shard].delta)


def test_what_cannot_be_written_anew_undoes_nothing(tmp_path, monkeypatch, copied):
    ids = copied(tmp_path / "run", 4)
    kept, ledger = weights(tmp_path / "run"), load_ledger(tmp_path / "run" / "pack")

    def fails(self, batch, shard):
        return [EditReport(id, shard, float("nan"), 0.0, 1, error="the loss was not finite") for id in batch.ids]

    with monkeypatch.context() as patch:
        patch.setattr(Repair, "rewrite", fails)
        with pytest.raises(
            RepairError, match=r"cannot be written again \(the loss was not finite\): nothing is undone"
        ):
            undo(tmp_path / "run", ids[:1])
    assert weights(tmp_path / "run") == kept
    journal = Journal(tmp_path / "run" / FILE, read_only=True)
    assert journal.rebuild() == ledger
    assert undo(tmp_path / "run", ids[:1])["undone"] == ids[:1]


def test_the_scores_before_are_the_run_s_own_without_the_undone(tmp_path):
    """On a real run: what `generations.jsonl` says of the final model's other answers."""
    run = tmp_path / "run"
    options = "--data.max_edits 6 --model.writing.steps 60 --data.max_irrelevant 60 --trainer.logger false"
    succeeded("train.py", "--config", "quickstart", *options.split(), "--run_dir", run, cwd=tmp_path)
    final = Artefacts.read(run).final
    gone = next(row["id"] for row in final if row["kind"] == "rephrase" and not row["correct"])
    found = undo(run, [gone])
    for score, kind in {"rel": "edit", "gen": "rephrase", "loc": "locality", "near": "near"}.items():
        right = [row["correct"] for row in final if row["kind"] == kind and row["id"] != gone]
        assert found["before"][score] == pytest.approx(sum(right) / len(right))
    whole = json.loads((run / "metrics.json").read_text())["final"]["autoregressive"]["gen"]
    assert found["before"]["gen"] > whole, "the premise: one that lost a rephrase is left out"


def test_an_undo_says_what_is_not_scored():
    kept = {"undone": ["e1"], "as_base": 1.0, "rebuilt": [], "untouched": 1, "shards": 1, "remaining": 1}
    scores = {"rel": 1.0, "gen": None, "loc": 0.5, "near": None, "op": None}
    head, _, of, names, *_, missing = report_lines(kept | {"before": scores, "after": scores})
    assert head == "undone: e1; 100.0 % of its prompts are answered as by the base"
    assert "of the 1 edit that" in of
    assert names.split() == ["Rel", "Loc"]
    assert missing.startswith("Not measured: Gen (no record has rephrases), Near")
    alone = report_lines(kept | {"remaining": 0})
    assert alone == [head, "the pack holds no other edit: there is nothing to score"]


def fuse_all(editor) -> None:
    """Fuse the shards, as an accepted merge does."""
    shards = editor.memory.ids
    fused = editor.fuse(shards, editor.memory.stacked(shards).sum(0))
    editor.ledger.reassign([id for shard in shards for id in editor.ledger.owned_by(shard)], fused)
    editor.calibrate()


def test_what_was_merged_into_the_base_stays_and_says_so(tmp_path):
    def fold(editor) -> None:
        fuse_all(editor)
        (fused,) = editor.memory.ids
        editor.fold(fused)
        editor.ledger.reassign(editor.ledger.owned_by(fused), BASE)

    ids = finished_run(tmp_path / "run", change=fold, capacity=4)
    kept = weights(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"merged into the base's own weights.* a new run without its record"):
        undo(tmp_path / "run", ids[:1])
    assert weights(tmp_path / "run") == kept


def test_refusals_change_nothing(tmp_path):
    def supersede(editor) -> None:
        first, second = list(editor.ledger)[:2]
        editor.ledger.supersede(first, second)
        editor.forget([first])
        editor.finish_window()

    ids = finished_run(tmp_path / "run", change=supersede, form="low_rank", capacity=1)
    kept, told = weights(tmp_path / "run"), Journal(tmp_path / "run" / FILE, read_only=True).last
    with pytest.raises(UnknownEditError, match=f"the id 'nobody'; known: '{ids[0]}', .*'{ids[7]}'$"):
        undo(tmp_path / "run", [ids[3], "nobody"])
    with pytest.raises(ConfigError, match=f"superseded by {ids[1]}: nothing of it is left; undo its successor"):
        undo(tmp_path / "run", ids[:1])
    holder = RunDirectory(tmp_path / "run")
    holder.hold()
    with pytest.raises(ConfigError, match="in use by another run"):
        undo(tmp_path / "run", [ids[3]])
    holder._held.close()
    assert (weights(tmp_path / "run"), Journal(tmp_path / "run" / FILE, read_only=True).last) == (kept, told)
    undo(tmp_path / "run", [ids[3]])
    with pytest.raises(ConfigError, match=f"'{ids[3]}' is undone already"):
        undo(tmp_path / "run", [ids[3]])
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(RepairError, match="no finished run"):
        undo(tmp_path / "run", [ids[4]])


KILLED = """
import os, signal, sys
import repair_lightning.commands.undo as module
real = module.save_pack
def die(*args, **kwargs):
    if {after}: real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
module.save_pack = die
module.undo(sys.argv[1], sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_on_the_way(tmp_path, copied):
    """Before the pack is swapped nothing has happened, behind it all has; the same command says which."""
    ids = copied(tmp_path / "run", 1)
    kept = weights(tmp_path / "run")
    for after in (False, True):
        call = [sys.executable, "-c", KILLED.format(after=after), str(tmp_path / "run"), ids[0]]
        assert subprocess.run(call, cwd=REPOSITORY).returncode == -9
        assert (weights(tmp_path / "run") == kept) is not after
    with pytest.raises(ConfigError, match="undone already"):
        undo(tmp_path / "run", [ids[0]])
    journal = Journal(tmp_path / "run" / FILE, read_only=True)
    assert journal.rebuild() == load_ledger(tmp_path / "run" / "pack")
    assert load_ledger(tmp_path / "run" / "pack").with_status(EditStatus.UNDONE) == [ids[0]]
