"""The activation router against loops over tokens, and thresholds derived by hand."""

import pytest
import torch
from hypothesis import given, settings
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
POOLS = ["last", "mean", "max"]


def prompts(batch, length, width, side, dtype):
    """Activations whose padding is NaN, so that a single padded token spoils a wrong score."""
    activations = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0)).to(dtype)
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


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("batch", "length", "width", "shards"), [(1, 1, 1, 1), (5, 3, 8, 4), (2, 3, 4, 0)])
def test_scores_against_a_loop(batch, length, width, shards, side, pool, dtype):
    """Padding counts for nothing on either side, and the sketched scores of whole deltas are the same."""
    activations, mask = prompts(batch, length, width, side, dtype)
    deltas = torch.randn(shards, 5, width, generator=torch.Generator().manual_seed(9)).to(dtype)
    scores = activation_scores(activations, deltas, mask, pool)
    assert scores.shape == (batch, shards)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    expected = slow_scores(activations, deltas, mask, pool)
    torch.testing.assert_close(scores.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if dtype == torch.float32:
        torch.testing.assert_close(sketched_scores(activations, deltas, mask, pool), scores)


def test_decisions_pinned():
    """Thresholds 2 and 10. (3, 12): ratios 1.5 and 1.2, so shard 0 although its score is lower.

    (1, 9): .5 and .9, base. (2, 10): both exactly 1, which is not above 1: base. (0, 11): 0 and 1.1, shard 1.
    NaN chooses the base and is seen.
    """
    scores = torch.tensor([[3.0, 12.0], [1.0, 9.0], [2.0, 10.0], [0.0, 11.0], [torch.nan, 50.0]])
    choice, ratio = decide(scores, torch.tensor([2.0, 10.0]))
    assert choice.tolist() == [0, -1, -1, 1, -1]
    torch.testing.assert_close(ratio, torch.tensor([1.5, 0.9, 1.0, 1.1, torch.nan]), equal_nan=True)


SCORES = st.floats(0, 100, width=32)
RATES = st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.5, 0.9])


class TestCalibrateThreshold:
    @pytest.mark.parametrize(
        ("positive", "negative", "rate", "expected"),
        [
            pytest.param([15, 40], range(1, 11), 0.1, 12.0, id="one of ten may fire, 9; half-way to 15"),
            pytest.param([8, 40], range(1, 11), 0.1, 9.0, id="no free band: 9 stands"),
            pytest.param([9], range(1, 11), 0.0, 10.0, id="rate 0: the loudest does not exceed itself"),
            pytest.param([6, 8], [], 0.01, 3.0, id="edits alone"),
            pytest.param([], [1, 2], 0.0, 2.0, id="negatives alone"),
            pytest.param([], range(1, 101), 0.29, 71.0, id="0.29 * 100 is 28.999999999999996 in floats"),
        ],
    )
    def test_pinned(self, positive, negative, rate, expected):
        scores = (torch.tensor([float(score) for score in given]) for given in (positive, negative))
        assert calibrate_threshold(*scores, rate) == expected

    @given(st.lists(SCORES, max_size=8), st.lists(SCORES, min_size=1, max_size=30), RATES)
    def test_laws(self, positive, negative, rate):
        """The threshold is positive and lies above as many negatives as allowed; every edit fires where there is a
        free band; what was calibrated is what `decide` lets through in float32."""
        threshold = calibrate_threshold(torch.tensor(positive), torch.tensor(negative), rate)
        allowed = max(k for k in range(len(negative)) if k <= rate * len(negative) + 1e-9)
        assert threshold > 0
        smallest = min(c for c in [0.0, *negative] if sum(score > c for score in negative) <= allowed)
        if positive and min(positive) > smallest:
            assert smallest < threshold
            assert all(score > threshold for score in positive) or min(positive) < 1e-37
        else:
            assert threshold == max(smallest, torch.finfo(torch.float32).tiny)
        if not positive or min(positive) >= 1 / 128:
            choice, _ = decide(torch.tensor(negative).view(-1, 1), torch.tensor([threshold]))
            assert (choice == 0).sum().item() <= allowed


def test_ratio_threshold():
    """Smallest edit score 5, act_ratio 0.2: 1. At ratio 1 the weakest edit no longer fires. Never 0."""
    scores = torch.tensor([8.0, 5.0, 30.0])
    assert ratio_threshold(scores, 0.2) == pytest.approx(1.0)
    choice, _ = decide(scores.view(-1, 1), torch.tensor([ratio_threshold(scores, 1.0)]))
    assert choice.tolist() == [0, -1, 0]
    assert ratio_threshold(torch.tensor([0.0]), 0.5) > 0


@settings(max_examples=20)
@given(st.integers(0, 4), st.integers(0, 99))
def test_sketched_scores_are_never_more_and_all_where_the_rank_suffices(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(7, rank, generator=generator) @ torch.randn(rank, 11, generator=generator)
    tokens = torch.randn(20, 11, generator=generator)
    exact = (tokens @ delta.T).norm(dim=-1)
    torch.testing.assert_close((tokens @ sketch(delta, 4).T).norm(dim=-1), exact, rtol=1e-3, atol=1e-4)
    assert bool(((tokens @ sketch(delta, 1).T).norm(dim=-1) <= exact * (1 + 1e-4) + 1e-5).all())
