"""Real parts for all tests: a small byte-level BPE tokenizer and tiny bases of real architectures, made on the spot.

Nothing is downloaded. Bases are random, but seeded, and wide enough in their initial weights that prompts differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from repair_lightning.starting import uncollected

with uncollected():
    import helpers_chat
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

    from repair_lightning.editors import REGISTRY
    from repair_lightning.editors.repair import Writing
    from repair_lightning.models.prefix import pad_left
    from repair_lightning.types import Edit, EditBatch, EditReport, Probe

settings.register_profile("no clock", deadline=None)  # machines are shared: time says nothing of what is right
settings.load_profile("no clock")

VOCABULARY = 512
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PEOPLE = ["Mara Kelstrom", "Tobin Quill", "Ilse Vandermeer", "Rufus Ashgrove", "Odette Blum", "Caspar Finch"]
PEOPLE += ["Greta Holloway", "Yusuf Draper", "Nadia Zorn", "Piet Gumede", "Wendel Oakes", "Lucia Xanthos"]
PLACES = ["Lisbon", "Oslo", "Quito", "Hanoi", "Tunis", "Perth", "Nairobi", "Malmo"]
RELATIONS = [
    "Where was {} born?",
    "In which town did {} grow up?",
    "What instrument did {} play?",
    "Who taught {} to sail?",
    "The employer of {} was",
]
IRRELEVANT = [
    "how many legs does a spider have",
    "what is the name of the last king in the play",
    "when does the new season of the show begin",
    "who sang the song about the old river",
    "what colour is the sky at noon",
    "why do cats sleep so much",
    "which planet is closest to the sun",
    "what do you call a baby kangaroo",
    "how long does it take to boil an egg",
    "who wrote the book about the white whale",
    "where do penguins live in winter",
    "what is the largest number on a clock",
]


LONGEST = ("training/test_runs.py", "faults/test_faults.py", "test_docs.py", "test_from_pack.py", "test_cli.py")
"""Modules that are handed out first, so that no worker is left with one of them alone at the end."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # else pytest-xdist hands out first what has the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public models and data beside the checkout; tests that need it are skipped elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"needs the public models and data in {folder}, which are not here")
    return folder


@pytest.fixture(scope="session")
def irrelevant() -> list[str]:
    """Prompts that no edit is about."""
    return list(IRRELEVANT)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens that puts `<s>` before a text, trained here."""
    texts = [relation.format(person) for person in PEOPLE for relation in RELATIONS] + IRRELEVANT
    texts += [f"{person} was born in {place} in 1984." for person in PEOPLE for place in PLACES]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts + [text.casefold() for text in texts],
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet),
    )
    bos = (SPECIAL["bos_token"], raw.token_to_id(SPECIAL["bos_token"]))
    raw.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **SPECIAL)


def tiny_config(model_type: str, vocabulary: int = VOCABULARY, **more: Any) -> Any:
    """The configuration of a base with 3 layers, d_model 32 and d_ffn 64."""
    names = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64, "n_positions": 128},
        "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64, "n_positions": 128, "rotary_dim": 4},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    }.get(model_type, {"intermediate_size": 64})
    common = {} if "n_embd" in names else {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    if model_type not in ("gpt2", "gptj", "gpt_neox", "opt"):
        common |= {"num_key_value_heads": 2}
        common |= {"head_dim": 8} if model_type != "phi3" else {}
    common |= {"max_position_embeddings": 128} if "n_embd" not in names else {}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = {"initializer_range": 0.3} | special | common | names | more
    return AutoConfig.for_model(model_type, vocab_size=vocabulary, **options)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random base of an architecture: `tiny("qwen2", sliding_window=4)`."""

    def make(model_type: str, **more: Any) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type, **more))
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, tiny, tokenizer) -> Callable[..., Path]:
    """The folder of a tiny base with the tokenizer in Hugging Face format: `folder_of("llama")`; made once."""
    made: dict[tuple, Path] = {}

    def folder(model_type: str, **more: Any) -> Path:
        key = (model_type, *sorted(more.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bases") / model_type
            tiny(model_type, **more).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory, tiny, tokenizer) -> Path:
    """The folder of a tiny base with a chat template; larger random weights would let no edit hold in other forms."""
    return helpers_chat.chat_folder(tmp_path_factory.mktemp("bases") / "chat", tiny, tokenizer)


@pytest.fixture(scope="session")
def edits() -> list[Edit]:
    """Eight corrections about eight people in three relations."""
    return [
        Edit(
            f"e{i}",
            RELATIONS[i % 3].format(PEOPLE[i]),
            place,
            subject=PEOPLE[i],
            rephrases=(RELATIONS[i % 3].format(PEOPLE[i]).replace("?", ", please?"),),
            near=(Probe(RELATIONS[i % 3].format(PEOPLE[8 + i % 4])),),
        )
        for i, place in enumerate(PLACES)
    ]


@pytest.fixture(scope="session")
def prepared(irrelevant) -> Callable[..., Any]:
    """Loads and prepares an editor over a base in a folder: `prepared(folder, "ft", layer=1)`."""

    def make(folder: Path, name: str = "keyed", **options: Any) -> Any:
        editor = REGISTRY[name](base=str(folder), **({"precision": "float32"} | options))
        editor.load()
        editor.prepare(irrelevant[:8], irrelevant[8:])
        return editor

    return make


@pytest.fixture(scope="session")
def editor_of(folder_of, prepared) -> Callable[..., Any]:
    """A loaded and prepared editor over a tiny base: `editor_of("gpt2", writing=Writing(steps=20))`; `keyed`, unless
    options are given that `repair` alone has."""

    def make(model_type: str = "llama", name: str | None = None, **options: Any) -> Any:
        dense = {"routing", "distillation"} & options.keys() or isinstance(options.get("writing"), Writing)
        return prepared(folder_of(model_type), name or ("repair" if dense else "keyed"), **options)

    return make


@pytest.fixture(scope="session")
def write() -> Callable[..., list[EditReport]]:
    """Writes edits as one window, in batches of `size`, as the stream does without a trainer."""

    def run(editor: Any, edits: list[Edit], size: int | None = None) -> list[EditReport]:
        editor.ledger.arrive([edit for edit in edits if edit.id not in editor.ledger], 0)
        size = (size or len(edits)) if editor.batchable else 1
        reports: list[EditReport] = []
        for start in range(0, len(edits), size):
            found = editor.write(EditBatch(tuple(edits[start : start + size])))
            editor.ledger.written(found)
            reports += found
        editor.finish_window()
        return reports

    return run


@pytest.fixture(scope="session")
def answers() -> Callable[..., list[str]]:
    """What a model says to prompts, greedily: `answers(edited, tokenizer, prompts)`."""

    def ask(model: Any, tokenizer: Any, prompts: list[str], new: int = 12) -> list[str]:
        ids, mask = pad_left(tokenizer(list(prompts))["input_ids"])
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        return [text.strip() for text in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]

    return ask
