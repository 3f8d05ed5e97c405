"""What the callbacks refuse: the option as users write it, its value, what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from callbacks import ErrorSampleMonitor, PruneAndRetrigger
from repair_lightning.errors import ConfigError

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (PruneAndRetrigger, {"max_attempts": 0}, "feedback.max_attempts must be at least 1, got 0"),
    (ErrorSampleMonitor, {"tau_correct": 0.0}, "monitor.tau_correct must be in (0, 1], got"),
]


@pytest.mark.parametrize(("callback", "options", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(callback, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        callback(**options)
