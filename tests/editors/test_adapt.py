"""Settings found by probe edits: what is chosen on bases that differ, that nothing of it is left behind, that a resumed
run keeps it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_runs import REPOSITORY, fit, world_edits, world_stream, write_edits
from lightning.pytorch.callbacks import ModelCheckpoint

from repair_lightning.editors import adapt as adapting
from repair_lightning.editors import repair
from repair_lightning.editors.adapt import Adapted, Candidate, Settings, beats, first_unbeaten, make_probes, other_words
from repair_lightning.editors.base import Editor
from repair_lightning.editors.repair import Repair, Routing, Writing
from repair_lightning.errors import ConfigError
from repair_lightning.packs.pack import load_edited, save_pack
from repair_lightning.types import Edit

ALL = {"layer": "auto", "writing": Writing(lr="auto", stop_margin="auto")}


def loaded(folder: Path, **options: Any) -> Repair:
    editor = Repair(str(folder), precision="float32", **options)
    editor.load()
    return editor


def prepared(folder: Path, irrelevant: list[str], **options: Any) -> Repair:
    editor = loaded(folder, **options)
    editor.prepare(irrelevant[:8], irrelevant[8:])
    return editor


def settings_of(editor: Repair) -> tuple[Any, ...]:
    return editor.layer, editor.writing.lr, editor.writing.stop_margin


def table(editor: Repair) -> list[dict[str, Any]]:
    """What was tried and how it fared; how long it took differs."""
    assert editor.adapted is not None
    return [{name: value for name, value in row.items() if name != "seconds"} for row in editor.adapted.candidates]


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_the_last_layer_and_the_defaults_where_nothing_is_better(folder_of, irrelevant):
    editor = prepared(folder_of("llama"), irrelevant, **ALL)
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


def test_another_layer_where_the_last_one_cannot_be_written(crippled, irrelevant):
    assert loaded(crippled).layer == 2, "the premise: the default is the last one"
    editor = prepared(crippled, irrelevant, layer="auto")
    written = {row["layer"]: row["written"] for row in table(editor)}
    assert written[2] == 0.0
    assert written[editor.layer] == max(written.values()) > 0.5
    assert editor.layer < 2
    assert editor.edited.split.value is editor.base.model.model.layers[editor.layer].mlp.down_proj


def test_what_is_written_there_is_answered(crippled, irrelevant, write, answers, edits):
    editor = prepared(crippled, irrelevant, layer="auto")
    write(editor, edits[:3])
    right = answers(editor.edited, editor.tokenizer, [edit.prompt for edit in edits[:3]])
    default = prepared(crippled, irrelevant)
    write(default, edits[:3])
    wrong = answers(default.edited, default.tokenizer, [edit.prompt for edit in edits[:3]])
    hits = [sum(a == edit.target for a, edit in zip(said, edits, strict=False)) for said in (right, wrong)]
    assert hits[0] > hits[1] == 0


def test_a_learning_rate_that_reaches_the_target(folder_of, irrelevant, monkeypatch):
    """With a first candidate that is far too small to write anything in the steps that there are, another is taken."""
    monkeypatch.setattr(adapting, "RATES", (1e-6, 1.0))
    editor = prepared(folder_of("llama"), irrelevant, writing=Writing(lr="auto"))
    assert [row["written"] for row in table(editor)] == [0.0, 1.0]
    assert settings_of(editor) == (2, 1.0, 2.0)


def test_dense_shards_too(folder_of, irrelevant, write, edits):
    editor = prepared(folder_of("llama"), irrelevant, layer="auto", writing=Writing("dense", lr="auto"))
    assert {row["layer"] for row in table(editor)} == {0, 1, 2}
    assert all(row["stop_margin"] == 2.0 for row in table(editor))
    assert not any(report.error for report in write(editor, edits[:3]))


def test_what_is_not_auto_stays(folder_of, irrelevant):
    editor = prepared(folder_of("llama"), irrelevant, layer="auto", writing=Writing(lr=0.7, stop_margin=None, steps=30))
    assert settings_of(editor) == (editor.layer, 0.7, None)
    assert {(row["lr"], row["stop_margin"]) for row in table(editor)} == {(0.7, None)}
    assert all(row["steps"] == 30 for row in table(editor))


def test_nothing_is_tried_where_nothing_is_auto(folder_of, irrelevant, monkeypatch):
    monkeypatch.setattr(repair, "adapt", None)
    assert prepared(folder_of("llama"), irrelevant).adapted is None


def test_the_layer_stays_where_something_is_written(folder_of, irrelevant, write, edits):
    """As in a run that goes on with a pack: what was written belongs to its layer."""
    editor = prepared(folder_of("llama"), irrelevant, layer=1)
    write(editor, edits[:2])
    editor.layer_option = "auto"
    editor.prepare(irrelevant[:8], irrelevant[8:])
    assert (editor.layer, len(editor.memory)) == (1, 2)
    assert {row["layer"] for row in table(editor)} == {1}


# -- the probes --------------------------------------------------------------------------------------------------------


def test_probes_want_what_the_base_says_to_others(folder_of, irrelevant, answers):
    editor = loaded(folder_of("llama"))
    said = answers(editor.base.model, editor.tokenizer, irrelevant, new=8)
    said = [" ".join(text.split()) for text in said]
    probes = make_probes(editor, irrelevant)
    assert len(probes) == sum(map(bool, said))
    for probe in probes:
        assert probe.target in said
        assert probe.target != said[irrelevant.index(probe.prompt)]


def test_other_words_leave_one_out_between_the_first_and_the_last():
    found = {edit.prompt for edit in other_words(Edit("a", "who sang it", "x"), 0)}
    assert found == {"who it"}
    long = Edit("b", "one two three four five", "x")
    found = [edit.prompt for edit in other_words(long, 0)]
    assert len(set(found)) == adapting.OTHER_WORDS
    assert all(text.startswith("one ") and text.endswith(" five") and text.count(" ") == 3 for text in found)
    assert [edit.prompt for edit in other_words(Edit("c", "two words", "x"), 0)] == ["two words"]


def test_a_base_with_one_answer_is_refused(folder_of, irrelevant):
    editor = loaded(folder_of("llama"), **ALL)
    with pytest.raises(ConfigError, match=r"says different things.*got 1 answer.*--data.irrelevant"):
        editor.prepare(irrelevant[:1], irrelevant[8:])


def candidate(layer: int, *scores: float) -> Candidate:
    return Candidate(Settings(layer, 1.0, 2.0), 1.0, 1.0, 1, 0.0, torch.tensor(scores))


def test_noise_and_small_gains_are_no_reason():
    """Of four probes one is won: mean 0.25, standard error 0.5 / 2; two standard errors are 0.5. Of four all won by a
    half: no noise. By 0.04: no noise, but less than counts."""
    zeros = torch.zeros(4)
    assert not beats(torch.tensor([1.0, 0, 0, 0]), zeros)
    assert beats(torch.full((4,), 0.5), zeros)
    assert not beats(torch.full((4,), 0.04), zeros)
    assert not beats(zeros, torch.full((4,), 0.5))
    assert not beats(zeros, zeros)
    assert beats(torch.ones(1), torch.zeros(1))


def test_the_first_that_is_not_beaten():
    last, below, low = candidate(2, 0, 0, 0, 0), candidate(1, 1, 1, 1, 0.9), candidate(0, 1, 1, 1, 1)
    assert first_unbeaten([last, below, low]) is below  # 0.025 more are no reason
    assert first_unbeaten([last, low]) is low
    assert first_unbeaten([low, last, below]) is low
    assert first_unbeaten([last]) is last


# -- no trace ----------------------------------------------------------------------------------------------------------


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"routing": Routing("hybrid")}], ids=["key", "hybrid"])
@pytest.mark.parametrize("model", ["llama", "crippled"])
def test_the_probes_leave_no_trace(folder_of, crippled, irrelevant, write, edits, options, model):
    """Found or given by hand, the settings write the same bits, and the generators go on where they were."""
    folder = crippled if model == "crippled" else folder_of(model)
    editor = loaded(folder, **ALL, **options)
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
    same = prepared(folder, irrelevant, layer=layer, writing=Writing(lr=lr, stop_margin=margin), **options)
    assert str(editor.router.state_dict()) == str(same.router.state_dict())
    reports = [write(one, edits) for one in (editor, same)]
    assert reports[0] == reports[1]
    torch.testing.assert_close(
        editor.memory.low_rank_tensors(), same.memory.low_rank_tensors(), rtol=0, atol=0, equal_nan=True
    )
    assert editor.options() == same.options()


def test_who_held_the_edited_model_goes_on_with_it(crippled, irrelevant, write, edits):
    editor = loaded(crippled, layer="auto")
    held, before = editor.edited, editor.layer
    editor.prepare(irrelevant[:8], irrelevant[8:])
    assert (held is editor.edited, held.layer, held.layer < before) == (True, editor.layer, True)
    write(editor, edits[:2])
    assert len(held.memory) == 2


def test_a_seed_gives_the_same_choice(folder_of, irrelevant):
    first, second = (prepared(folder_of("llama"), irrelevant, seed=3, **ALL) for _ in range(2))
    assert table(first) == table(second)
    assert settings_of(first) == settings_of(second)
    prompts = [[probe.prompt for probe in make_probes(replace_seed(first, seed), irrelevant)] for seed in (3, 3, 4)]
    assert prompts[0] == prompts[1] != prompts[2]


def replace_seed(editor: Repair, seed: int) -> Repair:
    editor.seed = seed
    return editor


# -- checkpoints, packs, runs ------------------------------------------------------------------------------------------

CHOSEN = Adapted(6, 0.5, 1.0, 12, 0.1, ({"layer": 6, "written": 1.0},))


def world_run(folder: Path, epochs: int = -1, ckpt_path: Path | None = None) -> Repair:
    """Two windows of two edits with everything left to `auto`, and a checkpoint after each."""
    folder.mkdir()
    editor = Repair("world", "auto", "float32", writing=Writing(lr="auto", stop_margin="auto"))
    stream = world_stream(write_edits(folder / "edits.jsonl", world_edits(4)), window=2, batch_size=2)
    saver = ModelCheckpoint(folder, filename="last", every_n_epochs=1, enable_version_counter=False)
    path = str(ckpt_path) if ckpt_path else None
    fit(editor, stream, [saver], folder, path, max_epochs=epochs, enable_checkpointing=True)
    return editor


def test_a_resumed_run_keeps_what_was_chosen(tmp_path, monkeypatch):
    chosen: Callable[..., Adapted] = lambda *_: CHOSEN  # noqa: E731
    monkeypatch.setattr(repair, "adapt", chosen)
    whole = world_run(tmp_path / "whole")
    assert settings_of(whole) == (6, 0.5, 1.0)
    world_run(tmp_path / "part", epochs=1)
    monkeypatch.setattr(repair, "adapt", None)  # whoever chooses anew fails
    resumed = world_run(tmp_path / "rest", ckpt_path=tmp_path / "part" / "last.ckpt")
    assert resumed.adapted == CHOSEN
    assert settings_of(resumed) == (6, 0.5, 1.0)
    assert resumed.edited.layer == 6
    torch.testing.assert_close(resumed.memory.low_rank_tensors(), whole.memory.low_rank_tensors(), rtol=0, atol=0)


def test_a_pack_has_the_layer_that_was_chosen(crippled, irrelevant, write, answers, edits, tmp_path):
    editor = prepared(crippled, irrelevant, **ALL)
    write(editor, edits[:3])
    config = json.loads((save_pack(editor, tmp_path / "pack", {}) / "repair_config.json").read_text())
    assert config["layer"] == config["options"]["layer"] == editor.layer < 2
    assert isinstance(config["options"]["writing"]["lr"], float)
    model, tokenizer = load_edited(tmp_path / "pack", precision="float32")
    prompts = [edit.prompt for edit in edits[:3]]
    assert model.layer == editor.layer
    assert answers(model, tokenizer, prompts) == answers(editor.edited, editor.tokenizer, prompts)


def test_a_run_says_what_it_chose(folder_of, tmp_path):
    path = write_edits(tmp_path / "edits.jsonl", world_edits(3))
    call = [sys.executable, str(REPOSITORY / "train.py"), "--config", "zsre_small", "--data.format", "jsonl"]
    call += ["--model.base", str(folder_of("llama")), "--data.path", path, "--data.irrelevant", "world"]
    call += ["--data.max_irrelevant", "40", "--trainer.logger", "false", "--run_dir", str(tmp_path / "run")]
    call += ["--model.layer", "auto", "--model.writing.lr", "auto", "--model.writing.stop_margin", "auto"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    adapted = json.loads((tmp_path / "run" / "metrics.json").read_text())["adapted"]
    assert len(adapted["candidates"]) >= 7
    assert f"layer {adapted['layer']}, lr {adapted['lr']:g}" in " ".join(done.stderr.split())
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]
    chosen = options["layer"], options["writing"]["lr"], options["writing"]["stop_margin"]
    assert chosen == (adapted["layer"], adapted["lr"], adapted["stop_margin"])


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "foo"}, "layer must be a whole number, null for the default, or 'auto', got 'foo'; negative"),
        ({"writing": Writing(lr="fast")}, "writing.lr must be a number or 'auto', got 'fast'"),
        ({"writing": Writing(stop_margin="wide")}, "writing.stop_margin must be a number or 'auto', got 'wide'"),
    ],
)
def test_a_word_that_is_not_auto(options, words):
    with pytest.raises(ConfigError, match=words):
        Repair("somewhere", **options)


def test_a_method_that_cannot_adapt_says_so():
    class Plain(Editor):
        build_memory = build_router = build_optimizer = write = forget = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="layer must be a whole number or null, got 'auto'"):
        Plain("somewhere", layer="auto")
