"""The paper's lemmas and theorems (Appendix D) as tests of the functions that are meant to obey them.

Theorem 4 takes the teacher u as constant, which is more than `kd_loss` does: a teacher that is itself a variable is
moved by the variance term.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from repair_lightning.functional import bernoulli_mask, kd_loss

DOUBLE = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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


def decreases(losses):
    return all(later <= earlier + 1e-13 for earlier, later in pairwise(losses))


WEIGHTS = [(0.2, 0.0), (0.2, 0.2), (0.2, 5.0)]


class TestDistillationOnTheSphere:
    """Lemma 3-5 and Theorem 4."""

    @pytest.mark.parametrize(("lam", "theta"), WEIGHTS)
    @pytest.mark.parametrize("m", [1, 2, 6])
    @pytest.mark.parametrize("share", [0.3, 0.99])
    def test_descent_below_two_over_l_decreases_and_reaches_the_teacher(self, lam, theta, m, share):
        teacher, students = sphere(m, 5, seed=m)
        rate = share * 2 / paper_bound(lam, theta, m)
        points, losses = descend(students, with_constant_teacher(teacher, lam, theta), rate)
        assert decreases(losses)
        assert losses[-1] < 1e-12 < losses[0]
        torch.testing.assert_close(points, teacher.expand_as(points), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("lam", "theta"), [*WEIGHTS, (0.0, 1.0)])
    @pytest.mark.parametrize("seed", range(3))
    def test_curvature_along_geodesics_stays_below_the_bound(self, lam, theta, seed):
        """Lemma 5: the second derivative along every geodesic of unit speed is at most L_R in size.

        What we derive is tighter, lambda / m + 4 theta / m: the cosine term has curvature (lambda / m) <u, o>, and the
        variance 1 - ||mean||^2 has (2 theta / m) <mean, o> and a rank-one-per-direction part of at most 2 theta / m.
        """
        m = 4
        teacher, students = sphere(m, 3, seed)
        loss = with_constant_teacher(teacher, lam, theta)
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


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_distillation_is_zero_exactly_where_all_agree(seed, batch):
    """Lemma 3 and 4: the loss is positive as soon as one member differs, and 0 where none does."""
    features = torch.randn(batch, 4, generator=seeded(seed), dtype=DOUBLE)
    assert kd_loss(features, 0.2, 0.2)[0] > 1e-9
    assert kd_loss(features, 0.0, 0.2)[0] > 1e-9
    assert kd_loss(features[:1].expand(batch, 4), 0.2, 0.2)[0] < 1e-30
