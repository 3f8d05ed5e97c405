"""The space of relations on made-up states: each is its relation's direction beside large directions of no meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repair_lightning.functional.relations import SHRINKAGE, RelationSpace, usual_limit
from repair_lightning.functional.relations import fit_relations as fit

D, EACH = 24, 7


def fit_relations(made, relation, rate):
    """Without words in common; the limit as a cosine."""
    space = fit(made, relation, torch.zeros(len(made), len(made)), rate)
    return RelationSpace(space.centre, space.projection, 2 * space.limit)


def states(relations: int, seed: int = 0, noise: float = 3.0) -> tuple[Tensor, Tensor]:
    """Wordings (n, D): what they ask says the first half of the coordinates, what it is put in, the other, louder."""
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randn(relations, D // 2, generator=generator)
    relation = torch.arange(relations).repeat_interleave(EACH)
    said = noise * torch.randn(len(relation), D // 2, generator=generator)
    slip = 0.05 * torch.randn(len(relation), D // 2, generator=generator)
    return torch.cat([asked[relation] + slip, said], -1) + 5.0, relation


def cosines(vectors: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
    """Of pairs of one relation, and of different ones."""
    alike = vectors @ vectors.T
    same = relation[:, None] == relation[None]
    return alike[same & ~torch.eye(len(relation), dtype=torch.bool)], alike[~same]


class TestFit:
    def test_relations_that_it_was_not_learnt_from_are_told_apart(self):
        """The raw states cannot: what is loud there says nothing."""
        space = fit_relations(*states(60), 0.02)
        made, relation = states(30, seed=1)
        inside, outside = cosines(space(made), relation)
        assert inside.median() > space.limit > outside.median()
        assert (inside > space.limit).float().mean() > 0.8
        raw = torch.nn.functional.normalize(made - made.mean(0), dim=-1)
        raw_inside, raw_outside = cosines(raw, relation)
        assert inside.mean() - outside.mean() > 2 * (raw_inside.mean() - raw_outside.mean())

    @pytest.mark.parametrize("rate", [0.05, 0.2])
    def test_the_limit_holds_on_new_relations(self, rate):
        space = fit_relations(*states(80), rate)
        made, relation = states(80, seed=2)
        _, outside = cosines(space(made), relation)
        assert rate / 4 < (outside > space.limit).float().mean() < 3 * rate

    @pytest.mark.parametrize("relations", [4, 60])  # fewer wordings than dimensions, and more
    def test_it_whitens_what_wordings_of_one_question_differ_in(self, relations):
        """Fisher's discriminants as the textbook has them: with the whole scatter matrix, and its inverse root."""
        made, relation = (found[::2] for found in states(relations))
        space = fit_relations(made, relation, 0.1)
        directions = torch.nn.functional.normalize(made.double() - made.double().mean(0), dim=-1)
        means = torch.stack([directions[relation == one].mean(0) for one in range(relations)])
        apart = directions - means[relation]
        within = apart.T @ apart / (len(made) - relations)
        values, vectors = torch.linalg.eigh(within + SHRINKAGE * within.trace() / D * torch.eye(D))
        whiten = vectors @ values.rsqrt().diag() @ vectors.T
        axes = torch.linalg.svd((means - means.mean(0)) @ whiten)[2][: space.projection.shape[1]]
        expected = (whiten @ axes.T).float()  # up to the sign of each axis
        torch.testing.assert_close(space.projection @ space.projection.T, expected @ expected.T, rtol=1e-4, atol=1e-4)


class TestApply:
    def test_what_is_not_finite_is_like_nothing(self):
        space = fit_relations(*states(20), 0.1)
        made, _ = states(1)
        made[0, 0], made[1, 3] = torch.nan, torch.inf
        found = space(made)
        assert not found[:2].any()
        assert found[2:].norm(dim=-1).allclose(torch.ones(EACH - 2))

    def test_by_hand(self):
        """(3, 5) lies at (2, 4) from the centre; the projection takes its first coordinate and minus its second."""
        space = RelationSpace(torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, -1.0]]), 0.5)
        expected = torch.tensor([[4.0, -4.0]]) / 32**0.5
        torch.testing.assert_close(space(torch.tensor([[3.0, 5.0]])), expected)


def test_pairs_that_ask_the_same_do_not_raise_the_usual_limit():
    """A fifth of the pairs are as alike as can be: the limit stays within what the others reach."""
    other = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    alone = usual_limit(other)
    assert alone == pytest.approx(0.4, abs=0.02)
    mixed = usual_limit(torch.cat([other, torch.full((1000,), 0.9)]))
    assert alone <= mixed < 0.55
    assert (other > mixed).float().mean() < 0.001
