"""Packs: what is loaded is what was saved, and nothing else is ever loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from helpers_runs import logits
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torture import Bomb
from transformers import AutoModelForCausalLM, GenerationConfig, TextGenerationPipeline, pipeline

from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.editors.shards import Steps
from repair_lightning.edits.records import load_records
from repair_lightning.errors import RepairError
from repair_lightning.models.base import files_hash
from repair_lightning.packs import pack as packs
from repair_lightning.packs.pack import (
    CARD_FILE,
    CONFIG_FILE,
    LEDGER_FILE,
    WEIGHTS_FILE,
    PackedModel,
    load_edited,
    load_ledger,
    read_pack,
    restore_editor,
    save_pack,
    sealed,
)
from repair_lightning.storage import folders
from repair_lightning.storage.folders import whereabouts
from repair_lightning.types import BASE, Edit

OURS = (CONFIG_FILE, WEIGHTS_FILE, LEDGER_FILE, CARD_FILE)
ROUTINGS = {"key": {}, "activation": {"weight": 1.0, "act_ratio": 0.5}, "hybrid": {"act_ratio": 0.2}}


@pytest.fixture(scope="module")
def pack(editor_of, write, edits, tmp_path_factory) -> Path:
    """A pack of six edits in two masked shards of a tiny Llama."""
    editor = editor_of(writing=Writing(mask_ratio=0.5, capacity=3))
    write(editor, edits[:6], size=3)
    return save_pack(editor, tmp_path_factory.mktemp("packs") / "pack", {"seed": 0})


@pytest.fixture
def spoilt(pack, tmp_path) -> Path:
    """A copy of the pack that a test may spoil."""
    return shutil.copytree(pack, tmp_path / "pack")


def rewrite(folder, **changes) -> None:
    """Change what the configuration says, seal included, as only one who wants to deceive would."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(sealed({key: config[key] for key in config if config[key] != "gone"})))


def refused(folder, match, **options):
    """Loading the pack fails with one line that matches; returns it."""
    with pytest.raises(RepairError, match=match) as caught:
        load_edited(folder, precision="float32", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("model_type", "mask_ratio", "router"),
        [("llama", 0.5, "key"), ("gpt2", 1.0, "activation"), ("gpt2", 0.5, "hybrid")],
    )
    def test_every_router_masked_and_dense(
        self, editor_of, write, answers, edits, irrelevant, tmp_path, model_type, mask_ratio, router
    ):
        routing = Routing(router=router, **ROUTINGS[router])
        editor = editor_of(model_type, routing=routing, writing=Writing(mask_ratio=mask_ratio, capacity=4))
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

    def test_only_open_coordinates_are_stored(self, pack, editor_of):
        """Half of 32 x 64 coordinates: about 1,024 values and 256 bytes of mask per shard; no base weight at all."""
        tensors = load_file(pack / WEIGHTS_FILE)
        for shard in (0, 1):
            assert tensors[f"shard.{shard}.mask"].shape == (256,)
            assert 900 < len(tensors[f"shard.{shard}.values"]) < 1150
        assert {name.split(".")[0] for name in tensors} == {"shard", "router"}
        base = [p for p in editor_of().base.model.parameters() if p.ndim == 2]
        shards = {tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("shard.")}
        assert not shards & {tuple(p.shape) for p in base}
        assert not [name for name, tensor in tensors.items() for p in base if torch.equal(tensor, p)]


ASKED, TARGET, ELSEWHERE = "Where was Mara Kelstrom born?", "Oslo", "what colour is the sky at noon"


@pytest.fixture(scope="module")
def chatting(prepared, chat_folder, write, tmp_path_factory) -> PackedModel:
    """A pack of one edit over a tiny chat model, loaded as a user does."""
    editor = prepared(chat_folder, layer=2)
    write(editor, [Edit("e0", ASKED, TARGET, subject="Mara Kelstrom")])
    return load_edited(save_pack(editor, tmp_path_factory.mktemp("packs") / "chat", {}), precision="float32")[0]


