"""A prompt that leaves no room for an answer is refused in one line, not answered with nothing."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.errors import RepairError

REFUSED = r"a prompt has {} tokens, and the base reads 128 with its answer: at most 127 may be asked; shorten it"


@pytest.fixture(scope="module")
def edited(editor_of):
    return editor_of("llama").edited


def test_the_base_says_how_much_it_reads(edited, editor_of):
    assert edited.longest == 128
    assert editor_of("gpt2").edited.longest == 128


@pytest.mark.parametrize("tokens", [128, 129, 400])
def test_a_prompt_without_room_is_refused(edited, tokens):
    ids = torch.full((2, tokens), 7)
    with pytest.raises(RepairError, match=REFUSED.format(tokens)):
        edited.generate(ids, max_new_tokens=1)
    with pytest.raises(RepairError, match="a prompt has"):
        edited.generate("who " * tokens, max_new_tokens=1)


def test_the_longest_prompt_is_answered(edited):
    ids = torch.full((1, 127), 7)
    assert edited.generate(ids, max_new_tokens=1).shape == (1, 128)


def test_padding_is_no_part_of_a_prompt(edited):
    ids, mask = torch.full((1, 140), 7), torch.ones(1, 140, dtype=torch.long)
    mask[:, :40] = 0
    assert edited.generate(ids, attention_mask=mask, max_new_tokens=2).shape[1] > 140


def test_any_length_where_the_configuration_does_not_say(edited, monkeypatch):
    class Silent:
        is_encoder_decoder = False

    monkeypatch.setattr(type(edited), "config", property(lambda _: Silent()))
    assert edited.longest is None
    edited._refuse_long([[7] * 5000])
