"""Distribution-aware batching (REPAIR, Sec. 2.3, Alg. 3, FormBatches) on cosine similarity, with FAISS.

Greedy: the seed is the point with the highest mean cosine to all that remain, its `b - 1` nearest join it, all leave,
repeat. With `S` = the sum of the m remaining unit vectors the mean cosine of `x` is `x.S / m`, so there is no n x n
matrix, and the seed is just the nearest point to the query `S / m`.

Beyond the paper, the result is exact: FAISS proposes candidates in float32, they are scored again in float64, and the
search widens until nothing outside can win. Cosines are compared rounded, equal ones by index; a zero vector has cosine
0 to everything, itself included.
"""

from __future__ import annotations

import math

import faiss
import numpy as np

DECIMALS = 9
"""Cosines that agree to so many decimals are tied."""


def form_batches(features: np.ndarray, batch_size: int, limit: int = 10_000) -> list[list[int]]:
    """Groups points into batches of similar ones.

    Args:
        features: shape (n, D), float32, finite; any length per row, only directions count.
        batch_size: members per batch, at least 1; the last batch of a part may have fewer.
        limit: more points are taken in parts of so many, in their order: the work grows with the square of a part.

    Returns:
        Batches of indices into `features`, in the order they were formed. A batch's first member is its seed (the
        teacher), the others follow by falling cosine to it. Every index occurs once.
    """
    batches: list[list[int]] = []
    for at in range(0, len(features), limit):
        pool = _Pool(features[at : at + limit])
        while left := int(pool.alive.sum()):
            seed = pool.take(pool.total / left, 1)
            nearest = pool.take(pool.units[seed[0]], min(batch_size, left) - 1)
            batches.append((at + np.concatenate([seed, nearest])).tolist())
    return batches


class _Pool:
    """The points that remain: all directions (n, D) in float64, which are left, and the sum of theirs."""

    def __init__(self, features: np.ndarray) -> None:
        wide = features.astype(np.float64)
        lengths = np.sqrt((wide**2).sum(axis=1, keepdims=True))
        self.units = wide / np.where(lengths > 0, lengths, 1.0)
        self.total = self.units.sum(axis=0)
        self.alive = np.ones(len(features), dtype=bool)
        self.index = faiss.IndexFlatIP(features.shape[1])
        self.index.add(self.units.astype(np.float32))

    def take(self, query: np.ndarray, k: int) -> np.ndarray:
        """Takes out the `k` remaining points with the highest inner product, exact in float64, ties by index.

        FAISS's float32 scores are off by less than `margin`, so once the k-th score exceeds its worst candidate by
        more, no point outside the candidates can be among the first k.
        """
        rounding = 4 * math.sqrt(len(query)) * float(np.finfo(np.float32).eps) * float(np.linalg.norm(query))
        margin = rounding + 2 * 10.0**-DECIMALS
        ask, sure = k + 32, k == 0
        ids = np.empty(0, dtype=np.int64)
        while not sure:
            if sure := ask >= self.alive.sum():
                ids, _ = self._ranked(query, np.flatnonzero(self.alive))
            else:
                selector = faiss.IDSelectorBitmap(np.packbits(self.alive, bitorder="little"))  # type: ignore[call-arg, arg-type]
                options = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
                rough, found = self.index.search(query[None].astype(np.float32), ask, params=options)
                ids, scores = self._ranked(query, found[0])
                sure = scores[k - 1] > rough[0][-1] + margin
            ask *= 8
        self.alive[ids[:k]] = False
        self.total -= self.units[ids[:k]].sum(axis=0)
        return ids[:k]

    def _ranked(self, query: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The points `ids` by falling float64 score (rounded), equal ones by index: ids and scores."""
        scores = np.round((self.units[ids] * query).sum(axis=1), DECIMALS)
        order = np.lexsort((ids, -scores))
        return ids[order], scores[order]
