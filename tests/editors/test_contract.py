"""What every registered editor must do, on every kind of base: a new method joins by its line in the registry."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch

from repair_lightning.editors import REGISTRY, Editor, make_editor
from repair_lightning.models.prefix import pad_left
from repair_lightning.packs import load_edited, save_pack, shard_tensors
from repair_lightning.types import BASE

OPTIONS: dict[str, dict] = {}
"""Constructor arguments for editors whose defaults do not suit a tiny base."""

MODELS = ["llama", "qwen2", "gpt2"]
LOADER = """
import json, sys
import torch
from repair_lightning.models.prefix import pad_left
from repair_lightning.packs import load_edited

model, tokenizer = load_edited(sys.argv[1], precision="float32")
prompts = json.loads(sys.stdin.read())
ids, mask = pad_left(tokenizer(prompts)["input_ids"])
output = model.generate(ids, mask, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
routes = [route.memory for route in model.route(prompts)]
print(json.dumps({"output": output[:, ids.shape[1]:].tolist(), "routes": routes}))
"""


@pytest.fixture(params=REGISTRY)
def name(request) -> str:
    return request.param


@pytest.fixture(params=MODELS)
def make(request, editor_of, name):
    """A fresh editor of one kind over one kind of base."""
    return lambda: editor_of(request.param, name, **OPTIONS.get(name, {}))


def told(model, tokenizer, prompts):
    ids, mask = pad_left(tokenizer(prompts)["input_ids"])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return output[:, ids.shape[1] :].tolist()


def logits(model, tokenizer, prompts):
    ids, mask = pad_left(tokenizer(prompts)["input_ids"])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.fixture
def asked(edits, irrelevant) -> list[str]:
    return [prompt for edit in edits for prompt in (edit.prompt, *edit.rephrases, edit.near[0].prompt)] + irrelevant


def test_a_name_and_capabilities(name):
    assert issubclass(REGISTRY[name], Editor)
    assert REGISTRY[name].editor_name == name
    assert all(isinstance(getattr(REGISTRY[name], flag), bool) for flag in ("batchable", "can_merge", "can_prune"))


def test_its_options_rebuild_it(make, name):
    """Plain types, one for each argument of the constructor, through JSON and back."""
    editor = make()
    options = editor.options()
    assert options.keys() == inspect.signature(REGISTRY[name]).parameters.keys()
    assert make_editor(name, json.loads(json.dumps(options))).options() == options


def test_no_effect_before_the_first_edit(make, asked):
    editor = make()
    assert torch.equal(
        logits(editor.edited, editor.tokenizer, asked), logits(editor.base.model, editor.tokenizer, asked)
    )
    assert {route.memory for route in editor.edited.route(asked)} == {BASE}
    assert (editor.router.route(editor.held_out, editor.memory).memory == BASE).all()


def test_edits_are_answered_and_the_base_keeps_its_weights(make, write, answers, edits, irrelevant):
    editor = make()
    weights = {key: value.clone() for key, value in editor.base.model.state_dict().items()}
    before = logits(editor.base.model, editor.tokenizer, irrelevant)
    write(editor, edits, 4)
    prompts = [edit.prompt for edit in edits]
    assert answers(editor.edited, editor.tokenizer, prompts) == [edit.target for edit in edits]
    assert torch.equal(logits(editor.edited, editor.tokenizer, irrelevant), before)
    assert all(torch.equal(value, weights[key]) for key, value in editor.base.model.state_dict().items())
    assert editor.choose(prompts).memory.tolist() == editor.owner_choice([edit.id for edit in edits]).tolist()


def test_a_pack_says_the_same_in_a_process_of_its_own(make, write, edits, asked, tmp_path):
    editor = make()
    write(editor, edits, 4)
    folder = save_pack(editor, tmp_path / "pack", {})
    call = [sys.executable, "-c", LOADER, str(folder)]
    run = subprocess.run(call, input=json.dumps(asked), capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["routes"] == [route.memory for route in editor.edited.route(asked)]
    assert found["output"] == told(editor.edited, editor.tokenizer, asked)


def test_a_checkpoint_holds_no_base_weight_and_brings_the_memory_back(make, write, edits, asked, tmp_path):
    editor = make()
    write(editor, edits, 4)
    checkpoint = {"state_dict": editor.state_dict(), "ledger": editor.ledger.state_dict()}
    editor.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "editor.ckpt")
    size = sum(value.numel() for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor))
    assert not [key for key in checkpoint["state_dict"] if "base." in key]
    assert size == sum(value.numel() for value in shard_tensors(editor.memory).values())

    loaded = torch.load(tmp_path / "editor.ckpt", weights_only=True)
    fresh = make()
    fresh.on_load_checkpoint(loaded)
    fresh.load_state_dict(loaded["state_dict"], strict=False)
    fresh.ledger.load_state_dict(loaded["ledger"])
    assert fresh.edited.route(asked) == editor.edited.route(asked)
    assert torch.equal(logits(fresh.edited, fresh.tokenizer, asked), logits(editor.edited, editor.tokenizer, asked))


def test_a_checkpoint_of_another_base_is_refused(name, editor_of):
    checkpoint = {}
    editor_of("llama", name, **OPTIONS.get(name, {})).on_save_checkpoint(checkpoint)
    other = editor_of("gpt2", name, **OPTIONS.get(name, {}))
    with pytest.raises(Exception, match=r"the checkpoint belongs to base .* give --model.base the base"):
        other.on_load_checkpoint(checkpoint)


def test_writing_goes_on_after_a_pack_was_saved(make, write, answers, edits, tmp_path):
    editor = make()
    write(editor, edits[:4])
    save_pack(editor, tmp_path / "pack", {})
    write(editor, edits[4:])
    targets = [edit.target for edit in edits]
    assert answers(editor.edited, editor.tokenizer, [edit.prompt for edit in edits]) == targets
    model, tokenizer = load_edited(tmp_path / "pack", precision="float32")
    assert answers(model, tokenizer, [edit.prompt for edit in edits[:4]]) == targets[:4]


def test_training_mode_does_not_reach_the_base(make):
    editor = make()
    editor.train()
    assert not any(module.training for module in editor.base.model.modules())
