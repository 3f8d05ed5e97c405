"""Half precision for factors of a matrix: as exact as it can be, whatever their sizes."""

from __future__ import annotations

import torch
from torch import Tensor


def halved(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (D, R) and (R, F) in float16, with the product that they had up to 2^-11 of each factor's entries.

    Each of the R pairs is balanced by a power of two first, so that both have entries of one size: a product can be had
    from a large and a small factor, of which half precision would lose one. What is too large even so becomes infinite.
    """
    sizes = [part.abs().amax(dim).float().clamp_min(1e-30) for part, dim in ((left, 0), (right, 1))]
    power = torch.exp2(((sizes[1].log2() - sizes[0].log2()) / 2).round())
    return (left * power).half(), (right / power[:, None]).half()
