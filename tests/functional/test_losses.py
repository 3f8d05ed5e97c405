"""The losses against loops that anyone can read, and against numbers derived by hand."""

import math

import pytest
import torch

from repair_lightning.functional import (
    Margins,
    kd_loss,
    routing_margin_loss,
    soft_kd_loss,
    target_cross_entropy,
    target_margin,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
PAPER = Margins(2.0, 20.0, 10.0)


def example(shape, dtype, side):
    """Logits (B, T, V) and labels with row b holding at least one target token, padding on one side."""
    generator = torch.Generator().manual_seed(0)
    batch, length, vocabulary = shape
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[0] = logits[0].argmax(-1)
    for row in range(batch):
        ignored = row % length
        labels[row, length - ignored :] = -100
        if side == "left":
            labels[row] = labels[row].roll(ignored)
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 7), (4, 2, 33)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_of_targets_against_loops(shape, dtype, side):
    """And the margin is positive exactly where greedy decoding says the target."""
    logits, labels = example(shape, dtype, side)
    entropy, margin = target_cross_entropy(logits, labels), target_margin(logits, labels)
    assert entropy.dtype == torch.promote_types(dtype, torch.float32)
    for row in range(shape[0]):
        said = [(logits[row, t].tolist(), int(y)) for t, y in enumerate(labels[row]) if y != -100]
        nats = [math.log(sum(map(math.exp, values))) - values[y] for values, y in said]
        assert entropy[row].item() == pytest.approx(sum(nats) / len(nats), rel=1e-5, abs=1e-6)
        margins = [values[y] - max(v for i, v in enumerate(values) if i != y) for values, y in said]
        assert margin[row].item() == pytest.approx(min(margins), rel=1e-5, abs=1e-6)
        assert (margin[row] > 0) == all(max(values) == values[y] and values.count(values[y]) == 1 for values, y in said)
    assert margin[0] > 0


def test_cross_entropy_without_target_is_zero_and_has_no_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = target_cross_entropy(logits, torch.tensor([[-100, -100, -100], [1, -100, -100]]))
    loss.sum().backward()
    assert loss[0] == 0
    assert [bool(found) for found in logits.grad.flatten(1).any(1)] == [False, True]


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        pytest.param([[5.0, 3.0, 0.0], [4.0, 1.0, -2.0]], [0, 1], -3.0, id="the smallest of 5 - 3 and 1 - 4"),
        pytest.param([[5.0, 3.0, 0.0], [4.0, 1.0, -2.0]], [0, -100], 2.0, id="what is no target does not count"),
        pytest.param([[0.0, 0.0, 0.0]], [1], 0.0, id="a tie is not safe"),
        pytest.param([[0.0, 0.0, 0.0]], [-100], math.inf, id="no target is always safe"),
    ],
)
def test_margin_pinned(logits, labels, expected):
    assert target_margin(torch.tensor([logits]), torch.tensor([labels])).tolist() == [expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_margin_of_what_is_not_finite_is_never_safe(dtype):
    logits = torch.full((1, 1, 4), -torch.inf, dtype=dtype)
    logits[0, 0, 1] = 80.0
    forbidden = target_margin(logits, torch.tensor([[2]]))
    assert torch.isfinite(forbidden).all()
    assert forbidden.item() < 0
    logits[0, 0, 3] = torch.nan
    assert not (target_margin(logits, torch.tensor([[1]])) > 0).any()


class TestRoutingMarginLoss:
    @pytest.mark.parametrize(
        ("edit", "irrelevant", "expected"), [([12.0, 30.0], [5.0, 1.0], 7.0), ([12.0], [5.0, 1.0, 0.0], 10.0)]
    )
    def test_pinned(self, edit, irrelevant, expected):
        """g1, g2, g = 2, 20, 10. Pairs: (s_i - 2)+: 3, 0, mean 1.5. (20 - s_e)+: 8, 0, mean 4. 12 - 5 = 7 and
        30 - 1 = 29: (10 - .)+ = 3, 0, mean 1.5. Sum 7.

        All pairs, where the numbers differ: quiet 3/3 = 1, loud 8, gaps 7, 11, 12: 3/3 = 1. Sum 10.
        """
        assert routing_margin_loss(torch.tensor(edit), torch.tensor(irrelevant), PAPER).item() == expected

    def test_gradients_push_apart_and_vanish_beyond_all_margins(self):
        for scores, expected in (([5.0, 5.0], [-2.0, 2.0]), ([25.0, 1.0], [0.0, 0.0])):
            edit, irrelevant = (torch.tensor([score], requires_grad=True) for score in scores)
            routing_margin_loss(edit, irrelevant, PAPER).backward()
            assert [edit.grad.item(), irrelevant.grad.item()] == expected, "two hinges each: level and gap"


class TestKdLoss:
    def test_pinned(self):
        """o_0 = (1, 0), o_1 = (0, 1) (given with lengths 2 and 5), lambda 0.2, theta 0.4.

        cos = 0, so L_cos = 1 over one student: 0.2. The mean is (.5, .5), each is at squared distance .5: L_var = .5,
        0.4 * .5 = 0.2. L = 0.4; members: teacher 0 + 0.2, student 0.2 + 0.2.
        """
        loss, members = kd_loss(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), 0.2, 0.4)
        assert loss.item() == pytest.approx(0.4)
        torch.testing.assert_close(members, torch.tensor([0.2, 0.4]))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("batch", "width"), [(1, 4), (2, 3), (5, 8), (9, 1)])
    def test_against_a_loop(self, dtype, batch, width):
        features = torch.randn(batch, width, generator=torch.Generator().manual_seed(batch)).to(dtype)
        units = [row / row.norm() for row in features.double()]
        mean = sum(units) / batch
        cosine = [1 - (unit @ units[0]).item() for unit in units]
        spread = [((unit - mean) ** 2).sum().item() for unit in units]
        loss, members = kd_loss(features, 0.3, 0.7)
        expected = 0.3 * sum(cosine[1:]) / max(batch - 1, 1) + 0.7 * sum(spread) / batch
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert members.tolist() == pytest.approx(
            [0.3 * c + 0.7 * s for c, s in zip(cosine, spread, strict=True)], rel=1e-4, abs=1e-5
        )
        assert (members >= 0).all()


def test_soft_kd_pinned():
    """Logits (2 log 3, 0) and (0, 0) at T = 2: p_0 = (3/4, 1/4), p_1 = (1/2, 1/2).

    KL = .75 log 1.5 + .25 log .5 = .304099 - .173287 = .130812, and no factor T^2.
    """
    logits = torch.tensor([[2 * math.log(3), 0.0], [0.0, 0.0]])
    assert soft_kd_loss(logits, 2.0).item() == pytest.approx(0.130812, abs=1e-6)
    assert soft_kd_loss(logits[:1], 2.0).item() == 0


@pytest.mark.parametrize("loss", [lambda x: kd_loss(x, 1.0, 0.0)[0], lambda x: soft_kd_loss(x, 2.0)])
def test_the_teacher_is_not_moved_and_its_students_are(loss):
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(features), features)
    assert not gradient[0].any()
    assert gradient[1:].abs().sum(-1).min() > 1e-3
