"""Exports: what leaves us loads without us, says what it costs, and overwrites nothing unasked."""

from __future__ import annotations

import json
import math
import re
import stat

import pytest
import torch
from helpers_runs import logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair_lightning import load_edited
from repair_lightning.editors.repair import Writing
from repair_lightning.errors import ConfigError
from repair_lightning.packs.export import KEEP, REPORT_FILE, export_pack, live_edits, merge_into_base, neighbours
from repair_lightning.packs.pack import CONFIG_FILE, WEIGHTS_FILE, load_ledger, save_pack
from repair_lightning.types import BASE


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


def test_it_is_chosen_and_measured_by_near_too(pack, edits, tmp_path, caplog):
    """The records' own neighbours are for the measure alone; without any, others than those that choose stand in."""
    caplog.set_level("INFO", logger="repair_lightning.packs.export")
    report = export_pack(pack, tmp_path / "plain", merged=True, precision="float32")
    assert report["asked"]["neighbours"] == 6  # one of each record
    assert report["routed"]["near"] == 1
    assert 0 <= report["merged"]["near"] <= 1
    tried = re.findall(r"keep ([\d.]+): ([\d.]+) of .* right, ([\d.]+) of .* kept, ([\d.]+) of neighbours", caplog.text)
    assert len(tried) == len(KEEP)
    best = max((float(rel) * float(loc) * float(near), float(keep)) for keep, rel, loc, near in tried)
    assert best[0] == pytest.approx(max(math.prod(map(float, row[1:])) for row in tried))
    assert report["keep"] in {float(keep) for keep, *shares in tried if math.prod(map(float, shares)) > best[0] - 0.02}
    model, _ = load_edited(pack, precision="float32")
    live = live_edits(model.ledger)
    chosen, measured = (set(neighbours(model, live, step)) for step in (1, 2))
    assert chosen
    assert measured
    assert not chosen & measured
    assert not (chosen | measured) & {probe.prompt for edit in edits for probe in edit.near}
    assert all(route.memory == BASE for route in model.route([*chosen, *measured]))


def test_a_base_in_half_precision_stays_one_and_anybody_may_read_it(tiny, tokenizer, prepared, write, edits, tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editor = prepared(tmp_path / "base")
    write(editor, edits[:2])
    folder = save_pack(editor, tmp_path / "pack", {})
    export_pack(folder, tmp_path / "plain", merged=True, precision="float32")
    export_pack(folder, tmp_path / "whole")
    for weights in ("plain/model.safetensors", "whole/base/model.safetensors"):
        assert {value.dtype for value in load_file(tmp_path / weights).values()} == {torch.bfloat16}
    files = [file for name in ("pack", "plain", "whole") for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert len(files) > 12
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


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
