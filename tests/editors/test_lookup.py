"""Lookup: the stored target is said, whatever the base would say, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.scoring.protocols import AUTOREGRESSIVE, answers, forced_tokens
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.types import BASE


@pytest.fixture(scope="module")
def written(editor_of, write, edits):
    editor = editor_of("llama", "lookup")
    write(editor, edits[:6], 6)
    return editor


def test_it_says_its_target_and_stops(written, edits):
    owners = written.owner_choice([edit.id for edit in edits[:6]])
    said = answers(written.edited, [edit.prompt for edit in edits[:6]], owners, 16)
    assert said == [edit.target for edit in edits[:6]]
    assert written.choose([edit.prompt for edit in edits[:6]]).memory.tolist() == owners.tolist()


def test_a_wrong_memory_says_its_own_target_until_what_is_fed_leaves_it(written, edits):
    """Teacher forced with another edit's target: the first token is the memory's own, the rest the base's."""
    one, other = edits[0], edits[1]
    wrong = written.owner_choice([other.id])
    (found,) = forced_tokens(written.edited, [one.prompt], [one.target], wrong)
    (plain,) = forced_tokens(written.edited, [one.prompt], [one.target], torch.tensor([BASE]))
    own = written.encode(other).target
    assert found[0] == own[0]
    expected = written.encode(one).target
    same = next(i for i, (a, b) in enumerate(zip(own, expected, strict=False)) if a != b)
    assert found[same + 1 :] == plain[same + 1 :]


def test_perfect_routing_is_perfect(written, edits):
    """All shards are empty and alike: what one of them said is not taken for what another says."""
    asked = edits[:6]
    scorer = Scorer(written.edited, asked)
    owners = written.owner_choice([question.edit for question in scorer.questions])
    wrong = owners.roll(1)
    scorer.score("wrong", wrong, owners)
    found = scorer.score("oracle", owners, owners).scores[AUTOREGRESSIVE]
    assert (found["rel"], found["gen"]) == (1.0, 1.0)
