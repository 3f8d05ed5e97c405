"""Distribution-aware batching (REPAIR, Sec. 2.3, Alg. 3, FormBatches) on cosine similarity, with FAISS.

Greedy: the seed is the point with the highest mean cosine to all that remain, its `b - 1` nearest join it, all leave,
repeat. With `S` = the sum of the m remaining unit vectors the mean cosine of `x` is `x.S / m`, so there is no n x n
matrix, and the seed is just the nearest point to the query `S / m`.

Where this goes beyond the paper:

- The result is exact: FAISS proposes candidates in float32, they are scored again in float64, and the search widens
  until nothing outside can win.
- Ties have an order: cosines are compared rounded to 9 decimals, equal ones by index.
- More than `limit` points are taken in parts of so many, in their order: the work grows with the square of a part.
- A zero vector has cosine 0 to everything, itself included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from repair_lightning.errors import ConfigError, RepairError

DECIMALS = 9
"""Cosines that agree to so many decimals are tied."""
_CHUNK = 4096
_SLACK = 32


def form_batches(features: np.ndarray, batch_size: int, limit: int = 10_000) -> list[list[int]]:
    """Groups points into batches of similar ones.

    Args:
        features: Shape (n, D), float32; any length per row, only directions count.
        batch_size: Members per batch (the last batch may have fewer), at least 1.
        limit: Most points that are grouped together.

    Returns:
        Batches of indices into `features`, in the order they were formed. A batch's first member is its seed (the
        teacher), the others follow by falling cosine to it. Every index occurs once.

    Raises:
        ConfigError: if `batch_size` or `limit` is below 1.
        RepairError: if `features` is not (n, D) or holds a value that is not finite.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")
    features = _checked(features)
    parts = range(0, len(features), limit)
    return [(at + b).tolist() for at in parts for b in _exact_batches(features[at : at + limit], batch_size)]


def unit_vectors(features: np.ndarray) -> np.ndarray:
    """Rows of `features`, shape (n, D), scaled to length 1 (zero rows stay zero), as float32 of the same shape.

    Raises:
        RepairError: if `features` is not (n, D) or holds a value that is not finite.
    """
    features = _checked(features)
    units = np.empty(features.shape, dtype=np.float32)
    for part in _chunks(np.arange(len(features))):
        units[part] = _directions(features[part])
    return units


def _checked(features: np.ndarray) -> np.ndarray:
    """The features as float32, shape (n, D). Raises `RepairError` as :func:`unit_vectors` does."""
    features = np.asarray(features, dtype=np.float32)
    if features.ndim != 2 or (len(features) and not features.shape[1]):
        raise RepairError(f"features must have shape (points, dimensions), got {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        few = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        problem = f"features of {len(bad)} of {len(features)} points are not finite (points {few})"
        raise RepairError(f"{problem}; leave those points out")
    return features


def _chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


def _directions(features: np.ndarray) -> np.ndarray:
    """The rows (k, D) at length 1 in float64; zero rows stay zero."""
    wide = features.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(axis=1, keepdims=True))
    return wide / np.where(lengths > 0, lengths, 1.0)


class _Pool:
    """The points that remain: all features (n, D) float32, which are left, and the sum of their float64 directions."""

    def __init__(self, features: np.ndarray, index: Any) -> None:
        self.features, self.index = features, index
        self.alive = np.ones(len(features), dtype=bool)
        self.left = len(features)
        self.total = np.zeros(features.shape[1])
        for part in _chunks(np.arange(len(features))):
            self.total += self.directions(part).sum(axis=0)

    def directions(self, ids: np.ndarray) -> np.ndarray:
        """The points `ids` as float64 unit vectors, shape (k, D)."""
        return _directions(self.features[ids])

    def remove(self, ids: np.ndarray) -> None:
        """Takes the points `ids` out."""
        self.alive[ids] = False
        self.left -= len(ids)
        self.total -= self.directions(ids).sum(axis=0)

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's `k` best remaining points for `query` (D,), or as many as it finds: float32 scores and ids."""
        selector = faiss.IDSelectorBitmap(np.packbits(self.alive, bitorder="little"))  # type: ignore[call-arg, arg-type]
        options = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        scores, ids = self.index.search(query[None].astype(np.float32), k, params=options)
        found = ids[0] >= 0
        return scores[0][found], ids[0][found]

    def ranked(self, query: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The points `ids` by falling float64 score (rounded), equal ones by index: ids and scores."""
        parts = [(self.directions(part) * query).sum(axis=1) for part in _chunks(ids)]
        scores = np.round(np.concatenate([np.empty(0), *parts]), DECIMALS)
        order = np.lexsort((ids, -scores))
        return ids[order], scores[order]


def _flat_index(units: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(max(units.shape[1], 1))
    if len(units):
        index.add(units)
    return index


def _exact_top(pool: _Pool, query: np.ndarray, k: int) -> np.ndarray:
    """Ids of the `k` remaining points with the highest inner product, exact in float64, ties by index.

    FAISS's float32 scores are off by less than `margin`, so once the k-th score exceeds its worst candidate by more, no
    point outside the candidates can be among the first k.
    """
    rounding = 4 * math.sqrt(len(query)) * float(np.finfo(np.float32).eps) * float(np.linalg.norm(query))
    margin = rounding + 2 * 10.0**-DECIMALS
    ask = k + _SLACK
    while True:
        if ask >= pool.left:
            return pool.ranked(query, np.flatnonzero(pool.alive))[0][:k]
        rough, ids = pool.search(query, ask)
        ids, scores = pool.ranked(query, ids)
        if scores[k - 1] > rough[-1] + margin:
            return ids[:k]
        ask *= 8


def _exact_batches(features: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    pool = _Pool(features, _flat_index(unit_vectors(features)))
    while pool.left:
        seed = _exact_top(pool, pool.total / pool.left, 1)
        query = pool.directions(seed)[0]
        pool.remove(seed)
        nearest = _exact_top(pool, query, min(batch_size - 1, pool.left))
        pool.remove(nearest)
        yield np.concatenate([seed, nearest])
