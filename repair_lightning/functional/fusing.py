"""One delta for all edits: least squares over what the shards add where they speak, and over what must stay.

Source: the streaming normal equations of RegMean (Jin et al., 2023, arXiv 2212.09849), with the edits' own keys
as each shard's data, and of MEMIT (Meng et al., 2023, arXiv 2210.07229), with unrelated keys that stay put.
No shard is laid out in full: memory is F x F, whatever the number of shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._tensors import check_not_negative, check_positive, widen


@torch.no_grad()
def fused_delta(keys: Tensor, values: Tensor, kept: Tensor, keep: float = 10.0, ridge: float = 0.01) -> Tensor:
    """`argmin_d sum_n ||d k_n - v_n||^2 + keep (N / M) sum_m ||d k_m||^2 + ridge c ||d||^2`, (D, F) in float32.

    Args:
        keys: (N, F), A(x) where the edits' target tokens are read.
        values: (N, D), what the shards add there.
        kept: (M, F), A(x) of unrelated texts.
        keep: weight of an unrelated position against an edit's, >= 0.
        ridge: weight of the delta's size, > 0, in units c of the mean diagonal of the normal equations.
    """
    check_not_negative("keep", keep, "0 lets unrelated texts change")
    check_positive("ridge", ridge, "without it the keys' span is not solved for")
    if keys.ndim != 2 or values.shape[:1] != keys.shape[:1] or kept.shape[1:] != keys.shape[1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (keys, values, kept))
        raise ValueError(f"keys (N, F), values (N, D) and kept (M, F) must agree, got {shapes}")
    if not len(keys):
        return values.new_zeros(values.shape[1], keys.shape[1], dtype=torch.float32)
    keys, values, kept = (widen(tensor).double() for tensor in (keys, values, kept))
    normal = keys.T @ keys + keep * len(keys) / max(len(kept), 1) * (kept.T @ kept)
    normal.diagonal().add_(ridge * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny)
    return torch.linalg.solve(normal, keys.T @ values).T.float().contiguous()
