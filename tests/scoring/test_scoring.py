"""The scorer on hand-made routings: every figure follows from what plain models say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from repair_lightning.memory.query import Choice
from repair_lightning.scoring import protocols
from repair_lightning.scoring import scorer as scoring
from repair_lightning.scoring.protocols import forced_choice, normalise, token_share
from repair_lightning.scoring.scorer import Question, Scorer, oracle_choice, questions_of
from repair_lightning.types import BASE, Edit, Probe


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


def test_questions_in_order():
    edit = Edit("e", "P", "T", None, ("R1", "R2"), (Probe("L", "a"),), (Probe("N"),))
    assert questions_of([edit]) == [
        Question("e", "edit", "P", "T"),
        Question("e", "rephrase", "R1", "T"),
        Question("e", "rephrase", "R2", "T"),
        Question("e", "locality", "L", "a"),
        Question("e", "near", "N", None),
    ]
    assert [question.keeps_base for question in questions_of([edit])] == [False, False, False, True, True]


def mixed(owners: torch.Tensor) -> torch.Tensor:
    """A routing with everything in it: right shard, wrong shard and base for each kind in turn."""
    wrong = 1 - owners
    base = torch.full_like(owners, BASE)
    return torch.stack([owners, base, wrong])[torch.arange(len(owners)) % 3, torch.arange(len(owners))]


@pytest.mark.parametrize("routing", ["owners", "base", "mixed"])
def test_every_figure_is_what_plain_models_say(written, plain, scorer, owners, routing):
    editor, _ = written
    memory = {"owners": owners, "base": torch.full_like(owners, BASE), "mixed": mixed(owners)}[routing]
    result = scorer.score("stage", forced_choice(memory), owners)
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
        assert (row["id"], row["kind"], row["prompt"], row["memory"], row["stage"]) == (
            question.edit,
            question.kind,
            question.prompt,
            int(memory[i]),
            "stage",
        )
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
    if routing == "base":
        assert result.scores["autoregressive"]["loc"] == result.scores["autoregressive"]["near"] == 1.0


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
    confusion = scorer.score("stage", forced_choice(memory), owners).routing
    for kind, shares in confusion.items():
        index = [i for i, question in enumerate(scorer.questions) if question.kind == kind]
        counts = [sum(i % 3 == rest for i in index) for rest in (1, 0, 2)]
        expected = [count / len(index) for count in counts]
        assert [shares["base"], shares["right"], shares["wrong"]] == pytest.approx(expected)
        assert sum(shares.values()) == pytest.approx(1.0)


def test_kinds_that_do_not_occur_have_no_figures(written, edits):
    editor, _ = written
    alone = Scorer(editor.edited, edits[2:])
    owners = torch.tensor([0])
    result = alone.score("stage", forced_choice(owners), owners)
    assert (result.routing["rephrase"], result.routing["locality"], result.routing["near"]) == (None, None, None)
    assert [result.scores["autoregressive"][kind] for kind in ("gen", "loc", "near", "op")] == [None] * 4


@pytest.fixture
def spy(monkeypatch):
    """Counts the prompts that are generated from and fed; the real functions do the work."""
    seen: dict[str, list[str]] = {"answers": [], "forced_tokens": []}
    real = {name: getattr(protocols, name) for name in seen}

    def watch(name):
        def watched(model, prompts, *rest):
            seen[name].extend(prompts)
            return real[name](model, prompts, *rest)

        return watched

    for name in seen:
        monkeypatch.setattr(scoring.protocols, name, watch(name))
    return seen


def test_base_replies_are_reused_for_base_routed_prompts_alone(written, edits, owners, spy):
    editor, _ = written
    scorer = Scorer(editor.edited, edits)
    memory = mixed(owners)
    everything = [question.prompt for question in scorer.questions]
    routed = [everything[i] for i in range(len(memory)) if memory[i] != BASE]
    scorer.score("a", forced_choice(memory), owners)
    assert spy["answers"] == spy["forced_tokens"] == everything + routed
    scorer.score("b", forced_choice(torch.full_like(memory, BASE)), owners)
    assert spy["answers"] == everything + routed
    scorer.score("c", forced_choice(memory), owners, fresh=True)  # the base itself has changed: ask all
    assert spy["answers"] == spy["forced_tokens"] == everything + routed + everything


class TestAskedAgain:
    """What was said is kept for as long as the memory that said it holds the same."""

    @pytest.fixture
    def settled(self, written, edits, owners, spy):
        """A scorer that has asked the base and the owners."""
        scorer = Scorer(written[0].edited, edits)
        scorer.score("first", forced_choice(owners), owners)
        self.forget(spy)
        return scorer

    def forget(self, spy):
        for seen in spy.values():
            seen.clear()

    def asked(self, spy):
        """Who was asked since, by both protocols alike."""
        assert spy["answers"] == spy["forced_tokens"]
        found = list(spy["answers"])
        self.forget(spy)
        return found

    def prompts(self, scorer, chosen=None):
        return [q.prompt for i, q in enumerate(scorer.questions) if chosen is None or chosen[i]]

    def test_an_unchanged_memory_is_not(self, settled, owners, spy):
        first = settled.score("stage", forced_choice(owners), owners)
        assert self.asked(spy) == []
        assert settled.score("stage", forced_choice(owners), owners).rows == first.rows
        assert self.asked(spy) == []

    def test_another_memory_is_for_its_questions_alone(self, settled, owners, spy):
        """Two of the questions go to the other shard; back at their own, nothing is asked."""
        other = owners.clone()
        other[[1, 4]] = 1 - owners[[1, 4]]
        settled.score("other", forced_choice(other), owners)
        assert self.asked(spy) == self.prompts(settled, other != owners)
        for memory in (owners, other):
            settled.score("again", forced_choice(memory), owners)
            assert self.asked(spy) == []

    @pytest.mark.parametrize("how", ["in place", "pruned and written anew", "another object of the same content"])
    def test_a_shard_is_when_its_content_changed(self, written, settled, edits, owners, spy, how):
        """Shard 0 alone; what is said is then what a scorer without a past says. Changed back, nothing is asked."""
        memory = written[0].memory
        before = settled.score("stage", forced_choice(owners), owners).rows
        half = owners.clone()
        half[::2] = 1 - half[::2]  # both shards are in use
        settled.score("stage", forced_choice(half), owners)
        self.forget(spy)
        snapshot, kept = memory.snapshot(), memory[0].delta.detach().clone()
        try:
            if how == "in place":
                memory[0].delta.data.neg_()
            else:
                memory.prune(0)
                memory[0].delta.data.copy_(kept if how.startswith("another") else -kept)
            found = settled.score("stage", forced_choice(half), owners)
            changed = not how.startswith("another")
            assert self.asked(spy) == (self.prompts(settled, half == 0) if changed else [])
            assert found.rows == Scorer(written[0].edited, edits).score("stage", forced_choice(half), owners).rows
            self.forget(spy)
        finally:
            memory.restore(snapshot)
            memory[0].delta.data.copy_(kept)
        assert settled.score("stage", forced_choice(owners), owners).rows == before
        assert self.asked(spy) == []

    def test_a_changed_base_is_before_and_after(self, written, settled, owners, spy):
        """With `fresh` the base's questions too, once for each content of its W_v, and so are the shards upon it."""
        editor, _ = written
        half = torch.where(torch.arange(len(owners)) % 2 == 0, owners, BASE)
        choice = forced_choice(half)
        plain = settled.score("stage", choice, owners).rows
        self.forget(spy)
        weights, layer = editor.edited.weights, editor.layer
        kept, rows = weights.matrix(layer), []
        try:
            for factor in (1.0, -1.0, 1.0):
                weights.put(layer, kept * factor)
                for time in range(2):
                    rows.append(settled.score("stage", choice, owners, fresh=True).rows)
                    first = time == 0 and len(rows) < 4
                    assert self.asked(spy) == (self.prompts(settled) if first else [])
        finally:
            weights.restore()
        assert rows[0] == rows[1] == rows[4] == rows[5] == plain
        assert rows[2] == rows[3] != plain
        assert {row["base_answer"] for row in rows[2]} == {row["base_answer"] for row in plain}


