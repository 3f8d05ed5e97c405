"""Masks: what is closed keeps its bits, and storage gives back what it took."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.functional import bernoulli_mask, pack_mask, pack_values, unpack_mask, unpack_values

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(9,), (2, 3, 4), (0,), (64, 33)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.9, 1.0])
def test_share_of_open_coordinates(ratio):
    """The count of n = 100,000 draws has standard deviation sqrt(n rho (1 - rho)); five of them are allowed."""
    n = 100_000
    count = bernoulli_mask((100, 1000), ratio, seeded()).sum().item()
    assert abs(count - n * ratio) <= 5 * math.sqrt(n * ratio * (1 - ratio))


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = (bernoulli_mask((50, 50), 0.2, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_bits_pinned():
    """Bits 0, 2 and 7 of the first byte: 1 + 4 + 128 = 133; the ninth coordinate is bit 0 of the second: 1."""
    packed = pack_mask(torch.tensor([1, 0, 1, 0, 0, 0, 0, 1, 1]).bool())
    assert packed.tolist() == [133, 1]
    assert packed.dtype == torch.uint8


@given(st.lists(st.booleans(), max_size=70))
def test_packed_bits_come_back(bits):
    assert unpack_mask(pack_mask(torch.tensor(bits, dtype=torch.bool)), (len(bits),)).tolist() == bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_values_come_back_and_the_rest_is_dropped(dtype, shape):
    mask = bernoulli_mask(shape, 0.3, seeded())
    dense = torch.randn(shape, generator=seeded(1)).to(dtype)
    values = pack_values(dense, mask)
    assert values.shape == (int(mask.sum()),)
    assert torch.equal(unpack_values(values, unpack_mask(pack_mask(mask), shape)), torch.where(mask, dense, 0.0))
    transposed = mask.mT if mask.ndim > 1 else mask
    assert torch.equal(unpack_mask(pack_mask(transposed), transposed.shape), transposed)
