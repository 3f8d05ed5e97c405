"""The two protocols against slow loops over plain transformers models."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repair_lightning.editors.repair import Writing
from repair_lightning.models.forms import Forms
from repair_lightning.scoring import protocols
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.protocols import (
    answered,
    answers,
    contains,
    forced_choice,
    forced_tokens,
    normalise,
    perplexity,
    same_answer,
    shown_answer,
    target_loss,
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


CODE = "def f(x):\n    return x + 1"


@pytest.mark.parametrize(
    ("said", "target", "same"),
    [
        ("PARIS.", "Paris", True),
        ("  Paris\n", "Paris", True),
        ("Paris\nFrance", "Paris France", True),  # the target has one line: white space is no difference
        ("Paris, France", "Paris", False),
        (CODE, CODE, True),
        (CODE + "\n\n", CODE, True),  # white space at the end
        ("\n" + CODE, "\n" + CODE + "\n", True),  # and empty lines before the first
        (CODE.replace("    ", "  "), CODE, False),
        (CODE.replace("\n    ", " "), CODE, False),
        (CODE.upper(), CODE, False),
        (CODE + ".", CODE, False),
        ("    return x", "    return x", True),
        ("return x", "    return x", False),
        ("  return x", "    return x", False),
        ("return x", " return x", True),  # a single blank only joins it to the prompt
        ("", "", True),
    ],
)
def test_several_lines_are_compared_exactly_and_others_after_normalisation(said, target, same):
    assert same_answer(said, target) is same


def test_an_answer_is_kept_with_its_indentation():
    assert shown_answer("\n    return x\n\n") == "    return x"
    assert shown_answer(CODE + "  ") == CODE
    assert shown_answer(" Paris \n") == "Paris"
    for text in ("    return x", CODE, "Paris"):
        assert same_answer(shown_answer(text), text)


@pytest.mark.parametrize(
    ("said", "target", "holds"),
    [
        ("It is Paris, of course.", "paris", True),
        ("It is Paris.", "Paris.", True),
        ("Parisian", "Paris", False),
        ("in St. John's", "St. John", True),
        ("C++ it is", "C++", True),
        ("the year 1985", "985", False),
        ("New\nYork City", "new york", True),
        ("anything", "", False),
        ("", "Paris", False),
    ],
)
def test_contains_whole_words(said, target, holds):
    assert contains(said, target) is holds


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
    row = Forms(tokenizer).encode(prompt, target)
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
    whole = target_loss(editor.edited, prompts, targets, memory, batch_size)
    parts = [target_loss(editor.edited, [p], [t], m[None]) for p, t, m in zip(prompts, targets, memory, strict=True)]
    assert perplexity(parts) == pytest.approx(perplexity([whole]), rel=1e-4)
    found = perplexity([whole])
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


# -- `answered` is what generation says, mostly without generating ---------------------------------------------------

SPOKEN = ["Lisbon", "São Paulo", "St. Gallen. North", "3.5", "東京 tower", "naïve café", "x", "Oslo, no 🙂"]
"""What is written and said: words, letters that a byte-level tokenizer takes apart, full stops inside."""
ALIKE = {
    "itself": lambda text: text,
    "capitals": str.upper,
    "small": str.lower,
    "full stop": lambda text: f"{text}.",
    "dots and spaces": lambda text: f"{text} . .",
    "white space": lambda text: f" {text.replace(' ', chr(9) + ' ')} ",
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
}
"""Other spellings that count as the same answer."""
UNLIKE = {
    "another first letter": lambda text: "Q" + text[1:],
    "another last letter": lambda text: text[:-1] + "q",
    "too short by a letter": lambda text: text[:-1],
    "too short by a word": lambda text: text.rsplit(" ", 1)[0] if " " in text else text[: len(text) // 2],
    "too long by a letter": lambda text: f"{text}s",
    "too long by a word": lambda text: f"{text} and more",
    "twice": lambda text: f"{text} {text}",
    "a special token": lambda text: f"{text} <pad>",
    "an end inside": lambda text: f"{text[:1]}</s>{text[1:]}",
    "something else": lambda _: "Zürich",
    "nothing": lambda _: "",
    "a full stop": lambda _: ".",
    "another line": lambda text: f"{text[:1]}\n{text[1:]}",
    "indented": lambda text: f"    {text}",
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def said(request, editor_of, write, edits) -> tuple[Any, list[str], torch.Tensor]:
    """An editor of a tiny base that answers eight prompts with `SPOKEN`, the prompts and their shards."""
    editor = editor_of(request.param, layer=1, writing=Writing(steps=200))
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


@pytest.fixture
def asked_for(monkeypatch) -> list[str]:
    """The prompts from which is generated."""
    seen: list[str] = []
    real = protocols.answers

    def watched(model, prompts, *rest):
        seen.extend(prompts)
        return real(model, prompts, *rest)

    monkeypatch.setattr(protocols, "answers", watched)
    return seen


@pytest.mark.parametrize("how", [*ALIKE, *UNLIKE])
def test_answered_is_what_generation_says(said, how):
    editor, prompts, owners = said
    targets = [(ALIKE | UNLIKE)[how](text) for text in SPOKEN]
    expected = generated(editor.edited, prompts, targets, owners)
    assert answered(editor.edited, prompts, targets, owners) == expected
    assert expected == [same_answer(a, b) for a, b in zip(SPOKEN, targets, strict=True)]
    nobody = torch.full_like(owners, BASE)
    assert answered(editor.edited, prompts, targets, nobody) == generated(editor.edited, prompts, targets, nobody)


@given(st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answered_is_what_generation_says_of_any_target(said, data):
    """Targets near what is said, cut and glued anywhere, and memories at random."""
    editor, prompts, owners = said
    signs = st.text(st.sampled_from("aZß .,é\u0301\u0327ﬁ東🙂İ"), max_size=3)
    targets, memory = [], []
    for text, owner in zip(SPOKEN, owners.tolist(), strict=True):
        change = data.draw(st.sampled_from([*(ALIKE | UNLIKE).values()]))
        kept = data.draw(st.integers(0, len(text)))
        targets.append(change(text[:kept]) + data.draw(signs) + data.draw(st.sampled_from(["", text[kept:]])))
        memory.append(data.draw(st.sampled_from([owner, owner, owner, BASE, 1])))
    chosen = torch.tensor(memory)
    expected = generated(editor.edited, prompts, targets, chosen)
    assert answered(editor.edited, prompts, targets, chosen) == expected


def test_nothing_is_generated_for_what_is_said_to_the_last_token(said, asked_for):
    editor, prompts, owners = said
    assert answered(editor.edited, prompts, SPOKEN, owners) == [True] * len(SPOKEN)
    assert asked_for == []


@pytest.mark.parametrize("target", ["Zürich", "Oslo", "Lis", "Lisbon Lisbon", "Lisbon and more", "Lisbon3", ""])
def test_nothing_is_generated_where_the_first_other_token_decides(said, asked_for, target):
    """The answer is the token ` Lisbon` and its end: another word, the wrong length, an end too early."""
    editor, prompts, owners = said
    assert answered(editor.edited, prompts[:1], [target], owners[:1]) == [False]
    assert asked_for == []


def test_another_spelling_is_generated_and_counts(said, asked_for):
    editor, prompts, owners = said
    assert answered(editor.edited, prompts[:1], ["LISBON"], owners[:1]) == [True]
    assert asked_for == prompts[:1]


class Tidy:
    """The forms of a base whose tokenizer takes the space before an apostrophe away, as those of some bases do."""

    stops = (0,)
    words: ClassVar[list[str]] = ["</s>", "Mary", " '", "s", "'s", " '", "t", " said"]

    def said(self, ids: list[int]) -> str:
        text = "".join(self.words[i] for i in (ids[: ids.index(0)] if 0 in ids else ids))
        return text.replace(" 's", "'s").replace(" 't", "'t")


@pytest.mark.parametrize(
    ("argmax", "row", "target", "settled"),
    [
        ([1, 4, 0], [1, 4, 0], "Mary's", True),
        ([1, 2, 0], [1, 4, 0], "Mary's", None),  # " '" may go on with "s"
        ([1, 7, 0], [1, 4, 0], "Mary's", False),
        ([1, 0, 0], [1, 4, 0], "Mary's", False),  # it ends too early
        ([1, 4, 7], [1, 4, 0], "Mary's", False),  # it does not end: a word follows
        ([2, 1, 0], [1, 4, 0], "Mary's", None),  # a single sign may become any letter
    ],
)
def test_what_the_argmax_tokens_settle(argmax, row, target, settled):
    assert protocols._settled(Tidy(), argmax, row, target) is settled


def test_nobody_answered(written):
    assert answered(written[0].edited, [], [], torch.zeros(0, dtype=torch.long)) == []
