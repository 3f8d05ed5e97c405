"""Recursive least squares against the closed form of the stacked problem, and what its two relatives promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair_lightning.functional.least_squares import Recursion, damped_change, minimal_change, spd_inverse

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


def test_all_taken_out_leaves_what_was():
    start, _ = problem()
    found = start
    terms = terms_of(5, (3, 3, 3))
    for term in terms:
        found = found.absorb(*term)
    for term in terms:
        found = found.remove(*term)
    torch.testing.assert_close(found.weight, start.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.information, start.information, rtol=1e-3, atol=1e-4)


def test_the_inverse_belongs_to_the_information():
    found, _ = problem()
    for term in terms_of(9, (2,) * 200):
        found = found.absorb(*term)
    torch.testing.assert_close(found.inverse @ found.information.float(), torch.eye(F), rtol=1e-3, atol=1e-3)


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


def test_a_nearly_singular_problem_in_float32():
    """Keys of size 1e4 that repeat, over a ridge of 1e-3: a condition number of 1e12 and more. What was missing at the
    start is some 1e4, so float32 gets within a hundred-thousandth of it."""
    weight, anchors = draw(0, D, F), draw(1, 2, F)
    found = Recursion.start(weight, anchors, 1e-3, 1.0)
    key = 1e4 * draw(2, 1, F)
    terms = [(key, draw(10 + i, 1, D)) for i in range(4)]
    for term in terms:
        found = found.absorb(*term)
    mean = torch.stack([values for _, values in terms]).mean(0)
    assert float((key @ found.weight.T - mean).norm()) < 1e-4 * float((key @ weight.T).norm())


def test_what_was_never_in_cannot_be_taken_out():
    start, _ = problem()
    with pytest.raises(torch.linalg.LinAlgError):
        start.remove(10 * draw(4, 2, F), draw(5, 2, D))


def test_the_minimum_bounds_the_deviations():
    """`lambda^2 ||W - W_0||^2 + mu^2 ||K_0 (W - W_0)^T||^2 <= sum ||K_i W_0^T - V_i||^2`."""
    found, (weight, anchors, ridge, anchoring) = problem(torch.float64)
    energy = 0.0
    for keys, values in terms_of(20, (2,) * 30, torch.float64):
        found = found.absorb(keys, values)
        energy += float((keys @ weight.T - values).square().sum())
        moved = found.weight - weight
        spent = ridge * float(moved.square().sum()) + anchoring * float((anchors @ moved.T).square().sum())
        assert 0 < spent <= energy


class TestMinimalChange:
    moment = draw(7, 40, F).T @ draw(7, 40, F) / 40

    @pytest.mark.parametrize("number", [1, 4])
    def test_it_says_what_it_should(self, number):
        keys, residual = draw(1, number, F), draw(2, number, D)
        delta = minimal_change(keys, residual, self.moment)
        torch.testing.assert_close(keys @ delta.T, residual, rtol=1e-4, atol=1e-4)

    def test_nothing_smaller_in_the_norm_of_the_moment_does(self):
        """Every other delta that says it differs by one that is zero on the keys, and costs more."""
        keys, residual = draw(1, 2, F), draw(2, 2, D)
        delta = minimal_change(keys, residual, self.moment)

        def cost(matrix):
            return float((matrix @ self.moment * matrix).sum())

        basis = torch.linalg.svd(keys).Vh[2:]
        for seed in range(20):
            other = delta + 0.1 * draw(30 + seed, D, len(basis)) @ basis
            torch.testing.assert_close(keys @ other.T, residual, rtol=1e-3, atol=1e-3)
            assert cost(other) > cost(delta)

    def test_romes_formula_for_one_key(self):
        key, residual = draw(1, 1, F), draw(2, 1, D)
        toward = torch.linalg.solve(self.moment.double(), key[0].double()).float()
        wanted = residual.T @ toward[None] / (key @ toward)
        torch.testing.assert_close(minimal_change(key, residual, self.moment), wanted, rtol=1e-4, atol=1e-5)


def test_memits_normal_equations():
    """`delta (M + K^T K) = R^T K`, and the gradient of its objective is zero there."""
    keys, residual = draw(1, 6, F), draw(2, 6, D)
    moment = 3 * torch.eye(F) + draw(3, 30, F).T @ draw(3, 30, F)
    delta = damped_change(keys, residual, moment)
    torch.testing.assert_close(delta @ (moment + keys.T @ keys), residual.T @ keys, rtol=1e-4, atol=1e-3)
    free = delta.clone().requires_grad_()
    ((keys @ free.T - residual).square().sum() + (free @ moment * free).sum()).backward()
    assert float(free.grad.norm()) < 1e-3 * float((residual.T @ keys).norm())
