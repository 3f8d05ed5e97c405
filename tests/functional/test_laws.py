"""The paper's lemmas and theorems (Appendix D) as tests of the functions that are meant to obey them.

Where a claim does not hold as printed, the test beside it shows the case:

- Theorem 4 says that the descent converges to [u, ..., u] because that is the only *minimiser*. Other critical points
  exist (all -u; every set with mean -lambda / (2 theta) u where lambda <= 2 theta), and a descent that starts there
  stays. They are maxima or saddles: every random start here leaves them. It also takes the teacher u as constant, which
  is more than `kd_loss` does: a teacher that is itself a variable is moved by the variance term.
- Theorem 5 says that conflict falls by rho^2. That is the inner product; the norms fall too, each by sqrt(rho), so the
  angle (the cosine) between two shards' gradients falls by about rho only.
- Lemma 7 takes from Assumption 3 that an error once below the threshold stays there. The assumption speaks of errors
  above it only: new edits can bring the error back.
"""

import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from repair_lightning.functional import bernoulli_mask, kd_loss, masked_step

DOUBLE = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestMaskedStepNormBound:
    """Lemma 1 and 6: `||eta (M * g)|| <= eta ||g||` for each mask."""

    @settings(deadline=None)
    @given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.floats(1e-3, 10.0))
    def test_bound(self, seed, ratio, rate):
        generator = seeded(seed)
        gradient = torch.randn(13, 7, generator=generator, dtype=DOUBLE)
        mask = bernoulli_mask(gradient.shape, ratio, generator)
        weight = torch.zeros_like(gradient)
        masked_step(weight, -rate * gradient, mask)
        assert weight.norm() <= rate * gradient.norm() * (1 + 1e-12)  # rounding
        kept = math.sqrt(
            sum((rate * g) ** 2 for g, m in zip(gradient.flatten().tolist(), mask.flatten(), strict=True) if m)
        )
        assert weight.norm().item() == pytest.approx(kept, rel=1e-12)

    def test_the_bound_is_reached_by_the_open_mask(self):
        gradient = torch.randn(5, 5, dtype=DOUBLE)
        weight = torch.zeros_like(gradient)
        masked_step(weight, -0.9 * gradient, bernoulli_mask((5, 5), 1.0, seeded(0)))
        torch.testing.assert_close(weight.norm(), 0.9 * gradient.norm())

    def test_the_expected_norm(self):
        """E||M * g||^2 = rho ||g||^2. Deviation over n masks: sqrt(rho (1 - rho) sum g^4 / n); five allowed."""
        gradient, ratio, n = torch.randn(200, dtype=DOUBLE), 0.2, 4000
        masks = bernoulli_mask((n, 200), ratio, seeded(1))
        mean = (masks * gradient).square().sum(1).mean()
        sigma = (ratio * (1 - ratio) * gradient.pow(4).sum() / n).sqrt()
        assert (mean - ratio * gradient.square().sum()).abs() < 5 * sigma


class TestInnerProductScaling:
    """Theorem 1 and 5: `E<M_i * g_i, M_j * g_j> = rho^2 <g_i, g_j>` for independent masks."""

    @staticmethod
    def products(ratio, n, width=100):
        """n draws of the masked inner product, the full one, and both gradients (correlated, so that they conflict)."""
        g_i = torch.randn(width, generator=seeded(5), dtype=DOUBLE)
        g_j = -g_i + torch.randn(width, generator=seeded(6), dtype=DOUBLE)
        generator = seeded(7)
        m_i, m_j = (bernoulli_mask((n, width), ratio, generator) for _ in range(2))
        return (m_i * g_i), (m_j * g_j), g_i, g_j

    @pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5, 0.9])
    def test_rho_squared(self, ratio):
        """One draw is `sum_p m_p g_ip g_jp` with m_p ~ Bernoulli(rho^2), independent over p.

        Its variance is rho^2 (1 - rho^2) sum (g_ip g_jp)^2; the mean of n = 20,000 draws may be five deviations off.
        """
        n = 20_000
        masked_i, masked_j, g_i, g_j = self.products(ratio, n)
        mean = (masked_i * masked_j).sum(1).mean()
        sigma = (ratio**2 * (1 - ratio**2) * (g_i * g_j).square().sum() / n).sqrt()
        full = g_i @ g_j
        assert (mean - ratio**2 * full).abs() < 5 * sigma
        assert (mean - ratio * full).abs() > 5 * sigma, "the test tells rho^2 from rho"

    def test_one_mask_for_both_gives_rho(self):
        """Independence is needed: with the same mask the factor is rho, not rho^2."""
        ratio, n = 0.2, 20_000
        masked_i, _, g_i, g_j = self.products(ratio, n)
        mean = (masked_i * g_j).sum(1).mean()
        sigma = (ratio * (1 - ratio) * (g_i * g_j).square().sum() / n).sqrt()
        assert (mean - ratio * (g_i @ g_j)).abs() < 5 * sigma
        assert (mean - ratio**2 * (g_i @ g_j)).abs() > 5 * sigma

    def test_the_angle_falls_by_rho_only(self):
        """The norms shrink by sqrt(rho) each: cos is about rho^2 / rho = rho times what it was (5 % slack)."""
        ratio = 0.5
        masked_i, masked_j, g_i, g_j = self.products(ratio, 5000)
        cosine = F.cosine_similarity(masked_i, masked_j, dim=1).mean()
        assert cosine.item() == pytest.approx(ratio * F.cosine_similarity(g_i, g_j, dim=0).item(), rel=0.05)


