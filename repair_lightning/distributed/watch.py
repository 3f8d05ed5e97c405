"""Noticing a lost rank, whatever started it and whatever the others wait in.

Each rank counts up a number in the run's key-value store once a second, from a thread of its own. Whose number stands
still, or whose process has ended, is lost: the others say so and end, instead of waiting in a collective for somebody
who will not come. A rank that ends on purpose says so first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

EXIT_CODE = 75
"""Of a process that ends because another one is lost: try again later."""

_ALIVE, _LEFT = "repair/alive", "repair/left"


class Watch:
    """Watches the ranks of a run from a thread, until :meth:`stop`.

    Args:
        rank: of this process.
        size: how many ranks there are.
        address: host and port of the store.
        patience: seconds without a sign of life before a rank counts as lost.
        children: processes that this one started, rank by rank from 1: their end is noticed at once.
        lost: called with what there is to say; by default the process says it and ends.
    """

    BEAT = 1.0
    """Seconds between two signs of life."""

    def __init__(
        self,
        rank: int,
        size: int,
        address: tuple[str, int],
        patience: float = 60.0,
        children: Sequence[subprocess.Popen] = (),
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.size, self.patience, self.children = rank, size, patience, children
        self._lost = lost or _end
        self._store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=patience))
        self._finished, self._said = threading.Event(), threading.Event()
        self._seen = {other: (0, time.monotonic()) for other in range(size) if other != rank}
        self._count = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def start(self) -> None:
        """Begin; the store must be there."""
        self._thread.start()

    def stop(self, reason: str = "") -> None:
        """End, telling the others that this rank is no longer to be waited for, and why if it was not planned."""
        self._finished.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(3 * self.BEAT)
        try:
            self._store.set(f"{_LEFT}/{self.rank}", reason or "done")
        except (dist.DistError, RuntimeError):
            return  # the store is gone, and with it all who could have read this

    def wait(self) -> None:
        """Somebody may be lost: give the watch the time to find out who; it ends the process if so."""
        self._said.wait(self.patience + 2 * self.BEAT)

    def _run(self) -> None:
        while not self._finished.wait(self.BEAT):
            try:
                self._count += 1
                self._store.set(f"{_ALIVE}/{self.rank}", str(self._count))
                found = self._find()
            except (dist.DistError, RuntimeError) as error:
                found = f"the first rank's store cannot be reached ({str(error).splitlines()[0]}): rank 0 is lost"
            if found and not self._finished.is_set():
                self._said.set()
                self._lost(found)
                return

    def _find(self) -> str | None:
        """What there is to say of a lost rank; None while all are well."""
        for number, child in enumerate(self.children, 1):
            if child.poll() and not self._reason(number):
                return f"rank {number} is lost: its process ended with code {child.returncode}"
        now = time.monotonic()
        for other, (count, since) in self._seen.items():
            reason = self._reason(other)
            if reason and reason != "done":
                return f"rank {other} stopped: {reason}"
            found = self._number(f"{_ALIVE}/{other}")
            if found != count:
                self._seen[other] = (found, now)
            elif now - since > self.patience and not reason:
                return f"rank {other} is lost: no sign of life for {self.patience:.0f} s"
        return None

    def _reason(self, rank: int) -> str:
        key = f"{_LEFT}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _number(self, key: str) -> int:
        return int(self._store.get(key)) if self._store.check([key]) else 0


def _end(reason: str) -> None:
    words = f"error: {reason}; the same command goes on from the last full window"
    os.write(sys.stderr.fileno(), f"{words}\n".encode())
    os._exit(EXIT_CODE)
