"""The machine a figure was measured on, and how much memory this process holds."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.context import REPOSITORY


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, versions, threads, load and the code's commit, in plain types."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lightning", "faiss-cpu")},
        "threads": threads,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": commit(),
    }


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None outside git."""
    call = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def rss() -> int:
    """Bytes of memory that this process holds now."""
    return _status("VmRSS") or peak_rss()


def peak_rss() -> int:
    """Most bytes that this process held; of this program alone, `ru_maxrss` would count its parent's too."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")]
    return found[0] if found else 0
