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
SHAPES = [(1, 1, 2), (3, 5, 7), (4, 2, 33)]


def example(shape, dtype, side="right", seed=0):
    """Logits (B, T, V) and labels with row b holding at least one target token, padding on one side."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, vocabulary = shape
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    for row in range(batch):
        ignored = row % length
        labels[row, length - ignored :] = -100
        if side == "left":
            labels[row] = labels[row].roll(ignored)
    return logits, labels


def targets(labels, row):
    return [(t, int(label)) for t, label in enumerate(labels[row]) if label != -100]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
class TestAgainstLoops:
    def test_cross_entropy(self, shape, dtype, side):
        logits, labels = example(shape, dtype, side)
        expected = []
        for row in range(shape[0]):
            nats = [math.log(sum(map(math.exp, logits[row, t].tolist()))) - logits[row, t, y].item()
                    for t, y in targets(labels, row)]  # fmt: skip
            expected.append(sum(nats) / len(nats))
        actual = target_cross_entropy(logits, labels)
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)

    def test_margin(self, shape, dtype, side):
        logits, labels = example(shape, dtype, side)
        expected = []
        for row in range(shape[0]):
            margins = []
            for t, y in targets(labels, row):
                values = logits[row, t].tolist()
                margins.append(values[y] - max(v for i, v in enumerate(values) if i != y))
            expected.append(min(margins))
        actual = target_margin(logits, labels)
        torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)

    def test_margin_is_positive_exactly_where_greedy_decoding_says_the_target(self, shape, dtype, side):
        logits, labels = example(shape, dtype, side)
        labels[0] = torch.where(labels[0] == -100, -100, logits[0].argmax(-1))
        said = [all(logits[row, t].argmax() == y for t, y in targets(labels, row)) for row in range(shape[0])]
        assert (target_margin(logits, labels) > 0).tolist() == said
        assert said[0]


class TestTargetCrossEntropy:
    def test_uniform_logits_cost_log_v(self):
        """Equal logits over V = 4: every token costs log 4 = 1.386294 nats, however many tokens there are."""
        labels = torch.tensor([[0, -100, -100], [1, 2, 3]])
        torch.testing.assert_close(target_cross_entropy(torch.zeros(2, 3, 4), labels), torch.full((2,), 1.386294))

    def test_nothing_is_shifted(self):
        """Position 1 is sure of token 2, and so is the label at position 1: log(1 + 2/e^30), about 0."""
        logits = torch.zeros(1, 3, 3)
        logits[0, 1, 2] = 30.0
        assert target_cross_entropy(logits, torch.tensor([[-100, 2, -100]])).item() < 1e-6
        assert target_cross_entropy(logits, torch.tensor([[2, -100, -100]])).item() == pytest.approx(math.log(3))

    def test_an_example_without_target_gives_zero_and_no_gradient(self):
        logits = torch.randn(2, 3, 4, requires_grad=True)
        labels = torch.tensor([[-100, -100, -100], [1, -100, -100]])
        loss = target_cross_entropy(logits, labels)
        loss.sum().backward()
        assert loss[0] == 0
        assert not logits.grad[0].any()
        assert logits.grad[1, 0].abs().sum() > 0
        assert not logits.grad[1, 1:].any()

    def test_bfloat16_is_summed_in_float32(self):
        """Two equal logits of 1000 other tokens: log 1000 = 6.907755; bfloat16 would round it to 6.90625."""
        loss = target_cross_entropy(torch.zeros(1, 1, 1000, dtype=torch.bfloat16), torch.tensor([[3]]))
        assert loss.item() == pytest.approx(math.log(1000), abs=1e-5)

    def test_gradient(self):
        logits, labels = example((3, 4, 5), torch.float64)
        assert torch.autograd.gradcheck(lambda x: target_cross_entropy(x, labels), logits.requires_grad_())

    @pytest.mark.parametrize("function", [target_cross_entropy, target_margin])
    def test_misaligned_labels(self, function):
        with pytest.raises(ValueError, match=r"labels must be \(B, T\) .* got \(2, 4\) for \(2, 3, 5\)"):
            function(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


class TestTargetMargin:
    def test_pinned(self):
        """Token 0: right 5, best other 3, margin 2. Token 1: right 1, best other 4, margin -3. The smallest is -3."""
        logits = torch.tensor([[[5.0, 3.0, 0.0], [4.0, 1.0, -2.0]]])
        assert target_margin(logits, torch.tensor([[0, 1]])).tolist() == [-3.0]
        assert target_margin(logits, torch.tensor([[0, -100]])).tolist() == [2.0]
        assert target_margin(torch.tensor([[[-5e6, -4e6]]]), torch.tensor([[1]])).tolist() == [1e6]

    def test_a_tie_is_not_safe(self):
        assert target_margin(torch.zeros(1, 1, 3), torch.tensor([[1]])).tolist() == [0.0]

    def test_no_target_is_always_safe(self):
        assert target_margin(torch.zeros(1, 2, 3), torch.full((1, 2), -100)).tolist() == [math.inf]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_masked_vocabulary_gives_no_minus_infinity(self, dtype):
        logits = torch.full((1, 1, 4), -torch.inf, dtype=dtype)
        logits[0, 0, 1] = 80.0
        forbidden = target_margin(logits, torch.tensor([[2]]))
        assert torch.isfinite(forbidden).all()
        assert forbidden.item() < 0
        assert target_margin(logits, torch.tensor([[1]])).item() > 0

    def test_nan_is_never_safe(self):
        logits = torch.tensor([[[torch.nan, 1.0], [5.0, 0.0]]])
        assert not (target_margin(logits, torch.tensor([[1, 0]])) > 0).any()


class TestMargins:
    def test_scaled(self):
        assert Margins(0.5, 2.0, 1.0).scaled(4.0) == Margins(2.0, 8.0, 4.0)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
    @pytest.mark.parametrize("name", ["irrelevant", "edit", "gap"])
    def test_not_positive(self, name, value):
        with pytest.raises(ValueError, match=rf"margins\.{name} must be positive and finite, got {value}"):
            Margins(**{"irrelevant": 2.0, "edit": 20.0, "gap": 10.0, name: value})

    def test_bad_unit(self):
        with pytest.raises(ValueError, match=r"unit must be positive and finite, got 0\.0: measure"):
            Margins(2, 20, 10).scaled(0.0)


class TestRoutingMarginLoss:
    PAPER = Margins(2.0, 20.0, 10.0)

    def test_pinned_pairs(self):
        """g1, g2, g = 2, 20, 10; edits 12 and 30, irrelevant 5 and 1.

        (s_i - 2)+: 3, 0, mean 1.5. (20 - s_e)+: 8, 0, mean 4. Pairs 12 - 5 = 7 and 30 - 1 = 29: (10 - .)+ = 3, 0,
        mean 1.5. Sum 7.
        """
        assert routing_margin_loss(torch.tensor([12.0, 30.0]), torch.tensor([5.0, 1.0]), self.PAPER).item() == 7.0

    def test_pinned_all_pairs(self):
        """One edit of 12 against 5, 1 and 0: quiet 3/3 = 1, loud 8, gaps 7, 11, 12: 3/3 = 1. Sum 10."""
        assert routing_margin_loss(torch.tensor([12.0]), torch.tensor([5.0, 1.0, 0.0]), self.PAPER).item() == 10.0

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("edits", "irrelevant"), [(1, 1), (4, 4), (4, 7), (6, 1)])
    def test_against_a_loop(self, dtype, edits, irrelevant):
        generator = torch.Generator().manual_seed(edits)
        s_e = (30 * torch.rand(edits, generator=generator)).to(dtype)
        s_i = (10 * torch.rand(irrelevant, generator=generator)).to(dtype)
        pairs = [(i, i) for i in range(edits)] if edits == irrelevant else [
            (e, i) for e in range(edits) for i in range(irrelevant)
        ]  # fmt: skip
        expected = (
            sum(max(0, s.item() - 2) for s in s_i) / irrelevant
            + sum(max(0, 20 - s.item()) for s in s_e) / edits
            + sum(max(0, 10 - (s_e[e].item() - s_i[i].item())) for e, i in pairs) / len(pairs)
        )
        assert routing_margin_loss(s_e, s_i, self.PAPER).item() == pytest.approx(expected, rel=1e-5)

    def test_zero_and_without_gradient_beyond_all_margins(self):
        edit = torch.tensor([25.0, 40.0], requires_grad=True)
        loss = routing_margin_loss(edit, torch.tensor([1.0, 2.0]), self.PAPER)
        loss.backward()
        assert loss.item() == 0.0
        assert not edit.grad.any()

    def test_gradients_push_apart(self):
        edit = torch.tensor([5.0], requires_grad=True)
        irrelevant = torch.tensor([5.0], requires_grad=True)
        routing_margin_loss(edit, irrelevant, self.PAPER).backward()
        assert edit.grad.item() == -2.0  # loud and apart, one each
        assert irrelevant.grad.item() == 2.0  # quiet and apart

    def test_empty(self):
        with pytest.raises(ValueError, match=r"irrelevant_scores must have shape \(n,\) with n >= 1, got \(0,\)"):
            routing_margin_loss(torch.ones(2), torch.ones(0), self.PAPER)


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
    @pytest.mark.parametrize(("batch", "width"), [(2, 3), (5, 8), (9, 1)])
    @pytest.mark.parametrize("detach_teacher", [True, False])
    def test_against_a_loop(self, dtype, batch, width, detach_teacher):
        features = torch.randn(batch, width, generator=torch.Generator().manual_seed(batch)).to(dtype)
        units = [row / row.norm() for row in features.double()]
        mean = sum(units) / batch
        cosine = [1 - (unit @ units[0]).item() for unit in units]
        spread = [((unit - mean) ** 2).sum().item() for unit in units]
        loss, members = kd_loss(features, 0.3, 0.7, detach_teacher=detach_teacher)
        assert loss.item() == pytest.approx(0.3 * sum(cosine[1:]) / (batch - 1) + 0.7 * sum(spread) / batch, rel=1e-4)
        expected = torch.tensor([0.3 * c + 0.7 * s for c, s in zip(cosine, spread, strict=True)])
        torch.testing.assert_close(members.float(), expected.float(), rtol=1e-4, atol=1e-5)

    def test_length_does_not_matter(self):
        features = torch.randn(4, 6, dtype=torch.float64)
        lengths = torch.tensor([[1e-3], [1.0], [7.0], [1e4]], dtype=torch.float64)
        torch.testing.assert_close(kd_loss(features, 1, 1), kd_loss(features * lengths, 1, 1))

    def test_one_member_costs_nothing(self):
        features = torch.randn(1, 4, requires_grad=True)
        loss, members = kd_loss(features, 0.2, 0.2)
        loss.backward()
        assert loss.item() == 0.0
        assert members.tolist() == [0.0]
        assert not features.grad.any()

    def test_never_negative(self):
        features = torch.randn(1, 512).repeat(8, 1) * torch.rand(8, 1)
        loss, members = kd_loss(features, 1.0, 1.0)
        assert (members >= 0).all()
        assert 0 <= loss.item() < 1e-6

    def test_a_stranger_stands_out(self):
        """Three alike and one opposite: the stranger's share is the largest, so FILTERANDRECLUSTER finds it."""
        _, members = kd_loss(torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.0], [1.0, -0.1]]), 0.2, 0.2)
        assert members.argmax() == 2
        assert members[2] > 5 * members[[0, 1, 3]].max()

    def test_detached_teacher_is_not_moved_by_the_cosine_term(self):
        features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        held = torch.autograd.grad(kd_loss(features, 1.0, 0.0)[0], features)[0]
        free = torch.autograd.grad(kd_loss(features, 1.0, 0.0, detach_teacher=False)[0], features)[0]
        spread = torch.autograd.grad(kd_loss(features, 0.0, 1.0)[0], features)[0]
        assert not held[0].any()
        assert free[0].abs().sum() > 1e-3
        assert spread[0].abs().sum() > 1e-3
        torch.testing.assert_close(held[1:], free[1:])

    def test_gradient(self):
        features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: kd_loss(x, 0.2, 0.4, detach_teacher=False), features)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"cosine_weight must be finite and at least 0, got -0\.2"):
            kd_loss(torch.ones(2, 2), -0.2, 0.0)
        with pytest.raises(ValueError, match=r"variance_weight must be finite and at least 0, got nan"):
            kd_loss(torch.ones(2, 2), 0.2, math.nan)
        with pytest.raises(ValueError, match=r"features must have shape \(B, n\) with B >= 1, got \(2, 3, 4\)"):
            kd_loss(torch.ones(2, 3, 4), 0.2, 0.2)


