"""Edits as token ids: what the target's ids are, where it ends, and where labels stand."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repair_lightning.functional import IGNORED
from repair_lightning.models import sampling
from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left
from repair_lightning.models.tokenizing import Encoded, target_labels
from repair_lightning.world import base_dir

CORPUS = ["the quick brown fox jumps over the lazy dog", "who painted the night watch? Rembrandt van Rijn", "1984 , 51"]
SPECIAL = ["<s>", "</s>", "<pad>"]


def train(template: str = "$A", across_words: bool = False) -> PreTrainedTokenizerFast:
    """A real tokenizer: byte-level BPE, or one that splits nothing, so that a merge may cross the space."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    raw.train_from_iterator(CORPUS * 20, trainers.BpeTrainer(vocab_size=400, **options))
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZERS = {
    "plain": train,
    "bos": lambda: train("<s> $A"),
    "bos_and_eos": lambda: train("<s> $A </s>"),
    "eos": lambda: train("$A </s>"),
    "across_words": lambda: train(across_words=True),
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
def test_the_prompt_is_as_generation_sees_it_and_the_target_follows_one_space_and_ends(tokenizer, prompt, target):
    """The prompt's ids must not depend on the target: at inference there is none."""
    assert encode(tokenizer, prompt, target).prompt == encode(tokenizer, prompt, "another").prompt
    own, row = tokenizer(prompt)["input_ids"], encode(tokenizer, prompt, target)
    assert list(row.prompt) == [id for id in own if id != tokenizer.eos_token_id]
    assert row.target[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in row.ids[:-1]
    assert tokenizer.backend_tokenizer.decode(list(row.target[:-1]), skip_special_tokens=False) == f" {target}"
    assert row.ids == row.prompt + row.target


def test_a_join_that_changes_the_prompt_is_split_apart():
    """`lazy dog` is one piece where pieces may hold spaces, so the prompt `the lazy` is not a prefix of the whole."""
    tokenizer = TOKENIZERS["across_words"]()
    prompt, target = "over the lazy", "dog"
    own = tokenizer(prompt)["input_ids"]
    assert tokenizer(f"{prompt} {target}")["input_ids"][: len(own)] != own  # the premise
    row = encode(tokenizer, prompt, target)
    assert list(row.prompt) == own
    assert list(row.target) == [*tokenizer(" dog", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_labels_stand_where_the_target_stands():
    rows = [Encoded((1, 2, 3), (7, 8, 9)), Encoded((4,), (5, 6)), Encoded((1, 2, 3, 4, 5), (9,))]
    labels = target_labels(rows)
    assert labels.tolist() == [[7, 8, 9], [IGNORED, 5, 6], [IGNORED, IGNORED, 9]]
    ids, _ = pad_left([row.ids for row in rows])
    assert torch.equal(ids[:, -3:][labels != IGNORED], labels[labels != IGNORED]), "the right end of the ids"


def test_an_answer_ends_with_whatever_ends_it_and_holds_no_padding(monkeypatch, tokenizer):
    """Of several ends each counts; an answer that is cut has none."""
    said = [[5, 2, 0, 0], [9, 0, 0, 0], [5, 5, 5, 5], [2, 0, 0, 0]]
    monkeypatch.setattr(sampling, "_continued", lambda *_: said)
    forms = Forms(tokenizer, stops=[2, 9])
    rows = sampling.greedy_rows(None, forms, ["a"] * 4, length=4)  # type: ignore[arg-type]
    assert rows == [(tuple(forms.ids("a")), answer) for answer in ((5, 2), (9,), (5, 5, 5, 5), (2,))]
