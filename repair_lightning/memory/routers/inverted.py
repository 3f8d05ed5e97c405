"""The nearest of very many keys: FAISS's inverted file, which looks at the keys about the nearest centroids alone."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

CELLS_PER_ROOT = 2
"""Centroids per square root of the number of keys: a search compares as many centroids as it then compares keys."""
_PER_CELL = 39
"""Most keys per centroid that the clustering looks at."""
_ROUNDS = 8


def centroids_of(keys: Tensor) -> Tensor:
    """Centroids (C, W) of unit keys (N, W) by spherical k-means on a sample; the same for the same keys."""
    number = max(1, round(CELLS_PER_ROOT * len(keys) ** 0.5))
    clustering = faiss.Kmeans(
        keys.shape[1],
        number,
        niter=_ROUNDS,
        seed=0,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_PER_CELL,
    )
    clustering.train(keys.numpy())
    return torch.from_numpy(clustering.centroids)


def cells_of(keys: Tensor, centroids: Tensor) -> Tensor:
    """The centroid (N,) that each key is nearest to."""
    _, nearest = faiss.knn(keys.numpy(), centroids.numpy(), 1, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(nearest[:, 0])


class InvertedFile:
    """The rows of a table of keys (N, W) by the cell that they lie in, for a search that goes through few cells.

    Holds the keys a second time in half precision; what that finds is scored again by the keys themselves. Rows are
    known by numbers that never change, so that dropping some moves none. What is found depends on the rows alone, not
    on how they came and went.

    Args:
        centroids: (C, W) of the cells.
        probes: cells that a search goes through.
    """

    def __init__(self, centroids: Tensor, probes: int) -> None:
        width = centroids.shape[1]
        self._quantizer = faiss.IndexFlatIP(width)  # the index does not keep it alive
        self._quantizer.add(centroids.numpy())
        half, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        self._index = faiss.IndexIVFScalarQuantizer(self._quantizer, width, len(centroids), half, metric, False)
        self._index.is_trained = True  # half precision has nothing to learn
        self._how: Any = faiss.SearchParametersIVF()
        self._how.nprobe = min(probes, len(centroids))
        self._dropped = np.zeros(0, dtype=np.int64)

    @property
    def wasted(self) -> float:
        """Share of the held rows that were dropped."""
        return len(self._dropped) / max(self._index.ntotal, 1)

    def add(self, keys: Tensor, numbers: Tensor, cells: Tensor) -> None:
        """Take in rows: their keys (M, W), numbers (M,), higher than all before, and cells (M,)."""
        arrays = keys.contiguous().numpy(), numbers.contiguous().numpy(), cells.contiguous().numpy()
        self._index.add_core(len(keys), *map(faiss.swig_ptr, arrays))

    def drop(self, numbers: Tensor) -> None:
        """Leave rows out of every later search."""
        self._dropped = np.concatenate([self._dropped, numbers.numpy()])
        self._kept = faiss.IDSelectorNot(faiss.IDSelectorBatch(self._dropped))
        self._how.sel = self._kept

    def search(self, keys: Tensor, number: int) -> Tensor:
        """Numbers (B, number) of the rows that are about the nearest, in no order; -1 where no more were found."""
        _, found = self._index.search(keys.numpy(), number, params=self._how)
        return torch.from_numpy(found)
