"""The loss-aware merge against a loop over coordinates, and cases worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair_lightning.functional import bernoulli_mask, loss_weights, ties_merge, trim

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def slow_merge(deltas, weights, normalize):
    """Alg. 4, one coordinate at a time, in plain numbers."""
    columns = deltas.double().flatten(1).T.tolist() if deltas.ndim > 1 else [deltas.double().tolist()]
    merged = []
    for column in columns:
        votes = [(w, d) for w, d in zip(weights.double().tolist(), column, strict=True) if d != 0 and w > 0]
        if len({math.copysign(1, d) for _, d in votes}) > 1:
            merged.append(max(votes, key=lambda vote: vote[0] * abs(vote[1]))[1])
        else:
            mass = sum(w for w, _ in votes) if normalize == "contributors" and votes else 1.0
            merged.append(sum(w * d for w, d in votes) / mass)
    return torch.tensor(merged, dtype=torch.float64).view(deltas.shape[1:])


def sparse(shards, shape, dtype, ratio=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(shards, *shape, generator=generator)
    return (deltas * bernoulli_mask(deltas.shape, ratio, generator)).to(dtype)


def merge_column(values, weights, normalize="contributors"):
    deltas = torch.tensor(values, dtype=torch.float64).view(-1, 1)
    return ties_merge(deltas, torch.tensor(weights, dtype=torch.float64), normalize).item()


class TestPinned:
    @pytest.mark.parametrize("normalize", ["contributors", "global"])
    def test_conflict_keeps_the_value_of_the_strongest(self, normalize):
        """+3 with weight .2 and -2 with weight .8: .2 * 3 = .6 < .8 * 2 = 1.6, so -2, whole (not -1.6, not +.6)."""
        assert merge_column([3, -2], [0.2, 0.8], normalize) == -2

    def test_magnitude_can_outvote_weight(self):
        """+9 with .2 against -2 with .8: 1.8 > 1.6, so +9."""
        assert merge_column([9, -2], [0.2, 0.8]) == 9

    def test_conflict_is_decided_by_shards_not_by_camps(self):
        """+1, +1, -1.5 with thirds: the positive camp is larger, but the strongest single shard says -1.5."""
        assert merge_column([1, 1, -1.5], [1 / 3] * 3) == -1.5

    def test_agreement(self):
        """+3 and +2 with .2 and .8: .6 + 1.6 = 2.2 either way, for the weights that take part sum to 1."""
        assert merge_column([3, 2], [0.2, 0.8]) == pytest.approx(2.2)
        assert merge_column([3, 2], [0.2, 0.8], "global") == pytest.approx(2.2)

    def test_one_contributor(self):
        """+3 alone with weight .2: kept whole among contributors; the paper's rule shrinks it to .6."""
        assert merge_column([3, 0], [0.2, 0.8]) == 3
        assert merge_column([3, 0], [0.2, 0.8], "global") == pytest.approx(0.6)

    def test_two_of_three_contribute(self):
        """-3 and -1 with .2 and .3, the third is 0: (.6 + .3) / .5 = 1.8 among contributors, .9 globally."""
        assert merge_column([-3, -1, 0], [0.2, 0.3, 0.5]) == pytest.approx(-1.8)
        assert merge_column([-3, -1, 0], [0.2, 0.3, 0.5], "global") == pytest.approx(-0.9)

    def test_a_zero_is_no_vote(self):
        """0 beside +1 and +2 does not make a conflict, and -0.0 is a zero too."""
        assert merge_column([1, -0.0, 2], [0.25, 0.5, 0.25]) == pytest.approx(1.5)

    def test_a_draw_goes_to_the_lower_index(self):
        assert merge_column([-1, 1], [0.5, 0.5]) == -1
        assert merge_column([1, -1], [0.5, 0.5]) == 1

    def test_nobody_contributes(self):
        assert merge_column([0, 0], [0.5, 0.5]) == 0
        assert merge_column([0, 0], [0.5, 0.5], "global") == 0

    def test_a_shard_of_weight_zero_takes_no_part(self):
        """-5 with weight 0 neither conflicts (1 and 3 are averaged, not 3 kept) nor stands where it is alone."""
        assert merge_column([1, 3, -5], [0.5, 0.5, 0.0]) == 2
        assert merge_column([0, -5], [1.0, 0.0]) == 0


