"""Contexts that others wrote: who answers, how likely a continuation is, and what is said. Needs no lm_eval."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.errors import RepairError
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.continuations import (
    completions,
    cut,
    log_likelihoods,
    longest_text,
    route_contexts,
)
from repair_lightning.types import BASE


@pytest.fixture(scope="module")
def model(written) -> EditedModel:
    return written[0].edited


@pytest.fixture(scope="module")
def contexts(written) -> list[str]:
    """Edits, and prompts that no edit is about, of several lengths."""
    edits = written[1].edits
    return [text for edit in edits for text in (edit.prompt, edit.locality[0].prompt)]


@pytest.fixture(scope="module")
def rows(model, contexts) -> list[list[int]]:
    return model.tokenizer(contexts)["input_ids"]


@pytest.fixture(scope="module")
def then(written, model) -> list[list[int]]:
    texts = [f" {target}" for edit in written[1].edits for target in (edit.target, edit.locality[0].answer)]
    return model.tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def memory(written, model, rows) -> torch.Tensor:
    """What the router chose: every edit its shard, everything else the base."""
    found = route_contexts(model, rows)
    assert found.tolist()[::2] == [written[1].ledger.owner_of(edit.id) for edit in written[1].edits]
    assert set(found.tolist()[1::2]) == {BASE}
    return found


def slow(reference, context: list[int], then: list[int]) -> tuple[float, bool]:
    """The sum by hand, a plain model and a loop: one token after the other."""
    logits = reference(torch.tensor([context + then])).logits[0].detach().double()
    total, greedy = 0.0, True
    for place, token in enumerate(then, start=len(context) - 1):
        total += float(logits[place, token] - logits[place].exp().sum().log())
        greedy = greedy and int(logits[place].argmax()) == token
    return total, greedy


class TestRouting:
    def test_as_the_model_itself_routes(self, model, contexts, memory):
        assert memory.tolist() == [BASE if r.memory is None else r.memory for r in model.route(contexts)]

    def test_equal_contexts_are_asked_once(self, model, rows, memory, monkeypatch):
        asked: list[int] = []
        choose_rows = EditedModel.choose_rows
        monkeypatch.setattr(EditedModel, "choose_rows", lambda m, r: asked.append(len(r)) or choose_rows(m, r))
        assert route_contexts(model, rows * 3, batch_size=5).tolist() == memory.tolist() * 3
        assert sum(asked) == len({tuple(row) for row in rows})
        assert max(asked) == 5

    @pytest.mark.parametrize("row", [[], [1], [1, 2]])
    def test_nothing_asked_is_the_bases(self, model, rows, memory, row):
        assert route_contexts(model, [row, rows[0]]).tolist() == [BASE, int(memory[0])]

    def test_of_what_is_too_long_the_end_counts(self, model, rows):
        long = [rows[1][-1]] * 2 * longest_text(model) + rows[0]
        assert route_contexts(model, [long]).tolist() == route_contexts(model, [long[-longest_text(model) :]]).tolist()


class TestLogLikelihoods:
    def test_as_by_hand(self, model, plain, rows, then, memory):
        found = log_likelihoods(model, rows, then, memory, batch_size=5)
        for i, (value, greedy) in enumerate(found):
            expected, expected_greedy = slow(plain(int(memory[i])), rows[i], then[i])
            assert value == pytest.approx(expected, abs=2e-4)
            assert greedy is expected_greedy
        assert all(greedy for _, greedy in found[::2])  # the edits are answered
        base = log_likelihoods(model, rows, then, torch.full_like(memory, BASE))
        assert all(a > b + 1 for (a, _), (b, _) in zip(found[::2], base[::2], strict=True))

    def test_a_mixed_batch_as_one_by_one(self, model, rows, then, memory):
        mixed = log_likelihoods(model, rows, then, memory, batch_size=len(rows))
        single = [log_likelihoods(model, [r], [t], memory[i : i + 1])[0] for i, (r, t) in enumerate(zip(rows, then))]  # noqa: B905
        assert [greedy for _, greedy in mixed] == [greedy for _, greedy in single]
        assert [value for value, _ in mixed] == pytest.approx([value for value, _ in single], abs=2e-4)

    def test_of_what_is_too_long_the_end_is_read(self, model, plain, rows, then):
        limit, base = longest_text(model), torch.tensor([BASE])
        long = rows[1][1:] * limit
        kept = long[-(limit + 1 - len(then[1])) :]
        (found,) = log_likelihoods(model, [long], [then[1]], base)
        assert found[0] == pytest.approx(slow(plain(BASE), kept, then[1])[0], abs=2e-4)

    def test_the_longest_continuation(self, model, rows):
        limit, base = longest_text(model), torch.tensor([BASE])
        assert log_likelihoods(model, [rows[0]], [rows[0][:1] * limit], base)[0][0] < 0
        with pytest.raises(RepairError, match=rf"{limit + 1} tokens, and the base reads {limit}"):
            log_likelihoods(model, [rows[0]], [rows[0][:1] * (limit + 1)], base)

    def test_nothing(self, model, rows):
        assert log_likelihoods(model, [], [], torch.tensor([], dtype=torch.long)) == []
        assert log_likelihoods(model, rows[:1], [[]], torch.tensor([0])) == [(0.0, True)]


class TestCompletions:
    def test_as_plain_models_go_on(self, model, plain, rows, memory):
        found = completions(model, rows, memory, max_new_tokens=8, batch_size=5)
        for row, shard, text in zip(rows, memory.tolist(), found, strict=True):
            said = plain(shard).generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert text == model.tokenizer.decode(said[0, len(row) :], skip_special_tokens=True)

    def test_the_edits_are_said(self, written, model, rows, memory):
        found = completions(model, rows[::2], memory[::2], max_new_tokens=12)
        assert [text.strip() for text in found] == [edit.target for edit in written[1].edits]

    def test_up_to_a_string_in_the_midst_of_tokens(self, model, rows, memory):
        whole = completions(model, rows, memory, max_new_tokens=8)
        stop = whole[0][2:4]
        found = completions(model, rows, memory, [stop, "never said"], max_new_tokens=8)
        assert found == [text.split(stop)[0] for text in whole]
        assert found != whole

    def test_it_stops_there(self, model, rows, memory, monkeypatch):
        """A batch whose rows have all said a stop string generates no further."""
        lengths: list[int] = []
        generate = model.base.generate

        def spy(**options):
            output = generate(**options)
            lengths.append(output.shape[1] - options["input_ids"].shape[1])
            return output

        monkeypatch.setattr(model.base, "generate", spy)
        completions(model, rows[:1], memory[:1], [" "], max_new_tokens=8)
        assert lengths == [1]

    def test_no_room(self, model, rows, memory):
        limit = longest_text(model)
        with pytest.raises(RepairError, match=rf"max_gen_toks is {limit}, and the base reads {limit}"):
            completions(model, rows[:1], memory[:1], max_new_tokens=limit)


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [("a b\nc", ["\n"], "a b"), ("a b\nc", ["\n", " "], "a"), ("abc", [], "abc"), ("abc", ["", "x"], "abc")],
)
def test_cut(text, until, expected):
    assert cut(text, until) == expected
