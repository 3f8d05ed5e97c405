"""Refusals of numbers that an option cannot have."""

from __future__ import annotations

import math
from typing import Any

from repair_lightning.errors import ConfigError


def positive(options: Any, *names: str, at: str = "") -> None:
    """Refuse what is not positive and finite; `at` stands before the names."""
    for name in names:
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{at}{name} must be positive and finite, got {value}")


def at_least(least: int, options: Any, *names: str, at: str = "") -> None:
    """Refuse what is less than `least` or not finite."""
    for name in names:
        value = getattr(options, name)
        if not least <= value < math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise ConfigError(f"{at}{name} must be at least {least}{finite}, got {value}")


def share(options: Any, *names: str) -> None:
    """Refuse what is not in [0, 1)."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must be in [0, 1), got {value}")
