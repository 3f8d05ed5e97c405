"""FormBatches against a slow, obvious reference."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repair_lightning.edits import clustering
from repair_lightning.edits.clustering import form_batches


def reference(features: np.ndarray, batch_size: int) -> list[list[int]]:
    """The rule as loops over points: means and cosines of all pairs, rounded, ties to the lower index."""

    def unit(row):
        length = math.sqrt(math.fsum(float(v) ** 2 for v in row))
        return [float(v) / length if length else 0.0 for v in row]

    units = [unit(row) for row in features]
    cosine = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in units] for x in units]
    left, batches = list(range(len(units))), []
    while left:
        mean = {i: round(math.fsum(cosine[i][j] for j in left) / len(left), clustering.DECIMALS) for i in left}
        seed = min(left, key=lambda i: (-mean[i], i))
        others = [i for i in left if i != seed]
        others.sort(key=lambda i: (-round(cosine[seed][i], clustering.DECIMALS), i))
        batches.append([seed, *others[: batch_size - 1]])
        left = [i for i in left if i not in batches[-1]]
    return batches


@settings(max_examples=80, deadline=None)
@given(
    features=hnp.arrays(
        np.float32, st.tuples(st.integers(0, 14), st.integers(1, 4)), elements=st.integers(-3, 3).map(float)
    ),
    batch_size=st.integers(1, 6),
)
def test_exact_on_small_grids_full_of_ties_duplicates_and_zeros(features, batch_size):
    assert form_batches(features, batch_size) == reference(features, batch_size)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(30, 70), dim=st.integers(2, 40), batch_size=st.integers(1, 9))
def test_exact_on_dense_points_where_faiss_needs_its_certificate(seed, n, dim, batch_size):
    """More points than the first search asks for, so candidates come from FAISS, not from the full scan."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, dim)).astype(np.float32) + rng.choice([0.0, 3.0, 100.0]).astype(np.float32)
    assert form_batches(features, batch_size) == reference(features, batch_size)


def test_exact_where_float32_cannot_tell_the_points_apart():
    """200 points within 3e-4 rad: cosines differ by less than float32's 6e-8, but by more than the tie's 1e-9."""
    across = np.random.default_rng(0).uniform(-3e-4, 3e-4, size=200)
    features = np.stack([np.ones(200), across], axis=1).astype(np.float32)
    assert form_batches(features, 5) == reference(features, 5)


def test_a_seed_and_its_neighbours_by_hand():
    """Points at 0, 10, 20, 90 and 100 degrees, in falling order.

    Mean cosines: 0: 0.550, 10: 0.629, 20: 0.688, 90: 0.500, 100: 0.397, so 20 leads. Its nearest are 10 (cos 10) and
    0 (cos 20), before 90 (cos 70). Of the last two each has the mean (1 + cos 10) / 2: a tie, so the lower index leads.
    """
    angles = np.deg2rad([100, 90, 20, 10, 0])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert form_batches(features, 3) == [[2, 3, 4], [0, 1]]


def test_zero_vectors_come_last_in_order():
    features = np.array([[0, 0], [1, 0], [0, 0], [1, 0.1]], dtype=np.float32)
    assert form_batches(features, 2) == [[1, 3], [0, 2]]
    assert form_batches(np.zeros((5, 3), dtype=np.float32), 2) == [[0, 1], [2, 3], [4]]


def test_above_the_limit_points_are_taken_in_parts():
    features = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    batches = form_batches(features, 10, limit=300)
    parts = [form_batches(features[at : at + 300], 10) for at in range(0, 1000, 300)]
    assert batches == [[300 * i + member for member in batch] for i, part in enumerate(parts) for batch in part]
    assert sorted(member for batch in batches for member in batch) == [*range(1000)]
