"""Shards as LoRA adapters: `peft` computes with them what we compute, and what is no such shard is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from repair_lightning.__main__ import run
from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.editors.shards import Steps
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.packs.adapters import ROUTER_FILE, factored
from repair_lightning.packs.export import REPORT_FILE, export_pack
from repair_lightning.packs.pack import CONFIG_FILE, load_edited, save_pack

DENSE = {"writing": Writing(steps=40, mask_ratio=0.5, capacity=3), "routing": Routing("hybrid", act_ratio=0.2)}
CASES = {
    "llama": ("llama", {"writing": Steps(steps=40)}),
    "gpt2": ("gpt2", {"writing": Steps(steps=40)}),
    "dense": ("llama", DENSE),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, editor_of, write, edits, tmp_path_factory):
    """Six edits of a tiny base, one without a subject in its record, as a pack and as adapters; GPT-2 stores W_v the
    other way round."""
    model_type, options = CASES[request.param]
    editor, folder = editor_of(model_type, **options), tmp_path_factory.mktemp("peft")
    write(editor, [replace(edits[0], subject=None), *edits[1:6]], size=3)
    save_pack(editor, folder / "pack", {})
    return request.param, folder, export_pack(folder / "pack", folder / "adapters", precision="float32", peft=True)


def who_takes_which(folder):
    return json.loads((folder / "adapters" / ROUTER_FILE).read_text())


@torch.no_grad()
@pytest.mark.filterwarnings("error::UserWarning")  # of keys that peft misses, of a matrix stored the other way round
def test_peft_computes_what_we_compute(case, folder_of):
    name, folder, _ = case
    model, _ = load_edited(folder / "pack", precision="float32")
    for row in who_takes_which(folder)["edits"]:
        base = AutoModelForCausalLM.from_pretrained(folder_of(CASES[name][0]), dtype=torch.float32)
        elsewhere = PeftModel.from_pretrained(base, folder / "adapters" / row["adapter"])
        ids = torch.tensor([model.forms.encode(row["prompt"], row["target"]).ids])
        with model.forced(int(row["adapter"].split("/")[1])):
            expected = model.base(ids).logits
        with model.forced(None):
            assert (model.base(ids).logits - expected).abs().max() > 0.1
        assert (elsewhere(input_ids=ids).logits - expected).abs().max() <= 1e-4
        (module,) = [path for path, found in elsewhere.named_modules() if isinstance(found, LoraLayer)]
        assert module.removeprefix("base_model.model.") == who_takes_which(folder)["module"]


def test_it_says_which_prompts_take_which(case, edits):
    """As the router does, to whose numbers an edit's own belong."""
    name, folder, _ = case
    model, _ = load_edited(folder / "pack", precision="float32")
    said = who_takes_which(folder)
    rows = said["edits"]
    assert (said["base"], said["layer"], said["router"]["name"]) == (model.card["base"], model.layer, model.router.name)
    assert [row["adapter"] for row in rows] == [f"adapters/{model.ledger.owner_of(row['id'])}" for row in rows]
    for key in ("id", "prompt", "target", "subject"):
        assert [row[key] for row in rows] == [getattr(edit, key) for edit in edits[:6]]
    limits = dict(zip(model.router.ids, model.router.limits.tolist(), strict=True))
    assert {row["id"]: row["limit"] for row in rows} == pytest.approx(limits, abs=1e-6)
    if name == "dense":
        thresholds = {row["adapter"]: row["threshold"] for row in rows}
        assert thresholds == pytest.approx({f"adapters/{k}": v for k, v in model.router.gate.thresholds.items()})


def test_the_report(case):
    name, folder, report = case
    assert json.loads((folder / "adapters" / REPORT_FILE).read_text()) == report
    files = list((folder / "adapters").rglob("*.safetensors"))
    assert (report["kind"], report["live_edits"], report["adapters"]) == ("peft", 6, len(files))
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    if name == "dense":  # masked at random, two shards of three edits have full rank
        assert (report["adapters"], report["rank"], report["larger_than_dense"]) == (2, 32, 2)
    else:
        assert (report["adapters"], report["larger_than_dense"]) == (6, 0)


def test_a_dense_matrix_at_its_numerical_rank():
    delta = torch.randn(32, 3) @ torch.randn(3, 64)
    left, right = factored(delta)
    assert (left.shape, right.shape) == ((32, 3), (3, 64))
    torch.testing.assert_close(left @ right, delta, rtol=1e-5, atol=1e-5)
    left, right = factored(torch.zeros(32, 64))
    assert left.shape == (32, 1)  # peft takes no rank of zero
    assert not (left @ right).any()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("ft", {"steps": 2}, "keeps them in the base's own W_v; give --merged instead"),
        ("grace", {"relative": True, "steps": 2}, "as outputs that replace those of W_v; leave --peft out"),
        ("lookup", {}, "as texts; leave --peft out"),
        ("icl", {}, "as texts; leave --peft out"),
    ],
)
def test_what_adds_nothing_to_the_value_matrix(editor_of, write, edits, tmp_path, name, options, match):
    editor = editor_of("llama", name, **options)
    write(editor, edits[:1])
    save_pack(editor, tmp_path / "pack", {})
    with pytest.raises(ConfigError, match=match):
        export_pack(tmp_path / "pack", tmp_path / "to", peft=True)
    assert not (tmp_path / "to").exists()


def test_nothing_to_export(editor_of, tmp_path):
    pack = save_pack(editor_of("llama"), tmp_path / "pack", {})
    with pytest.raises(RepairError, match="holds no live edit: there is no shard to export; export without --peft"):
        export_pack(pack, tmp_path / "to", peft=True)


def test_the_command(case, tmp_path, capsys):
    """Its last line is about size; a folder that is taken is left alone, and an earlier export replaced on demand."""
    name, folder, report = case
    given = ["export", "--pack", str(folder / "pack"), "--to", str(tmp_path / "to")]
    with pytest.raises(ConfigError, match="--merged and --peft are two kinds of export; give one of them"):
        run([*given, "--peft", "--merged"])
    run(given)
    with pytest.raises(ConfigError, match="is not empty; give --to a new folder, or --overwrite"):
        run([*given, "--peft"])
    assert (tmp_path / "to" / CONFIG_FILE).is_file()
    capsys.readouterr()
    run([*given, "--peft", "--overwrite"])
    said = capsys.readouterr().out
    assert f"{report['adapters']} LoRA adapters, rank {report['rank']} at most, {report['bytes']:,} bytes" in said
    assert ("larger than their dense matrices: 2" in said) == (name == "dense")
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"adapters", ROUTER_FILE, REPORT_FILE}
