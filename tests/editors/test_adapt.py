"""Settings found by probe edits: what is chosen on bases that differ, that nothing of it is left behind, that a resumed
run keeps it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_runs import fit, world_edits, world_stream, write_edits
from lightning.pytorch.callbacks import ModelCheckpoint

from repair_lightning.editors import Keyed, adaptive
from repair_lightning.editors.adapt import Adapted
from repair_lightning.editors.shards import Steps

ALL = {"layer": "auto", "writing": Steps(lr="auto", stop_margin="auto")}


def loaded(folder: Path, **options: Any) -> Keyed:
    editor = Keyed(str(folder), precision="float32", **options)
    editor.load()
    return editor


def settings_of(editor: Keyed) -> tuple[Any, ...]:
    return editor.layer, editor.writing.lr, editor.writing.stop_margin


def table(editor: Keyed) -> list[dict[str, Any]]:
    """What was tried and how it fared; how long it took differs."""
    assert editor.adapted is not None
    return [{name: value for name, value in row.items() if name != "seconds"} for row in editor.adapted.candidates]


def test_the_last_layer_and_the_defaults_where_nothing_is_better(folder_of, prepared):
    editor = prepared(folder_of("llama"), **ALL)
    assert settings_of(editor) == (2, 1.0, 2.0)
    tried = [(row["layer"], row["lr"], row["stop_margin"]) for row in table(editor)]
    assert tried[:3] == [(2, 1.0, 2.0), (1, 1.0, 2.0), (0, 1.0, 2.0)]
    assert tried[3:] == [(2, 3.0, 2.0), (2, 0.3, 2.0), (2, 1.0, 4.0), (2, 1.0, 1.0)]
    assert table(editor)[0]["written"] == 1.0


@pytest.fixture(scope="module")
def crippled(tmp_path_factory, tiny, tokenizer) -> Path:
    """A Gemma 2 whose last layer's feed-forward network is multiplied by nothing: no value matrix there says a thing.

    Its norm multiplies by one plus its weight.
    """
    model = tiny("gemma2")
    with torch.no_grad():
        model.model.layers[-1].post_feedforward_layernorm.weight.fill_(-1.0)
        model.model.norm.weight.fill_(4.0)  # a random base of so few dimensions else cannot say a thing for sure
    folder = tmp_path_factory.mktemp("crippled")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_layer_where_the_last_one_cannot_be_written(crippled, prepared):
    assert loaded(crippled).layer == 2, "the premise: the default is the last one"
    editor = prepared(crippled, layer="auto")
    written = {row["layer"]: row["written"] for row in table(editor)}
    assert written[2] == 0.0
    assert written[editor.layer] == max(written.values()) > 0.25
    assert editor.layer < 2
    assert editor.edited.split.value is editor.base.model.model.layers[editor.layer].mlp.down_proj


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("model", ["llama", "crippled"])
def test_the_probes_leave_no_trace(folder_of, crippled, irrelevant, prepared, write, edits, model):
    """Found or given by hand, the settings write the same bits, and the generators go on where they were."""
    folder, auto = (crippled, {"layer": "auto"}) if model == "crippled" else (folder_of(model), ALL)
    editor = loaded(folder, **auto)
    weights = {name: value.clone() for name, value in editor.base.model.state_dict().items()}
    states, hooks = (torch.get_rng_state(), random.getstate()), hooks_of(editor.base.model)
    editor.prepare(irrelevant[:8], irrelevant[8:])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert hooks_of(editor.base.model) == hooks
    assert all(torch.equal(value, weights[name]) for name, value in editor.base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in editor.base.model.parameters())
    assert len(editor.memory) == editor.memory.next_id == len(editor.ledger) == 0
    layer, lr, margin = settings_of(editor)
    same = prepared(folder, layer=layer, writing=Steps(lr=lr, stop_margin=margin))
    assert str(editor.router.state_dict()) == str(same.router.state_dict())
    reports = [write(one, edits) for one in (editor, same)]
    assert reports[0] == reports[1]
    torch.testing.assert_close(
        editor.memory.low_rank_tensors(), same.memory.low_rank_tensors(), rtol=0, atol=0, equal_nan=True
    )
    assert editor.options() == same.options()


CHOSEN = Adapted(6, 0.5, 1.0, 12, 0.1, ({"layer": 6, "written": 1.0},))


def world_run(folder: Path, epochs: int = -1, ckpt_path: Path | None = None) -> Keyed:
    """Two windows of two edits with everything left to `auto`, and a checkpoint after each."""
    folder.mkdir()
    editor = Keyed("world", layer="auto", precision="float32", writing=Steps(lr="auto", stop_margin="auto"))
    stream = world_stream(write_edits(folder / "edits.jsonl", world_edits(4)), window=2, batch_size=2)
    saver = ModelCheckpoint(folder, filename="last", every_n_epochs=1, enable_version_counter=False)
    path = str(ckpt_path) if ckpt_path else None
    fit(editor, stream, [saver], folder, path, max_epochs=epochs, enable_checkpointing=True)
    return editor


def test_a_resumed_run_keeps_what_was_chosen(tmp_path, monkeypatch):
    chosen: Callable[..., Adapted] = lambda *_: CHOSEN  # noqa: E731
    monkeypatch.setattr(adaptive, "adapt", chosen)
    whole = world_run(tmp_path / "whole")
    assert settings_of(whole) == (6, 0.5, 1.0)
    world_run(tmp_path / "part", epochs=1)
    monkeypatch.setattr(adaptive, "adapt", None)  # whoever chooses anew fails
    resumed = world_run(tmp_path / "rest", ckpt_path=tmp_path / "part" / "last.ckpt")
    assert resumed.adapted == CHOSEN
    assert settings_of(resumed) == (6, 0.5, 1.0)
    assert resumed.edited.layer == 6
    torch.testing.assert_close(resumed.memory.low_rank_tensors(), whole.memory.low_rank_tensors(), rtol=0, atol=0)
