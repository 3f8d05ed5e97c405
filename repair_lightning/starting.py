"""How a program begins: importing all that it needs, a million objects, without a look for garbage among them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: Python does not look for garbage inside, nor ever again among what is there at the end. A program
    starts and ends in 3.5 s instead of 5.9 s of CPU time so. Where torch is there already, nothing is otherwise."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
