"""The activation router: how strongly a prompt wakes each shard, when that is enough, and where the line lies.

Source: REPAIR, Sec. 2.2 (Eq. 2, 3), Alg. 2.

Deviations: the prompt's tokens are scored, without padding and target, pooled per sequence (Eq. 2 does not say which);
one threshold per shard instead of one for all, so the winner has the largest `score / threshold`; thresholds are
calibrated from scores (the paper's rule is `ratio_threshold`).

Shapes: B prompts, T tokens, F = d_ffn, D = d_model, K shards, P positive and N negative scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ._tensors import check_bool, check_fraction, widen

Pool = Literal["last", "mean", "max"]  # how the scores of a prompt's tokens become the prompt's score
_SKETCHED = 1 << 24  # products of tokens and sketches that are held at once: 64 MB of float32


def activation_scores(
    activations: Tensor, deltas: Tensor | Sequence[Tensor], mask: Tensor, pool: Pool, *, check: bool = True
) -> Tensor:
    """Eq. 2 per prompt and shard: `pool_t || A_t delta_i^T ||_2`.

    Args:
        activations: (B, T, F), the inputs A of the value matrix. Masked positions may hold anything, NaN included.
        deltas: (K, D, F) or K tensors (D, F), which are not copied: `W'_i - W_v`; K may be 0.
        mask: (B, T) bool, True on the prompt's tokens; padding may be left or right. Target tokens must be False.
        pool: `last` (the last True position; only that token is multiplied), `mean` or `max`.
        check: look for prompts without tokens, which waits for the device.

    Returns:
        (B, K) in float32 or wider; differentiable in both `activations` and `deltas`.
    """
    _check_shapes(activations, deltas, mask, pool)
    if check and (empty := (~mask.any(dim=1)).nonzero().flatten().tolist()):
        raise ValueError(f"mask must be True somewhere in every row, got none in rows {empty}: drop empty prompts")
    if pool == "last":
        activations, mask = _last_token(activations, mask)
    tokens = activations.masked_fill(~mask.unsqueeze(-1), 0.0)
    scores = []
    for delta in deltas:
        dtype = torch.promote_types(tokens.dtype, delta.dtype)
        norms = torch.linalg.vector_norm(widen(tokens.to(dtype) @ delta.to(dtype).T), dim=-1)
        scores.append(_pool(norms, mask, pool))
    return torch.stack(scores, dim=1) if scores else widen(tokens.new_zeros(len(tokens), 0))


def _check_shapes(activations: Tensor, deltas: Tensor | Sequence[Tensor], mask: Tensor, pool: str) -> None:
    if pool not in get_args(Pool):
        raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
    check_bool("mask", mask)
    if activations.ndim != 3 or activations.shape[:2] != mask.shape:
        raise ValueError(
            f"mask must be (B, T) for activations (B, T, F), got {tuple(mask.shape)} for {tuple(activations.shape)}"
        )
    shapes = [tuple(delta.shape) for delta in deltas]
    if any(len(shape) != 2 or shape[1] != activations.shape[2] for shape in shapes):
        raise ValueError(
            f"deltas must be (K, D, F) with F = {activations.shape[2]}, the width of the activations, got {shapes}"
        )


def _last_token(activations: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, F) and (B, 1): each prompt's last True position, right or left of its padding."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return activations.take_along_dim(last.unsqueeze(-1), dim=1), mask.take_along_dim(last, dim=1)


def _pool(norms: Tensor, mask: Tensor, pool: Pool) -> Tensor:
    """(..., T) -> (...) over the True positions; the norms are 0 elsewhere, which no maximum and no sum notices."""
    return norms.sum(dim=-1) / mask.sum(dim=-1) if pool == "mean" else norms.amax(dim=-1)


def sketch(delta: Tensor, rank: int) -> Tensor:
    """A delta (D, F) in `rank` rows, nearly the best approximation: (rank, F) float32, the singular directions in their
    size, so that `||sketch a||` is `||delta a||` without what lies outside the `rank` strongest directions.

    Found by a randomised range finder with one power iteration (arXiv 0909.4061, Alg. 4.4) from a fixed seed.
    """
    delta = delta.float()
    width = min(2 * rank, *delta.shape)
    start = torch.randn(delta.shape[1], width, generator=torch.Generator().manual_seed(0)).to(delta.device)
    basis = torch.linalg.qr(delta @ start).Q
    basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    inside = basis.T @ delta
    strongest = torch.linalg.eigh(inside @ inside.T).eigenvectors[:, -rank:]
    return torch.nn.functional.pad(strongest.T @ inside, (0, 0, 0, rank - strongest.shape[1]))


def sketched_scores(activations: Tensor, sketches: Tensor, mask: Tensor, pool: Pool) -> Tensor:
    """Eq. 2 with each shard's :func:`sketch` (K, R, F) in place of its delta: (B, K), by one matrix product for a block
    of shards; activations (B, T, F), mask and pool as for :func:`activation_scores`."""
    if pool == "last":
        activations, mask = _last_token(activations, mask)
    tokens = activations.masked_fill(~mask.unsqueeze(-1), 0.0)
    block = max(1, _SKETCHED // max(tokens.shape[0] * tokens.shape[1] * sketches.shape[1], 1))
    scores = [tokens.new_zeros(len(tokens), 0)]
    for part in sketches.split(block):
        norms = (tokens @ part.flatten(0, 1).T).unflatten(-1, part.shape[:2]).norm(dim=-1)  # (B, T, k)
        scores.append(_pool(norms.mT, mask.unsqueeze(1), pool))
    return torch.cat(scores, 1)


def decide(scores: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Alg. 2: the shard with the largest `score / threshold` if that exceeds 1, else the base.

    Args:
        scores: (B, K), at least 0.
        thresholds: (K,), positive, in the unit of the scores.

    Returns:
        the choice (B,), the shard's index or -1 for the base; and the largest `score / threshold` (B,), 0 where K = 0.
        A NaN ratio is passed on and chooses the base.
    """
    if scores.ndim != 2 or thresholds.shape != scores.shape[1:]:
        raise ValueError(
            f"thresholds must be (K,) for scores (B, K), got {tuple(thresholds.shape)} for {tuple(scores.shape)}"
        )
    if not bool((thresholds > 0).all()):
        raise ValueError(f"thresholds must be positive, got {thresholds.tolist()}: calibrate each shard first")
    if thresholds.numel() == 0:
        base = scores.new_full((len(scores),), -1, dtype=torch.long)
        return base, widen(scores.new_zeros(len(scores)))
    ratio, shard = (widen(scores) / widen(thresholds)).max(dim=1)
    return torch.where(ratio > 1, shard, -1), ratio


