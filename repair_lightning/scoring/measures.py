"""What a run measures beside its scores: the most memory that editing took, and where the edits lie in the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from repair_lightning.types import Edit

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

MOST = 1000
"""Edits on a map: a picture shows no more, and the components cost the cube of it."""


SPEED = "speed/edits_per_minute"
"""The metric in which a run's speed is logged."""


def edits_per_minute(edits: int, seconds: float) -> float:
    """A run's speed: edits that have arrived, over the time that editing took, in all parts of a resumed run; what
    scoring and reporting took does not count."""
    return 60 * edits / max(seconds, 1e-9)


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
    variance (2,); zeros of a single one. A component's largest coordinate is positive."""
    if len(features) < 2:
        return np.zeros((len(features), 2)), np.zeros(2)
    left, values, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    places = left[:, :2] * values[:2]
    top = places[np.abs(places).argmax(0), np.arange(2)]
    return places * np.where(top < 0, -1.0, 1.0), values[:2] ** 2 / max((values**2).sum(), np.finfo(float).tiny)


class PeakMemory:
    """Peaks over several stretches, above what was taken when the first began: `host`, bytes of resident memory, None
    where the system does not say (`/proc` is Linux's); `device`, bytes of the GPU, None without one."""

    def __init__(self) -> None:
        self._floor: dict[str, int] = {}
        self._peak: dict[str, int] = {}

    def begin(self) -> None:
        """A stretch begins."""
        floor = {}
        with suppress(OSError):  # no Linux, or not allowed here: then there is no figure
            Path("/proc/self/clear_refs").write_text("5")  # begin the peak again, see `proc_pid_clear_refs(5)`
            floor["host"] = _resident("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            floor["device"] = torch.cuda.memory_allocated()
        self._floor = self._floor or floor

    def end(self) -> None:
        """The stretch ends."""
        for name, floor in self._floor.items():
            now = _resident("VmHWM") if name == "host" else torch.cuda.max_memory_allocated()
            self._peak[name] = max(self._peak.get(name, 0), now - floor)

    def figures(self) -> dict[str, int | None]:
        """For `metrics.json`."""
        return {name: self._peak.get(name) for name in ("host", "device")}


def _resident(name: str) -> int:
    lines = map(str.split, Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == f"{name}:")
