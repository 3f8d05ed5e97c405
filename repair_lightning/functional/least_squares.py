"""Regularised least squares for a linear associative memory: in one piece, and recursively, one set of keys at a time.

With W (D, F), keys K (n, F) and values V (n, D) that W should give for them, the minimiser of

    sum_i ||K_i W^T - V_i||^2 + lambda^2 ||W - W_0||^2 + mu^2 ||K_0 W^T - V_0||^2

has the information matrix `A = lambda^2 I + mu^2 K_0^T K_0 + sum_i K_i^T K_i`. With `C = A^-1` a further set of keys
costs as much at step 10,000 as at step 1 (recursive least squares, as in RLSEdit, "Beyond Hard Writes and Rigid
Preservation: Soft Recursive Least-Squares for Lifelong LLM Editing"), and can be taken out again (downdating).

The paper's public code feeds a difference as V and subtracts `K W` from it once more; derived here from the stacked
problem and tested against its closed form, the step is `W + (V - K W^T)^T (C' K^T)^T` with absolute values V.

Shapes: u keys in a step, n keys in all, F = d_ffn, D = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-3  # largest error of a step's gain, relative to the keys, before the inverse is computed again


def spd_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix, worked out in float64, in the matrix's own type.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite.
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix.double())).to(matrix.dtype)


def minimal_change(keys: Tensor, residual: Tensor, moment: Tensor) -> Tensor:
    """The delta (D, F) with `delta k = r` for each key (n, F) and residual (n, D) that is least in the norm
    `tr(delta M delta^T)`; the keys are linearly independent.

    ROME's write (arXiv 2202.05262, Eq. 2) for one key: `r (M^-1 k)^T / (k^T M^-1 k)`. M (F, F), positive definite, is
    the second moment of the keys that should be left alone.
    """
    toward = torch.linalg.solve(moment.double(), keys.double().T)
    return (residual.double().T @ torch.linalg.solve(keys.double() @ toward, toward.T)).to(residual.dtype)


def damped_change(keys: Tensor, residual: Tensor, moment: Tensor) -> Tensor:
    """The delta (D, F) that minimises `sum ||delta k - r||^2 + tr(delta M delta^T)`, with arguments as for
    :func:`minimal_change`.

    MEMIT's write (arXiv 2210.07229, Eq. 14): its normal equations are `delta (M + K^T K) = R^T K`.
    """
    normal = moment.double() + keys.double().T @ keys.double()
    return torch.linalg.solve(normal, keys.double().T @ residual.double()).T.to(residual.dtype)


def dual_basis(keys: Tensor, quiet: Tensor, ridge: float) -> Tensor:
    """C (n, F) with `K C^T` near the identity and `Q C^T` near zero, for keys K (n, F) and quiet keys Q (m, F).

    `delta = V^T C` is then the ridge solution that gives values V (n, D) for the keys and nothing for the quiet ones:
    `C` are the first n rows of `(Z Z^T + ridge c I)^-1 Z` with `Z = [K; Q]` and c the keys' mean square length.
    """
    stacked = torch.cat([keys, quiet.to(keys)]).double()
    gram = stacked @ stacked.T
    gram.diagonal().add_(ridge * gram.diagonal()[: len(keys)].mean() + torch.finfo(gram.dtype).tiny)
    weights = torch.linalg.solve(gram, torch.eye(len(gram), len(keys), dtype=gram.dtype, device=gram.device))
    return (weights.T @ stacked).to(keys.dtype)


@dataclass(frozen=True)
class Recursion:
    """A least-squares problem that grows: its minimiser, and what is needed to take in more.

    Attributes:
        weight: (D, F), the minimiser W.
        inverse: (F, F), C, the inverse of `information`.
        information: (F, F), A in float64; it only ever adds and subtracts, so C can be had from it again.
        rebuilt: how often that was necessary.
    """

    weight: Tensor
    inverse: Tensor
    information: Tensor
    rebuilt: int = 0

    @classmethod
    def start(cls, weight: Tensor, anchors: Tensor, ridge: float, anchoring: float) -> Recursion:
        """Before the first key: weight W_0 (D, F), anchors K_0 (N, F), ridge lambda^2 > 0, anchoring mu^2."""
        eye = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        information = ridge * eye + anchoring * (anchors.double().T @ anchors.double())
        return cls(weight, spd_inverse(information).to(weight.dtype), information)

    def absorb(self, keys: Tensor, values: Tensor) -> Recursion:
        """With further keys (u, F) and values (u, D)."""
        return self._step(keys, values, 1)

    def remove(self, keys: Tensor, values: Tensor) -> Recursion:
        """Without keys and values that were absorbed: as if they never had been."""
        return self._step(keys, values, -1)

    def _step(self, keys: Tensor, values: Tensor, sign: int) -> Recursion:
        """A step in the problem's own precision; where that is not enough, with an inverse made again in float64.

        Raises:
            torch.linalg.LinAlgError: the keys that are taken out were never in.
        """
        information = self.information + sign * (keys.double().T @ keys.double())
        try:
            found = self._woodbury(keys, information, sign)
        except torch.linalg.LinAlgError:
            found = None
        rebuilt = self.rebuilt + (found is None)
        if found is None:
            whole = spd_inverse(information)
            found = (keys.double() @ whole).to(keys.dtype), whole.to(keys.dtype)
        gain, inverse = found
        weight = self.weight + sign * ((values - keys @ self.weight.T).T @ gain)
        return Recursion(weight, inverse, information, rebuilt)

    def _woodbury(self, keys: Tensor, information: Tensor, sign: int) -> tuple[Tensor, Tensor] | None:
        """The step's gain (u, F) and the new inverse by a factorisation of (u, u), the gain refined once against the
        information; None where it is too far from solving what it should for that."""
        forward = self.inverse @ keys.T
        inner = sign * (keys @ forward) + torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        lower = torch.linalg.cholesky((inner + inner.T) / 2)
        half = torch.linalg.solve_triangular(lower, forward.T, upper=False)
        gain = torch.linalg.solve_triangular(lower.T, half, upper=True)
        inverse = self.inverse - sign * (half.T @ half)

        def missing(gain: Tensor) -> Tensor:  # for `gain information = keys`, by float64
            return (keys.double() - gain.double() @ information).to(keys.dtype)

        before = missing(gain)
        gain = gain + before @ inverse
        close = missing(gain).norm() <= min(before.norm(), TOLERANCE * keys.norm())
        return (gain, inverse) if close else None
