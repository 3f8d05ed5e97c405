"""Loading a base: its identity, its precision, its tokenizer's true ids, and errors that name the remedy."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repair_lightning.errors import ConfigError
from repair_lightning.models.base import can_stop, load_base, load_tokenizer, resolve_dtype

PROBE = "In 1984, Mara's 2 cats weren't at 51 Rue d'Été. 日本"


@pytest.fixture
def copied(folder_of, tmp_path):
    """A folder of a tiny base that a test may spoil."""

    def copy(model_type="llama"):
        return shutil.copytree(folder_of(model_type), tmp_path / model_type)

    return copy


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
class TestLoading:
    def test_is_frozen_and_ready(self, folder_of, model_type):
        base = load_base(str(folder_of(model_type)), "float32")
        assert not base.model.training
        assert not any(p.requires_grad for p in base.model.parameters())
        assert base.parameters == sum(p.numel() for p in base.model.parameters())
        assert base.embeddings.shape == (512, 32)
        assert base.name == str(folder_of(model_type))
        assert base.model.config.model_type == model_type

    def test_the_tokenizer_pads_left_with_true_ids(self, folder_of, model_type):
        folder = folder_of(model_type)
        found = load_base(str(folder), "float32").tokenizer
        raw = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        assert found(PROBE)["input_ids"] == raw(PROBE)["input_ids"]
        assert found.decode(found(PROBE)["input_ids"], skip_special_tokens=True) == PROBE
        assert (found.padding_side, found.pad_token_id, found.bos_token_id, found.eos_token_id) == ("left", 0, 1, 2)
        rows = found(["Mara", PROBE], padding=True, return_tensors="pt")
        assert rows["attention_mask"][0, 0] == 0
        assert rows["input_ids"][0, 0] == 0

    def test_the_hash_knows_the_weights_and_not_the_precision(self, copied, model_type):
        folder = copied(model_type)
        before = load_base(str(folder), "float32").sha256
        assert len(before) == 64
        assert load_base(str(folder), "bfloat16").sha256 == before
        weights = load_file(folder / "model.safetensors")
        name = next(iter(weights))
        weights[name].view(-1)[0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert load_base(str(folder), "float32").sha256 != before


class TestHash:
    def test_other_files_do_not_matter(self, copied):
        folder = copied()
        before = load_base(str(folder), "float32").sha256
        (folder / "README.md").write_text("hello")
        shutil.copy(folder / "model.safetensors", folder / "adapter.safetensors")
        assert load_base(str(folder), "float32").sha256 == before

    def test_every_part_of_a_split_checkpoint_counts(self, tiny, tokenizer, tmp_path):
        tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
        tokenizer.save_pretrained(tmp_path)
        parts = sorted(tmp_path.glob("*.safetensors"))
        assert len(parts) > 1
        hashes = {load_base(str(tmp_path), "float32").sha256}
        for part in parts:
            weights = load_file(part)
            next(iter(weights.values())).view(-1)[0] += 1
            save_file(weights, part, metadata={"format": "pt"})
            hashes.add(load_base(str(tmp_path), "float32").sha256)
        assert len(hashes) == len(parts) + 1

    @pytest.mark.slow
    def test_a_hub_models_hash_is_its_files_too(self, folder_of, tmp_path):
        """A hub cache laid out by hand, read offline by a process of its own, in two precisions."""
        folder = folder_of("qwen2")
        repo = tmp_path / "models--someone--tiny"
        shutil.copytree(folder, repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        script = (
            "from repair_lightning.models.base import load_base\n"
            "bases = [load_base('someone/tiny', p) for p in ('float32', 'bfloat16')]\n"
            "print(*{b.sha256 for b in bases}, *bases[0].tokenizer('Mara 12')['input_ids'])"
        )
        env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        local = load_base(str(folder), "float32")
        assert run.stdout.split() == [local.sha256, *map(str, local.tokenizer("Mara 12")["input_ids"])]


class TestPrecision:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    def test_named(self, folder_of, precision):
        model = load_base(str(folder_of("llama")), precision).model
        assert {p.dtype for p in model.parameters()} == {getattr(torch, precision)}

    def test_auto(self):
        assert resolve_dtype("auto") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)

    @pytest.mark.parametrize("precision", ["fp32", "", "32"])
    def test_unknown(self, folder_of, precision):
        expected = f"precision must be one of auto, float32, bfloat16, float16, got '{precision}'"
        with pytest.raises(ConfigError, match=expected):
            load_base(str(folder_of("llama")), precision)


class TestMissing:
    @pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "runs/nothing/base", "../nothing"])
    def test_no_such_folder_is_said_at_once(self, name):
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"no such folder; give a folder in Hugging Face format or a hub name"):
            load_base(name, "float32")
        assert time.monotonic() - started < 2

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be loaded") as caught:
            load_base(str(tmp_path), "float32")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_a_damaged_folder(self, copied, file, damage):
        folder = copied()
        if damage == "missing":
            (folder / file).unlink()
        else:
            (folder / file).write_bytes((folder / file).read_bytes()[:100])
        started = time.monotonic()
        with pytest.raises(ConfigError, match="cannot be loaded") as caught:
            load_base(str(folder), "float32")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < 5

    def test_an_unsupported_architecture(self, tmp_path, tokenizer):
        from transformers import BloomConfig, BloomForCausalLM

        BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="unsupported architecture 'bloom'"):
            load_base(str(tmp_path), "float32")

    def test_home_is_found(self, folder_of, monkeypatch):
        folder = folder_of("llama")
        monkeypatch.setenv("HOME", str(folder.parent))
        assert load_base("~/llama", "float32").name == "~/llama"


class TestEnding:
    """Points in the plane as a head of eight tokens: a state can rank one first where it is a corner of them all."""

    @staticmethod
    def stops(*rows):
        head = torch.nn.Linear(2, len(rows), bias=False)
        head.weight.data = torch.tensor(rows)
        return can_stop(SimpleNamespace(get_output_embeddings=lambda: head), SimpleNamespace(eos_token_id=1))

    def test_a_corner_that_is_not_the_farthest_from_the_middle(self):
        """From the middle, about (-2.5, 0.2), the end (0, 1) lies towards (2.5, 0.8), where (10, 0.9) is farther."""
        assert self.stops((10.0, 0.9), (0.0, 1.0), *[(-5.0, 0.0)] * 6)

    def test_a_point_inside(self):
        assert not self.stops((10.0, 0.9), (0.0, 0.0), (-5.0, 3.0), *[(-5.0, -3.0)] * 5)

    def test_a_row_that_others_share(self):
        assert not self.stops(*[(1.0, 2.0)] * 8)


class TestTokenizer:
    def test_auto_tokenizer_rewrites_qwen2(self, folder_of, caplog):
        """Why the comparison exists: transformers rebuilds a Qwen2 tokenizer by its type, and splits numbers."""
        folder = folder_of("qwen2")
        raw = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(PROBE)["input_ids"]
        if AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"] == raw:
            pytest.skip("this release of transformers keeps the ids")
        with caplog.at_level(logging.WARNING):
            found = load_tokenizer(str(folder))
        assert found(PROBE)["input_ids"] == raw
        assert "changes its ids" in caplog.text
        assert (found.padding_side, found.pad_token_id, found.bos_token_id, found.eos_token_id) == ("left", 0, 1, 2)

    def test_a_class_that_changes_ids_is_replaced_with_a_warning(self, folder_of, monkeypatch, caplog):
        """The comparison itself, with an AutoTokenizer that forgets the start token on purpose."""
        folder = folder_of("llama")

        def forgetful(name, **_):
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>")
            tokenizer.backend_tokenizer.post_processor = None
            return tokenizer

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", forgetful)
        with caplog.at_level(logging.WARNING):
            found = load_tokenizer(str(folder))
        assert "changes its ids" in caplog.text
        assert found("Mara")["input_ids"][0] == 1
        assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<pad>")
        assert found.padding_side == "left"

    def test_a_tokenizer_that_agrees_is_kept_without_a_word(self, folder_of, caplog):
        with caplog.at_level(logging.WARNING):
            load_tokenizer(str(folder_of("llama")))
        assert "changes its ids" not in caplog.text

    def test_without_a_padding_token_the_end_pads(self, copied):
        folder = copied()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found = load_tokenizer(str(folder))
        assert found.pad_token_id == found.eos_token_id == 2
