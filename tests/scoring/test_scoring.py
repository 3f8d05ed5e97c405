"""The scorer on hand-made routings: every figure follows from what plain models say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from repair_lightning.scoring.protocols import normalise, token_share
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.types import BASE, Probe


@pytest.fixture(scope="module")
def edits(written):
    """Three edits: one with all its prompts, one whose probes have no answers, one with nothing but itself."""
    _, stream = written
    a, b, c = stream.edits[:3]
    bare = replace(c, rephrases=(), locality=(), near=())
    return [a, replace(b, locality=(Probe(b.locality[0].prompt),), near=(Probe(b.near[0].prompt, None),)), bare]


@pytest.fixture(scope="module")
def scorer(written, edits):
    return Scorer(written[0].edited, edits)


@pytest.fixture(scope="module")
def owners(written, scorer):
    return written[0].owner_choice([question.edit for question in scorer.questions])


def mixed(owners: torch.Tensor) -> torch.Tensor:
    """A routing with everything in it: right shard, wrong shard and base for each kind in turn."""
    wrong = 1 - owners
    base = torch.full_like(owners, BASE)
    return torch.stack([owners, base, wrong])[torch.arange(len(owners)) % 3, torch.arange(len(owners))]


@pytest.mark.parametrize("routing", ["owners", "mixed"])
def test_every_figure_is_what_plain_models_say(written, plain, scorer, owners, routing):
    editor, _ = written
    memory = {"owners": owners, "mixed": mixed(owners)}[routing]
    result = scorer.score("stage", memory, owners)
    exact: dict[str, list[float]] = {}
    share: dict[str, list[float]] = {}
    held: list[bool] = []
    strange: list[bool] = []
    for i, question in enumerate(scorer.questions):
        said, own = (say(plain(m), editor, question.prompt, scorer.max_new_tokens) for m in (int(memory[i]), BASE))
        fed = question.expected or own or "."
        tokens, base_tokens = (force(plain(m), editor, question.prompt, fed) for m in (int(memory[i]), BASE))
        target = editor.edited.forms.encode(question.prompt, fed).target
        right, right_tokens = (own, base_tokens) if question.keeps_base else (question.expected, target)
        kind = {"edit": "rel", "rephrase": "gen", "locality": "loc", "near": "near"}[question.kind]
        exact.setdefault(kind, []).append(float(normalise(said) == normalise(right)))
        held += [normalise(question.expected) in normalise(said)] if kind == "rel" else []
        fed_differs = normalise(said) != normalise(question.expected or "nothing was expected")
        strange.append(int(memory[i]) != BASE and said != own and fed_differs)
        share.setdefault(kind, []).append(token_share(tokens, right_tokens))
        row = result.rows[i]
        assert (row["answer"], row["base_answer"], row["correct"]) == (said, own, bool(exact[kind][-1]))
        assert row["teacher_forced"] == pytest.approx(share[kind][-1], abs=1e-6)
        known = {"id": question.edit, "kind": question.kind, "prompt": question.prompt, "memory": int(memory[i])}
        assert (known | {"stage": "stage"}).items() <= row.items()
    for protocol, parts in (("autoregressive", exact), ("teacher_forced", share)):
        means = {kind: sum(values) / len(values) for kind, values in parts.items()}
        op = (means["rel"] * means["gen"] * means["loc"]) ** (1 / 3)
        free = protocol == "autoregressive"
        beside = {"contains": sum(held) / len(held), "garbled": sum(strange) / len(strange)}
        expected = means | {"op": op} | (beside if free else dict.fromkeys(beside))
        assert result.scores[protocol] == pytest.approx(expected)
    json.dumps(result.rows, allow_nan=False)
    if routing == "owners":
        assert result.scores["autoregressive"]["rel"] == 1.0, "the premise: the edits were written"


def say(model, editor, prompt: str, limit: int) -> str:
    ids = editor.tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=limit, do_sample=False, pad_token_id=editor.tokenizer.pad_token_id)
    return editor.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def force(model, editor, prompt: str, target: str) -> list[int]:
    row = editor.edited.forms.encode(prompt, target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    return logits[len(row.prompt) - 1 : -1].argmax(-1).tolist()


def test_routing_confusion(scorer, owners):
    """By hand: kinds in the order of the questions, base every second of three, the wrong shard every third."""
    memory = mixed(owners)
    confusion = scorer.score("stage", memory, owners).routing
    for kind, shares in confusion.items():
        index = [i for i, question in enumerate(scorer.questions) if question.kind == kind]
        counts = [sum(i % 3 == rest for i in index) for rest in (1, 0, 2)]
        expected = [count / len(index) for count in counts]
        assert [shares["base"], shares["right"], shares["wrong"]] == pytest.approx(expected)
        assert sum(shares.values()) == pytest.approx(1.0)


def test_a_changed_base_is_measured_against_the_old_one(written, edits):
    """After a merge into W_v prompts are routed to the base, but its replies are new ones."""
    editor, _ = written
    scorer = Scorer(editor.edited, edits)
    nobody = torch.full((len(scorer.questions),), BASE)
    before = scorer.score("before", nobody, nobody)
    owner = editor.ledger.owner_of(edits[0].id)
    try:
        editor.edited.weights.add(editor.layer, editor.memory[owner].delta.detach())
        after = scorer.score("after", nobody, nobody, fresh=True)
    finally:
        editor.edited.weights.restore()
    shard = scorer.score("shard", torch.full_like(nobody, owner), nobody)
    assert [row["answer"] for row in after.rows] == [row["answer"] for row in shard.rows]
    assert after.scores == shard.scores != before.scores
    assert [row["base_answer"] for row in after.rows] == [row["answer"] for row in before.rows]


def test_the_oracle_sends_an_edits_prompts_to_its_owner_and_the_rest_to_the_base(scorer, owners):
    result = scorer.by_oracle(owners)
    for question, owner, row in zip(scorer.questions, owners.tolist(), result.rows, strict=True):
        assert row["memory"] == (owner if question.kind in ("edit", "rephrase") else BASE)
    routing = result.routing
    assert routing["edit"]["right"] == routing["rephrase"]["right"] == 1.0
    assert routing["locality"]["base"] == routing["near"]["base"] == 1.0


def test_what_was_said_is_kept_for_as_long_as_its_shard_holds_the_same(written, edits, owners):
    """After a change in place the rows are those of a scorer without a past; changed back, those from before."""
    shard = written[0].memory[int(owners[0])]
    settled, choice = Scorer(written[0].edited, edits), owners
    before = settled.score("stage", choice, owners).rows
    try:
        shard.delta.data.neg_()
        found = settled.score("stage", choice, owners).rows
        assert found == Scorer(written[0].edited, edits).score("stage", choice, owners).rows != before
    finally:
        shard.delta.data.neg_()
    assert settled.score("stage", choice, owners).rows == before