def test_a_changed_base_is_measured_against_the_old_one(written, edits):
    """After a merge into W_v prompts are routed to the base, but its replies are new ones."""
    editor, _ = written
    scorer = Scorer(editor.edited, edits)
    nobody = torch.full((len(scorer.questions),), BASE)
    before = scorer.score("before", forced_choice(nobody), nobody)
    owner = editor.ledger.owner_of(edits[0].id)
    weight = editor.edited.split.value.weight
    kept = weight.detach().clone()
    try:
        weight.data += editor.memory[owner].delta.detach()
        after = scorer.score("after", forced_choice(nobody), nobody, fresh=True)
    finally:
        weight.data.copy_(kept)
    shard = scorer.score("shard", forced_choice(torch.full_like(nobody, owner)), nobody)
    assert [row["answer"] for row in after.rows] == [row["answer"] for row in shard.rows]
    assert after.scores == shard.scores != before.scores
    assert [row["base_answer"] for row in after.rows] == [row["answer"] for row in before.rows]


def test_a_subset_shares_the_bases_replies(written, edits, scorer, owners, spy):
    _ = scorer.base
    spy["answers"].clear()
    scorer._said.clear()
    part = scorer.subset({edits[1].id})
    index = [i for i, question in enumerate(scorer.questions) if question.edit == edits[1].id]
    memory = mixed(owners)
    found = part.score("stage", forced_choice(memory[index]), owners[index])
    whole = scorer.score("stage", forced_choice(memory), owners)
    assert found.rows == [whole.rows[i] for i in index]
    assert len(spy["answers"]) == sum(memory[index] != BASE) + sum(memory != BASE)


