"""Contexts that others wrote: who answers, how likely a continuation is, and what is said. Needs no lm_eval."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.continuations import completions, log_likelihoods, route_contexts
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


def test_log_likelihoods_by_hand(model, plain, rows, then, memory):
    found = log_likelihoods(model, rows, then, memory, batch_size=5)
    for i, (value, greedy) in enumerate(found):
        expected, expected_greedy = slow(plain(int(memory[i])), rows[i], then[i])
        assert value == pytest.approx(expected, abs=2e-4)
        assert greedy is expected_greedy
    assert all(greedy for _, greedy in found[::2])  # the edits are answered


def test_completions_as_plain_models_go_on_and_up_to_a_string_in_the_midst_of_tokens(model, plain, rows, memory):
    whole = completions(model, rows, memory, max_new_tokens=8, batch_size=5)
    for row, shard, text in zip(rows, memory.tolist(), whole, strict=True):
        said = plain(shard).generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert text == model.tokenizer.decode(said[0, len(row) :], skip_special_tokens=True)
    stop = whole[0][2:4]
    found = completions(model, rows, memory, [stop, "never said"], max_new_tokens=8)
    assert found == [text.split(stop)[0] for text in whole] != whole
