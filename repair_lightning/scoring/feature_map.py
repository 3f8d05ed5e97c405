"""Where the edits lie in the frozen base: their features' two principal components, for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from repair_lightning.types import Edit

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

MOST = 1000
"""Edits on a map: a picture shows no more, and the components cost the cube of it."""


def feature_map(editor: Editor, edits: Sequence[Edit], most: int = MOST) -> dict[str, Any]:
    """The content of `features.json`.

    Returns:
        `edits`, id -> its two coordinates, for at most `most` edits at even distances along the stream, and
        `explained`, the share of the variance in [0, 1] that each coordinate holds.
    """
    step = -(-len(edits) // most) if edits else 1
    shown = list(edits[::step])
    features = np.asarray(editor.features(shown), dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(features).all(-1))
    places, explained = principal_components(features[finite])
    known = [shown[i].id for i in finite]
    found = {id: [round(float(value), 5) for value in place] for id, place in zip(known, places, strict=True)}
    return {"explained": [round(float(share), 5) for share in explained], "edits": found}


def principal_components(features: np.ndarray, number: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, number) of features (n, D) along their principal components, and the components' shares of the
    variance (number,); zeros where there are fewer components. A component's largest coordinate is positive."""
    n = len(features)
    places, shares = np.zeros((n, number)), np.zeros(number)
    if n < 2:
        return places, shares
    centred = features - features.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(number, len(values))
    places[:, :kept] = left[:, :kept] * values[:kept]
    top = places[np.abs(places).argmax(0), np.arange(number)]
    total = float((values**2).sum())
    shares[:kept] = values[:kept] ** 2 / total if total > 0 else 0.0
    return places * np.where(top < 0, -1.0, 1.0), shares
