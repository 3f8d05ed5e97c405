"""Edits as token ids: what the target's ids are, where it ends, and where labels stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_runs import world_edits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repair_lightning.functional import IGNORED
from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left
from repair_lightning.models.tokenizing import Encoded, target_labels
from repair_lightning.world import base_dir

CORPUS = ["the quick brown fox jumps over the lazy dog", "who painted the night watch? Rembrandt van Rijn", "1984 , 51"]
SPECIAL = ["<s>", "</s>", "<pad>"]


def train(kind: str) -> PreTrainedTokenizerFast:
    """A real tokenizer: byte-level BPE, or a Unigram one that splits nothing, so a merge may cross the space."""
    if kind == "across_words":
        raw = Tokenizer(models.BPE(unk_token=None))
        raw.pre_tokenizer = pre_tokenizers.Split(Regex("[|]"), "removed")  # spaces are part of the pieces
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    raw.decoder = decoders.Fuse() if kind == "across_words" else decoders.ByteLevel()
    raw.train_from_iterator(CORPUS * 20, trainer)
    pairs = [("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))]
    template = {"bos": "<s> $A", "both": "<s> $A </s>", "end": "$A </s>"}.get(kind)
    if template:
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZERS = {
    "plain": lambda: train("plain"),
    "bos": lambda: train("bos"),
    "bos_and_eos": lambda: train("both"),
    "eos": lambda: train("end"),
    "across_words": lambda: train("across_words"),
    "world": lambda: AutoTokenizer.from_pretrained(str(base_dir()), local_files_only=True),
}
PAIRS = [
    ("the quick brown", "fox"),
    ("who painted the night watch?", "Rembrandt van Rijn"),
    ("the", "the"),
    ("over the lazy dog", "1984"),
    ("fox", "jumps over the lazy dog"),
]


def encode(tokenizer, prompt: str, target: str) -> Encoded:
    return Forms(tokenizer).encode(prompt, target)


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_prompt_ids_are_what_the_router_and_generation_see(tokenizer, prompt, target):
    """The prompt's ids must not depend on the target: at inference there is none."""
    assert encode(tokenizer, prompt, target).prompt == encode(tokenizer, prompt, "another").prompt
    own = tokenizer(prompt)["input_ids"]
    assert list(encode(tokenizer, prompt, target).prompt) == [id for id in own if id != tokenizer.eos_token_id]


@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_the_target_is_spelled_after_one_space_and_ends_with_eos(tokenizer, prompt, target):
    row = encode(tokenizer, prompt, target)
    assert row.target[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in row.ids[:-1]
    assert tokenizer.backend_tokenizer.decode(list(row.target[:-1]), skip_special_tokens=False) == f" {target}"
    assert row.ids == row.prompt + row.target


@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_target_ids_follow_the_prompts_where_joining_leaves_it_alone(tokenizer, prompt, target):
    row = encode(tokenizer, prompt, target)
    joined = [id for id in tokenizer(f"{prompt} {target}")["input_ids"] if id != tokenizer.eos_token_id]
    if tuple(joined[: len(row.prompt)]) == row.prompt:
        assert list(row.ids[:-1]) == joined
    else:
        assert list(row.target[:-1]) == tokenizer(f" {target}", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("the quick\n", "fox", "the quick\nfox"),
        ("the quick ", "fox", "the quick fox"),
        ("  the\n\tquick", "fox", "  the\n\tquick fox"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("the quick", "\nfox", "the quick\nfox"),
    ],
)
def test_nothing_is_stripped_or_mended(tokenizer, prompt, target, text):
    if tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) != text:
        pytest.skip("this tokenizer cannot spell the text")
    row = encode(tokenizer, prompt, target)
    assert tokenizer.decode(list(row.ids), skip_special_tokens=True) == text
    assert list(row.prompt) == [id for id in tokenizer(prompt)["input_ids"] if id != tokenizer.eos_token_id]


def test_an_end_that_the_user_wrote_stays():
    """Only the end that the tokenizer itself puts behind a text is taken off."""
    for name, ends in (("bos", False), ("bos_and_eos", True), ("plain", False), ("eos", True)):
        tokenizer = TOKENIZERS[name]()
        ids = tokenizer("the fox</s>")["input_ids"]
        assert list(Forms(tokenizer).bare("the fox</s>")) == (ids[:-1] if ends else ids)


def test_a_join_that_changes_the_prompt_is_split_apart():
    """`lazy dog` is one piece where pieces may hold spaces, so the prompt `the lazy` is not a prefix of the whole."""
    tokenizer = TOKENIZERS["across_words"]()
    prompt, target = "over the lazy", "dog"
    own = tokenizer(prompt)["input_ids"]
    assert tokenizer(f"{prompt} {target}")["input_ids"][: len(own)] != own  # the premise
    row = encode(tokenizer, prompt, target)
    assert list(row.prompt) == own
    assert list(row.target) == [*tokenizer(" dog", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_world_edits_join_with_one_space():
    tokenizer = TOKENIZERS["world"]()
    forms = Forms(tokenizer)
    for edit in world_edits(50):
        row = forms.encode(edit.prompt, edit.target)
        text = tokenizer.decode(list(row.ids[:-1]), skip_special_tokens=True)
        assert text == f"{edit.prompt} {edit.target}"


def test_labels_stand_where_the_target_stands():
    rows = [Encoded((1, 2, 3), (7, 8, 9)), Encoded((4,), (5, 6)), Encoded((1, 2, 3, 4, 5), (9,))]
    labels = target_labels(rows)
    assert labels.tolist() == [[7, 8, 9], [IGNORED, 5, 6], [IGNORED, IGNORED, 9]]
    ids, _ = pad_left([row.ids for row in rows])
    width = labels.shape[1]
    tail = ids[:, -width:]
    assert torch.equal(tail[labels != IGNORED], labels[labels != IGNORED])  # labels are the right end of the ids
    assert (labels != IGNORED).sum(-1).tolist() == [len(row.target) for row in rows]


def test_labels_of_real_rows_line_up_with_left_padding(tokenizer):
    rows = [encode(tokenizer, prompt, target) for prompt, target in PAIRS]
    labels = target_labels(rows)
    ids, mask = pad_left([row.ids for row in rows], fill=tokenizer.pad_token_id)
    assert mask[:, -1].all()
    at = labels != IGNORED
    assert torch.equal(ids[:, -labels.shape[1] :][at], labels[at])
    assert (labels[:, -1] == tokenizer.eos_token_id).all()


def test_the_world_tokenizer_is_a_file_of_this_repository():
    assert (Path(base_dir()) / "tokenizer.json").is_file()
