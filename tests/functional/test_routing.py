"""The activation router against loops over tokens, and thresholds derived by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.functional import (
    activation_scores,
    calibrate_threshold,
    decide,
    ratio_threshold,
    sketch,
    sketched_scores,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


def prompts(batch, length, width, side, dtype, seed=0):
    """Activations whose padding is NaN, so that a single padded token spoils a wrong score."""
    activations = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        count = length - row % length
        mask[row, :count] = True
        if side == "left":
            mask[row] = mask[row].flip(0)
    activations[~mask] = torch.nan
    return activations, mask


def slow_scores(activations, deltas, mask, pool):
    rows = []
    for tokens, keep in zip(activations.double(), mask, strict=True):
        norms = [[(delta.double() @ token).norm().item() for token in tokens[keep]] for delta in deltas]
        reduce = {"last": lambda n: n[-1], "mean": lambda n: sum(n) / len(n), "max": max}[pool]
        rows.append([reduce(n) for n in norms])
    return torch.tensor(rows, dtype=torch.float64)


class TestActivationScores:
    @pytest.mark.parametrize("dtype", list(TOLERANCE))
    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize(("batch", "length", "width", "shards"), [(1, 1, 1, 1), (3, 4, 6, 2), (5, 3, 8, 4)])
    def test_against_a_loop(self, batch, length, width, shards, side, pool, dtype):
        activations, mask = prompts(batch, length, width, side, dtype)
        deltas = torch.randn(shards, 5, width, generator=torch.Generator().manual_seed(9)).to(dtype)
        scores = activation_scores(activations, deltas, mask, pool)
        assert scores.dtype == torch.promote_types(dtype, torch.float32)
        expected = slow_scores(activations, deltas, mask, pool)
        torch.testing.assert_close(scores.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    def test_pinned(self):
        """delta = diag(3, 4): tokens (1, 0), (0, 1), (1, 1) score 3, 4 and 5; the fourth is padding.

        last 5, max 5, mean (3 + 4 + 5) / 3 = 4; without the third token last 4, max 4, mean 3.5.
        """
        activations = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [9.0, 9.0]]]).repeat(2, 1, 1)
        mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
        deltas = torch.diag(torch.tensor([3.0, 4.0])).unsqueeze(0)
        for pool, expected in {"last": [5.0, 4.0], "max": [5.0, 4.0], "mean": [4.0, 3.5]}.items():
            assert activation_scores(activations, deltas, mask, pool).flatten().tolist() == expected, pool

    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    def test_company_and_padding_change_nothing(self, pool):
        activations, mask = prompts(4, 6, 5, "left", torch.float64)
        deltas = torch.randn(3, 7, 5, dtype=torch.float64)
        together = activation_scores(activations, deltas, mask, pool)
        alone = torch.cat([
            activation_scores(tokens[keep][None], deltas, keep[keep][None], pool)
            for tokens, keep in zip(activations, mask, strict=True)
        ])  # fmt: skip
        torch.testing.assert_close(together, alone)

    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    def test_a_hole_in_the_mask_is_not_a_token(self, pool):
        activations = torch.ones(1, 3, 2)
        activations[0, 1] = 100.0
        mask = torch.tensor([[True, False, True]])
        assert activation_scores(activations, torch.eye(2)[None], mask, pool).item() == pytest.approx(math.sqrt(2))

    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    def test_gradients_are_finite_with_nan_padding_and_fresh_shards(self, pool):
        activations, mask = prompts(3, 4, 5, "right", torch.float32)
        deltas = torch.randn(2, 6, 5)
        deltas[1] = 0.0
        deltas.requires_grad_()
        activation_scores(activations, deltas, mask, pool).sum().backward()
        assert deltas.grad.isfinite().all()
        assert deltas.grad[0].abs().sum() > 0
        assert not deltas.grad[1].any(), "the norm has no gradient at 0: documented in routing_margin_loss"

    def test_mixed_types(self):
        activations, mask = prompts(2, 3, 4, "left", torch.bfloat16)
        deltas = torch.randn(2, 5, 4)
        expected = slow_scores(activations, deltas, mask, "mean")
        actual = activation_scores(activations, deltas, mask, "mean")
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    def test_no_shards(self, pool):
        activations, mask = prompts(2, 3, 4, "left", torch.float32)
        assert activation_scores(activations, torch.zeros(0, 5, 4), mask, pool).shape == (2, 0)

    def test_errors(self):
        activations, mask = prompts(3, 4, 5, "right", torch.float32)
        deltas = torch.zeros(1, 6, 5)
        with pytest.raises(ValueError, match="pool must be one of last, mean, max, got 'median'"):
            activation_scores(activations, deltas, mask, "median")
        with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.int64: pass mask\.bool\(\)"):
            activation_scores(activations, deltas, mask.long(), "last")
        with pytest.raises(ValueError, match=r"deltas must be \(K, D, F\) with F = 5, .* got \[\(5, 6\)\]"):
            activation_scores(activations, deltas.mT, mask, "last")
        with pytest.raises(ValueError, match=r"mask must be \(B, T\) .* got \(3, 3\)"):
            activation_scores(activations, deltas, mask[:, 1:], "last")
        mask[1] = False
        with pytest.raises(ValueError, match=r"mask must be True somewhere in every row, got none in rows \[1\]"):
            activation_scores(activations, deltas, mask, "last")


class TestDecide:
    def test_pinned(self):
        """Thresholds 2 and 10. (3, 12): ratios 1.5 and 1.2, so shard 0 although its score is lower.

        (1, 9): .5 and .9, base. (2, 10): both exactly 1, which is not above 1: base. (0, 11): 0 and 1.1, shard 1.
        """
        scores = torch.tensor([[3.0, 12.0], [1.0, 9.0], [2.0, 10.0], [0.0, 11.0]])
        choice, ratio = decide(scores, torch.tensor([2.0, 10.0]))
        assert choice.tolist() == [0, -1, -1, 1]
        assert choice.dtype == torch.long
        torch.testing.assert_close(ratio, torch.tensor([1.5, 0.9, 1.0, 1.1]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_against_a_loop(self, dtype):
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(50, 4, generator=generator).to(dtype)
        thresholds = (torch.rand(4, generator=generator) + 0.5).to(dtype)
        choice, ratio = decide(scores, thresholds)
        for row, picked, value in zip(scores.float(), choice, ratio, strict=True):
            ratios = (row / thresholds.float()).tolist()
            assert picked == (ratios.index(max(ratios)) if max(ratios) > 1 else -1)
            assert value.item() == pytest.approx(max(ratios), rel=1e-5)
        assert {-1} < set(choice.tolist())

    def test_no_shards(self):
        choice, ratio = decide(torch.zeros(3, 0), torch.zeros(0))
        assert choice.tolist() == [-1, -1, -1]
        assert ratio.tolist() == [0.0, 0.0, 0.0]

    def test_nan_chooses_the_base_and_is_seen(self):
        choice, ratio = decide(torch.tensor([[torch.nan, 5.0]]), torch.ones(2))
        assert choice.tolist() == [-1]
        assert ratio.isnan().all()

    @pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
    def test_bad_threshold(self, threshold):
        with pytest.raises(ValueError, match=r"thresholds must be positive, got \[1\.0, "):
            decide(torch.ones(1, 2), torch.tensor([1.0, threshold]))

    def test_bad_shape(self):
        with pytest.raises(ValueError, match=r"thresholds must be \(K,\) .* got \(3,\) for \(1, 2\)"):
            decide(torch.ones(1, 2), torch.ones(3))


SCORES = st.floats(0, 100, width=32)
RATES = st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.5, 0.9])


class TestCalibrateThreshold:
    def test_pinned_free_band(self):
        """Negatives 1..10, rate 0.1: one may fire, so 9 is the smallest threshold. Positives from 15: (9 + 15) / 2."""
        assert calibrate_threshold(torch.tensor([15.0, 40.0]), torch.arange(1.0, 11.0), 0.1) == 12.0

    def test_pinned_overlap(self):
        """The same negatives, positives 8 and 40: 8 lies below 9, so there is no free band and 9 stands."""
        assert calibrate_threshold(torch.tensor([8.0, 40.0]), torch.arange(1.0, 11.0), 0.1) == 9.0

    def test_pinned_no_false_fire(self):
        """Rate 0: the loudest negative, 10, does not exceed itself; the positive at 9 is given up."""
        assert calibrate_threshold(torch.tensor([9.0]), torch.arange(1.0, 11.0), 0.0) == 10.0

    def test_one_side_alone(self):
        assert calibrate_threshold(torch.tensor([6.0, 8.0]), torch.zeros(0), 0.01) == 3.0
        assert calibrate_threshold(torch.zeros(0), torch.tensor([1.0, 2.0]), 0.0) == 2.0

    def test_rounding_of_the_rate(self):
        """0.29 * 100 is 28.999999999999996 in floats; 29 of 100 negatives may fire: 100 - 29 = 71."""
        assert calibrate_threshold(torch.zeros(0), torch.arange(1.0, 101.0), 0.29) == 71.0

    @given(st.lists(SCORES, max_size=8), st.lists(SCORES, min_size=1, max_size=30), RATES)
    def test_laws(self, positive, negative, rate):
        threshold = calibrate_threshold(torch.tensor(positive), torch.tensor(negative), rate)
        allowed = max(k for k in range(len(negative)) if k <= rate * len(negative) + 1e-9)
        fires = sum(score > threshold for score in negative)
        assert threshold > 0
        assert fires <= allowed
        candidates = [c for c in [0.0, *negative] if sum(score > c for score in negative) <= allowed]
        smallest = min(candidates)
        if positive and min(positive) > smallest:
            assert smallest < threshold
            assert all(score > threshold for score in positive) or min(positive) < 1e-37
        else:
            assert threshold == max(smallest, torch.finfo(torch.float32).tiny)

    @given(st.lists(st.floats(1 / 128, 100, width=32), min_size=1, max_size=5), st.lists(SCORES, max_size=20), RATES)
    def test_the_decision_in_float32_keeps_the_rate(self, positive, negative, rate):
        """What was calibrated is what fires: `decide` on the same scores lets no more negatives through."""
        threshold = calibrate_threshold(torch.tensor(positive), torch.tensor(negative), rate)
        choice, _ = decide(torch.tensor(negative).view(-1, 1), torch.tensor([threshold]))
        assert (choice == 0).sum().item() <= rate * len(negative) + 1e-9

    def test_zero_scores_still_give_a_positive_threshold(self):
        assert calibrate_threshold(torch.zeros(3), torch.zeros(3), 0.0) > 0
        assert calibrate_threshold(torch.zeros(3), torch.zeros(0), 0.0) > 0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"false_fire_rate must be in \[0, 1\), got 1\.0"):
            calibrate_threshold(torch.ones(1), torch.ones(1), 1.0)
        with pytest.raises(ValueError, match="positive and negative must not both be empty"):
            calibrate_threshold(torch.ones(0), torch.ones(0), 0.1)
        with pytest.raises(ValueError, match=r"positive scores must be finite and at least 0, got \[nan\]"):
            calibrate_threshold(torch.tensor([torch.nan]), torch.ones(1), 0.1)
        with pytest.raises(ValueError, match=r"negative scores must be finite and at least 0, got \[-1\.0\]"):
            calibrate_threshold(torch.ones(1), torch.tensor([-1.0]), 0.1)


class TestRatioThreshold:
    def test_pinned(self):
        """Smallest edit score 5, act_ratio 0.2: 1."""
        assert ratio_threshold(torch.tensor([8.0, 5.0, 30.0]), 0.2) == pytest.approx(1.0)

    def test_at_one_the_weakest_edit_no_longer_fires(self):
        scores = torch.tensor([5.0, 8.0])
        choice, _ = decide(scores.view(-1, 1), torch.tensor([ratio_threshold(scores, 1.0)]))
        assert choice.tolist() == [-1, 0]

    def test_always_positive(self):
        assert ratio_threshold(torch.tensor([0.0]), 0.5) > 0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"act_ratio must be in \(0, 1\], got 1\.3"):
            ratio_threshold(torch.ones(1), 1.3)
        with pytest.raises(ValueError, match="positive must not be empty, got 0 scores"):
            ratio_threshold(torch.ones(0), 0.5)
        with pytest.raises(ValueError, match=r"positive scores must be finite"):
            ratio_threshold(torch.tensor([torch.inf]), 0.5)


class TestSketch:
    @pytest.mark.parametrize(("rows", "columns"), [(5, 9), (9, 5), (12, 40), (1, 3)])
    def test_nearly_as_good_as_the_best_approximation(self, rows, columns):
        """Against the singular values, where it is hardest: all directions of a random matrix are about as strong."""
        delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        found = sketch(delta, 2)
        assert found.shape == (2, columns)
        best = torch.linalg.svdvals(delta)[:2].square().sum()
        assert found.square().sum() <= best * (1 + 1e-5)
        assert found.square().sum() >= 0.85 * best

    @given(st.integers(1, 4), st.integers(0, 99))
    def test_scores_never_more_and_all_where_the_rank_suffices(self, rank, seed):
        generator = torch.Generator().manual_seed(seed)
        delta = torch.randn(7, rank, generator=generator) @ torch.randn(rank, 11, generator=generator)
        tokens = torch.randn(20, 11, generator=generator)
        exact = (tokens @ delta.T).norm(dim=-1)
        torch.testing.assert_close((tokens @ sketch(delta, 4).T).norm(dim=-1), exact, rtol=1e-3, atol=1e-4)
        assert bool(((tokens @ sketch(delta, 1).T).norm(dim=-1) <= exact * (1 + 1e-4) + 1e-5).all())

    def test_the_same_delta_has_the_same_sketch_and_no_other_draw_moves(self):
        delta = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
        before = torch.get_rng_state()
        assert torch.equal(sketch(delta, 3), sketch(delta.clone(), 3))
        assert torch.equal(torch.get_rng_state(), before)

    def test_an_empty_shard_has_an_empty_sketch(self):
        assert sketch(torch.zeros(6, 10), 3).norm() == 0

    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("at_once", [1, 1 << 24])
    def test_scores_of_sketches_are_activation_scores(self, pool, side, at_once, monkeypatch):
        monkeypatch.setattr("repair_lightning.functional.routing._SKETCHED", at_once)
        activations, mask = prompts(4, 3, 6, side, torch.float32)
        sketches = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(1))
        expected = activation_scores(activations, sketches, mask, pool)
        torch.testing.assert_close(sketched_scores(activations, sketches, mask, pool), expected)

    def test_no_sketches(self):
        activations, mask = prompts(2, 3, 6, "left", torch.float32)
        assert sketched_scores(activations, torch.zeros(0, 2, 6), mask, "last").shape == (2, 0)
