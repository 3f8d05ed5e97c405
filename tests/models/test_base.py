"""Loading a base: its identity, its precision, its tokenizer's true ids, and errors that name the remedy."""

from __future__ import annotations

import logging
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repair_lightning.errors import ConfigError
from repair_lightning.models.base import can_stop, load_base, load_tokenizer

PROBE = "In 1984, Mara's 2 cats weren't at 51 Rue d'Été. 日本"


@pytest.fixture
def copied(folder_of, tmp_path):
    """A folder of a tiny base that a test may spoil."""

    def copy(model_type="llama"):
        return shutil.copytree(folder_of(model_type), tmp_path / model_type)

    return copy


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_the_tokenizer_pads_left_with_true_ids(folder_of, model_type):
    folder = folder_of(model_type)
    found = load_base(str(folder), "float32").tokenizer
    raw = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert found(PROBE)["input_ids"] == raw(PROBE)["input_ids"]
    assert found.decode(found(PROBE)["input_ids"], skip_special_tokens=True) == PROBE
    assert (found.padding_side, found.pad_token_id, found.bos_token_id, found.eos_token_id) == ("left", 0, 1, 2)
    rows = found(["Mara", PROBE], padding=True, return_tensors="pt")
    assert rows["attention_mask"][0, 0] == 0
    assert rows["input_ids"][0, 0] == 0


def test_every_part_of_a_split_checkpoint_counts(tiny, tokenizer, tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    hashes = {load_base(str(tmp_path), precision).sha256 for precision in ("float32", "bfloat16")}
    assert len(hashes) == 1, "the hash knows the weights and not the precision"
    for part in parts:
        weights = load_file(part)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, part, metadata={"format": "pt"})
        hashes.add(load_base(str(tmp_path), "float32").sha256)
    assert len(hashes) == len(parts) + 1


class TestMissing:
    @pytest.mark.parametrize("name", ["./nothing", "runs/nothing/base"])
    def test_no_such_folder_is_said_at_once(self, name):
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"no such folder; give a folder in Hugging Face format, a hub"):
            load_base(name, "float32")
        assert time.monotonic() - started < 2

    def test_a_hub_name_that_leads_nowhere(self, monkeypatch):
        """Without network, as with one where the hub knows no such model: what was looked for, and where."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        words = r"base 'smollm' is no folder here and not one of world, smollm2, and the hub does not give it: .*; "
        words += r"give a folder in Hugging Face format, .*\. Offline, copy what `hf download NAME --local-dir DIR`"
        with pytest.raises(ConfigError, match=words):
            load_base("smollm", "float32")

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_damaged_folder(self, copied, file):
        folder = copied()
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load_base(str(folder), "float32")


@pytest.mark.parametrize(
    ("rows", "stops"),
    [
        pytest.param([(10.0, 0.9), (0.0, 1.0), *[(-5.0, 0.0)] * 6], True, id="a corner, though not the farthest"),
        pytest.param([(10.0, 0.9), (0.0, 0.0), (-5.0, 3.0), *[(-5.0, -3.0)] * 5], False, id="a point inside"),
        pytest.param([(1.0, 2.0)] * 8, False, id="a row that others share"),
    ],
)
def test_whether_a_base_can_stop(rows, stops):
    """Points in the plane as a head of eight tokens: a state can rank one first where it is a corner of them all."""
    head = torch.nn.Linear(2, len(rows), bias=False)
    head.weight.data = torch.tensor(rows)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    assert can_stop(model, SimpleNamespace(eos_token_id=1)) is stops


def test_a_class_that_changes_ids_is_replaced_with_a_warning(folder_of, monkeypatch, caplog):
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
    assert found.padding_side == "left"
