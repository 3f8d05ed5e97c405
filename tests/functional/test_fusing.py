"""The fused delta against a dense reference and its limits."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.functional import fused_delta


@pytest.fixture
def problem():
    return torch.randn(12, 40), torch.randn(12, 7), torch.randn(30, 40)


def test_it_is_the_least_squares_solution(problem):
    """Stack the square roots of all weights and hand the whole to lstsq."""
    keys, values, kept = (tensor.double() for tensor in problem)
    keep, ridge = 3.0, 0.05
    normal = keys.T @ keys + keep * 12 / 30 * kept.T @ kept
    scale = (ridge * normal.diagonal().mean()) ** 0.5
    left = torch.cat([keys, (keep * 12 / 30) ** 0.5 * kept, scale * torch.eye(40, dtype=torch.float64)])
    right = torch.cat([values, torch.zeros(70, 7, dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(fused_delta(*problem, keep, ridge), expected.float(), rtol=1e-4, atol=1e-5)


def test_few_edits_are_said_exactly(problem):
    keys, values, kept = problem
    delta = fused_delta(keys, values, kept[:0], ridge=1e-9)
    torch.testing.assert_close(keys @ delta.T, values, rtol=1e-3, atol=1e-3)


def test_more_weight_keeps_more(problem):
    kept = problem[2]
    moved = [float((kept @ fused_delta(*problem, keep).T).norm()) for keep in (0.0, 1.0, 100.0)]
    assert moved[0] > moved[1] > moved[2]


def test_half_precision_and_no_edits(problem):
    keys, values, kept = problem
    assert fused_delta(keys.bfloat16(), values.bfloat16(), kept.bfloat16()).dtype == torch.float32
    assert torch.equal(fused_delta(keys[:0], values[:0], kept), torch.zeros(7, 40))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keep": -1.0}, "keep must be finite and at least 0"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"values": torch.zeros(3, 7)}, "must agree"),
        ({"kept": torch.zeros(3, 7)}, "must agree"),
    ],
)
def test_refused(problem, change, match):
    arguments = dict(zip(("keys", "values", "kept"), problem, strict=True)) | change
    with pytest.raises(ValueError, match=match):
        fused_delta(**arguments)