def calibrate_threshold(positive: Tensor, negative: Tensor, false_fire_rate: float) -> float:
    """The threshold (> 0) of one shard from the scores of its own edits and of held-out irrelevant prompts.

    First the smallest threshold that at most `false_fire_rate` of the negatives exceed (only a strictly greater score
    fires). Where all positives lie above it, the midpoint of the free band between the two is taken: rephrases score a
    little below their edit, unseen prompts a little above the seen. Without negatives the band starts at 0. Where the
    sets overlap the negatives win.

    Args:
        positive: (P,) scores of the shard's own edits; P may be 0 where there are negatives.
        negative: (N,) scores of irrelevant prompts; N may be 0 where there are positives.
        false_fire_rate: in [0, 1), share of the negatives that may fire.
    """
    if not 0.0 <= false_fire_rate < 1.0:
        raise ValueError(f"false_fire_rate must be in [0, 1), got {false_fire_rate}: 0.01 lets one in a hundred fire")
    if positive.numel() + negative.numel() == 0:
        raise ValueError("positive and negative must not both be empty, got 0 and 0: score some prompts first")
    _check_scores("positive", positive)
    _check_scores("negative", negative)
    floor = 0.0
    if negative.numel():
        allowed = math.floor(false_fire_rate * negative.numel() + 1e-9)  # 0.29 of 100 are 29, whatever the rounding
        floor = float(negative.flatten().sort(descending=True).values[min(allowed, negative.numel() - 1)])
    lowest = float(positive.min()) if positive.numel() else floor
    return _above_zero((floor + lowest) / 2 if lowest > floor else floor)


def ratio_threshold(positive: Tensor, act_ratio: float) -> float:
    """The paper's rule (Table 6): `act_ratio` times the smallest score (P,) of the shard's own edits, above 0."""
    check_fraction("act_ratio", act_ratio, "the paper uses 0.2 to 0.88")
    if positive.numel() == 0:
        raise ValueError("positive must not be empty, got 0 scores: the rule needs at least one edit of the shard")
    _check_scores("positive", positive)
    return _above_zero(act_ratio * float(positive.min()))


def _check_scores(name: str, scores: Tensor) -> None:
    if not bool(((scores >= 0) & scores.isfinite()).all()):
        raise ValueError(f"{name} scores must be finite and at least 0, got {scores.flatten().tolist()}")


def _above_zero(threshold: float) -> float:
    """`threshold`, or the smallest normal float32 where it is 0 or vanishes in float32."""
    return max(threshold, torch.finfo(torch.float32).tiny)