class TestAgainstTheLoop:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("normalize", ["contributors", "global"])
    @pytest.mark.parametrize("shape", [(), (1,), (40,), (6, 7), (2, 3, 4)])
    @pytest.mark.parametrize("shards", [1, 2, 3, 8])
    def test_merge(self, shards, shape, normalize, dtype):
        deltas = sparse(shards, shape, dtype)
        weights = loss_weights(torch.linspace(0.1, 2.0, shards, dtype=torch.float64), 1.0)
        merged = ties_merge(deltas, weights, normalize)
        assert merged.dtype == dtype
        assert merged.shape == torch.Size(shape)
        expected = slow_merge(deltas, weights, normalize).to(dtype)
        torch.testing.assert_close(merged, expected)

    @settings(deadline=None)
    @given(st.data())
    def test_merge_of_small_integers(self, data):
        """Integers and few weights make ties, zeros and conflicts likely."""
        shards = data.draw(st.integers(1, 5))
        rows = st.lists(st.integers(-2, 2), min_size=4, max_size=4)
        deltas = torch.tensor(data.draw(st.lists(rows, min_size=shards, max_size=shards)), dtype=torch.float64)
        weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=shards, max_size=shards)))
        for normalize in ("contributors", "global"):
            torch.testing.assert_close(ties_merge(deltas, weights, normalize), slow_merge(deltas, weights, normalize))


class TestLaws:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_shard_is_itself_whatever_its_weight(self, dtype):
        deltas = sparse(1, (50, 3), dtype)
        assert torch.equal(ties_merge(deltas, torch.tensor([0.3])), deltas[0])

    def test_disjoint_masks_lose_nothing(self):
        """Where masks do not meet the merge is the sum of the shards, bit for bit, whatever the losses."""
        owner = torch.randint(3, (500,), generator=torch.Generator().manual_seed(0))
        dense = torch.randn(500)
        deltas = torch.stack([torch.where(owner == shard, dense, 0.0) for shard in range(3)])
        weights = loss_weights(torch.tensor([0.1, 0.9, 3.0]), 2.0)
        assert torch.equal(ties_merge(deltas, weights), dense)
        assert ties_merge(deltas, weights, "global").norm() < 0.9 * dense.norm(), "the literal rule shrinks"

    @pytest.mark.parametrize("seed", range(5))
    def test_merged_values_lie_within_the_contributors(self, seed):
        deltas = sparse(4, (200,), torch.float64, seed=seed)
        merged = ties_merge(deltas, loss_weights(torch.rand(4), 1.0))
        low = deltas.where(deltas != 0, torch.inf).amin(0)
        high = deltas.where(deltas != 0, -torch.inf).amax(0)
        present = (deltas != 0).any(0)
        assert ((merged >= low - 1e-12) & (merged <= high + 1e-12))[present].all()
        assert not merged[~present].any()
        assert 0 < present.sum() < 200

    def test_order_of_shards_does_not_matter(self):
        deltas = sparse(5, (300,), torch.float64)
        weights = loss_weights(torch.rand(5, dtype=torch.float64), 1.0)
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(ties_merge(deltas, weights), ties_merge(deltas[order], weights[order]))

    def test_inputs_are_untouched(self):
        deltas, weights = sparse(3, (20,), torch.float32), torch.tensor([0.2, 0.3, 0.5])
        before = deltas.clone(), weights.clone()
        ties_merge(deltas, weights)
        trim(deltas[0], 0.1)
        assert torch.equal(deltas, before[0])
        assert torch.equal(weights, before[1])