def test_the_oracle_sends_an_edits_prompts_to_its_owner_and_the_rest_to_the_base(scorer, owners):
    choice = oracle_choice(scorer.questions, owners)
    for question, owner, chosen in zip(scorer.questions, owners.tolist(), choice.memory.tolist(), strict=True):
        assert chosen == (owner if question.kind in ("edit", "rephrase") else BASE)
    routing = scorer.score("oracle", choice, owners).routing
    assert routing["edit"]["right"] == routing["rephrase"]["right"] == 1.0
    assert routing["locality"]["base"] == routing["near"]["base"] == 1.0


def test_the_routers_choice_sees_prompts_alone(written, scorer):
    editor, _ = written
    choice = scorer.choose()
    again = editor.choose([question.prompt for question in scorer.questions])
    assert torch.equal(choice.memory, again.memory)
    assert choice.nearest == again.nearest


def test_infinite_thresholds_are_written_as_null(scorer, owners):
    rows = scorer.score("stage", Choice.base(len(owners)), owners).rows
    assert {row["threshold"] for row in rows} == {None}
    json.dumps(rows, allow_nan=False)


def test_perplexity_is_of_the_edits_own_prompts(written, edits, scorer):
    editor, _ = written
    nobody = torch.full((len(scorer.questions),), BASE)
    prompts, targets = [e.prompt for e in edits], [e.target for e in edits]
    expected = protocols.target_loss(editor.edited, prompts, targets, torch.full((3,), BASE))
    assert scorer.perplexity(nobody) == pytest.approx(protocols.perplexity([expected]))


def test_answers_are_long_enough_for_the_longest_target(written, edits):
    editor, _ = written
    long = replace(edits[0], target=" ".join(["Icelandic"] * 60))
    length = len(editor.encode(long).target)
    assert Scorer(editor.edited, [long]).max_new_tokens == length + 8 > 32
    assert Scorer(editor.edited, edits).max_new_tokens == 32
    assert Scorer(editor.edited, edits, max_new_tokens=5).max_new_tokens == 5
