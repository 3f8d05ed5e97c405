"""Masks: what is closed keeps its bits, and storage gives back what it took."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.functional import (
    bernoulli_mask,
    masked_step,
    pack_mask,
    pack_values,
    unpack_mask,
    unpack_values,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(1,), (8,), (9,), (3, 5), (2, 3, 4), (0,), (64, 33)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestBernoulliMask:
    @pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.9])
    def test_share_of_open_coordinates(self, ratio):
        """The count of n = 100,000 draws has standard deviation sqrt(n rho (1 - rho)); five of them are allowed."""
        n = 100_000
        count = bernoulli_mask((100, 1000), ratio, seeded()).sum().item()
        assert abs(count - n * ratio) < 5 * math.sqrt(n * ratio * (1 - ratio))

    def test_one_opens_everything(self):
        assert bernoulli_mask((1000, 100), 1.0, seeded()).all()

    def test_the_seed_decides(self):
        first, again, other = (bernoulli_mask((50, 50), 0.2, seeded(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.dtype == torch.bool

    def test_the_global_generator_is_left_alone(self):
        state = torch.get_rng_state()
        bernoulli_mask((50, 50), 0.2, seeded())
        assert torch.equal(torch.get_rng_state(), state)

    def test_device(self):
        assert bernoulli_mask((4,), 0.5, seeded(), device="meta").device.type == "meta"

    @pytest.mark.parametrize("ratio", [0.0, 1.3, -0.2, math.nan])
    def test_bad_ratio(self, ratio):
        with pytest.raises(ValueError, match=rf"mask_ratio must be in \(0, 1\], got {ratio}"):
            bernoulli_mask((2,), ratio, seeded())


class TestMaskedStep:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_against_a_loop(self, dtype, shape):
        parameter, step = (torch.randn(shape, generator=seeded(seed)).to(dtype) for seed in (1, 2))
        mask = bernoulli_mask(shape, 0.5, seeded(3))
        expected = [
            p + s if m else p for p, s, m in zip(parameter.flatten(), step.flatten(), mask.flatten(), strict=True)
        ]
        masked_step(parameter, step, mask)
        assert parameter.flatten().tolist() == [value.item() for value in expected]

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    def test_poison_does_not_leak(self, poison):
        parameter = torch.tensor([1.0, -0.0, 3.0])
        masked_step(parameter, torch.tensor([poison, poison, 1.0]), torch.tensor([False, False, True]))
        assert parameter.tolist() == [1.0, 0.0, 4.0]
        assert math.copysign(1, parameter[1].item()) == -1, "even the sign of zero is kept"

    def test_in_place_on_a_leaf(self):
        parameter = torch.nn.Parameter(torch.zeros(2))
        address = parameter.data_ptr()
        masked_step(parameter, torch.ones(2), torch.tensor([True, False]))
        assert parameter.tolist() == [1.0, 0.0]
        assert parameter.data_ptr() == address
        assert parameter.grad_fn is None

    def test_a_float32_step_on_a_bfloat16_parameter(self):
        """bfloat16 has 8 significant bits: 1 + 1/128 is its next number after 1, and 1.001 rounds back to 1."""
        parameter = torch.ones(3, dtype=torch.bfloat16)
        masked_step(parameter, torch.tensor([1 / 128, 0.001, 5.0]), torch.tensor([True, True, False]))
        assert parameter.tolist() == [1 + 1 / 128, 1.0, 1.0]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"mask must have the shape of parameter, \(2, 3\), got \(3,\)"):
            masked_step(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"step must have the shape of parameter, \(2, 3\), got \(1,\)"):
            masked_step(torch.zeros(2, 3), torch.zeros(1), torch.ones(2, 3, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.float32"):
            masked_step(torch.zeros(2), torch.zeros(2), torch.ones(2))


class TestPackMask:
    def test_pinned(self):
        """Bits 0, 2 and 7 of the first byte: 1 + 4 + 128 = 133; the ninth coordinate is bit 0 of the second: 1."""
        mask = torch.tensor([1, 0, 1, 0, 0, 0, 0, 1, 1]).bool()
        packed = pack_mask(mask)
        assert packed.tolist() == [133, 1]
        assert packed.dtype == torch.uint8

    @pytest.mark.parametrize("shape", SHAPES)
    def test_round_trip(self, shape):
        mask = bernoulli_mask(shape, 0.3, seeded())
        packed = pack_mask(mask)
        assert packed.numel() == math.ceil(mask.numel() / 8)
        assert torch.equal(unpack_mask(packed, shape), mask)

    @given(st.lists(st.booleans(), max_size=70))
    def test_round_trip_of_anything(self, bits):
        mask = torch.tensor(bits, dtype=torch.bool)
        assert unpack_mask(pack_mask(mask), (len(bits),)).tolist() == bits

    def test_transposed(self):
        mask = bernoulli_mask((5, 7), 0.5, seeded()).T
        assert torch.equal(unpack_mask(pack_mask(mask), (7, 5)), mask)

    def test_errors(self):
        with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.uint8"):
            pack_mask(torch.zeros(8, dtype=torch.uint8))
        with pytest.raises(TypeError, match=r"packed must be torch\.uint8, got torch\.int64"):
            unpack_mask(torch.zeros(1, dtype=torch.long), (8,))
        with pytest.raises(ValueError, match=r"packed must have shape \(2,\) for a mask of shape \(3, 3\), got \(1,\)"):
            unpack_mask(torch.zeros(1, dtype=torch.uint8), (3, 3))


class TestPackValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_round_trip(self, dtype, shape):
        mask = bernoulli_mask(shape, 0.3, seeded())
        dense = torch.where(mask, torch.randn(shape, generator=seeded(1)), 0.0).to(dtype)
        values = pack_values(dense, mask)
        assert values.shape == (int(mask.sum()),)
        assert torch.equal(unpack_values(values, mask), dense)
        assert unpack_values(values, mask).dtype == dtype

    def test_what_lies_outside_is_dropped(self):
        mask = torch.tensor([[True, False], [False, True]])
        values = pack_values(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mask)
        assert values.tolist() == [1.0, 4.0]
        assert unpack_values(values, mask).tolist() == [[1.0, 0.0], [0.0, 4.0]]

    def test_errors(self):
        mask = torch.tensor([True, False, True])
        with pytest.raises(ValueError, match=r"values must have shape \(2,\), one per open coordinate .* got \(3,\)"):
            unpack_values(torch.zeros(3), mask)
        with pytest.raises(ValueError, match=r"mask must have the shape of dense, \(2, 2\), got \(3,\)"):
            pack_values(torch.zeros(2, 2), mask)
        with pytest.raises(TypeError, match=r"mask must be torch\.bool"):
            unpack_values(torch.zeros(2), mask.long())