def sphere(m, width, seed):
    """A constant teacher u (width,) and m student directions (m, width)."""
    points = F.normalize(torch.randn(m + 1, width, generator=seeded(seed), dtype=DOUBLE), dim=1)
    return points[0], points[1:]


def paper_bound(lam, theta, m):
    """Lemma 5's bound of the smoothness constant L_R."""
    return 2 * lam / m + 4 * theta / m


def riemannian_gradient(points, objective):
    points = points.detach().requires_grad_()
    loss = objective(points)
    (gradient,) = torch.autograd.grad(loss, points)
    points = points.detach()
    return loss.item(), gradient - (gradient * points).sum(1, keepdim=True) * points


def descend(points, objective, rate, steps=20_000):
    """Theorem 4's iteration with R_o(v) = (o + v) / ||o + v||; returns the points and the losses on the way."""
    losses = []
    for _ in range(steps):
        loss, gradient = riemannian_gradient(points, objective)
        losses.append(loss)
        if gradient.norm() < 1e-9:
            break
        points = F.normalize(points - rate * gradient, dim=1)
    return points, losses


def with_constant_teacher(teacher, lam, theta):
    """`kd_loss` as a function of the students: the teacher is row 0 and no variable, as in the theorem."""
    return lambda students: kd_loss(torch.cat([teacher[None], students]), lam, theta)[0]


def as_printed(teacher, lam, theta):
    """Appendix D's own objective: mean and variance over the m students, the teacher outside."""
    return lambda o: lam * (1 - o @ teacher).mean() + theta * (o - o.mean(0)).square().sum(1).mean()


def decreases(losses):
    return all(later <= earlier + 1e-13 for earlier, later in pairwise(losses))


WEIGHTS = [(0.2, 0.0), (0.2, 0.2), (0.2, 5.0)]


