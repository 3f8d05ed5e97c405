"""Distribution-aware batching (REPAIR, Sec. 2.3, Alg. 3, FormBatches) on cosine similarity, with FAISS.

Greedy: the seed is the point with the highest mean cosine to all that remain, its `b - 1` nearest join it, all leave,
repeat. With `S` = the sum of the m remaining unit vectors the mean cosine of `x` is `x.S / m`, so there is no n x n
matrix, and the seed is just the nearest point to the query `S / m`.

Where this goes beyond the paper:

- Up to `exact_limit` points the result is exact: FAISS proposes candidates in float32, they are scored again in
  float64, and the search widens until nothing outside can win.
- Ties have an order: cosines are compared rounded to 9 decimals, equal ones by index.
- Above `exact_limit` an IVF index proposes neighbours out of its nearest cells, and the seed order is renewed only
  after every 1/64 of the points; the exact rule takes over for the last `exact_limit` points. The recall of the index
  is measured and logged.
- A zero vector has cosine 0 to everything, itself included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from repair_lightning.errors import ConfigError, RepairError

logger = logging.getLogger(__name__)

DECIMALS = 9
"""Cosines that agree to so many decimals are tied."""
_CHUNK = 4096
_SLACK = 32
_PROBED_CELLS = 32
_REFRESHES = 64
_RECALL_SAMPLE = 64


def form_batches(features: np.ndarray, batch_size: int, exact_limit: int = 10_000) -> list[list[int]]:
    """Groups points into batches of similar ones.

    Args:
        features: Shape (n, D), float32; any length per row, only directions count.
        batch_size: Members per batch (the last batch may have fewer), at least 1.
        exact_limit: Up to so many points the result is exact, above it neighbours are approximate.

    Returns:
        Batches of indices into `features`, in the order they were formed. A batch's first member is its seed (the
        teacher), the others follow by falling cosine to it. Every index occurs once.

    Raises:
        ConfigError: if `batch_size` or `exact_limit` is below 1.
        RepairError: if `features` is not (n, D) or holds a value that is not finite.
    """
    for name, value in (("batch_size", batch_size), ("exact_limit", exact_limit)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")
    features = _checked(features)
    if len(features) <= exact_limit:
        return [batch.tolist() for batch in _exact_batches(features, batch_size)]
    batches = _approximate_batches(features, batch_size, exact_limit)
    rest = np.setdiff1d(np.arange(len(features)), np.concatenate(batches))
    return batches + [rest[batch].tolist() for batch in _exact_batches(features[rest], batch_size)]


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


def neighbour_recall(features: np.ndarray, k: int, sample: int = _RECALL_SAMPLE) -> float:
    """Measures the approximate index: the share of the true `k` nearest that it finds.

    Args:
        features: Shape (n, D), float32.
        k: Neighbours per query, at least 1; a point is no neighbour of itself.
        sample: Number of queries, taken at even distances from `features`.

    Returns:
        Recall in [0, 1]; 1.0 where there is nothing to find.
    """
    units = unit_vectors(features)
    if len(units) < 2 or k < 1:
        return 1.0
    return _measure_recall(units, _flat_index(units), _ivf_index(units), k, sample)


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

    def search(self, query: np.ndarray, k: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's `k` best remaining points for `query` (D,), or as many as it finds: float32 scores and ids."""
        selector = faiss.IDSelectorBitmap(np.packbits(self.alive, bitorder="little"))  # type: ignore[call-arg, arg-type]
        kind = faiss.SearchParametersIVF if options else faiss.SearchParameters
        scores, ids = self.index.search(query[None].astype(np.float32), k, params=kind(sel=selector, **options))  # type: ignore[call-arg]
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


def _ivf_index(units: np.ndarray) -> Any:
    """An inverted file with about 4 sqrt(n) cells, trained with FAISS's fixed seed."""
    n, dim = units.shape
    cells = max(1, min(int(4 * math.sqrt(n)), n // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
    index.train(units)
    index.add(units)
    index.nprobe = min(_PROBED_CELLS, cells)
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


def _approximate_batches(features: np.ndarray, batch_size: int, until: int) -> list[list[int]]:
    """Batches from an IVF index until at most `until` points remain."""
    units = unit_vectors(features)
    pool = _Pool(features, _ivf_index(units))
    if batch_size > 1:
        recall = _measure_recall(units, _flat_index(units), pool.index, batch_size - 1, _RECALL_SAMPLE)
        logger.info("approximate clustering of %d points: recall@%d is %.3f", len(units), batch_size - 1, recall)
    batches: list[list[int]] = []
    while pool.left > until:
        renew_at = max(until, pool.left - max(1, len(units) // _REFRESHES))
        for seed in _seed_order(pool):
            if pool.left <= renew_at:
                break
            if pool.alive[seed]:
                batches.append(_approximate_batch(pool, seed, batch_size))
    return batches


def _seed_order(pool: _Pool) -> Iterator[int]:
    """The remaining points by falling mean cosine, as it stands now."""
    ids, _ = pool.ranked(pool.total / pool.left, np.flatnonzero(pool.alive))
    return iter(ids.tolist())


def _approximate_batch(pool: _Pool, seed: int, batch_size: int) -> list[int]:
    """The batch of `seed` with neighbours out of its nearest cells, or of more cells where those have too few left."""
    query = pool.directions(np.array([seed]))[0]
    pool.remove(np.array([seed]))
    k, cells = min(batch_size - 1, pool.left), pool.index.nprobe
    nearest = np.empty(0, dtype=np.int64)
    while len(nearest) < k and cells < 4 * pool.index.nlist:
        _, nearest = pool.search(query, k, nprobe=min(cells, pool.index.nlist))
        cells *= 4
    nearest, _ = pool.ranked(query, nearest)
    pool.remove(nearest)
    return [seed, *nearest.tolist()]


def _measure_recall(units: np.ndarray, exact: Any, approximate: Any, k: int, sample: int) -> float:
    """Share of the exact index's `k` nearest (by score, so ties do not count as misses) that the other index finds."""
    k = min(k, len(units) - 1)
    queries = units[np.linspace(0, len(units) - 1, min(sample, len(units))).astype(int)]
    worst_true = exact.search(queries, k + 1)[0][:, -1:]
    found = approximate.search(queries, k + 1)[0]
    hits = (found >= worst_true - 1e-6).sum(axis=1) - 1
    return float(np.clip(hits, 0, k).mean() / k)
