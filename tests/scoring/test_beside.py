"""What is scored beside the four kinds of prompts: every figure by hand, from what is known to be said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from repair_lightning.scoring import protocols
from repair_lightning.scoring.beside import age, beside_scores, negation, old_answer
from repair_lightning.scoring.follow import follow_scores
from repair_lightning.scoring.in_text import ASKED, entropy, requests, text_scores
from repair_lightning.scoring.probability import probability_scores
from repair_lightning.scoring.protocols import still_says
from repair_lightning.types import BASE, Edit, Further, Probe


@pytest.fixture(scope="module")
def model(written) -> Any:
    return written[0].edited


@pytest.fixture(scope="module")
def edits(written, model) -> list[Edit]:
    """Four edits whose prompts are answered with their targets."""
    found = list(written[1].edits[:4])
    _, said = protocols.routed_answers(model, [edit.prompt for edit in found], 32)
    assert said == [edit.target for edit in found], "the premise"
    return found


@pytest.fixture(scope="module")
def base_says(model):
    return lambda prompts: protocols.answers(model, prompts, torch.full((len(prompts),), BASE), 32)


def test_portability_with_and_without_questions_that_state_the_answer(model, edits):
    """Two sorts. Of the first one is right by its second answer, one wrong; the one of the other is right and states
    its first answer, the subject."""
    a, b = edits[:2]
    asked = (
        Further("portability/Reasoning", a.prompt, ("Zarn", a.target)),
        Further("portability/Reasoning", b.prompt, ("Zarn",)),
        Further("portability/Aliasing", b.prompt, (str(b.subject), b.target)),
    )
    found, rows = follow_scores(model, [replace(a, further=asked)])
    assert found["portability"] == {
        "all": {"asked": 3, "with_leak": pytest.approx(2 / 3), "without_leak": 0.5},
        "Reasoning": {"asked": 2, "with_leak": 0.5, "without_leak": 0.5},
        "Aliasing": {"asked": 1, "with_leak": 1.0, "without_leak": None},
    }
    assert [(row["answer"], row["contains"], row["leaks"]) for row in rows] == [
        (a.target, True, False),
        (b.target, False, False),
        (b.target, True, True),
    ]
    assert found["multi_hop"] is None
    assert found["personas"] is None


def test_hops_are_counted_by_case_and_personas_by_question(model, edits):
    """Three cases: the first, of two edits, has one right of two, the next both, the last none."""
    a, b, c, d = edits
    half = (Further("multi_hop", a.prompt, (a.target,)), Further("multi_hop", b.prompt, ("Zarn",)))
    both = (Further("multi_hop/1", b.prompt, ("Zarn", b.target)), Further("multi_hop/1", c.prompt, (c.target,)))
    none = (Further("multi_hop/2", c.prompt, ("Zarn",)),)
    personas = (Further("persona", d.prompt, (d.target,)), Further("persona", d.prompt, (f"{d.target} or so",)))
    records = [replace(a, further=half), replace(b, further=half), replace(c, further=(*both, *none))]
    found, rows = follow_scores(model, [*records, replace(d, further=personas)])
    assert found["multi_hop"] == {
        "cases": 3,
        "any_of_3": pytest.approx(2 / 3),
        "all_of_3": pytest.approx(1 / 3),
    }
    assert found["personas"] == 0.5
    assert found["portability"] is None
    assert len(rows) == 9


def test_what_the_base_cannot_be_asked_is_left_out_and_said(model, edits, caplog):
    """A dialogue, without a template; and more tokens than the base reads."""
    dialogue = '[{"role": "user", "content": "Who?"}]'
    asked = [Further("persona", text, ("x",)) for text in (dialogue, "word " * 5000, edits[0].prompt)]
    _, rows = follow_scores(model, [replace(edits[0], further=tuple(asked))])
    assert [row["prompt"] for row in rows] == [edits[0].prompt]
    assert "2 further questions cannot be asked of this base" in caplog.text


def test_the_old_answer_is_looked_for_outside_of_the_new_one():
    assert still_says("It is in York.", "York", ["New York"])
    assert not still_says("It is in new york.", "York", ["New York"])
    assert still_says("New York, not York", "York", ["New York"])
    assert not still_says("Yorkshire", "York", ["Leeds"])
    assert not still_says("the big apple", "apple", ["New York", "the Big Apple"])


def test_old_answers_and_age_come_from_what_was_said_already():
    """Of seven edits, the places of the fifths are 0 0 1 2 2 3 4; the third is not scored."""
    edits = [Edit(f"e{i}", f"p{i}", "new", old_answer=None if i == 6 else "old") for i in range(7)]
    said = {"e0": "new", "e1": "old", "e3": "old", "e4": "new", "e5": "new", "e6": "old"}
    rows = [{"id": id, "kind": "edit", "answer": text, "correct": text == "new"} for id, text in said.items()]
    rows += [{"id": "e0", "kind": "rephrase", "answer": "the old one", "correct": False}]
    rows += [{"id": "e0", "kind": "near", "answer": "old", "correct": True}]
    assert old_answer(edits, rows) == 3 / 6
    assert old_answer([replace(edit, old_answer=None) for edit in edits], rows) is None
    assert age(edits, rows) == [
        {"edits": 2, "rel": 0.5, "gen": 0.0},
        {"edits": 0, "rel": None, "gen": None},
        {"edits": 2, "rel": 0.5, "gen": None},
        {"edits": 1, "rel": 1.0, "gen": None},
        {"edits": 1, "rel": 0.0, "gen": None},
    ]


def test_a_text_is_asked_for_in_the_records_words_or_our_own():
    own = (Further("multi_hop", "Who?", ("x",)), Further("generation", "Mara plays the", ("x",)))
    edits = [Edit("a", "p", "t", "Mara", further=own), Edit("b", "p", "t", "Orsk"), Edit("c", "p", "t")]
    assert [(edit.id, text) for edit, text in requests(edits)] == [
        ("a", "Mara plays the"),
        ("b", ASKED[1].format("Orsk")),
    ]


def test_texts_hold_the_new_answer_or_the_old_one(model, edits, base_says):
    """The first text is an edit's target; the second the base's answer to a neighbour, where that is the old one; the
    third the same, of an edit that says nothing of what it replaces."""
    a, b, c, _ = edits
    near = b.near[0].prompt
    own, other = base_says([a.prompt, near])
    ask = lambda prompt: (Further("generation", prompt, ("x",)),)  # noqa: E731
    records = [
        replace(a, old_answer=own, further=ask(a.prompt)),
        replace(b, old_answer=other, target="Zarn", further=ask(near)),
        replace(c, target=other, further=ask(near)),
    ]
    found, rows = text_scores(model, records)
    assert own not in (a.target, other)
    assert found["in_text"] == {
        "asked": 3,
        "new": pytest.approx(2 / 3),
        "new_before": pytest.approx(1 / 3),
        "without_old": 0.5,
        "both": 0.5,
    }
    assert [(row["answer"], row["base_answer"]) for row in rows] == [(a.target, own), (other, other), (other, other)]
    before, after = (sum(map(entropy, texts)) / 2 for texts in ((own, other), (a.target, other)))
    assert found["fluency"] == pytest.approx({"before": before, "after": after})
    assert text_scores(model, [replace(a, subject=None)]) == ({"in_text": None, "fluency": None}, [])


def test_entropy_by_hand():
    """`a b a b`: bigrams ab twice, ba once, 0.9183 bits; trigrams aba, bab, 1 bit."""
    assert entropy("a b a b") == pytest.approx((2 / 3 * 0.9182958 + 4 / 3 * 1) / 2)
    assert entropy("word") == entropy("") == entropy("no no no no") == 0.0


def test_success_by_probability_is_what_plain_models_say(model, plain, written, edits, base_says):
    """ES, PS and NS from logits of the base, or of the base plus the shard that the router chooses."""
    editor = written[0]
    olds = base_says([edit.prompt for edit in edits])
    records = [replace(edit, old_answer=old) for edit, old in zip(edits[:3], olds, strict=False)]
    records[0] = replace(records[0], near=(Probe(edits[0].near[0].prompt, None),))

    def mean_log(prompt: str, answer: str) -> float:
        memory = int(model.choose([prompt]).memory[0])
        row = editor.edited.forms.encode(prompt, answer)
        with torch.no_grad():
            logits = plain(memory)(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        said = row.target[:-1]
        places = range(len(row.prompt) - 1, len(row.prompt) - 1 + len(said))
        return sum(float(logits[i, token]) for i, token in zip(places, said, strict=True)) / len(said)

    marks: dict[str, list[bool]] = {"es": [], "ps": [], "ns": []}
    for edit in records:
        new, old = edit.target, str(edit.old_answer)
        marks["es"].append(mean_log(edit.prompt, new) > mean_log(edit.prompt, old))
        marks["ps"] += [mean_log(text, new) > mean_log(text, old) for text in edit.rephrases]
        marks["ns"] += [mean_log(one.prompt, one.answer or old) > mean_log(one.prompt, new) for one in edit.near]
    expected = {name: sum(found) / len(found) for name, found in marks.items()}
    assert probability_scores(model, [*records, edits[3]]) == pytest.approx(expected)
    assert expected["es"] == 1.0
    assert probability_scores(model, edits) is None
    swapped = [replace(edit, target=str(edit.old_answer), old_answer=edit.target) for edit in records]
    assert probability_scores(model, swapped)["es"] == 0.0


def test_denied_prompts_keep_the_bases_answer(written, model, edits, base_says, monkeypatch):
    """Clozes alone, and the subject keeps its capital. Where a shard is made to answer, it shows."""
    records = [
        replace(edits[0], prompt=f"{edits[0].subject} always writes letters in"),
        edits[0],
        replace(edits[2], prompt="Who is it?"),
        replace(edits[3], prompt="Nobody has never said"),
    ]
    prompts = [
        f"It is not true that {edits[0].subject} always writes letters in",
        f"It is not true that letters from {edits[0].subject} are always written in",
    ]
    real, asked, owner = model.choose, [], written[0].ledger.owner_of(edits[0].id)

    def choose(texts):
        asked.append(list(texts))
        shards = [owner if text == prompts[1] else BASE for text in texts]
        return replace(real(texts), memory=torch.tensor(shards, dtype=torch.long))

    monkeypatch.setattr(model, "choose", choose)
    (now,) = protocols.answers(model, prompts[1:], torch.tensor([owner]), 16)
    (before,) = base_says(prompts[1:])
    found, rows = negation(model, records)
    assert asked[0] == prompts
    assert now != before, "the premise: the shard says something else"
    assert found == {"asked": 2, "fires": 0.5, "kept": 0.5}
    assert [(row["answer"], row["base_answer"]) for row in rows] == [(now, before)]
    assert negation(model, records[2:]) == (None, [])


def test_a_base_that_was_written_into_is_asked_again(editor_of, write):
    """No shard answers; what is said now is compared with what the base's own weights say."""
    editor = editor_of("llama", "ft", lr=0.02, steps=100, norm_constraint=0.5)
    edits = [Edit(f"e{i}", f"The employer of {name} was", "Oslo", name) for i, name in enumerate(("Mara", "Piet"))]
    write(editor, edits)
    assert editor.base_changed
    found, rows = negation(editor.edited, edits, base_changed=True)
    assert found["fires"] == 0.0
    assert [row["kept"] for row in rows] == [row["answer"] == row["base_answer"] for row in rows]
    assert found["kept"] == sum(row["kept"] for row in rows) / 2 < 1
    _, texts = text_scores(editor.edited, edits, base_changed=True)
    assert any(row["answer"] != row["base_answer"] for row in texts)


def test_nothing_is_asked_where_it_is_turned_off(model, edits):
    found, rows = beside_scores(model, edits, edits, [], forms=0, further=0)
    assert {row["kind"] for row in rows} == {"same_subject"}
    assert set(found) == {"forms", "same_subject", "op_interval", "old_answer", "age"}
    asked, rows = beside_scores(model, edits, edits, [], forms=0, further=2)
    assert {row["kind"] for row in rows} <= {"generation", "negation", "same_subject"}
    assert asked["in_text"]["asked"] == 1
