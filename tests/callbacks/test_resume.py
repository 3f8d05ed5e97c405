"""A run that was stopped between windows and resumed ends as if it had never stopped, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_runs import fit, hard_edits, world_editor, world_stream, write_edits
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger, Scoreboard
from repair_lightning.edits.checkpoints import JournaledCheckpointIO
from repair_lightning.edits.journal import Journal
from repair_lightning.packs.pack import read_pack, save_pack


def run(
    folder: Path,
    router: str,
    epochs: int = -1,
    ckpt_path: Path | None = None,
    target: str = "side",
    form: str = "dense",
    **options,
):
    """Three windows of a closed loop that has something to repair, with a checkpoint after each."""
    folder.mkdir()
    dense = {"capacity": 3, "mask_ratio": 0.8} if form == "dense" else {}
    editor = world_editor({"router": router}, form=form, **dense)
    stream = world_stream(write_edits(folder / "edits.jsonl", hard_edits(6)), window=2, batch_size=2)
    feedback = PruneAndRetrigger(max_attempts=2)
    merge = LossAwareTiesMerge(max_op_drop=1.0, every_n_windows=2, target=target)
    saver = ModelCheckpoint(folder, filename="last", every_n_epochs=1, enable_version_counter=False)
    loop = [ErrorSampleMonitor(), feedback, Scoreboard(live=2), merge, saver]
    path = str(ckpt_path) if ckpt_path else None
    fit(editor, stream, loop, folder, path, max_epochs=epochs, enable_checkpointing=True, **options)
    return editor, stream, feedback


@pytest.mark.parametrize(
    ("router", "stop", "form"), [("key", 3, "dense"), ("hybrid", 2, "dense"), ("key", 1, "low_rank")]
)
def test_stopped_and_resumed_is_the_same(tmp_path, router, stop, form):
    """Low-rank shards and keys lie in the journal beside the checkpoint, as they do in a run directory."""
    checkpoint = tmp_path / "part" / "last.ckpt"
    journal = Journal(tmp_path / "journal.sqlite")

    def durable() -> dict:
        plugin = JournaledCheckpointIO(checkpoint, lambda sha256, rows: journal.save(sha256, 0, rows), journal.tables)
        return {"plugins": [plugin]} if form == "low_rank" else {}

    whole, stream, feedback = run(tmp_path / "whole", router, form=form)
    assert feedback.retriggered, "the premise: the loop acted"
    assert stream.windows > stop
    run(tmp_path / "part", router, epochs=stop, form=form, **durable())
    if form == "low_rank":
        assert "rows" not in torch.load(checkpoint, weights_only=True)
        assert journal.tables()["shards"]
    resumed, again, loop = run(tmp_path / "rest", router, ckpt_path=checkpoint, form=form, **durable())
    assert again.ledger == stream.ledger
    assert (again.windows, again.arrived) == (stream.windows, stream.arrived)
    assert (loop.pruned, loop.retriggered) == (feedback.pruned, feedback.retriggered)
    packs = [read_pack(save_pack(editor, tmp_path / name, {})) for name, editor in (("a", whole), ("b", resumed))]
    (config, tensors), (config_again, tensors_again) = packs
    for part in ("shards", "next_shard", "router"):
        assert config_again[part] == config[part], part
    torch.testing.assert_close(tensors_again, tensors, rtol=0, atol=0)


def test_a_checkpoint_keeps_what_was_written_into_the_base(tmp_path):
    """After a merge into W_v the base is no longer the one on the disk: resuming must bring the change back."""
    whole, *_ = run(tmp_path / "whole", "key", target="main")
    run(tmp_path / "part", "key", epochs=2, target="main")
    resumed, *_ = run(tmp_path / "rest", "key", ckpt_path=tmp_path / "part" / "last.ckpt", target="main")
    weights = [editor.edited.split.value.weight.detach() for editor in (whole, resumed)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert resumed.base_changed
