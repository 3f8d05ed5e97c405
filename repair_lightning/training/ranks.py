"""Starting the ranks of one machine, and what is said when one of them is lost.

torchrun's agent starts and watches them: where one ends, it ends the others. A rank on another machine, or one that
stands still, is noticed by the process group, whose calls fail after a while (:func:`explained`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from repair_lightning.errors import RepairError
from repair_lightning.training.team import LostError, RankError

REMEDY = "the same command goes on from the last full window"
AGENT = "REPAIR_AGENT"
"""The environment variable that tells a rank which process of ours has started it."""
GRACE = 3.0
"""Seconds that a rank waits before it speaks of others: who knows more speaks first, and the agent ends this one."""


def start_ranks(number: int, nodes: int, node: int, address: str, patience: float) -> int:
    """Run this very command on each of a machine's `number` ranks, until all have ended.

    There are `nodes` machines that do so, this is the one with the number `node`; they meet at `address` (`host:port`
    of the first one) within `patience` seconds. Returns the exit code: 0, or that of the first rank that has failed and
    said why. Raises `LostError` where a rank has ended without a word, or a machine has not come.
    """
    spec = sys.modules["__main__"].__spec__
    command = [os.path.abspath(sys.argv[0])] if spec is None else ["-m", spec.name]
    config = LaunchConfig(
        nodes,
        nodes,
        number,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        run_id="repair",
        rdzv_backend="static",
        rdzv_endpoint=address,
        rdzv_configs={"rank": node, "timeout": patience},
        max_restarts=0,
    )
    os.environ[AGENT] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # what the agent would say is said below
    try:
        with plain_signals():
            elastic_launch(config, sys.executable)(*command, *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (RankError.exit_code, LostError.exit_code, 0 if rank else 1):
            return failure.exitcode  # it has said why
        words = f"rank {rank} is lost: its process ended with code {failure.exitcode}"
        raise LostError(f"{words}; {REMEDY}") from None
    except SignalException as stopped:
        signal.raise_signal(stopped.sigval)
        raise
    except RuntimeError as error:
        raise not_met(number * nodes, patience, error) from error
    return 0


@contextmanager
def plain_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end the process as the system does it: what waits inside torch hears no handler."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def is_started_by_us() -> bool:
    """Whether this process is a rank that :func:`start_ranks` has started: that process says why all have ended."""
    return os.environ.get(AGENT) == str(os.getppid())


def follow_agent() -> None:
    """End this process where the one that has started it ends: killed outright, it cannot take its ranks along."""

    def run() -> None:
        while is_started_by_us():
            time.sleep(1)
        os._exit(LostError.exit_code)

    if AGENT in os.environ:
        threading.Thread(target=run, daemon=True, name="follow-agent").start()


def not_met(size: int, patience: float, error: RuntimeError) -> LostError:
    """What to say where the ranks have not met."""
    words = f"not all of {size} ranks have come within {patience:.0f} s; start as many as devices x num_nodes says"
    return LostError(f"{words} (torch: {_words_of(error)})")


def _words_of(error: Exception) -> str:
    """What torch says, without the place in its sources."""
    return str(error).splitlines()[0].rpartition("] ")[2]


def explained(error: Exception, rank: int) -> Exception:
    """What a rank raises for an error, after a time in which another one, which may know more, is heard first."""
    lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
    if lost or rank:
        time.sleep(GRACE + min(rank, 20) / 2)
    if lost:
        return LostError(f"rank {rank} does not hear the others any more ({_words_of(error)}): one is lost; {REMEDY}")
    if rank and isinstance(error, RepairError) and not isinstance(error, RankError):
        return RankError(f"rank {rank}: {error}")
    return error
