"""Noticing a lost rank, whatever started it and whatever the others wait in.

Each rank counts up a number in the run's key-value store once a second, from a thread of its own. Whose number stands
still, or whose process has ended, is lost: the others say so and end, instead of waiting in a collective for somebody
who will not come. A rank that ends on purpose says so first.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

EXIT_CODE = 75
"""Of a process that ends because another one is lost: try again later."""
REMEDY = "the same command goes on from the last full window"


class Meeting:
    """While the ranks meet, in code that hears nothing: ends this process where a started one has ended, where a signal
    asks for it, or where too few have come in time.

    Args:
        rank: of this process.
        size: how many are to meet.
        children: processes that this one started, rank by rank behind its own; they are ended with it.
        patience: seconds to wait for the others.
        speaks: whether this process says why it ends; one on each machine should.
    """

    def __init__(
        self, rank: int, size: int, children: Sequence[subprocess.Popen], patience: float, speaks: bool = True
    ) -> None:
        self.rank, self.size, self.children, self.patience, self.speaks = rank, size, children, patience, speaks
        self._until = time.monotonic() + patience
        self._heard, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        self._met = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="meeting")

    def __enter__(self) -> None:
        self._before = signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._met.set()
        self._thread.join()
        signal.set_wakeup_fd(self._before)
        self._heard.close()
        self._signals.close()

    def _run(self) -> None:
        while not self._met.is_set():
            if select.select([self._heard], [], [], 0.2)[0]:
                for number in self._heard.recv(16):
                    self._end(f"stopped by {signal.Signals(number).name} before the ranks had met", 128 + number)
            for number, child in enumerate(self.children, self.rank + 1):
                if child.poll():
                    ended = f"its process ended with code {child.returncode} before the ranks had met"
                    self._end(f"error: rank {number} is lost: {ended}; {REMEDY}", EXIT_CODE)
            if time.monotonic() > self._until:
                late = f"not all of {self.size} ranks have come within {self.patience:.0f} s"
                self._end(f"error: {late}; start as many as devices x num_nodes says", EXIT_CODE)

    def _end(self, words: str, code: int) -> NoReturn:
        for child in self.children:
            child.kill()
        _leave(words if self.speaks else "", code)


class Watch:
    """Watches the ranks of a run from a thread, until :meth:`stop`.

    Args:
        rank: of this process.
        size: how many ranks there are.
        address: host and port of the store.
        patience: seconds without a sign of life before a rank counts as lost.
        children: processes that this one started, rank by rank behind its own: their end is noticed at once.
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
    ) -> None:
        self.rank, self.size, self.patience, self.children = rank, size, patience, children
        self._store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=patience))
        attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
        self._prefix = "/".join(("repair", *attempt))  # torchrun may keep one store for all attempts
        self._finished, self._said, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._seen = {other: (0, time.monotonic()) for other in range(size) if other != rank}
        self._count = self._answered = 0
        targets = {"watch": self._run, "watch-store": self._oversee}
        self._threads = [threading.Thread(target=run, daemon=True, name=name) for name, run in targets.items()]

    def start(self) -> None:
        """Begin; the store must be there."""
        for thread in self._threads:
            thread.start()

    def stop(self, reason: str = "") -> None:
        """End, telling the others that this rank is no longer to be waited for, and why if it was not planned."""
        self._finished.set()
        for thread in self._threads:
            if thread.is_alive() and threading.current_thread() is not thread:
                thread.join(3 * self.BEAT)
        try:
            self._store.set(self._key("left", self.rank), reason or "done")
        except (dist.DistError, RuntimeError):
            return  # the store is gone, and with it all who could have read this

    def wait(self) -> None:
        """Somebody may be lost: give the watch the time to find out who; it ends the process if so."""
        self._said.wait(self.patience + 2 * self.BEAT)

    def _run(self) -> None:
        while not self._finished.wait(self.BEAT):
            try:
                self._count += 1
                self._store.set(self._key("alive", self.rank), str(self._count))
                found = self._find()
                self._answered = self._count  # whatever it said
            except (dist.DistError, RuntimeError) as error:
                found = f"the first rank's store cannot be reached ({str(error).splitlines()[0]}): rank 0 is lost"
            if found is not None and not self._finished.is_set():
                self._end(found)

    def _oversee(self) -> None:
        """The store may fall silent, and who asks it waits for ever: its process or its machine stands still."""
        before, silent = 0, 0.0
        while not self._finished.wait(self.BEAT):
            silent = 0.0 if self._answered > before else silent + self.BEAT
            before = self._answered
            if silent > self.patience + self.BEAT and not self._finished.is_set():
                self._end(f"the first rank's store has not answered for {self.patience:.0f} s: rank 0 is lost")

    def _find(self) -> str | None:
        """What there is to say of a lost rank, nothing if another rank has said it; None while all are well."""
        if self._store.check([self._key("told")]):
            return ""
        for number, child in enumerate(self.children, self.rank + 1):
            if child.poll() and not self._reason(number):
                return f"rank {number} is lost: its process ended with code {child.returncode}"
        now = time.monotonic()
        for other, (count, since) in self._seen.items():
            reason = self._reason(other)
            if reason and reason != "done":
                return f"rank {other} stopped: {reason}" if other else ""  # the first has said so itself
            found = self._number(self._key("alive", other))
            if found != count:
                self._seen[other] = (found, now)
            elif now - since > self.patience and not reason:
                return f"rank {other} is lost: no sign of life for {self.patience:.0f} s"
        return None

    def _end(self, found: str) -> NoReturn:
        """End the process. Who is the first to know says so, and the others need not."""
        self._ending.acquire()  # and never let go of: there are two threads, and one end
        self._said.set()
        if found and self._is_news():
            _say(f"error: {found}; {REMEDY}")
        if self.rank == 0:
            time.sleep(2.5 * self.BEAT)  # the store goes with this process: the others have to read it
        _leave("", EXIT_CODE)

    def _is_news(self) -> bool:
        """Whether no other rank has said anything yet, as far as can be known: the store may be gone or silent."""
        if self._answered < self._count:
            return True
        try:
            return self._store.add(self._key("told"), 1) == 1
        except (dist.DistError, RuntimeError):
            return True

    def _key(self, *parts: object) -> str:
        return "/".join((self._prefix, *map(str, parts)))

    def _reason(self, rank: int) -> str:
        key = self._key("left", rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _number(self, key: str) -> int:
        return int(self._store.get(key)) if self._store.check([key]) else 0


def _say(words: str) -> None:
    os.write(sys.stderr.fileno(), f"{words}\n".encode())


def _leave(words: str, code: int) -> NoReturn:
    if words:
        _say(words)
    os._exit(code)
