"""Exports: what leaves us loads without us, says what it costs, and overwrites nothing unasked."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_runs import logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair_lightning import load_edited
from repair_lightning.editors.repair import Writing
from repair_lightning.errors import ConfigError
from repair_lightning.packs.export import REPORT_FILE, export_pack, live_edits, merge_into_base
from repair_lightning.packs.pack import CONFIG_FILE, WEIGHTS_FILE, load_ledger, save_pack


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pack(request, editor_of, write, edits, tmp_path_factory):
    """Six low-rank edits of a tiny base; GPT-2 stores W_v the other way round."""
    editor = editor_of(request.param, writing=Writing(steps=60))
    write(editor, edits[:6])
    return save_pack(editor, tmp_path_factory.mktemp("packs") / "pack", {})


def prompts_of(edits):
    return [prompt for edit in edits for prompt in (edit.prompt, edit.near[0].prompt)]


def test_merged_it_is_a_plain_checkpoint(pack, edits, tmp_path):
    """What transformers loads computes the logits of the model that was merged here."""
    report = export_pack(pack, tmp_path / "plain", merged=True, precision="float32")
    model, tokenizer = load_edited(pack, precision="float32")
    irrelevant = model.card["irrelevant"]
    before = model.value_weight.clone()
    live = live_edits(model.ledger)
    assert merge_into_base(model, live, irrelevant["background"], irrelevant["held_out"][::2]) == report["keep"]
    assert not torch.equal(model.value_weight, before)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", local_files_only=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")(prompts_of(edits)) == tokenizer(prompts_of(edits))
    with model.forced(None):
        expected = logits(model.base, tokenizer, prompts_of(edits))
    torch.testing.assert_close(logits(plain, tokenizer, prompts_of(edits)), expected, rtol=1e-5, atol=1e-5)


def test_merged_it_says_what_it_costs(pack, edits, tmp_path):
    report = export_pack(pack, tmp_path / "plain", merged=True, precision="float32", max_edits=4)
    assert json.loads((tmp_path / "plain" / REPORT_FILE).read_text())["merged"].keys() == report["merged"].keys()
    assert report["live_edits"] == 6
    assert report["asked"]["edits"] == 4
    assert report["asked"]["unrelated"] > 0  # the records bring none: irrelevant prompts stand in
    assert report["routed"]["rel"] == 1
    assert 0 <= report["merged"]["rel"] <= 1
    assert report["merged"]["loc"] is not None


def test_with_its_base_it_can_be_moved(pack, edits, answers, tmp_path):
    report = export_pack(pack, tmp_path / "whole")
    assert report["live_edits"] == 6
    model, tokenizer = load_edited(pack, precision="float32")
    expected = answers(model, tokenizer, prompts_of(edits))
    moved = tmp_path / "elsewhere" / "it"
    moved.parent.mkdir()
    (tmp_path / "whole").rename(moved)
    config = json.loads((moved / CONFIG_FILE).read_text())
    assert (moved / WEIGHTS_FILE).read_bytes() == (pack / WEIGHTS_FILE).read_bytes()
    assert (moved / "base" / "model.safetensors").is_file()
    assert not [file for file in moved.rglob("*") if file.suffix in (".py", ".bin", ".pt")]
    assert config["base"]["name"] not in str(moved)
    assert answers(*load_edited(moved, precision="float32"), prompts_of(edits)) == expected
    assert load_ledger(moved) == load_ledger(pack)


def test_a_folder_that_is_taken(pack, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    export_pack(pack, taken)  # empty: fine
    with pytest.raises(ConfigError, match=r"is not empty; give --to a new folder, or --overwrite"):
        export_pack(pack, taken)
    (taken / "old").touch()
    export_pack(pack, taken, overwrite=True)
    assert not (taken / "old").exists()
    (taken / REPORT_FILE).unlink()
    with pytest.raises(ConfigError, match="is not empty and no export"):
        export_pack(pack, taken, overwrite=True)
    assert (taken / WEIGHTS_FILE).is_file()
