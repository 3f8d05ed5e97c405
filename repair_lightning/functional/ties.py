"""Loss-aware TIES: several shards become one.

Source: REPAIR, Sec. 2.5, Alg. 4 (LOSSAWARETIESMERGE); trimming from TIES-Merging (Yadav et al., 2023), Sec. 3.

Deviations: where the signs agree the paper takes `sum_i w_i delta_i` (`global`), which with sparse masks shrinks a
coordinate of one contributor by its `w_i`; by default (`contributors`) the weights are renormalised over the shards
that are non-zero there. A shard that is 0 at a coordinate takes no part in its vote. Where the signs conflict the
strongest shard's value is kept whole, as in Alg. 4 (TIES proper averages the sign that won): +3 and -2 with weights .2
and .8 give -2, because .2 * 3 < .8 * 2.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ._tensors import check_fraction, check_not_negative, widen

Normalize = Literal["contributors", "global"]  # over which shards the weights of an agreed coordinate sum to 1


def loss_weights(losses: Tensor, alpha: float) -> Tensor:
    """`w = softmax(-alpha L)`: a shard that learnt its edits better has more to say.

    Args:
        losses: (K,) mean training loss per shard, nats, K >= 1.
        alpha: sensitivity in 1 / nats, >= 0; 0 weighs all alike.

    Returns:
        (K,), sums to 1, in float32 or wider.
    """
    check_not_negative("alpha", alpha, "0 weighs all shards alike")
    if losses.ndim != 1 or losses.numel() == 0 or not bool(losses.isfinite().all()):
        raise ValueError(
            f"losses must be (K,), K >= 1 and finite, got {losses.tolist()}: leave broken shards out of the merge"
        )
    return torch.softmax(-alpha * widen(losses), dim=0)


@torch.no_grad()
def trim(delta: Tensor, density: float) -> Tensor:
    """A copy of one shard's delta, n elements of any shape, in which only its ceil(density * n) largest magnitudes are
    not 0; the density is in (0, 1], and of equals the earlier (row-major) is kept."""
    check_fraction("density", density, "1 keeps everything")
    flat = delta.flatten()
    kept = math.ceil(density * flat.numel() - 1e-9)
    if kept == flat.numel():
        return delta.clone()
    order = flat.abs().sort(descending=True, stable=True).indices[:kept]
    return torch.zeros_like(flat).index_copy_(0, order, flat[order]).view_as(delta)


@torch.no_grad()
def ties_merge(deltas: Tensor, weights: Tensor, normalize: Normalize = "contributors") -> Tensor:
    """Alg. 4, lines 14-21, for all coordinates at once.

    Per coordinate, over the shards that are non-zero there and have a positive weight: same sign -> weighted sum;
    conflict -> the whole value of the shard with the largest `w_i |delta_i|` (of equals the lowest index).

    Args:
        deltas: (K, ...), `W'_i - W_v`, K >= 1, finite.
        weights: (K,), at least 0, usually from :func:`loss_weights`.
        normalize: `contributors` divides the weighted sum by the weights that took part, `global` does not.

    Returns:
        (...), the merged delta, in the type of `deltas`; sums run in float32 or wider, one shard at a time.
    """
    _check_merge(deltas, weights, normalize)
    shape, dtype = deltas.shape[1:], torch.promote_types(deltas.dtype, torch.float32)
    total, mass, strongest, winner = (torch.zeros(shape, dtype=dtype, device=deltas.device) for _ in range(4))
    signs, count = (torch.zeros(shape, dtype=torch.int16, device=deltas.device) for _ in range(2))
    for delta, weight in zip(deltas, weights.to(deltas.device, dtype), strict=True):
        value = delta.to(dtype) * (weight > 0)
        total += weight * value
        mass += weight * (value != 0)
        signs += value.sign().to(torch.int16)
        count += value != 0
        strength = weight * value.abs()
        winner = torch.where(strength > strongest, value, winner)
        strongest = torch.maximum(strength, strongest)
    if normalize == "contributors":
        total = torch.where(count == 1, winner, total / mass.where(count > 0, 1.0))
    return torch.where(signs.abs() == count, total, winner).to(deltas.dtype)


def _check_merge(deltas: Tensor, weights: Tensor, normalize: str) -> None:
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
    if deltas.ndim < 1 or len(deltas) == 0 or weights.shape != deltas.shape[:1]:
        raise ValueError(
            "weights must be (K,) for deltas (K, ...) with K >= 1, "
            f"got {tuple(weights.shape)} for {tuple(deltas.shape)}: one weight per shard"
        )
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"weights must be finite and at least 0, got {weights.tolist()}: use loss_weights")
    broken = [index for index, delta in enumerate(deltas) if not bool(delta.isfinite().all())]
    if broken:
        raise ValueError(f"deltas must be finite, got inf or NaN in shards {broken}: prune them before the merge")