@pytest.mark.parametrize("objective", [with_constant_teacher, as_printed])
class TestDistillationOnTheSphere:
    """Lemma 3-5 and Theorem 4."""

    @pytest.mark.parametrize(("lam", "theta"), WEIGHTS)
    @pytest.mark.parametrize("m", [1, 2, 6])
    @pytest.mark.parametrize("share", [0.3, 0.99])
    def test_descent_below_two_over_l_decreases_and_reaches_the_teacher(self, objective, lam, theta, m, share):
        teacher, students = sphere(m, 5, seed=m)
        rate = share * 2 / paper_bound(lam, theta, m)
        points, losses = descend(students, objective(teacher, lam, theta), rate)
        assert decreases(losses)
        assert losses[-1] < 1e-12 < losses[0]
        torch.testing.assert_close(points, teacher.expand_as(points), rtol=0, atol=1e-6)

    def test_a_step_far_beyond_the_bound_does_not(self, objective):
        """theta = 0: the curvature at u is lambda / m. A step of 3 m / lambda turns a small angle a into -2a."""
        teacher, students = sphere(3, 5, seed=0)
        _, losses = descend(students, objective(teacher, 0.2, 0.0), 3 * 3 / 0.2, steps=200)
        assert not decreases(losses)
        assert losses[-1] > 1e-3

    @pytest.mark.parametrize(("lam", "theta"), [*WEIGHTS, (0.0, 1.0)])
    @pytest.mark.parametrize("seed", range(3))
    def test_curvature_along_geodesics_stays_below_the_bound(self, objective, lam, theta, seed):
        """Lemma 5: the second derivative along every geodesic of unit speed is at most L_R in size.

        What we derive is tighter, lambda / m + 4 theta / m: the cosine term has curvature (lambda / m) <u, o>, and the
        variance 1 - ||mean||^2 has (2 theta / m) <mean, o> and a rank-one-per-direction part of at most 2 theta / m.
        """
        m = 4
        teacher, students = sphere(m, 3, seed)
        loss = objective(teacher, lam, theta)
        starts = [
            students,
            teacher.expand(m, 3),
            -teacher.expand(m, 3),
            torch.cat([teacher[None], -teacher.expand(3, 3)]),
        ]
        for start in starts:
            for _ in range(20):
                velocity = torch.randn(m, 3, dtype=DOUBLE)
                velocity -= (velocity * start).sum(1, keepdim=True) * start
                velocity /= velocity.norm()
                speed = velocity.norm(dim=1, keepdim=True)

                def along(t, start=start, velocity=velocity, speed=speed):
                    return loss(torch.cos(t * speed) * start + torch.sin(t * speed) * velocity / speed)

                curvature = torch.autograd.functional.hessian(along, torch.zeros((), dtype=DOUBLE)).abs().item()
                assert curvature <= lam / m + 4 * theta / m + 1e-12 <= paper_bound(lam, theta, m) + 2e-12

    def test_the_opposite_of_the_teacher_is_critical_too(self, objective):
        """The gap in Theorem 4's proof: at [-u, ..., -u] the gradient is 0 and the loss is not; a nudge leaves it."""
        teacher, _ = sphere(3, 5, seed=0)
        opposite = -teacher.expand(3, 5)
        loss = objective(teacher, 0.2, 0.01)
        value, gradient = riemannian_gradient(opposite, loss)
        assert gradient.norm() < 1e-12
        assert value > 0.3
        nudged = F.normalize(opposite + 1e-4 * torch.randn(3, 5, dtype=DOUBLE), dim=1)
        points, losses = descend(nudged, loss, 1 / paper_bound(0.2, 0.01, 3))
        assert decreases(losses)
        torch.testing.assert_close(points, teacher.expand_as(points), rtol=0, atol=1e-6)


class TestDistillationDetails:
    def test_a_continuum_of_critical_points(self):
        """lambda <= 2 theta, as printed: every set with mean -(lambda / 2 theta) u is critical, a circle of them here.

        lambda = theta = 1: mean -u/2, for two students in the plane at +-120 degrees from u.
        """
        teacher = torch.tensor([1.0, 0.0], dtype=DOUBLE)
        angle = 2 * math.pi / 3
        students = torch.tensor([[math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]], dtype=DOUBLE)
        value, gradient = riemannian_gradient(students, as_printed(teacher, 1.0, 1.0))
        assert gradient.norm() < 1e-12
        assert value == pytest.approx(1 + 1 + 1 / 4)  # lambda + theta + lambda^2 / (4 theta), the global maximum

    @settings(deadline=None)
    @given(st.integers(0, 10_000), st.integers(2, 6))
    def test_zero_exactly_where_all_agree(self, seed, batch):
        """Lemma 3 and 4: the loss is positive as soon as one member differs, and 0 where none does."""
        features = torch.randn(batch, 4, generator=seeded(seed), dtype=DOUBLE)
        assert kd_loss(features, 0.2, 0.2)[0] > 1e-9
        assert kd_loss(features, 0.0, 0.2)[0] > 1e-9
        assert kd_loss(features[:1].expand(batch, 4), 0.2, 0.2)[0] < 1e-30

    @pytest.mark.parametrize(("theta", "teacher_stays"), [(0.0, True), (0.2, False)])
    def test_a_teacher_that_is_a_variable(self, theta, teacher_stays):
        """Outside Theorem 4: with the first sample among the variables all agree in the end, but where?

        Detached and without variance the teacher has no gradient, so all come to it. The variance term moves it.
        """
        teacher, students = sphere(4, 5, seed=3)
        start = torch.cat([teacher[None], students])
        points, losses = descend(start, lambda o: kd_loss(o, 0.2, theta)[0], 1.0)
        assert losses[-1] < 1e-12
        torch.testing.assert_close(points, points[:1].expand_as(points), rtol=0, atol=1e-6)
        assert ((points[0] - teacher).norm() < 1e-9) == teacher_stays


def retriggers_needed(error, threshold, delta):
    """Theorem 6: `N* = ceil((error - threshold)+ / delta)`, exact on fractions."""
    return math.ceil(max(error - threshold, Fraction(0)) / delta)


def error_stream(error, threshold, delta, steps, rng=None):
    """Assumption 3: above the threshold each re-trigger repairs at least `delta`, exactly it where `rng` is None."""
    errors = [error]
    for _ in range(steps):
        repaired = delta * (1 if rng is None else 1 + Fraction(rng.randint(0, 100), 100))
        errors.append(max(errors[-1] - repaired, Fraction(0)) if errors[-1] > threshold else errors[-1])
    return errors


