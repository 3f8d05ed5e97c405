"""The two protocols against slow loops over plain transformers models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from repair_lightning.data.tokenizing import encode
from repair_lightning.evaluation.correctness import correctness
from repair_lightning.evaluation.protocols import (
    answers,
    forced_choice,
    forced_tokens,
    normalise,
    perplexity,
    token_share,
)
from repair_lightning.types import BASE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Rembrandt\tvan \n Rijn. ", "rembrandt van rijn"),
        ("PARIS", "paris"),
        ("Paris...", "paris"),
        ("Paris .", "paris"),
        ("St. John", "st. john"),  # a full stop inside stays
        ("Straße", "strasse"),
        ("e\u0301te\u0301", "été"),  # composed
        ("①", "1"),
        ("3.5", "3.5"),
        ("", ""),
        ("?", "?"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("found", "expected", "share"),
    [([1, 2, 3, 4], [1, 2, 9, 4], 0.75), ([1], [1], 1.0), ([2], [1], 0.0), ([], [], 0.0)],
)
def test_token_share(found, expected, share):
    assert token_share(found, expected) == share


def test_token_rows_of_two_lengths_are_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        token_share([1, 2], [1])


def test_forced_choice_is_what_was_given():
    choice = forced_choice(torch.tensor([2, BASE]))
    assert choice.memory.tolist() == [2, BASE]
    assert choice.nearest == (None, None)


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


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_answers_do_not_depend_on_the_batch(written, asked, batch_size):
    editor, _ = written
    prompts, _, memory = asked
    assert answers(editor.edited, prompts, memory, 12, batch_size) == answers(editor.edited, prompts, memory, 12)


def test_each_answer_has_its_own_limit(written, plain, asked):
    editor, _ = written
    prompts, _, memory = asked
    limits = [1 + i % 4 for i in range(len(prompts))]
    found = answers(editor.edited, prompts, memory, limits, batch_size=1)
    for prompt, chosen, text, limit in zip(prompts, memory.tolist(), found, limits, strict=True):
        assert text == slow_answer(plain(chosen), editor.tokenizer, prompt, limit)


def test_nothing_asked(written):
    editor, _ = written
    nobody = torch.zeros(0, dtype=torch.long)
    assert answers(editor.edited, [], nobody, 8) == []
    assert forced_tokens(editor.edited, [], [], nobody) == []


def slow_logits(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[torch.Tensor, list[int]]:
    """Logits at each target position, and the target's ids with their end."""
    row = encode(tokenizer, prompt, target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return logits[len(row.prompt) - 1 : -1], list(row.target)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_forced_tokens_are_the_plain_models(written, plain, asked, batch_size):
    editor, _ = written
    prompts, targets, memory = asked
    found = forced_tokens(editor.edited, prompts, targets, memory, batch_size)
    for prompt, target, chosen, tokens in zip(prompts, targets, memory.tolist(), found, strict=True):
        logits, expected = slow_logits(plain(chosen), editor.tokenizer, prompt, target)
        assert tokens == logits.argmax(-1).tolist()
        assert len(tokens) == len(expected)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_perplexity_is_the_plain_models(written, plain, asked, batch_size):
    """exp of the mean negative log likelihood over all target tokens, not a mean of means."""
    editor, _ = written
    prompts, targets, memory = asked
    total, count = 0.0, 0
    for prompt, target, chosen in zip(prompts, targets, memory.tolist(), strict=True):
        logits, expected = slow_logits(plain(chosen), editor.tokenizer, prompt, target)
        logs = logits.log_softmax(-1)
        total -= sum(float(logs[i, token]) for i, token in enumerate(expected))
        count += len(expected)
    found = perplexity(editor.edited, prompts, targets, memory, batch_size)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)


def test_correctness_is_exact_match_on_the_edits_own_prompt(written, plain):
    editor, stream = written
    nobody = torch.full((8,), BASE)
    for memory in (None, nobody, torch.zeros(8, dtype=torch.long)):
        chosen = editor.choose([edit.prompt for edit in stream.edits]).memory if memory is None else memory
        found = correctness(editor, stream.edits, memory=memory)
        for edit, shard in zip(stream.edits, chosen.tolist(), strict=True):
            said = slow_answer(plain(shard), editor.tokenizer, edit.prompt, 40)
            assert found[edit.id] == float(normalise(said) == normalise(edit.target))
    assert set(correctness(editor, stream.edits).values()) == {1.0}
    assert set(correctness(editor, stream.edits, memory=nobody).values()) == {0.0}


def test_an_answer_that_does_not_stop_is_wrong(written):
    """The target is a prefix of what the model says: exact match sees the rest."""
    editor, stream = written
    edit = next(edit for edit in stream.edits if " " in edit.target)
    shorter = replace(edit, target=edit.target.split()[0])
    owner = torch.tensor([stream.ledger.owner_of(edit.id)])
    assert correctness(editor, [edit], memory=owner) == {edit.id: 1.0}
    assert correctness(editor, [shorter], memory=owner) == {edit.id: 0.0}


def test_teacher_forced_correctness_is_a_share(written, plain):
    editor, stream = written
    nobody = torch.full((8,), BASE)
    found = correctness(editor, stream.edits, "teacher_forced", nobody)
    for edit in stream.edits:
        logits, expected = slow_logits(plain(BASE), editor.tokenizer, edit.prompt, edit.target)
        assert found[edit.id] == token_share(logits.argmax(-1).tolist(), expected)
