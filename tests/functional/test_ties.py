"""The loss-aware merge against a loop over coordinates, and cases worked out by hand."""

import math

import pytest
import torch

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


def sparse(shards, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(shards, *shape, generator=generator)
    return (deltas * bernoulli_mask(deltas.shape, 0.5, generator)).to(dtype)


@pytest.mark.parametrize(
    ("values", "weights", "contributors", "everyone"),
    [
        pytest.param([3, -2], [0.2, 0.8], -2, -2, id=".2 * 3 < .8 * 2: the strongest, whole"),
        pytest.param([9, -2], [0.2, 0.8], 9, 9, id="magnitude can outvote weight"),
        pytest.param([3, 2, -4], [0.3, 0.3, 0.3], -4, -4, id="by shards, not by camps"),
        pytest.param([3, 0], [0.2, 0.8], 3, 0.6, id="one contributor keeps it whole"),
        pytest.param([-3, -1, 0], [0.2, 0.3, 0.5], -1.8, -0.9, id="(.6 + .3) / .5"),
        pytest.param([1, -0.0, 2], [0.25, 0.5, 0.25], 1.5, 0.75, id="a zero is no vote, nor is -0.0"),
        pytest.param([-1, 1], [0.5, 0.5], -1, -1, id="a draw goes to the lower index"),
        pytest.param([0, 0], [0.5, 0.5], 0, 0, id="nobody contributes"),
        pytest.param([1, 3, -5], [0.5, 0.5, 0.0], 2, 2, id="weight zero takes no part"),
    ],
)
def test_pinned(values, weights, contributors, everyone):
    deltas, shares = (torch.tensor(given, dtype=torch.float64) for given in (values, weights))
    assert ties_merge(deltas[:, None], shares).item() == pytest.approx(contributors)
    assert ties_merge(deltas[:, None], shares, "global").item() == pytest.approx(everyone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", ["contributors", "global"])
@pytest.mark.parametrize(("shards", "shape"), [(1, (40,)), (2, ()), (8, (2, 3, 4))])
def test_against_the_loop(shards, shape, normalize, dtype):
    deltas = sparse(shards, shape, dtype)
    before = deltas.clone()
    weights = loss_weights(torch.linspace(0.1, 2.0, shards, dtype=torch.float64), 1.0)
    expected = slow_merge(deltas, weights, normalize).to(dtype)
    torch.testing.assert_close(ties_merge(deltas, weights, normalize), expected)
    assert torch.equal(deltas, before)


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

    def test_order_of_shards_does_not_matter(self):
        deltas = sparse(5, (300,), torch.float64)
        weights = loss_weights(torch.rand(5, dtype=torch.float64), 1.0)
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(ties_merge(deltas, weights), ties_merge(deltas[order], weights[order]))


@pytest.mark.parametrize(
    ("losses", "alpha", "expected"),
    [
        pytest.param([0.0, math.log(3)], 2.0, [0.9, 0.1], id="1 to 3^-2"),
        pytest.param([1e4, 1e4 + math.log(3)], 1.0, [0.75, 0.25], id="large losses do not overflow"),
        pytest.param([0.0, 5.0, 9.0, 1.0], 0.0, [0.25] * 4, id="alpha zero is uniform"),
    ],
)
def test_loss_weights(losses, alpha, expected):
    found = loss_weights(torch.tensor(losses, dtype=torch.float64), alpha)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("density", "shape"), [(0.07, (100,)), (0.5, (10, 7)), (0.01, (1,))])
def test_trim_against_a_loop(shape, density, dtype):
    """The largest are kept, of equals the earlier ones. 0.07 * 100 is 7.000000000000001 in floats; 7 of 100 stay."""
    delta = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    flat = delta.flatten().tolist()
    kept = math.ceil(round(density * len(flat), 6))
    ranked = sorted(range(len(flat)), key=lambda index: (-abs(flat[index]), index))[:kept]
    assert trim(delta, density).flatten().tolist() == [v if i in ranked else 0.0 for i, v in enumerate(flat)]
