"""The space of relations on made-up states: each is its relation's direction beside large directions of no meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repair_lightning.functional.relations import RelationSpace, _discriminants, no_space, usual_limit
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
    def test_vectors_are_of_unit_length(self):
        made, relation = states(40)
        found = fit_relations(made, relation, 0.02)(made)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(made)))
        assert found.dtype == torch.float32

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

    @pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
    def test_the_limit_holds_on_new_relations(self, rate):
        space = fit_relations(*states(80), rate)
        made, relation = states(80, seed=2)
        _, outside = cosines(space(made), relation)
        assert rate / 4 < (outside > space.limit).float().mean() < 3 * rate

    def test_the_limit_rises_as_the_rate_falls(self):
        limits = [fit_relations(*states(40), rate).limit for rate in (0.3, 0.1, 0.02)]
        assert limits == sorted(limits)

    def test_the_limit_is_measured_on_relations_that_were_left_out(self):
        """By hand: of each half, in the space of the other one."""
        made, relation = states(20)
        expected = []
        for half in (0, 1):
            inside = relation % 2 == half
            found = RelationSpace(*_discriminants(made[inside], relation[inside]), 0.0)(made[~inside])
            other = relation[~inside][:, None] != relation[~inside][None]
            expected.append(torch.quantile((found @ found.T)[other][::7].double(), 0.9).item())
        assert fit_relations(made, relation, 0.1).limit == pytest.approx(sum(expected) / 2)

    def test_the_same_states_give_the_same_space(self):
        one, other = (fit_relations(*states(30), 0.02) for _ in range(2))
        assert torch.equal(one.projection, other.projection)
        assert torch.equal(one.centre, other.centre)
        assert one.limit == other.limit

    def test_neither_size_nor_place_of_the_states_matters(self):
        made, relation = states(30)
        near, far = fit_relations(made, relation, 0.02), fit_relations(3 * made + 7, relation, 0.02)
        assert far.limit == pytest.approx(near.limit, abs=1e-4)
        alike = near(made) @ near(made).T
        torch.testing.assert_close(far(3 * made + 7) @ far(3 * made + 7).T, alike, atol=1e-3, rtol=0)

    def test_no_more_directions_than_relations_differ_in(self):
        made, relation = states(6)
        assert fit_relations(made, relation, 0.1).projection.shape == (D, 5)

    def test_in_half_precision_as_in_full(self):
        made, relation = states(30)
        space = fit_relations(made.bfloat16(), relation, 0.02)
        assert space.projection.dtype == torch.float32
        assert space(made.bfloat16()).isfinite().all()


class TestApply:
    def test_what_is_not_finite_is_like_nothing(self):
        space = fit_relations(*states(20), 0.1)
        made, _ = states(1)
        made[0, 0], made[1, 3] = torch.nan, torch.inf
        found = space(made)
        assert not found[:2].any()
        assert found[2:].norm(dim=-1).allclose(torch.ones(EACH - 2))

    def test_the_centre_itself_is_like_nothing(self):
        space = fit_relations(*states(20), 0.1)
        assert not space(space.centre[None]).any()

    def test_a_row_does_not_feel_its_company(self):
        space = fit_relations(*states(20), 0.1)
        made, _ = states(3)
        torch.testing.assert_close(space(made), torch.cat([space(row[None]) for row in made]))

    def test_before_anything_is_learnt(self):
        assert no_space()(torch.ones(3, D)).shape == (3, 0)
        assert no_space().limit == 1

    def test_by_hand(self):
        """(3, 5) lies at (2, 4) from the centre; the projection takes its first coordinate and minus its second."""
        space = RelationSpace(torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, -1.0]]), 0.5)
        expected = torch.tensor([[4.0, -4.0]]) / 32**0.5
        torch.testing.assert_close(space(torch.tensor([[3.0, 5.0]])), expected)


class TestUsualLimit:
    def test_pairs_that_ask_the_same_do_not_raise_it(self):
        """A fifth of the pairs are as alike as can be: the limit stays within what the others reach."""
        other = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
        alone = usual_limit(other)
        assert alone == pytest.approx(0.4, abs=0.02)
        mixed = usual_limit(torch.cat([other, torch.full((1000,), 0.9)]))
        assert alone <= mixed < 0.55
        assert (other > mixed).float().mean() < 0.001

    def test_where_nothing_is_told_apart_it_is_one(self):
        assert usual_limit(torch.zeros(100)) == 1.0


class TestUnsoundStates:
    def test_wordings_that_a_base_cannot_read_are_left_out(self):
        made, relation = states(40)
        sound = fit_relations(made, relation, 0.02)
        made = torch.cat([made, torch.full((2, D), float("inf"))])
        found = fit_relations(made, torch.cat([relation, torch.tensor([40, 41])]), 0.02)
        assert torch.equal(found.projection, sound.projection)
        assert found.limit == sound.limit

    def test_without_any_nothing_is_alike(self):
        made, relation = states(40)
        found = fit(made * float("nan"), relation, torch.zeros(len(made), len(made)), 0.02)
        assert (found.limit, len(found.centre)) == (1.0, 0)
