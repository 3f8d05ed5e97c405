"""The machine a figure was measured on: what it is, its clock, its memory, and processes of their own."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.context import REPOSITORY

T = TypeVar("T")


def use_threads(count: int) -> None:
    """Threads of OpenMP (before it is loaded), torch and FAISS; and no progress bars among the tables."""
    os.environ |= {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}
    import faiss
    import torch
    import transformers

    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    transformers.utils.logging.disable_progress_bar()


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, versions, threads, load and the code's commit, in plain types."""
    import torch

    names = _values("/proc/cpuinfo", "model name")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lightning", "faiss-cpu")},
        "threads": threads,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": commit.stdout.strip() or None,
    }


def rss() -> int:
    """Bytes of memory that this process holds now."""
    return _bytes("VmRSS") or peak_rss()


def peak_rss() -> int:
    """Most bytes that this process held; of this program alone, `ru_maxrss` would count its parent's too."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return _bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes(key: str) -> int:
    return sum(int(value.split()[0]) * 1024 for value in _values("/proc/self/status", key))


def _values(file: str, key: str) -> list[str]:
    """What a file of `/proc` says of a key; nothing on systems without it."""
    lines = Path(file).read_text().splitlines() if Path(file).is_file() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key]


def in_child(threads: int, call: Callable[..., T], *args: Any) -> T:
    """What a call returns, in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), use_threads, (threads,)) as pool:
        return pool.submit(call, *args).result()


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that one call takes; a GPU is waited for."""
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in `repeats` rounds after one to warm up: every round runs all, in turning order, so that a
    busy moment of the machine hits all sides alike."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in [*calls] if turn % 2 == 0 else [*reversed([*calls])]:
            seconds[name].append(seconds_of(calls[name]))
    return seconds


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