PERCENT = st.integers(1, 99).map(lambda n: Fraction(n, 100))


class TestFiniteTimeRepair:
    """Lemma 7 and Theorem 6 (2) on streams of errors whose repair per re-trigger is known."""

    @given(PERCENT, PERCENT, PERCENT, st.integers(0, 1000))
    def test_hits_the_threshold_in_time(self, error, threshold, delta, seed):
        needed = retriggers_needed(error, threshold, delta)
        errors = error_stream(error, threshold, delta, needed + 3, random.Random(seed))
        assert errors[needed] <= threshold
        assert all(r <= max(threshold, error - n * delta) for n, r in enumerate(errors))

    @given(PERCENT, PERCENT, PERCENT)
    def test_the_count_is_tight(self, error, threshold, delta):
        """With the least repair allowed, one re-trigger fewer is not enough."""
        needed = retriggers_needed(error, threshold, delta)
        errors = error_stream(error, threshold, delta, needed)
        assert errors[needed] <= threshold
        assert needed == 0 or errors[needed - 1] > threshold

    def test_pinned(self):
        """Error .90, threshold .35, repair .20: .90, .70, .50, .30: three re-triggers (.55 / .20 = 2.75)."""
        error, threshold, delta = Fraction(90, 100), Fraction(35, 100), Fraction(20, 100)
        assert retriggers_needed(error, threshold, delta) == 3
        assert error_stream(error, threshold, delta, 3) == [Fraction(n, 100) for n in (90, 70, 50, 30)]

    def test_below_the_threshold_nothing_is_promised(self):
        """Theorem 2 as printed has the error fall without end; Assumption 3 lets it rise again once it is low.

        .4 -> .2 -> .3 -> .1 with threshold .25, repair .2: each step from above repairs .2, and r_2 = .3 breaks
        Lemma 7's max(.25, 0) = .25.
        """
        errors, threshold, delta = [Fraction(n, 10) for n in (4, 2, 3, 1)], Fraction(1, 4), Fraction(1, 5)
        steps = list(pairwise(errors))
        assert all(before - after >= delta for before, after in steps if before > threshold)
        assert any(r > max(threshold, errors[0] - n * delta) for n, r in enumerate(errors))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
}


class TestMaskedOptimizers:
    """Alg. 3's MASKEDUPDATE with "SGD/Adam, etc.": the mask acts on the step, so nothing leaks."""

    @staticmethod
    def train(optimizer, masks, masked, dtype=torch.float32, steps=10):
        """Fit a linear map, changing the mask after `steps`; returns the weight before and after the last mask."""
        weight = torch.randn(6, 5, generator=seeded(0)).to(dtype)
        proposal = weight.clone().requires_grad_()
        optimizer = OPTIMIZERS[optimizer]([proposal])
        inputs, outputs = (torch.randn(8, n, generator=seeded(n)).to(dtype) for n in (5, 6))
        for mask in masks:
            before = weight.clone()
            for _ in range(steps):
                optimizer.zero_grad()
                (inputs @ proposal.T - outputs).square().mean().backward()
                proposal.grad.mul_(mask)
                optimizer.step()
                if masked:
                    masked_step(weight, proposal.detach() - weight, mask)
                    proposal.data.copy_(weight)
                else:
                    weight.copy_(proposal.detach())
        return before, weight

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_closed_coordinates_never_move(self, optimizer, dtype):
        masks = [bernoulli_mask((6, 5), 0.4, seeded(seed)) for seed in (1, 2)]
        before, after = self.train(optimizer, masks, masked=True, dtype=dtype)
        assert torch.equal(before[~masks[1]], after[~masks[1]])
        assert (before != after)[masks[1]].all(), "and every open one does"

    @pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
    def test_a_mask_on_the_gradient_alone_leaks(self, optimizer):
        """The reason for `masked_step`: old momentum and weight decay move what the gradient's mask has closed."""
        masks = [bernoulli_mask((6, 5), 0.4, seeded(seed)) for seed in (1, 2)]
        before, after = self.train(optimizer, masks, masked=False)
        assert not torch.equal(before[~masks[1]], after[~masks[1]])

    def test_sgd_is_the_papers_update(self):
        """Without momentum both are `W - eta (M * g)`."""
        masks = [bernoulli_mask((6, 5), 0.4, seeded(1))]
        torch.testing.assert_close(
            self.train("sgd", masks, masked=True)[1], self.train("sgd", masks, masked=False)[1], rtol=1e-5, atol=1e-6
        )
