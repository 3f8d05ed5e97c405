"""Figures by hand: the means, the separation of scores, the map of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repair_lightning.memory.query import Choice
from repair_lightning.scoring.measures import principal_components
from repair_lightning.scoring.protocols import scores_of
from repair_lightning.scoring.scorer import Question
from repair_lightning.scoring.separation import Separation
from repair_lightning.types import BASE


def test_means_and_op():
    """Rel 3/4, Gen 1/2, Loc 1: OP = (3/8)^(1/3) = 0.7211."""
    marks = [("edit", 1), ("edit", 1), ("edit", 0), ("edit", 1), ("rephrase", 0.5), ("rephrase", 0.5), ("locality", 1)]
    found = scores_of([(kind, value, 1 - value) for kind, value in marks])
    expected = {"rel": 0.75, "gen": 0.5, "loc": 1.0, "near": None, "op": 0.7211247851537042}
    assert found["autoregressive"] == pytest.approx(expected)
    assert found["teacher_forced"] == pytest.approx({"rel": 0.25, "gen": 0.5, "loc": 0.0, "near": None, "op": 0.0})


@pytest.mark.parametrize(
    ("kinds", "score", "area"),
    [
        ("erln", [4.0, 3.0, 2.0, 1.0], 1.0),
        ("erln", [4.0, 2.0, 3.0, 1.0], 0.75),  # of four pairs one is the wrong way round
        ("en", [1.0, 1.0], 0.5),  # a tie is half a pair
        ("eel", [1e6, 2e6, 1e5], 1.0),  # far beyond what a sigmoid tells apart
        ("er", [1.0, 2.0], None),
    ],
)
def test_area_under_the_curve(kinds, score, area):
    names = {"e": "edit", "r": "rephrase", "l": "locality", "n": "near"}
    questions = tuple(Question("a", names[kind], f"p{i}", None) for i, kind in enumerate(kinds))
    size = len(kinds)
    choice = Choice(torch.full((size,), BASE), torch.tensor(score), torch.ones(size), ("a",) * size)
    found = Separation(questions, torch.zeros(size, dtype=torch.long), choice).auroc()
    assert found == (None if area is None else pytest.approx(area))


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)])
def test_principal_components_against_the_covariance(shape):
    features = np.random.default_rng(1).normal(size=shape) * np.linspace(3, 1, shape[1])
    places, shares = principal_components(features)
    centred = features - features.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    expected = centred @ vectors[:, ::-1][:, :2]
    assert shares == pytest.approx(values[::-1][:2] / values.sum())
    assert np.abs(places) == pytest.approx(np.abs(expected), abs=1e-9)
    assert all(column[np.abs(column).argmax()] > 0 for column in places.T), "the sign is not left to chance"
