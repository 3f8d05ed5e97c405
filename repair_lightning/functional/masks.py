"""Bernoulli masks: which coordinates of a shard may move, and how they are stored.

Source: REPAIR, Alg. 1 (line 1), Lemma 6, Theorem 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._tensors import check_bool, check_fraction


def bernoulli_mask(
    shape: Sequence[int], ratio: float, generator: torch.Generator, device: torch.device | str | None = None
) -> Tensor:
    """A bool mask whose coordinates are open independently with probability `ratio`.

    Args:
        shape: of the mask.
        ratio: rho in (0, 1] (published 0.2).
        generator: drawn from on its own device, so that one seed gives one mask wherever it is used.
        device: where the mask is put; the generator's by default.
    """
    check_fraction("mask_ratio", ratio, "1 opens every coordinate")
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=generator.device)
    return mask.bernoulli_(ratio, generator=generator).to(device or generator.device)


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask of n elements as (ceil(n / 8),) uint8, lowest bit first, row-major, with zeros at the end."""
    check_bool("mask", mask)
    flat = mask.flatten().to(torch.uint8)
    octets = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-(-len(flat) // 8), 8)
    return (octets << _bits(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`: bool of `shape`."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or len(packed) != -(-count // 8):
        raise ValueError(
            f"packed must be {-(-count // 8)} bytes for a mask of shape {tuple(shape)}, got {packed.dtype} of shape "
            f"{tuple(packed.shape)}: the mask was packed with another shape"
        )
    octets = (packed.unsqueeze(1) >> _bits(packed.device)) & 1
    return octets.flatten()[:count].bool().view(tuple(shape))


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack_values(dense: Tensor, mask: Tensor) -> Tensor:
    """The coordinates of `dense` that a mask of its shape opens, (mask.sum(),), row-major; the others are dropped."""
    check_bool("mask", mask)
    return dense[mask]


def unpack_values(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of :func:`pack_values`: `values` at the open coordinates, 0 elsewhere, in the shape of `mask`."""
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
