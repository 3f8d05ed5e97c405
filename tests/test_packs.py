"""Packs: what is loaded is what was saved, and nothing else is ever loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.models.prefix import pad_left
from repair_lightning.packs import (
    CONFIG_FILE,
    LEDGER_FILE,
    MERGED_FOLDER,
    WEIGHTS_FILE,
    load_edited,
    load_ledger,
    read_pack,
    save_pack,
)
from repair_lightning.types import BASE

ROUTINGS = {"key": {}, "activation": {"weight": 1.0, "act_ratio": 0.5}, "hybrid": {"act_ratio": 0.2}}


def logits(model, tokenizer, prompts):
    ids, mask = pad_left(tokenizer(prompts)["input_ids"])
    with torch.no_grad():
        return model(ids, mask).logits


@pytest.fixture(scope="module")
def pack(editor_of, write, edits, tmp_path_factory) -> Path:
    """A pack of six edits in two masked shards of a tiny Llama."""
    editor = editor_of(writing=Writing("dense", mask_ratio=0.5, capacity=3))
    write(editor, edits[:6], size=3)
    return save_pack(editor, tmp_path_factory.mktemp("packs") / "pack", {"seed": 0})


@pytest.fixture
def spoilt(pack, tmp_path) -> Path:
    """A copy of the pack that a test may spoil."""
    return shutil.copytree(pack, tmp_path / "pack")


def refused(folder, match, **options):
    """Loading the pack fails with one line that matches; returns it."""
    with pytest.raises(RepairError, match=match) as caught:
        load_edited(folder, precision="float32", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
    @pytest.mark.parametrize("mask_ratio", [0.5, 1.0])
    @pytest.mark.parametrize("router", ROUTINGS)
    def test_every_router_masked_and_dense(
        self, editor_of, write, answers, edits, irrelevant, tmp_path, model_type, mask_ratio, router
    ):
        editor = editor_of(
            model_type,
            routing=Routing(router=router, **ROUTINGS[router]),
            writing=Writing("dense", mask_ratio=mask_ratio, capacity=4),
        )
        write(editor, edits, size=4)
        prompts = [p for e in edits for p in (e.prompt, *e.rephrases, e.near[0].prompt)] + irrelevant
        folder = save_pack(editor, tmp_path / "pack", {"command": "test"})
        model, tokenizer = load_edited(folder, precision="float32")
        assert model.route(prompts) == editor.edited.route(prompts)
        assert {route.memory for route in model.route(prompts)} - {BASE}
        assert torch.equal(logits(model, tokenizer, prompts), logits(editor.edited, editor.tokenizer, prompts))
        assert answers(model, tokenizer, prompts) == answers(editor.edited, editor.tokenizer, prompts)
        for shard in editor.memory.ids:
            assert torch.equal(model.memory[shard].delta, editor.memory[shard].delta)
            assert torch.equal(model.memory[shard].mask, editor.memory[shard].mask)
        assert load_ledger(folder) == editor.ledger

    def test_ids_and_generations_survive(self, editor_of, write, edits, tmp_path):
        editor = editor_of(writing=Writing("dense", mask_ratio=0.5, capacity=2))
        write(editor, edits[:6], size=2)
        editor.prune(0)
        editor.memory.fuse([1, 2], editor.memory[1].delta.detach() + editor.memory[2].delta.detach())
        model, _ = load_edited(save_pack(editor, tmp_path / "pack", {}), precision="float32")
        assert model.memory.ids == editor.memory.ids == [0, 3]
        assert model.memory.next_id == 4
        assert [model.memory[shard].generation for shard in (0, 3)] == [1, 0]
        assert torch.equal(model.memory[3].open, editor.memory[3].open)

    @pytest.mark.parametrize("router", ROUTINGS)
    def test_without_any_edit(self, editor_of, edits, tmp_path, router):
        editor = editor_of(routing=Routing(router=router))
        model, tokenizer = load_edited(save_pack(editor, tmp_path / "pack", {}), precision="float32")
        prompts = [edit.prompt for edit in edits]
        assert {route.memory for route in model.route(prompts)} == {BASE}
        assert torch.equal(logits(model, tokenizer, prompts), logits(model.base, tokenizer, prompts))

    def test_saving_again_replaces(self, editor_of, write, edits, tmp_path):
        editor = editor_of(writing=Writing("dense", capacity=4))
        write(editor, edits[:4])
        save_pack(editor, tmp_path / "pack", {})
        write(editor, edits[4:])
        model, _ = load_edited(save_pack(editor, tmp_path / "pack", {}), precision="float32")
        assert model.memory.ids == [0, 1]

    def test_only_open_coordinates_are_stored(self, pack, editor_of):
        """Half of 32 x 64 coordinates: about 1,024 values and 256 bytes of mask per shard; no base weight at all."""
        tensors = load_file(pack / WEIGHTS_FILE)
        for shard in (0, 1):
            assert tensors[f"shard.{shard}.mask"].shape == (256,)
            assert 900 < len(tensors[f"shard.{shard}.values"]) < 1150
        assert {name.split(".")[0] for name in tensors} == {"shard", "router"}
        base = set(map(tuple, (p.shape for p in editor_of().base.model.parameters() if p.ndim == 2)))
        assert not base & {tuple(tensor.shape) for tensor in tensors.values()}

    def test_the_configuration_is_plain_json(self, pack, folder_of):
        config = json.loads((pack / CONFIG_FILE).read_text())
        assert config["editor"] == "repair"
        assert config["base"]["name"] == str(folder_of("llama"))
        assert config["provenance"] == {"seed": 0}
        assert config["layer"] == 2
        assert sorted(file.name for file in pack.iterdir()) == [LEDGER_FILE, CONFIG_FILE, WEIGHTS_FILE]

    def test_a_folded_shard_takes_its_base_along(self, editor_of, write, answers, edits, tmp_path):
        editor = editor_of(writing=Writing("dense"))
        write(editor, edits[:4])
        editor.fold(0)
        prompts = [edit.prompt for edit in edits[:4]]
        model, tokenizer = load_edited(save_pack(editor, tmp_path / "pack", {}), precision="float32")
        assert (tmp_path / "pack" / MERGED_FOLDER / "model.safetensors").is_file()
        assert answers(model.base, tokenizer, prompts) == [edit.target for edit in edits[:4]]
        assert answers(model, tokenizer, prompts) == [edit.target for edit in edits[:4]]


class TestWrongBase:
    def test_other_weights(self, pack, folder_of):
        line = refused(
            pack, "the pack belongs to base .* give the base that it was made with", base=str(folder_of("gpt2"))
        )
        assert str(folder_of("gpt2")) in line

    def test_the_same_architecture_with_one_weight_changed(self, pack, folder_of, tiny, tokenizer, tmp_path):
        other = tiny("llama")
        other.lm_head.weight.data[0, 0] += 1e-3
        other.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        refused(pack, "the pack belongs to base", base=str(tmp_path))

    def test_a_moved_base_may_be_named(self, pack, folder_of, tmp_path):
        moved = shutil.copytree(folder_of("llama"), tmp_path / "elsewhere")
        model, _ = load_edited(pack, base=str(moved), precision="float32")
        assert model.memory.ids == [0, 1]

    def test_a_base_that_is_gone(self, spoilt):
        config = json.loads((spoilt / CONFIG_FILE).read_text())
        config["base"]["name"] = "/nowhere/at/all"
        (spoilt / CONFIG_FILE).write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="no such folder"):
            load_edited(spoilt)


class TestDamage:
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
    def test_truncated_weights(self, spoilt, share):
        file = spoilt / WEIGHTS_FILE
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        refused(spoilt, r"pack '.*' is damaged: .*; restore it from a copy")

    @pytest.mark.parametrize("place", [0, 3, 7, 8, 40, -1, -1000, -5000])
    @pytest.mark.parametrize("bit", [0, 7])
    def test_a_flipped_bit(self, spoilt, place, bit):
        """In the length, the header or the values: a value's flip gives a valid file, so the hash must tell."""
        file = spoilt / WEIGHTS_FILE
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << bit
        file.write_bytes(content)
        refused(spoilt, r"pack '.*' is damaged: .*; restore it from a copy")

    def test_weights_of_another_pack(self, spoilt, editor_of, tmp_path):
        other = save_pack(editor_of(), tmp_path / "other", {})
        shutil.copy(other / WEIGHTS_FILE, spoilt / WEIGHTS_FILE)
        refused(spoilt, "is damaged: side_memory.safetensors is not the file")

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_truncated_configuration(self, spoilt, share):
        text = (spoilt / CONFIG_FILE).read_text()
        (spoilt / CONFIG_FILE).write_text(text[: int(len(text) * share)])
        refused(spoilt, "is damaged")

    def test_a_configuration_that_is_no_text(self, spoilt):
        (spoilt / CONFIG_FILE).write_bytes(b"\xff\xfe\x00{")
        refused(spoilt, "is damaged")

    @pytest.mark.parametrize(
        "key", ["base", "layer", "shape", "mask_ratio", "next_shard", "shards", "router", "weights_sha256"]
    )
    @pytest.mark.parametrize("value", ["wrong", "absent"])
    def test_a_configuration_with_a_hole(self, spoilt, key, value):
        config = json.loads((spoilt / CONFIG_FILE).read_text())
        config[key] = [None]
        if value == "absent":
            del config[key]
        (spoilt / CONFIG_FILE).write_text(json.dumps(config))
        refused(spoilt, "is damaged")

    @pytest.mark.parametrize(
        "changes",
        [{"layer": 99}, {"shape": [64, 32]}, {"shards": {"0": 0, "1": 0, "7": 0}}, {"router": {"name": "key"}}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_configuration_that_does_not_fit(self, spoilt, changes):
        config = json.loads((spoilt / CONFIG_FILE).read_text()) | changes
        (spoilt / CONFIG_FILE).write_text(json.dumps(config))
        refused(spoilt, "restore it from a copy")

    @pytest.mark.parametrize("version", [0, 2, None, "1"])
    def test_another_version(self, spoilt, version):
        config = json.loads((spoilt / CONFIG_FILE).read_text()) | {"format_version": version}
        (spoilt / CONFIG_FILE).write_text(json.dumps(config))
        refused(spoilt, rf"has format version {version}; this release reads 1")

    @pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
    def test_json_that_is_no_object(self, spoilt, content):
        (spoilt / CONFIG_FILE).write_text(content)
        refused(spoilt, "has format version None")

    def test_no_weights(self, spoilt):
        (spoilt / WEIGHTS_FILE).unlink()
        refused(spoilt, "is damaged: .*side_memory.safetensors")

    def test_no_pack(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nothing"):
            line = refused(folder, "is no pack: it has no repair_config.json; give the folder that train.py wrote")
            assert str(folder) in line


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestNoCode:
    @pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE, LEDGER_FILE])
    @pytest.mark.parametrize("how", ["pickle", "torch"])
    def test_a_pickle_is_refused_and_not_run(self, spoilt, tmp_path, file, how):
        trap = tmp_path / "sprung"
        if how == "pickle":
            (spoilt / file).write_bytes(pickle.dumps(Bomb(trap)))
        else:
            torch.save(Bomb(trap), spoilt / file)
        with pytest.raises(RepairError):
            load_ledger(spoilt) if file == LEDGER_FILE else read_pack(spoilt)
        assert not trap.exists()
        with (spoilt / file).open("rb") as stream:
            if how == "pickle":
                pickle.load(stream)
        assert trap.exists() == (how == "pickle"), "the trap itself works"
