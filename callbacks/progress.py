"""Progress of the stream: a live bar in a terminal, one line per window elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from repair_lightning.scoring.measures import SPEED

from .editing import stream_of

_SHOWN = {"live/rel": "Rel", "live/gen": "Gen", "live/loc": "Loc", "live/near": "Near", "live/op": "OP"}


class StreamProgress(ProgressBar):
    """The window, edits written out of all, live scores in per cent, edits per minute and the time left.

    The speed is the one of `metrics.json`. The time left is by the clock, with scoring, at the pace of this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._quiet = False
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def disable(self) -> None:
        """Show nothing; Lightning asks for this on all ranks but the first."""
        self._quiet = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar where there is a terminal."""
        self._start, self._had = time.perf_counter(), self._written(trainer)
        if self._quiet or not self._console.is_terminal:
            return
        bar = (BarColumn(bar_width=20),) if self._console.width >= 120 else ()  # no room beside the words
        words = TextColumn("{task.description}", table_column=Column(ratio=1))  # wraps where it must
        self._bar = Progress(SpinnerColumn(), *bar, words, console=self._console, expand=True)
        self._bar.start()
        total = len(stream_of(trainer).edits)
        self._task = self._bar.add_task(self._words(trainer), total=total, completed=self._had)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._written(trainer), description=self._words(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Show the live scores; without a terminal, one line."""
        self.on_train_batch_end(trainer, pl_module)
        if self._bar is None and not self._quiet:
            self._console.print(self._words(trainer), highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the terminal is usable."""
        self.on_train_end(trainer, pl_module)

    def _words(self, trainer: pl.Trainer) -> str:
        """Where the stream stands: `window 2: 256/300 edits  Rel 100.0  ...  950 edits/min  0:00:03 left`."""
        stream = stream_of(trainer)
        written, total = self._written(trainer), len(stream.edits)
        pace = (written - self._had) / max(time.perf_counter() - self._start, 1e-9)
        known = trainer.callback_metrics
        scores = [f"{name} {100 * float(known[key]):.1f}" for key, name in _SHOWN.items() if key in known]
        parts = [f"window {stream.windows}: {written}/{total} edit{'s' * (total != 1)}", *scores]
        parts += [f"{float(known[SPEED]):.0f} edits/min"] if SPEED in known else []
        parts += [f"{timedelta(seconds=round((total - written) / pace))} left"] if pace > 0 and written < total else []
        return "  ".join(parts)

    def _written(self, trainer: pl.Trainer) -> int:
        stream = stream_of(trainer)
        return stream.arrived if stream.singles else len(stream.written())  # of single edits the model holds one