class TestSoftKdLoss:
    def test_pinned(self):
        """Logits (2 log 3, 0) and (0, 0) at T = 2: p_0 = (3/4, 1/4), p_1 = (1/2, 1/2).

        KL = .75 log 1.5 + .25 log .5 = .304099 - .173287 = .130812, and no factor T^2.
        """
        logits = torch.tensor([[2 * math.log(3), 0.0], [0.0, 0.0]])
        assert soft_kd_loss(logits, 2.0).item() == pytest.approx(0.130812, abs=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("batch", "vocabulary"), [(2, 2), (5, 11)])
    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_against_a_loop(self, dtype, batch, vocabulary, temperature):
        logits = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
        p = (logits.double() / temperature).softmax(1).tolist()
        total = sum(a * math.log(a / b) for row in p[1:] for a, b in zip(p[0], row, strict=True))
        assert soft_kd_loss(logits, temperature).item() == pytest.approx(total / (batch - 1), rel=1e-4)

    def test_one_member_costs_nothing(self):
        assert soft_kd_loss(torch.randn(1, 5), 2.0).item() == 0.0

    def test_teacher(self):
        logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        held = torch.autograd.grad(soft_kd_loss(logits, 2.0), logits)[0]
        free = torch.autograd.grad(soft_kd_loss(logits, 2.0, detach_teacher=False), logits)[0]
        assert not held[0].any()
        assert held[1:].abs().sum() > 1e-3
        assert free[0].abs().sum() > 1e-3

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
    def test_bad_temperature(self, temperature):
        with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
            soft_kd_loss(torch.zeros(2, 2), temperature)