class TestMergeErrors:
    def test_unknown_rule(self):
        with pytest.raises(ValueError, match="normalize must be one of contributors, global, got 'local'"):
            ties_merge(torch.ones(1, 2), torch.ones(1), "local")

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"weights must be \(K,\) .* got \(3,\) for \(2, 4\)"):
            ties_merge(torch.ones(2, 4), torch.ones(3))
        with pytest.raises(ValueError, match=r"with K >= 1, got \(0,\) for \(0, 4\)"):
            ties_merge(torch.ones(0, 4), torch.ones(0))

    def test_broken_numbers(self):
        with pytest.raises(ValueError, match=r"weights must be finite and at least 0, got \[0\.5, -0\.5\]"):
            ties_merge(torch.ones(2, 4), torch.tensor([0.5, -0.5]))
        deltas = torch.ones(3, 4)
        deltas[1, 2] = torch.nan
        with pytest.raises(ValueError, match=r"deltas must be finite, got inf or NaN in shards \[1\]"):
            ties_merge(deltas, torch.ones(3))


class TestLossWeights:
    def test_pinned(self):
        """alpha 2, losses 0 and log 3: weights proportional to 1 and 3^-2 = 1/9, so .9 and .1."""
        torch.testing.assert_close(loss_weights(torch.tensor([0.0, math.log(3)]), 2.0), torch.tensor([0.9, 0.1]))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_against_the_formula(self, dtype):
        losses = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=dtype)
        raw = [math.exp(-1.5 * loss) for loss in losses.tolist()]
        expected = torch.tensor([value / sum(raw) for value in raw])
        torch.testing.assert_close(loss_weights(losses, 1.5).float(), expected)

    def test_large_losses_do_not_overflow(self):
        """exp(-10,000) is 0 in floats; the softmax depends on differences alone."""
        weights = loss_weights(torch.tensor([1e4, 1e4 + 1]), 1.0)
        torch.testing.assert_close(weights, loss_weights(torch.tensor([0.0, 1.0]), 1.0))

    def test_alpha_zero_is_uniform(self):
        assert loss_weights(torch.tensor([0.0, 5.0, 9.0, 1.0]), 0.0).tolist() == [0.25] * 4

    def test_errors(self):
        with pytest.raises(ValueError, match=r"alpha must be finite and at least 0, got -1\.0"):
            loss_weights(torch.ones(2), -1.0)
        with pytest.raises(ValueError, match=r"losses must be \(K,\), K >= 1 and finite, got \[1\.0, inf\]"):
            loss_weights(torch.tensor([1.0, math.inf]), 1.0)
        with pytest.raises(ValueError, match=r"losses must be .* got \[\]"):
            loss_weights(torch.ones(0), 1.0)


class TestTrim:
    def test_pinned(self):
        """Five values, density .4: ceil(2) are kept, -4 and 3."""
        assert trim(torch.tensor([1.0, -4.0, 3.0, 0.5, -2.0]), 0.4).tolist() == [0.0, -4.0, 3.0, 0.0, 0.0]

    def test_of_equals_the_earlier_is_kept(self):
        assert trim(torch.tensor([[1.0, -2.0], [1.0, -1.0]]), 0.5).tolist() == [[1.0, -2.0], [0.0, 0.0]]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.99, 1.0])
    @pytest.mark.parametrize("shape", [(1,), (30,), (10, 7)])
    def test_against_a_loop(self, shape, density, dtype):
        delta = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        flat = delta.flatten().tolist()
        kept = math.ceil(round(density * len(flat), 6))
        ranked = sorted(range(len(flat)), key=lambda index: (-abs(flat[index]), index))[:kept]
        expected = [value if index in ranked else 0.0 for index, value in enumerate(flat)]
        assert trim(delta, density).flatten().tolist() == expected

    def test_rounding_of_the_density(self):
        """0.07 * 100 is 7.000000000000001 in floats; 7 of 100 are kept, not 8."""
        assert trim(torch.arange(1.0, 101.0), 0.07).count_nonzero() == 7

    def test_full_density_is_a_copy(self):
        delta = torch.ones(3)
        trim(delta, 1.0).zero_()
        assert delta.tolist() == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("density", [0.0, 1.5, -1.0])
    def test_bad_density(self, density):
        with pytest.raises(ValueError, match=rf"density must be in \(0, 1\], got {density}: 1 keeps everything"):
            trim(torch.ones(3), density)
