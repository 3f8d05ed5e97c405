"""Stopwatches. What is compared runs interleaved, so that a busy moment of the machine hits both sides alike."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that one call takes; a GPU is waited for."""
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in `repeats` rounds; every round runs all, the order turns round by round."""
    for call in [*calls.values()] * warm:
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in [*calls] if turn % 2 == 0 else [*reversed([*calls])]:
            seconds[name].append(seconds_of(calls[name]))
    return seconds


class Stopwatch:
    """Adds up the seconds spent in methods of objects, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, name: str | None = None) -> None:
        """Time every call of `owner.method` under `name`; a method that does not exist is left out."""
        original = getattr(owner, method, None)
        if original is None:
            return
        name = name or method
        self.seconds.setdefault(name, 0.0)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            _synchronise()
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                _synchronise()
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """The seconds since the last look."""
        taken = dict(self.seconds)
        self.seconds = dict.fromkeys(taken, 0.0)
        return taken


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
