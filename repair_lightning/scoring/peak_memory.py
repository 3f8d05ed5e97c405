"""The most memory that a stretch of work took: of the process on Linux, and of the GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peaks over several stretches, above what was taken when the first began: `host`, bytes of resident memory, None
    where the system does not say; `device`, bytes of the GPU, None without one."""

    def __init__(self) -> None:
        self.host: int | None = None
        self.device: int | None = None
        self._floor: tuple[int | None, int | None] | None = None

    def begin(self) -> None:
        """A stretch begins."""
        try:
            CLEAR.write_text("5")  # begin the peak again, see `proc_pid_clear_refs(5)`
            host = _resident("VmRSS")
        except OSError:
            host = None
        device = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            device = torch.cuda.memory_allocated()
        self._floor = self._floor or (host, device)

    def end(self) -> None:
        """The stretch ends."""
        host, device = self._floor or (None, None)
        if host is not None:
            self.host = max(self.host or 0, _resident("VmHWM") - host)
        if device is not None:
            self.device = max(self.device or 0, torch.cuda.max_memory_allocated() - device)

    def figures(self) -> dict[str, int | None]:
        """For `metrics.json`."""
        return {"host": self.host, "device": self.device}


def _resident(name: str) -> int:
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == f"{name}:")
