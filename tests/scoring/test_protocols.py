"""The two protocols against slow loops over plain transformers models."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repair_lightning.editors.shards import Steps
from repair_lightning.models.forms import Forms
from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import answered, answers, contains, forced_tokens, normalise, same_answer
from repair_lightning.types import BASE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Rembrandt\tvan \n Rijn. ", "rembrandt van rijn"),
        ("St. John", "st. john"),  # a full stop inside stays
        ("Straße", "strasse"),
        ("e\u0301te\u0301", "été"),  # composed
        ("①", "1"),
        ("?", "?"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(normalise(text)) == normalise(text)


CODE = "def f(x):\n    return x + 1"


@pytest.mark.parametrize(
    ("said", "target", "same"),
    [
        ("PARIS.", "Paris", True),
        ("Paris\nFrance", "Paris France", True),  # the target has one line: white space is no difference
        ("Paris, France", "Paris", False),
        (CODE, CODE, True),
        (CODE + "\n\n", CODE, True),  # white space at the end
        ("\n" + CODE, "\n" + CODE + "\n", True),  # and empty lines before the first
        (CODE.replace("    ", "  "), CODE, False),
        (CODE.upper(), CODE, False),
        ("return x", "    return x", False),
        ("return x", " return x", True),  # a single blank only joins it to the prompt
    ],
)
def test_several_lines_are_compared_exactly_and_others_after_normalisation(said, target, same):
    assert same_answer(said, target) is same


@pytest.mark.parametrize(
    ("said", "target", "holds"),
    [
        ("It is Paris, of course.", "paris", True),
        ("Parisian", "Paris", False),
        ("in St. John's", "St. John", True),
        ("C++ it is", "C++", True),
        ("the year 1985", "985", False),
        ("anything", "", False),
    ],
)
def test_contains_whole_words(said, target, holds):
    assert contains(said, target) is holds


@pytest.fixture(scope="module")
def asked(written) -> tuple[list[str], list[str], torch.Tensor]:
    """Prompts of several lengths, targets, and memories in a mix: base, either shard, right or not."""
    _, stream = written
    prompts, targets, memory = [], [], []
    for i, edit in enumerate(stream.edits):
        for j, prompt in enumerate((edit.prompt, *edit.rephrases, edit.locality[0].prompt)):
            prompts.append(prompt)
            targets.append(edit.target)
            memory.append((BASE, 0, 1)[(i + j) % 3])
    return prompts, targets, torch.tensor(memory)


def slow_answer(model: Any, tokenizer: Any, prompt: str, limit: int) -> str:
    """Greedy decoding one token at a time, no cache, until the end of sequence."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(limit):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token[None, None]], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_answers_are_the_plain_models(written, plain, asked):
    editor, _ = written
    prompts, _, memory = asked
    found = answers(editor.edited, prompts, memory, 12)
    for prompt, chosen, text in zip(prompts, memory.tolist(), found, strict=True):
        assert text == slow_answer(plain(chosen), editor.tokenizer, prompt, 12)
    assert len({*found}) > 8, "the premise: they differ"


def slow_logits(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[torch.Tensor, list[int]]:
    """Logits at each target position, and the target's ids with their end."""
    row = Forms(tokenizer).encode(prompt, target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return logits[len(row.prompt) - 1 : -1], list(row.target)


def test_forced_tokens_are_the_plain_models(monkeypatch, written, plain, asked):
    monkeypatch.setattr(protocols, "BATCH", 5)
    editor, _ = written
    prompts, targets, memory = asked
    found = forced_tokens(editor.edited, prompts, targets, memory)
    for prompt, target, chosen, tokens in zip(prompts, targets, memory.tolist(), found, strict=True):
        logits, expected = slow_logits(plain(chosen), editor.tokenizer, prompt, target)
        assert tokens == logits.argmax(-1).tolist()
        assert len(tokens) == len(expected)


def test_perplexity_is_the_plain_models(written, plain, asked):
    """exp of the mean negative log likelihood over all target tokens, not a mean of means."""
    editor, _ = written
    prompts, targets, memory = asked
    total, count = 0.0, 0
    for prompt, target, chosen in zip(prompts, targets, memory.tolist(), strict=True):
        logits, expected = slow_logits(plain(chosen), editor.tokenizer, prompt, target)
        logs = logits.log_softmax(-1)
        total -= sum(float(logs[i, token]) for i, token in enumerate(expected))
        count += len(expected)
    whole = protocols.target_loss(editor.edited, prompts, targets, memory)
    assert protocols.perplexity([whole]) == pytest.approx(math.exp(total / count), rel=1e-4)


SPOKEN = ["Lisbon", "São Paulo", "St. Gallen. North", "3.5", "東京 tower", "naïve café", "x", "Oslo, no 🙂"]
"""What is written and said: words, letters that a byte-level tokenizer takes apart, full stops inside."""
CHANGES = (
    lambda text: text,
    str.upper,
    lambda text: f"{text} . .",
    lambda text: f" {text.replace(' ', chr(9) + ' ')} ",
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),  # full width
    lambda text: "Q" + text[1:],  # from here on another answer
    lambda text: text[:-1],
    lambda text: f"{text}s",
    lambda text: f"{text} <pad>",
    lambda text: f"{text[:1]}</s>{text[1:]}",
    lambda _: "Zürich",
    lambda _: "",
    lambda text: f"{text[:1]}\n{text[1:]}",
    lambda text: f"    {text}",
)
"""Other spellings that count as the same answer, and what does not."""


@pytest.fixture(scope="module")
def said(editor_of, write, edits) -> tuple[Any, list[str], torch.Tensor]:
    """An editor of a tiny base that answers eight prompts with `SPOKEN`, the prompts and their shards."""
    editor = editor_of(layer=1, writing=Steps(steps=200))
    taught = [replace(edit, target=target) for edit, target in zip(edits, SPOKEN, strict=True)]
    write(editor, taught)
    prompts, owners = [edit.prompt for edit in taught], editor.owner_choice([edit.id for edit in taught])
    assert answers(editor.edited, prompts, owners, 30) == SPOKEN, "the premise"
    return editor, prompts, owners


def generated(model: Any, prompts: list[str], targets: list[str], memory: torch.Tensor) -> list[bool]:
    """The definition: the greedy answer, two tokens past the target, is the same answer as the target."""
    pairs = zip(prompts, targets, strict=True)
    limits = [len(model.forms.encode(prompt, target).target) + 2 for prompt, target in pairs]
    found = answers(model, prompts, memory, limits)
    return [same_answer(a, b) for a, b in zip(found, targets, strict=True)]


@given(st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answered_is_what_generation_says_of_any_target(said, data):
    """Targets near what is said, cut and glued anywhere, and memories at random."""
    editor, prompts, owners = said
    signs = st.text(st.sampled_from("aZß .,é\u0301\u0327ﬁ東🙂İ"), max_size=3)
    targets, memory = [], []
    for text, owner in zip(SPOKEN, owners.tolist(), strict=True):
        change = data.draw(st.sampled_from(CHANGES))
        kept = data.draw(st.integers(0, len(text)))
        targets.append(change(text[:kept]) + data.draw(signs) + data.draw(st.sampled_from(["", text[kept:]])))
        memory.append(data.draw(st.sampled_from([owner, owner, owner, BASE, 1])))
    chosen = torch.tensor(memory)
    expected = generated(editor.edited, prompts, targets, chosen)
    assert answered(editor.edited, prompts, targets, chosen) == expected
