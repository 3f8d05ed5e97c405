"""What every registered editor must do, on every kind of base: a new method joins by its line in the registry."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers_runs import REPOSITORY, logits, same

from repair_lightning.editors import REGISTRY, Editor, make_editor
from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.editors.shards import Steps
from repair_lightning.editors.values import Values
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.models.prefix import pad_left
from repair_lightning.packs.pack import WEIGHTS_FILE, load_edited, save_pack, shard_tensors
from repair_lightning.scoring.protocols import perplexity, target_loss
from repair_lightning.types import BASE, EditBatch

SURE = Values(lr=0.3, steps=60, stop_margin=6.0)
"""How a tiny random base is told what to say, token by token."""
OPTIONS: dict[str, dict] = {
    "rlsedit": {"layers": 2, "values": SURE, "ridge": 0.003, "anchoring": 0.01},
    "rls_repair": {"values": SURE, "ridge": 0.003, "anchoring": 0.01},
    "rome": {"values": SURE},
    "memit": {"layers": 2, "layer": 0, "values": SURE, "moment_weight": 1e-6},
    "ultraedit": {"lr": 0.01},
    "mend": {
        "train_data": str(REPOSITORY / "repair_lightning" / "world" / "edits.jsonl"),
        "steps": 0,
        "alpha": 1e-3,
        "layers": 2,
        "rank": 16,
    },
    "ft": {"lr": 0.02, "steps": 100, "norm_constraint": 0.5},
    "ft_ewc": {"lr": 0.02, "accumulate": True},
    "lora": {"rank": 8, "alpha": 16, "lr": 0.01, "epochs": 60, "stop_loss": 0.02},
    "grace": {"eps": 0.5, "relative": True, "lr": 0.3, "steps": 100, "stop_margin": 2.0},
    "defer": {"lr": 0.02, "steps": 200, "stop_margin": 3.0},
    "wise": {
        "routing": Routing(),  # to activations all prompts of a tiny base look alike
        "writing": Writing(mask_ratio=0.5, stop_margin=4.0, steps=300),
    },
}
"""Constructor arguments for editors whose defaults do not suit a tiny base."""
NEARER = ("ultraedit", "grace", "mend")
"""Editors of which a single write is a step towards the target, not an answer; in so small a base GRACE's one vector
for all tokens is no more either."""

TEXTS = ("icl",)
"""Editors that put texts before prompts, of which a random base makes nothing."""
UNTRAINED = (*TEXTS, "lookup")
"""Editors that train nothing."""

MODELS = ["llama", "gpt2"]
"""GPT-2 stores W_v the other way round; other architectures are tried with a single write."""
LOADER = """
import json, sys
import torch
from repair_lightning.models.prefix import pad_left
from repair_lightning.packs.pack import load_edited

