"""Forming homogeneous batches of many vectors: speed, the approximate index's recall, what the batches are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.context import Context
from benchmarks.report import Table, number, percent
from benchmarks.timing import seconds_of
from repair_lightning.edits.clustering import form_batches, neighbour_recall, unit_vectors

TITLE = "Clustering: homogeneous batches"
DIMENSION = 64
BATCH = 128
_TOPIC = 200
"""Vectors per topic, on average."""


def run_part(context: Context) -> dict[str, Any]:
    """Each size once; small ones are repeated, the best counts."""
    rows = [row_of(points, context) for points in context.within_limit(context.points)]
    return {"dimension": DIMENSION, "batch_size": BATCH, "sizes": rows}


def synthetic(points: int, seed: int) -> np.ndarray:
    """Vectors (points, 64) about random topics, some common and some rare, with noise of half the topics' length."""
    generator = np.random.default_rng(seed)
    topics = max(2, points // _TOPIC)
    centres = generator.standard_normal((topics, DIMENSION), dtype=np.float32)
    weights = generator.pareto(2.0, topics) + 0.1
    of = generator.choice(topics, points, p=weights / weights.sum())
    return centres[of] + 0.5 * generator.standard_normal((points, DIMENSION), dtype=np.float32)


def row_of(points: int, context: Context) -> dict[str, Any]:
    """One size."""
    vectors = synthetic(points, context.seed)
    batches: list[list[int]] = []
    repeats = context.repeats if points <= 10_000 else 1
    seconds = [
        seconds_of(lambda: batches.__setitem__(slice(None), form_batches(vectors, BATCH))) for _ in range(repeats)
    ]
    units = unit_vectors(vectors)
    order = np.random.default_rng(context.seed).permutation(points)
    random = [order[at : at + BATCH].tolist() for at in range(0, points, BATCH)]
    lengths = [len(batch) for batch in batches]
    return {
        "points": points,
        "seconds": min(seconds),
        "all_seconds": seconds,
        "vectors_per_second": points / min(seconds),
        "recall": neighbour_recall(vectors, BATCH - 1),
        "batches": len(batches),
        "smallest": min(lengths),
        "full": sum(length == BATCH for length in lengths) / len(lengths),
        "cosine": mean_cosine(units, batches),
        "random_cosine": mean_cosine(units, random),
    }


def mean_cosine(units: np.ndarray, batches: Sequence[Sequence[int]]) -> float:
    """Mean cosine of two different members of a batch, over all batches of two and more, weighted by size."""
    total = weight = 0.0
    for batch in batches:
        n = len(batch)
        if n > 1:
            among = float(np.square(units[batch].sum(0, dtype=np.float64)).sum() - np.square(units[batch]).sum())
            total += n * among / (n * (n - 1))
            weight += n
    return total / max(weight, 1.0)


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per size."""
    header = ("vectors", "seconds", "vectors/s", "recall", "batches", "full", "smallest", "cosine inside", "random")
    rows = [
        (
            f"{row['points']:,}",
            number(row["seconds"]),
            number(row["vectors_per_second"]),
            number(row["recall"]),
            str(row["batches"]),
            f"{percent(row['full'])} %",
            str(row["smallest"]),
            number(row["cosine"]),
            number(row["random_cosine"]),
        )
        for row in result["sizes"]
    ]
    note = (
        f"Vectors of dimension {result['dimension']} about topics of {_TOPIC} on average, batches of "
        f"{result['batch_size']}. Recall: share of the true {result['batch_size'] - 1} nearest that the approximate "
        "index finds (it is in use above 10,000 vectors; below, batches are exact)."
    )
    return [Table(TITLE, header, rows, note)]
