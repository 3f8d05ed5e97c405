"""Progress of the stream: a live bar in a terminal, one line per window elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_SHOWN = (("live/rel", "Rel"), ("live/gen", "Gen"), ("live/loc", "Loc"))


class StreamProgress(ProgressBar):
    """Edits written out of all, the window, live Rel/Gen/Loc and edits per minute.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        self.quiet = quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def disable(self) -> None:
        """Lightning turns the bar off on all ranks but the first."""
        self.quiet = True

    def enable(self) -> None:
        """Lightning turns the bar on."""
        self.quiet = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar where there is a terminal."""
        self._start = time.perf_counter()
        if self.quiet or not self._console.is_terminal:
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        scores = TextColumn("edits  {task.fields[live]}")
        self._bar = Progress(*columns, scores, TimeElapsedColumn(), console=self._console)
        self._bar.start()
        total = len(trainer.datamodule.edits)  # type: ignore[attr-defined]
        self._task = self._bar.add_task("window 1", total=total, live="")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._written(trainer), description=self._window(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Show the live scores; without a terminal, one line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._written(trainer), live=self._live(trainer))
        elif not self.quiet:
            written, total = self._written(trainer), len(trainer.datamodule.edits)  # type: ignore[attr-defined]
            pace = 60 * written / max(time.perf_counter() - self._start, 1e-9)
            line = f"{self._window(trainer)}: {written}/{total} edits  {self._live(trainer)}  {pace:.0f} edits/min"
            self._console.print(line, highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the terminal is usable."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _written(self, trainer: pl.Trainer) -> int:
        return len(trainer.datamodule.written())  # type: ignore[attr-defined]

    def _window(self, trainer: pl.Trainer) -> str:
        return f"window {trainer.datamodule.windows}"  # type: ignore[attr-defined]

    def _live(self, trainer: pl.Trainer) -> str:
        known = trainer.callback_metrics
        return "  ".join(f"{name} {float(known[key]):.2f}" for key, name in _SHOWN if key in known)
