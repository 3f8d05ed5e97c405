"""Separation: areas and shares by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_runs import written_editor

from repair_lightning.memory.query import Check, Choice
from repair_lightning.scoring.scorer import Question
from repair_lightning.scoring.separation import Separation
from repair_lightning.types import BASE


def separation(kinds: str, score: list[float], threshold: float = 1.0, memory=None, checks=()) -> Separation:
    """Prompts of one edit that shard 0 owns: `e`, `r`, `l` and `n` for the kinds."""
    names = {"e": "edit", "r": "rephrase", "l": "locality", "n": "near"}
    questions = tuple(Question("a", names[kind], f"p{i}", None) for i, kind in enumerate(kinds))
    size = len(kinds)
    memory = torch.full((size,), BASE) if memory is None else torch.tensor(memory)
    choice = Choice(memory, torch.tensor(score), torch.full((size,), threshold), ("a",) * size, checks)
    return Separation(questions, torch.zeros(size, dtype=torch.long), choice)


@pytest.mark.parametrize(
    ("kinds", "score", "area"),
    [
        ("erln", [4.0, 3.0, 2.0, 1.0], 1.0),
        ("erln", [1.0, 2.0, 3.0, 4.0], 0.0),
        ("erln", [4.0, 2.0, 3.0, 1.0], 0.75),  # of four pairs one is the wrong way round
        ("en", [1.0, 1.0], 0.5),  # a tie is half a pair
        ("eel", [1e6, 2e6, 1e5], 1.0),  # far beyond what a sigmoid tells apart
        ("er", [1.0, 2.0], None),
        ("l", [1.0], None),
    ],
)
def test_area_under_the_curve(kinds, score, area):
    assert separation(kinds, score).auroc() == (None if area is None else pytest.approx(area))


def test_scores_count_relative_to_their_limits():
    """Two shards of very different scales: 10 of 100 is less than 2 of 1."""
    found = separation("el", [2.0, 10.0])
    choice = Choice(found.choice.memory, found.choice.score, torch.tensor([1.0, 100.0]), found.choice.nearest)
    assert Separation(found.questions, found.owners, choice).auroc() == 1.0


def test_a_prompt_that_no_edit_is_about_lies_lowest():
    """Its limit is infinite; where all are, as without any shard, nothing can be said."""
    found = separation("erll", [0.9, 0.1, -1.0, -1.0])
    limits = torch.tensor([0.5, 0.5, math.inf, math.inf])
    choice = Choice(found.choice.memory, found.choice.score, limits, found.choice.nearest)
    assert Separation(found.questions, found.owners, choice).auroc() == 1.0
    assert separation("el", [0.0, 0.0], threshold=math.inf).auroc() is None


def test_neighbours_alone_and_other_measures():
    """The locality prompt lies above the edit, the neighbour below; a check without a limit does not count."""
    likeness = Check("likeness", torch.tensor([0.9, 0.2, 0.8]), torch.tensor([0.5, 0.5, -math.inf]))
    found = separation("eln", [2.0, 3.0, 1.0], checks=(likeness,))
    assert found.auroc() == 0.5
    assert found.auroc(others=("near",)) == 1.0
    assert found.auroc("likeness") == 1.0
    assert found.auroc("likeness", others=("near",)) is None


def test_who_answered():
    found = separation("eerln", [1.0] * 5, memory=[0, BASE, 7, BASE, 0])
    assert found.confusion()["edit"] == {"base": 0.5, "right": 0.5, "wrong": 0.0}
    assert found.right() == {"edit": 0.5, "rephrase": 0.0, "locality": 1.0, "near": 0.0}
    assert found.of("edit").tolist() == [True, True, False, False, False]
    assert not found.of("edit", owner=1).any()


def test_a_real_router_on_one_prompt_of_each_kind():
    editor, stream = written_editor(4, form="low_rank", capacity=1)
    found = Separation.measure(editor, stream.edits)
    assert len(found.questions) == 4 * 4
    first = {(edit.id, "rephrase"): edit.rephrases[0] for edit in stream.edits}
    asked = {(question.edit, question.kind): question.prompt for question in found.questions}
    assert first.items() <= asked.items()
    assert (
        found.choice.memory.tolist() == editor.choose([question.prompt for question in found.questions]).memory.tolist()
    )
    assert found.right()["edit"] == 1.0
    assert found.auroc() > 0.9
    assert set(found.values) == {"score", "its target's tokens said"}
