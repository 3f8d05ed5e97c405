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


def feature_map(editor: Editor, edits: Sequence[Edit]) -> dict[str, Any]:
    """The content of `features.json`: `edits`, id -> its two coordinates, for at most `MOST` edits at even distances
    along the stream, and `explained`, the share of the variance in [0, 1] that each coordinate holds."""
    shown = list(edits[:: -(-len(edits) // MOST) or 1])
    features = np.asarray(editor.features(shown), dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(features).all(-1))
    places, explained = principal_components(features[finite])
    return {
        "explained": explained.round(5).tolist(),
        "edits": {shown[i].id: place for i, place in zip(finite, places.round(5).tolist(), strict=True)},
    }


def principal_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, 2) of features (n, D) along their principal components, and the components' shares of the
    variance (2,); zeros where there are fewer components. A component's largest coordinate is positive."""
    if len(features) < 2:
        return np.zeros((len(features), 2)), np.zeros(2)
    left, values, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    kept = min(2, len(values))
    places = np.pad(left[:, :kept] * values[:kept], ((0, 0), (0, 2 - kept)))
    top = places[np.abs(places).argmax(0), np.arange(2)]
    shares = values**2 / max(float((values**2).sum()), np.finfo(float).tiny)
    return places * np.where(top < 0, -1.0, 1.0), np.pad(shares[:kept], (0, 2 - kept))