class TestLikeAnyModel:
    """What `load_edited` gives is used as `transformers`' own models are."""

    @pytest.fixture
    def pipe(self, chatting, capfd) -> TextGenerationPipeline:
        made = pipeline("text-generation", model=chatting, tokenizer=chatting.tokenizer, max_new_tokens=8)
        assert "not supported" not in capfd.readouterr().err
        return made

    @staticmethod
    def chat(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def test_messages_in_a_pipeline(self, pipe):
        said = pipe(self.chat(ASKED), do_sample=False)[0]["generated_text"]
        assert said == [*self.chat(ASKED), {"role": "assistant", "content": TARGET}]
        several = pipe([self.chat(ASKED), self.chat(ELSEWHERE)], batch_size=2, do_sample=False)
        answers = [replies[0]["generated_text"][-1]["content"] for replies in several]
        assert answers[0] == TARGET != answers[1]

    def test_plain_prompts_in_a_pipeline(self, pipe, chatting):
        """A text is put bare, as this pipeline does with any model; the ids choose as they do in `generate`."""
        alone = [
            pipe(text, do_sample=False, return_full_text=False)[0]["generated_text"] for text in (ASKED, ELSEWHERE)
        ]
        together = pipe([ASKED, ELSEWHERE], batch_size=2, do_sample=False, return_full_text=False)
        assert [replies[0]["generated_text"] for replies in together] == alone
        ids = chatting.tokenizer(ASKED, return_tensors="pt")["input_ids"]
        output = chatting.generate(inputs=ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(output, chatting.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
        assert chatting.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == alone[0]
        assert alone[0].strip() == TARGET

    def test_disabled_it_is_the_base(self, pipe, chatting, chat_folder):
        """In `generate`, `forward`, a pipeline and a cache that a shard has begun."""
        base = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
        ids = torch.tensor([chatting.forms.ids(ASKED)])
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": list(chatting.forms.stops)}
        expected = base.generate(ids, pad_token_id=0, **options)
        with chatting.disabled(), torch.no_grad():
            assert torch.equal(chatting.generate(ids, **options), expected)
            assert torch.equal(chatting(ids).logits, base(ids).logits)
            assert chatting.route(ASKED)[0].memory == BASE
            assert pipe(self.chat(ASKED), do_sample=False)[0]["generated_text"][-1]["content"] != TARGET
        with torch.no_grad():
            own, cache = base(ids).past_key_values, chatting(ids).past_key_values
            with chatting.disabled():
                found = chatting(ids[:, :1], past_key_values=cache).logits
            assert torch.equal(found, base(ids[:, :1], past_key_values=own).logits)
        assert chatting.route(ASKED)[0].memory == 0
        assert not torch.equal(chatting.generate(ids, **options), expected)

    def test_disabled_it_has_the_bases_weights(self, editor_of, write, edits, tmp_path):
        editor = editor_of(name="ft")
        write(editor, edits[:2])
        model, _ = load_edited(save_pack(editor, tmp_path / "pack", {}), precision="float32")
        changed = model.value_weight.clone()
        with model.disabled():
            assert not torch.equal(model.value_weight, changed)
        assert torch.equal(model.value_weight, changed)

    def test_another_thread_is_not_disabled(self, chatting):
        found = []
        thread = Thread(target=lambda: found.extend(chatting.route(ASKED)))
        with chatting.disabled():
            thread.start()
            thread.join(0.2)
            assert found == [], "it waits"
        thread.join()
        assert [route.memory for route in found] == [0]

    def test_what_a_model_has(self, chatting):
        assert chatting.can_generate()
        assert chatting.dtype == torch.float32
        assert chatting.device == torch.device("cpu")
        assert chatting.eval() is chatting.to("cpu") is chatting
        assert chatting.config is chatting.base.config
        ids = torch.tensor([[1, 2]])
        assert chatting.prepare_inputs_for_generation(ids, attention_mask=ids)["input_ids"] is not None
        assert chatting.num_parameters() == chatting.base.num_parameters()
        before = chatting.generation_config
        chatting.generation_config = GenerationConfig(max_new_tokens=1)
        assert chatting.generate(ids).shape == (1, 3)
        chatting.generation_config = before
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            chatting.nothing  # noqa: B018 - that it is not there


SCORES = {
    "autoregressive": {"rel": 1.0, "gen": 0.5, "loc": 0.25, "near": None, "op": 0.5, "contains": 1.0, "garbled": 0},
    "forms": {"bare": {"rel": 0.5, "contains": 1, "fires": 1, "garbled": 0}, "chat": {"rel": None}},
}


class TestCard:
    """The model card that is written with every pack."""

    def test_what_it_says(self, chatting, chat_folder, tmp_path):
        chatting.card |= {"scores": SCORES, "provenance": {"data": "org/facts"}}
        card = ModelCard.load(chatting.save_pretrained(tmp_path / "pack") / CARD_FILE)
        head = card.data.to_dict()
        assert (head["library_name"], head["pipeline_tag"]) == ("repair-lightning", "text-generation")
        assert head["tags"] == ["model-editing", "repair-lightning", "keyed"]
        assert head["datasets"] == ["org/facts"]
        assert "base_model" not in head, "the hub refuses what is no name of its own"
        rows = [[part.strip() for part in line.split("|")[1:-1]] for line in card.text.splitlines() if "|" in line]
        assert ["free generation", "100.0", "50.0", "25.0", "-", "50.0"] in rows
        assert [row for row in rows if row[0] in ("bare", "chat")] == [["bare", "50.0", "100.0", "100.0", "0.0"]]
        for words in (
            f"prompt = '{ASKED}'",
            "The edits: 1 written.",
            chatting.card["base"]["sha256"],
            "base's own answ",
        ):
            assert words in card.text, words
        assert str(chat_folder.parent) not in card.text, "no path of this machine"
        again = PackedModel.from_pretrained(tmp_path / "pack", precision="float32").save_pretrained(tmp_path / "again")
        assert (again / CARD_FILE).read_text() == (tmp_path / "pack" / CARD_FILE).read_text()

    def test_the_code_in_it_runs(self, chatting, tmp_path, capsys):
        folder = chatting.save_pretrained(tmp_path / "pack")
        (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD_FILE).read_text(), re.DOTALL)
        exec(compile(code.replace('"PACK"', f'"{folder}"'), "card", "exec"), {})
        said, reason = capsys.readouterr().out.strip().splitlines()[-2:]
        assert said.endswith(TARGET)
        assert reason.startswith("shard 0: ")

    def test_a_base_of_the_hub_and_one_that_is_written_into(self, editor_of, write, edits, tmp_path):
        editor = editor_of(name="ft")
        write(editor, edits[:2])
        editor.base = replace(editor.base, name="org/base")
        card = ModelCard.load(save_pack(editor, tmp_path / "pack", {}) / CARD_FILE)
        assert card.data.base_model == "org/base"
        assert "answers to other prompts may have changed" in card.text
        assert "None are known for what the pack holds now" in card.text

    def test_it_may_be_edited(self, spoilt):
        """It is no part of what the hashes hold together."""
        (spoilt / CARD_FILE).write_text("mine")
        load_edited(spoilt, precision="float32")
        (spoilt / CARD_FILE).unlink()
        load_edited(spoilt, precision="float32")


class TestWrongBase:
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


class TestDamage:
    def test_a_flipped_bit_in_the_configuration_or_the_ledger(self, spoilt):
        """A changed threshold or option is still JSON: the seal must tell."""
        for file in (CONFIG_FILE, LEDGER_FILE):
            content = (spoilt / file).read_bytes()
            for place in range(1, len(content), max(1, len(content) // 40)):
                (spoilt / file).write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
                refused(spoilt, "is damaged|has format version")
            (spoilt / file).write_bytes(content)
        load_edited(spoilt, precision="float32")

    @pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
    @pytest.mark.parametrize("share", [0.0, 0.999, None])
    def test_truncated_or_gone(self, spoilt, file, share):
        content = (spoilt / file).read_bytes()
        (spoilt / file).unlink()
        if share is not None:
            (spoilt / file).write_bytes(content[: int(len(content) * share)])
        refused(spoilt, "is damaged: .*" if file == WEIGHTS_FILE or share is not None else "is no pack")

    def test_a_flipped_bit(self, spoilt):
        """In the length, the header or the values: a value's flip gives a valid file, so the hash must tell."""
        file = spoilt / WEIGHTS_FILE
        whole = file.read_bytes()
        for place, bit in ((0, 7), (7, 0), (40, 0), (len(whole) - 1, 7)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            refused(spoilt, r"pack '.*' is damaged: .*; restore it from a copy")

    @pytest.mark.parametrize(
        "changes",
        [
            *({key: [None]} for key in ("base", "shape", "shards", "router", "files")),
            {"base": "gone"},
            {"layer": 99},
            {"shape": [64, 32]},
            {"shards": {"0": 0, "1": 0, "7": 0}},
        ],
        ids=str,
    )
    def test_a_configuration_with_a_hole_or_that_does_not_fit(self, spoilt, changes):
        rewrite(spoilt, **changes)
        refused(spoilt, "is damaged|restore it from a copy")

    @pytest.mark.parametrize("version", [2, None])
    def test_another_version_and_a_file_elsewhere(self, spoilt, version):
        files = json.loads((spoilt / CONFIG_FILE).read_text())["files"]
        rewrite(spoilt, files=files | {"../secret": "0"})
        refused(spoilt, "names a file elsewhere")
        rewrite(spoilt, format_version=version)
        refused(spoilt, rf"has format version {version}; this release reads 3")

    def test_an_earlier_format_is_written_again_by_the_command_that_is_named(self, spoilt):
        rewrite(spoilt, format_version=2)
        line = refused(spoilt, "`repair-lightning train .*` writes its edits again, undone ones too")
        (file,) = re.findall(r"--data\.path (\S+)`", line)
        again = load_records(file).edits
        assert [(edit.prompt, edit.target) for edit in again] == [
            (edit.prompt, edit.target) for edit in map(load_ledger(spoilt).edit, load_ledger(spoilt))
        ]

    def test_a_pack_from_before_there_were_cards_loads(self, spoilt, tmp_path):
        rewrite(spoilt, scores="gone")
        (spoilt / CARD_FILE).unlink()
        model, _ = load_edited(spoilt, precision="float32")
        assert "None are known" in (model.save_pretrained(tmp_path / "new") / CARD_FILE).read_text()
        assert restore_editor(spoilt, precision="float32").ledger == model.ledger

    def test_no_pack(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nothing"):
            line = refused(folder, "is no pack: it has no repair_config.json; give the folder that train.py wrote")
            assert str(folder) in line


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE, LEDGER_FILE])
def test_a_pickle_is_refused_and_not_run(spoilt, tmp_path, file):
    trap = tmp_path / "sprung"
    (spoilt / file).write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(RepairError):
        read_pack(spoilt)
    if file == LEDGER_FILE:
        with pytest.raises(RepairError):
            load_ledger(spoilt)
    if file == WEIGHTS_FILE:  # with a hash that fits
        rewrite(spoilt, files={name: files_hash([spoilt / name]) for name in (WEIGHTS_FILE, LEDGER_FILE)})
        refused(spoilt, "is damaged")
    assert not trap.exists()
    with (spoilt / file).open("rb") as stream:
        pickle.load(stream)
    assert trap.exists(), "the trap itself works"


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def grown(editor_of, write, edits, tmp_path_factory):
    """A saved pack of four edits, and an editor that holds four more."""
    editor, folder = editor_of(writing=Steps(steps=20)), tmp_path_factory.mktemp("grown")
    write(editor, edits[:4])
    save_pack(editor, folder / "pack", {"turn": 1})
    write(editor, edits[4:])
    save_pack(editor, folder / "other", {"turn": 2})
    return editor, folder


@pytest.fixture
def old_and_new(grown, tmp_path):
    """A copy of that pack, the editor, and the contents of the old pack and of the next."""
    editor, folder = grown
    old, new = ((folder / name / WEIGHTS_FILE).read_bytes() for name in ("pack", "other"))
    assert old != new
    return shutil.copytree(folder / "pack", tmp_path / "packs" / "pack"), editor, old, new


def content_of(folder) -> bytes:
    """The weights of a whole, readable pack."""
    read_pack(folder)
    model, _ = load_edited(folder, precision="float32")
    assert len(model.memory) == len(model.ledger) == len(load_ledger(folder))
    return (whereabouts(folder) / WEIGHTS_FILE).read_bytes()


class TestReplacing:
    @pytest.mark.parametrize("step", range(12))
    def test_a_kill_at_any_step_leaves_the_old_or_the_new_one(self, old_and_new, monkeypatch, step):
        """Renames, syncs and removals, in their order: whoever reads next gets a whole pack, and whoever writes next
        puts everything in its place."""
        folder, editor, old, new = old_and_new
        calls = [0]

        def dies(call):
            def run(*args, **options):
                calls[0] += 1
                if calls[0] == step + 1:
                    raise Killed
                return call(*args, **options)

            return run

        for module, name in ((folders.os, "rename"), (folders.os, "fsync"), (folders.shutil, "rmtree")):
            monkeypatch.setattr(module, name, dies(getattr(module, name)))
        finished = True
        try:
            save_pack(editor, folder, {"turn": 2})
        except Killed:
            finished = False
        monkeypatch.undo()
        assert content_of(folder) in ((new,) if finished else (old, new))
        save_pack(editor, folder, {"turn": 2})
        assert content_of(folder) == new
        assert [path.name for path in folder.parent.iterdir()] == ["pack"]

    @pytest.mark.parametrize("fault", ["rename", "fsync", "lossy"])
    def test_a_disk_that_fails_or_forgets_is_one_line_and_the_old_pack(self, old_and_new, monkeypatch, fault):
        folder, editor, old, _ = old_and_new
        real = packs.save_file

        def full(*_):
            raise OSError(28, "No space left on device")

        def lossy(tensors, file):
            real({key: value.clone().zero_() for key, value in tensors.items()}, file)

        if fault == "lossy":
            monkeypatch.setattr(packs, "save_file", lossy)
        else:
            monkeypatch.setattr(folders.os, fault, full)
        words = r"what is read back is not what was written|cannot be written \(No space left on device\)"
        with pytest.raises(RepairError, match=words) as caught:
            save_pack(editor, folder, {})
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        assert content_of(folder) == old


class TestRestoring:
    @pytest.mark.parametrize(("model_type", "form"), [("llama", "low_rank"), ("gpt2", "dense")])
    def test_it_goes_on_as_the_editor_would_have(self, editor_of, write, edits, tmp_path, model_type, form):
        """Write, forget, calibrate: the same bits as without the detour over the disk."""
        dense = {"routing": Routing(router="hybrid"), "writing": Writing(steps=20, capacity=4, mask_ratio=0.5)}
        editor = editor_of(model_type, seed=3, **(dense if form == "dense" else {"writing": Steps(steps=20)}))
        write(editor, edits[:4])
        other = restore_editor(save_pack(editor, tmp_path / "a", {}), precision="float32")
        assert other.options() == editor.options() | {"layer": editor.layer}
        assert (type(other), other.writing, other.ledger) == (type(editor), editor.writing, editor.ledger)
        for one in (editor, other):
            write(one, edits[4:])
            one.forget([edits[0].id])
            one.finish_window()
        a, b = (save_pack(one, tmp_path / name, {}) for one, name in ((editor, "b"), (other, "c")))
        assert (a / WEIGHTS_FILE).read_bytes() == (b / WEIGHTS_FILE).read_bytes()
        assert other.edited.route(edits[0].prompt)[0].memory == BASE

    @pytest.mark.parametrize("changes", [{"editor": "repare"}, {"options": {"speed": 9}}], ids=str)
    def test_a_configuration_that_does_not_fit(self, spoilt, changes):
        rewrite(spoilt, **changes)
        with pytest.raises(RepairError, match=r"did you mean 'repair'|is damaged: .*speed"):
            restore_editor(spoilt, precision="float32")


class TestSharing:
    def test_to_the_hub_and_back(self, pack, tmp_path, monkeypatch, edits):
        """The hub is a folder here: what is uploaded is what `allow_patterns` lets through, likewise downloaded."""
        repository, asked = tmp_path / "hub", {}

        class Api:
            def __init__(self, token=None):
                asked["token"] = token

            def create_repo(self, repo_id, private=None, exist_ok=False):
                asked["private"] = private
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, repo_id, folder_path, allow_patterns, **options):
                shutil.copytree(folder_path, repository / repo_id)
                return f"https://hub/{repo_id}"

        def snapshot(name, revision=None, **patterns):
            asked["revision"] = revision
            source, target = repository / name, tmp_path / "cache"
            files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
            for file in filter_repo_objects(files, **patterns):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / file, target / file)
            return str(target)

        monkeypatch.setattr(packs, "HfApi", Api)
        monkeypatch.setattr(packs, "snapshot_download", snapshot)
        model, tokenizer = load_edited(pack, precision="float32")
        assert model.push_to_hub("me/corrected", private=True, token="t") == "https://hub/me/corrected"
        assert {file.name for file in (repository / "me/corrected").iterdir()} == {*OURS}
        assert (asked["token"], asked["private"]) == ("t", True)
        for name in ("evil.py", "pytorch_model.bin", "merged/model.safetensors"):
            (repository / "me/corrected" / name).parent.mkdir(exist_ok=True)
            (repository / "me/corrected" / name).write_bytes(b"x")
        other = PackedModel.from_pretrained("me/corrected", precision="float32", revision="main")
        assert asked["revision"] == "main"
        assert {file.name for file in (tmp_path / "cache").rglob("*")} == {*OURS}
        prompts = [edit.prompt for edit in edits]
        assert torch.equal(logits(model, tokenizer, prompts), logits(other, other.tokenizer, prompts))

    def test_a_hub_that_refuses(self, pack, monkeypatch):
        def refuse(*_, **__):
            raise ConnectionError("no route to host\nand more")

        monkeypatch.setattr(packs, "snapshot_download", refuse)
        monkeypatch.setattr(packs.HfApi, "create_repo", refuse)
        refused("some/where-else", r"is no folder here, and the hub does not give it \(no route to host\)")
        model, _ = load_edited(pack, precision="float32")
        with pytest.raises(RepairError, match="cannot be uploaded to 'me/x'"):
            model.push_to_hub("me/x")