prompts = json.loads(sys.stdin.read())
for folder in sys.argv[1:]:
    model, tokenizer = load_edited(folder, precision="float32")
    ids, mask = pad_left(tokenizer(prompts)["input_ids"])
    output = model.generate(ids, mask, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    routes = [route.memory for route in model.route(prompts)]
    print(json.dumps({"output": output[:, ids.shape[1]:].tolist(), "routes": routes}))
"""


@pytest.fixture(params=[(model, name) for name in REGISTRY for model in MODELS], ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def name(case) -> str:
    return case[1]


@pytest.fixture
def make(case, editor_of, name):
    """A fresh editor of one kind over one kind of base."""
    return lambda: editor_of(case[0], name, **OPTIONS.get(name, {}))


def told(model, tokenizer, prompts):
    ids, mask = pad_left(tokenizer(prompts)["input_ids"])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return output[:, ids.shape[1] :].tolist()


def written_logits(editor, shard, prompts):
    """What was written gives; a shard that does not say its target in full is silent, so it is not asked by routing."""
    if not editor.router.vouches or editor.router.quotes:
        return logits(editor.edited, editor.tokenizer, prompts)
    with editor.edited.forced(shard):
        return logits(editor.base.model, editor.tokenizer, prompts)


@pytest.fixture
def asked(edits, irrelevant) -> list[str]:
    return [prompt for edit in edits for prompt in (edit.prompt, *edit.rephrases, edit.near[0].prompt)] + irrelevant


def test_what_lacks_a_part_is_refused_before_anything_is_loaded():
    class Half(Editor):
        def write(self, batch):
            return []

    with pytest.raises(ConfigError, match=r"Half must have forget; see docs/adding-an-editor\.md"):
        Half("no/base")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("repair", {"writing": Writing(steps=0)}, "writing.steps must be at least 1, got 0"),
        ("repair", {"writing": Writing(mask_ratio=0.0)}, r"writing.mask_ratio must be in \(0, 1\], got 0.0"),
        ("keyed", {"layer": "foo"}, "layer must be a whole number, null for the default, or 'auto', got 'foo'"),
        ("keyed", {"writing": Steps(lr="fast")}, "writing.lr must be a number or 'auto', got 'fast'"),
        ("wise", {"mode": "both"}, "mode must be one of retrieve, merge, got 'both'"),
        ("mend", {"batch": 0}, "batch must be at least 1, got 0"),
        ("rlsedit", {"ridge": 0.0}, "ridge must be positive"),
        ("rlsedit", {"values": Values(at="foo")}, r"values\.at must be one of targets, subject, got 'foo'"),
        ("rlsedit", {"anchors": "nowhere.txt"}, "'nowhere.txt' is no file"),
        ("icl", {"retriever": "words"}, "retriever must be one of key, states, got 'words'"),
        ("repair", {}, r"no base: give --model\.base a folder in Hugging Face format"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(name, options, words):
    with pytest.raises(ConfigError, match=words):
        REGISTRY[name](**options).load()


def test_an_edit_without_a_report_is_refused(editor_of, edits, monkeypatch):
    editor = editor_of("llama", "ft")
    monkeypatch.setattr(editor, "write", lambda batch: [])
    with pytest.raises(RepairError, match=r"FT\.write must return one report for each edit .* got \[\] for \['e0'\]"):
        editor.training_step(EditBatch((edits[0],)), 0)


def test_before_the_first_edit_it_is_the_base(make, asked, name):
    """Its options, plain types through JSON, make another like it; and training mode does not reach the base."""
    assert issubclass(REGISTRY[name], Editor)
    assert REGISTRY[name].editor_name == name
    editor = make()
    options = editor.options()
    assert list(options) == REGISTRY[name].arguments()
    assert make_editor(name, json.loads(json.dumps(options))).options() == options
    editor.train()
    assert not any(module.training for module in editor.base.model.modules())
    assert torch.equal(
        logits(editor.edited, editor.tokenizer, asked), logits(editor.base.model, editor.tokenizer, asked)
    )
    assert {route.memory for route in editor.edited.route(asked)} == {BASE}
    assert (editor.router.route(editor.held_out, editor.memory).memory == BASE).all()


def weights_of(editor) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in editor.base.model.state_dict().items()}


def changed(editor, weights) -> list[str]:
    return [key for key, value in editor.base.model.state_dict().items() if not torch.equal(value, weights[key])]


def test_edits_are_answered_and_a_rollback_brings_every_bit_back(make, write, answers, edits, irrelevant, asked, name):
    """On a tiny random base all prompts look alike, and one matrix says four of them at once, not eight. Only what it
    says is written into; back it goes from half-way and from the first edit, and a released base is as it was."""
    editor, written = make(), edits[:4]
    prompts, targets = [edit.prompt for edit in written], [edit.target for edit in written]
    before = perplexity([target_loss(editor.edited, prompts, targets, torch.full((4,), BASE))])
    weights, said = weights_of(editor), logits(editor.edited, editor.tokenizer, asked)
    untouched = logits(editor.base.model, editor.tokenizer, irrelevant)
    first, own = editor.snapshot(), editor.own_state()

    reports = write(editor, written, 4)
    assert [(report.id, report.error) for report in reports] == [(edit.id, None) for edit in written]
    chosen = editor.choose(prompts).memory
    assert chosen.tolist() == editor.owner_choice([edit.id for edit in written]).tolist()
    if name not in TEXTS:
        assert perplexity([target_loss(editor.edited, prompts, targets, chosen)]) < 0.9 * before
    if name not in (*TEXTS, *NEARER):
        right = written if editor.batchable else written[-1:]
        assert answers(editor.edited, editor.tokenizer, [e.prompt for e in right]) == [e.target for e in right]
    assert editor.base_changed == editor.writes_base
    if editor.writes_base:
        assert len(changed(editor, weights)) == len(editor.edited.weights.state()) > 0
        assert editor.figures()["deviation"].keys() == {str(layer) for layer in editor.edited.weights.state()}
    else:
        assert changed(editor, weights) == []
        assert torch.equal(logits(editor.edited, editor.tokenizer, irrelevant), untouched)

    halfway, half, half_own = editor.snapshot(), weights_of(editor), editor.own_state()
    write(editor, edits[4:5], 4)
    editor.rollback(halfway)
    assert changed(editor, half) == []
    assert same(editor.own_state(), half_own)
    editor.edited.release()
    assert changed(editor, weights) == []
    editor.change_base()
    editor.rollback(first)
    assert changed(editor, weights) == []
    assert not editor.base_changed
    assert same(editor.own_state(), own)
    assert torch.equal(logits(editor.edited, editor.tokenizer, asked), said)


@pytest.mark.parametrize("name", REGISTRY)
def test_what_is_not_finite_is_reported_and_spoils_nothing(name, editor_of, write, edits):
    """A state that is not a number, as an overflowing base gives: that edit alone fails, the rest is written."""
    editor = editor_of("llama", name, **OPTIONS.get(name, {}))
    editor.edited.captures([editor.encode(edits[2]).ids])[0].hidden.fill_(torch.nan)
    reports = write(editor, edits[:5])
    assert [report.id for report in reports if report.error] == ([] if name in UNTRAINED else [edits[2].id])
    for layer in editor.edited.weights.state():
        assert editor.edited.weights.matrix(layer).isfinite().all()
    kept = [*editor.memory.state_dict().values(), *editor.own_state().values()]
    assert all(value.isfinite().all() for value in kept if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", REGISTRY)
def test_what_it_cannot_do_it_refuses(name, editor_of, write, edits):
    editor = editor_of("llama", name, **OPTIONS.get(name, {}))
    write(editor, edits[:2], 4)
    if editor.can_undo:
        editor.undo([edits[0].id])
        assert editor.ledger.owner_of(edits[0].id) is None
    else:
        with pytest.raises(ConfigError, match="cannot take edits back"):
            editor.undo([edits[0].id])
    if not editor.can_adapt:
        with pytest.raises(ConfigError, match="layer must be a whole number or null, got 'auto'"):
            type(editor)(layer="auto")
    checkpoint: dict = {}
    editor.on_save_checkpoint(checkpoint)
    with pytest.raises(Exception, match=r"the checkpoint belongs to base .* give --model.base the base"):
        editor_of("gpt2", name, **OPTIONS.get(name, {})).on_load_checkpoint(checkpoint)


def test_packs_say_the_same_in_a_process_of_their_own(editor_of, write, edits, asked, tmp_path):
    """One process for the packs of all editors: starting it takes longer than all else."""
    editors = {name: editor_of("llama", name, **OPTIONS.get(name, {})) for name in REGISTRY}
    for name, editor in editors.items():
        write(editor, edits[:4], 4)
        save_pack(editor, tmp_path / name, {})
    call = [sys.executable, "-c", LOADER, *(str(tmp_path / name) for name in editors)]
    run = subprocess.run(call, input=json.dumps(asked), capture_output=True, text=True, check=True)
    for editor, line in zip(editors.values(), run.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found["routes"] == [route.memory for route in editor.edited.route(asked)]
        assert found["output"] == told(editor.edited, editor.tokenizer, asked)


def resumed(editor, fresh, file):
    """The editor's state in another one, by way of the disk; no weight of the base is in it."""
    checkpoint = {"state_dict": editor.state_dict(), "ledger": editor.ledger.state_dict()}
    editor.on_save_checkpoint(checkpoint)
    assert not [key for key in checkpoint["state_dict"] if "base." in key]
    rows = checkpoint["rows"]["shards"].values()
    tensors = [*checkpoint["state_dict"].values(), *(value for row in rows for value in row.values())]
    size = sum(value.numel() for value in tensors if isinstance(value, torch.Tensor))
    stored = shard_tensors(editor.memory).items()
    assert size == sum(value.numel() for name, value in stored if not name.endswith((".ids", ".ranks")))
    torch.save(checkpoint, file)
    loaded = torch.load(file, weights_only=True)
    fresh.on_load_checkpoint(loaded)
    fresh.load_state_dict(loaded["state_dict"], strict=False)
    fresh.ledger.load_state_dict(loaded["ledger"])
    fresh.change_base()
    return fresh


def test_it_goes_on_from_a_checkpoint_bit_by_bit_and_a_pack_says_the_same(make, write, edits, asked, tmp_path):
    editor = make()
    write(editor, edits[:2], 4)
    fresh = resumed(editor, make(), tmp_path / "half.ckpt")
    assert fresh.edited.route(asked) == editor.edited.route(asked)
    assert torch.equal(logits(fresh.edited, fresh.tokenizer, asked), logits(editor.edited, editor.tokenizer, asked))
    packs = []
    for one in (editor, fresh):
        write(one, edits[2:4], 4)
        packs.append(save_pack(one, tmp_path / f"pack-{len(packs)}", {}))
    assert (packs[0] / WEIGHTS_FILE).read_bytes() == (packs[1] / WEIGHTS_FILE).read_bytes()
    model, tokenizer = load_edited(packs[1], precision="float32")
    assert model.route(asked) == editor.edited.route(asked)
    assert told(model, tokenizer, asked) == told(editor.edited, editor.tokenizer, asked)


ELSEWHERE = [("llama", {"precision": "bfloat16"}), ("llama", {"cache_mib": 0})]
ELSEWHERE += [(name, {}) for name in ("gptj", "gpt_neox", "opt", "gemma2")]


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize(("model_type", "options"), ELSEWHERE, ids=str)
def test_other_precisions_caches_and_architectures(name, model_type, options, editor_of, write, edits):
    """Other orders of attention and feed-forward network, other norms, other places of the token dimension."""
    editor = editor_of(model_type, name, **(OPTIONS.get(name, {}) | options))
    before = logits(editor.edited, editor.tokenizer, [edits[0].prompt])
    (report,) = write(editor, edits[:1])
    assert report.error is None
    assert not torch.equal(written_logits(editor, report.shard, [edits[0].prompt]), before)
