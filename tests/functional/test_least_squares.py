"""Recursive least squares against the closed form of the stacked problem, and what its two relatives promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair_lightning.functional import fused_delta
from repair_lightning.functional.least_squares import (
    Recursion,
    damped_change,
    dual_basis,
    minimal_change,
    spd_inverse,
)
from repair_lightning.functional.moments import RunningMoments

F, D, N = 12, 5, 20


def draw(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stacked(weight, anchors, ridge, anchoring, terms):
    """The minimiser by one call of `lstsq` over all rows, W_0 and anchors among them, in float64."""
    weight, anchors = weight.double(), anchors.double()
    rows = [ridge**0.5 * torch.eye(weight.shape[1], dtype=torch.float64), anchoring**0.5 * anchors]
    aims = [ridge**0.5 * weight.T, anchoring**0.5 * anchors @ weight.T]
    rows += [keys.double() for keys, _ in terms]
    aims += [values.double() for _, values in terms]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(aims)).solution.T


def problem(dtype=torch.float32, ridge=0.3, anchoring=0.2):
    weight, anchors = draw(0, D, F, dtype=dtype), draw(1, N, F, dtype=dtype)
    return Recursion.start(weight, anchors, ridge, anchoring), (weight, anchors, ridge, anchoring)


def terms_of(seed: int, sizes, dtype=torch.float32):
    return [(draw(seed + i, u, F, dtype=dtype), draw(seed + 100 + i, u, D, dtype=dtype)) for i, u in enumerate(sizes)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_it_is_the_stacked_problems_minimiser_at_every_step(dtype, tolerance):
    found, fixed = problem(dtype)
    terms = terms_of(2, (1, 3, 20, 2, 1), dtype)
    torch.testing.assert_close(found.weight.double(), fixed[0].double())
    for i, term in enumerate(terms):
        found = found.absorb(*term)
        wanted = stacked(*fixed, terms[: i + 1])
        torch.testing.assert_close(found.weight.double(), wanted, rtol=tolerance, atol=tolerance)
        assert found.weight.dtype == dtype


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(4)))
def test_order_does_not_matter_and_what_is_removed_never_was(seed, order):
    start, fixed = problem(torch.float64)
    terms = terms_of(seed, (1, 4, 2, 3), torch.float64)
    found = start
    for i in order:
        found = found.absorb(*terms[i])
    torch.testing.assert_close(found.weight, stacked(*fixed, terms), rtol=1e-8, atol=1e-8)
    found = found.remove(*terms[order[1]])
    rest = [term for i, term in enumerate(terms) if i != order[1]]
    torch.testing.assert_close(found.weight, stacked(*fixed, rest), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damage", [float("nan"), -1e3, 5.0], ids=["nan", "not positive definite", "wrong"])
def test_an_inverse_that_float32_has_spoilt_is_made_anew(damage):
    """Cholesky fails, or the gain does not solve what it should: the step is done again from the information."""
    found, fixed = problem()
    terms = terms_of(3, (3, 2))
    found = found.absorb(*terms[0])
    spoilt = Recursion(found.weight, found.inverse * damage, found.information)
    healed = spoilt.absorb(*terms[1])
    assert (found.rebuilt, healed.rebuilt) == (0, 1)
    torch.testing.assert_close(healed.weight.double(), stacked(*fixed, terms), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(healed.inverse, spd_inverse(healed.information).float())
    assert healed.absorb(*terms[0]).rebuilt == 1


def test_nothing_smaller_in_the_norm_of_the_moment_says_it():
    """Every other delta that says it differs by one that is zero on the keys, and costs more."""
    keys, residual = draw(1, 4, F), draw(2, 4, D)
    moment = draw(7, 40, F).T @ draw(7, 40, F) / 40
    delta = minimal_change(keys, residual, moment)
    torch.testing.assert_close(keys @ delta.T, residual, rtol=1e-4, atol=1e-4)
    basis = torch.linalg.svd(keys).Vh[4:]
    for seed in range(20):
        other = delta + 0.1 * draw(30 + seed, D, len(basis)) @ basis
        assert (other @ moment * other).sum() > (delta @ moment * delta).sum()


def test_memits_normal_equations():
    """`delta (M + K^T K) = R^T K`."""
    keys, residual = draw(1, 6, F), draw(2, 6, D)
    moment = 3 * torch.eye(F) + draw(3, 30, F).T @ draw(3, 30, F)
    delta = damped_change(keys, residual, moment)
    torch.testing.assert_close(delta @ (moment + keys.T @ keys), residual.T @ keys, rtol=1e-4, atol=1e-3)


def test_the_fused_delta_is_the_least_squares_solution():
    """Stack the square roots of all weights and hand the whole to lstsq; more weight on what is kept keeps more."""
    keys, values, kept = draw(1, 12, F), draw(2, 12, D), draw(3, 30, F)
    share, ridge = 3.0 * 12 / 30, 0.05
    normal = (keys.T @ keys + share * kept.T @ kept).double()
    scale = (ridge * normal.diagonal().mean()) ** 0.5
    left = torch.cat([keys.double(), share**0.5 * kept.double(), scale * torch.eye(F, dtype=torch.float64)])
    right = torch.cat([values.double(), torch.zeros(30 + F, D, dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(fused_delta(keys, values, kept, 3.0, ridge).double(), expected, rtol=1e-4, atol=1e-5)
    moved = [float((kept @ fused_delta(keys, values, kept, keep).T).norm()) for keep in (0.0, 1.0, 100.0)]
    assert moved[0] > moved[1] > moved[2]
    assert not fused_delta(keys[:0], values[:0], kept).any()


@pytest.mark.parametrize("quiet", [0, 4])
def test_the_dual_basis_tells_keys_apart_and_is_still_at_quiet_ones(quiet):
    """Without a ridge exactly; with one it is the solution of ridge regression, which quiet keys meet with zeros."""
    keys, still, values = draw(1, 6, F), draw(2, quiet, F), draw(3, 6, D)
    exact = dual_basis(keys, still, 1e-9)
    torch.testing.assert_close(keys @ exact.T, torch.eye(6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(still @ exact.T, torch.zeros(quiet, 6), rtol=1e-3, atol=1e-3)
    weight = 0.1 * float(keys.square().sum(-1).mean())
    left = torch.cat([keys, still, weight**0.5 * torch.eye(F)]).double()
    right = torch.cat([values, torch.zeros(quiet + F, D)]).double()
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close((values.T @ dual_basis(keys, still, 0.1)).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [[5], [1, 1, 1], [2, 30, 1, 7]])
def test_running_moments_of_parts_are_those_of_the_whole(parts):
    features = draw(0, sum(parts), 4) * 3 + 100
    found = RunningMoments.none(4)
    for part in features.split(parts):
        found = found.with_(part)
    torch.testing.assert_close(found.mean, features.mean(0))
    wanted = (features - features.mean(0)) / features.std(0)
    torch.testing.assert_close(found.normalise(features), wanted, rtol=1e-3, atol=1e-3)
    constant = RunningMoments.none(2).with_(torch.ones(3, 2))
    assert not constant.normalise(torch.ones(1, 2)).any(), "what never varies stays finite"
