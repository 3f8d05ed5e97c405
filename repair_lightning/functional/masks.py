"""Bernoulli masks: which coordinates of a shard may move, the step that respects them, and their compact storage.

Source: REPAIR, Alg. 1 (line 1), Alg. 3 (MASKEDUPDATE), Lemma 6, Theorem 5.

Deviations: the paper masks the gradient. Momentum, weight decay and rounding can still move a closed coordinate, so
here the mask acts on the *step* that any optimiser proposes, and closed coordinates keep their bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._tensors import check_bool, check_fraction, check_same_shape


def bernoulli_mask(
    shape: Sequence[int], ratio: float, generator: torch.Generator, device: torch.device | str | None = None
) -> Tensor:
    """A mask whose coordinates are open independently with probability `ratio`.

    Args:
        shape: of the mask.
        ratio: rho in (0, 1] (published 0.2); 1 opens everything.
        generator: drawn from on its own device, so that one seed gives one mask wherever it is used.
        device: where the mask is put; the generator's by default.

    Returns:
        Bool tensor of `shape`.

    Raises:
        ValueError: for a ratio outside (0, 1].
    """
    check_fraction("mask_ratio", ratio, "1 opens every coordinate")
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=generator.device)
    return mask.bernoulli_(ratio, generator=generator).to(device or generator.device)


@torch.no_grad()
def masked_step(parameter: Tensor, step: Tensor, mask: Tensor) -> None:
    """`parameter += mask * step` in place; closed coordinates keep their bits even where `step` is inf or NaN.

    Args:
        parameter: any shape and float type; a leaf that requires gradients is fine.
        step: same shape, the change that the optimiser proposes (already scaled by the learning rate and signed).
        mask: same shape, bool, True = open.

    Raises:
        ValueError: where the shapes disagree (nothing is broadcast).
        TypeError: where `mask` is not boolean.
    """
    check_bool("mask", mask)
    check_same_shape("step", step, "parameter", parameter)
    check_same_shape("mask", mask, "parameter", parameter)
    parameter.copy_(torch.where(mask, parameter + step, parameter))


def pack_mask(mask: Tensor) -> Tensor:
    """Eight coordinates per byte, lowest bit first, row-major; the last byte is filled up with zeros.

    Args:
        mask: bool, any shape of n elements.

    Returns:
        (ceil(n / 8),) uint8.

    Raises:
        TypeError: where `mask` is not boolean.
    """
    check_bool("mask", mask)
    flat = mask.flatten().to(torch.uint8)
    octets = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(_bytes(len(flat)), 8)
    return (octets << _bits(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`: bool of `shape`.

    Raises:
        ValueError: where `packed` has not the ceil(n / 8) bytes that `shape` needs.
        TypeError: where `packed` is not uint8.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be torch.uint8, got {packed.dtype}: pass what pack_mask returned")
    count = math.prod(shape)
    if packed.shape != (_bytes(count),):
        raise ValueError(
            f"packed must have shape ({_bytes(count)},) for a mask of shape {tuple(shape)}, "
            f"got {tuple(packed.shape)}: the mask was packed with another shape"
        )
    octets = (packed.unsqueeze(1) >> _bits(packed.device)) & 1
    return octets.flatten()[:count].bool().view(tuple(shape))


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack_values(dense: Tensor, mask: Tensor) -> Tensor:
    """The open coordinates of `dense`, (mask.sum(),), row-major; what lies outside the mask is dropped.

    Raises:
        ValueError: where the shapes disagree.
        TypeError: where `mask` is not boolean.
    """
    check_bool("mask", mask)
    check_same_shape("mask", mask, "dense", dense)
    return dense[mask]


def unpack_values(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of :func:`pack_values`: `values` at the open coordinates, 0 elsewhere, in the shape of `mask`.

    Raises:
        ValueError: where there are not as many values as open coordinates.
        TypeError: where `mask` is not boolean.
    """
    check_bool("mask", mask)
    open_count = int(mask.sum())
    if values.shape != (open_count,):
        raise ValueError(
            f"values must have shape ({open_count},), one per open coordinate of the mask, got {tuple(values.shape)}: "
            "the values belong to another mask"
        )
    dense = values.new_zeros(mask.shape)
    dense[mask] = values
    return dense
