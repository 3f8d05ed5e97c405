"""A run's directory: held by one process, resumed where it was left, never overwritten unasked.

`run.json` says what was asked for, `journal.sqlite` what became of every edit, `checkpoints/last.ckpt` holds the state
after the last window that came to its end, `metrics.json` is written last and means that the run has finished. What is
written once and never changed, shards and keys, lies in the segments that the checkpoint names.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from repair_lightning.edits.journal import FILE as JOURNAL_FILE
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.segments import Segments, unsegmented
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.models.base import files_hash
from repair_lightning.storage.folders import sync

log = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints") / "last.ckpt"
SEGMENTS = "segments"
"""The folder of the segments, beside the checkpoint."""
ROWS = "rows"
"""Where a checkpoint names its rows; see `repair_lightning.memory.rows`."""
METRICS_FILE, SETTINGS_FILE, LOCK_FILE = "metrics.json", "run.json", ".lock"
_WRITTEN = (
    SETTINGS_FILE,
    JOURNAL_FILE,
    f"{JOURNAL_FILE}-wal",
    f"{JOURNAL_FILE}-shm",
    "checkpoints",
    "pack",
    "scratch",
    "config.yaml",
    "edits.parquet",
    "generations.jsonl",
    "curves.jsonl",
    "features.json",
    "report.html",
    METRICS_FILE,
)
"""What a run writes, and `overwrite` therefore removes; nothing else in the directory is touched."""

_RESULTS = (
    "pack",
    "checkpoints",
    "config.yaml",
    "edits.parquet",
    "generations.jsonl",
    "curves.jsonl",
    "features.json",
    "report.html",
)
"""What of it is there only behind a journal: without one it is not ours to remove."""

Resume = Literal["auto", "never"]


class RunDirectory:
    """The directory of one run, held by this process until it ends.

    Args:
        path: where; made if missing.

    Attributes:
        journal: what became of every edit; there once the run is open.
        checkpoint: the checkpoint to go on from; None starts at the first edit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.segments = Segments((self.path / CHECKPOINT).with_name(SEGMENTS))
        self.journal: Journal
        self.checkpoint: Path | None = None

    def open(self, settings: Mapping[str, Any], resume: Resume = "auto", overwrite: bool = False) -> None:
        """Take hold of the directory and refuse what cannot go on in it; nothing is changed yet.

        Args:
            settings: everything that decides what the run computes; a run is resumed under the same.
            resume: `auto` goes on with an unfinished run, `never` does not.
            overwrite: a run that cannot go on here, because it has finished, has other settings or must not be resumed,
                is going to be removed.

        Raises:
            ConfigError: another process has the directory; a run that cannot go on lies there.
            RepairError: the directory cannot be written.
        """
        self.settings = plain(settings)
        self.hold()
        obstacle = self._obstacle(resume)
        if obstacle and not overwrite:
            self._held.close()
            raise ConfigError(f"run_dir '{self.path}' holds {obstacle}")
        self._anew = bool(obstacle) or not self._begun() or self._replaced()

    def hold(self) -> None:
        """Take hold of the directory, for as long as this process lives or until :meth:`close`.

        Raises:
            ConfigError: another process has it.
            RepairError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = open(self.path / LOCK_FILE, "a")  # noqa: SIM115 - held on purpose
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run_dir '{self.path}' is in use by another run; wait for it or give another") from error
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def resumes(self) -> bool:
        """Whether the run is going to go on from a checkpoint."""
        return not self._anew and (self.path / CHECKPOINT).is_file()

    def begin(self) -> None:
        """Open the journal: a new one, or that of the unfinished run, behind its last durable point.

        Raises:
            RepairError: the checkpoint or the journal is damaged, or the directory cannot be written.
        """
        try:
            if self._anew:
                self._clear()  # at the least what a run left that was killed before it had said what it is
                write_durably(self.path / SETTINGS_FILE, json.dumps(self.settings, indent=1, ensure_ascii=False))
                self.journal = Journal(self.path / JOURNAL_FILE)
                return
            self.journal = Journal(self.path / JOURNAL_FILE)
            seq, windows = self._durable_point()
        except OSError as error:
            raise self._unwritable(error) from error
        void = self.journal.rewind(seq, f"resumed behind window {windows}")
        if windows:
            log.info("resuming '%s' behind window %d; void: %s", self.path, windows, counted(void, "later event"))
        else:
            log.info("resuming '%s' from its first edit: no window was saved", self.path)

    def history(self) -> Ledger:
        """The ledger as the journal tells it, up to the checkpoint."""
        return self.journal.rebuild()

    def close(self) -> None:
        """Let go of the journal and of the directory."""
        self.journal.close()
        self._held.close()

    # -- starting -----------------------------------------------------------------------------------------------------

    def _begun(self) -> bool:
        return (self.path / JOURNAL_FILE).is_file() and (self.path / SETTINGS_FILE).is_file()

    def _unwritable(self, error: OSError) -> RepairError:
        return RepairError(f"run_dir '{self.path}' cannot be written ({error.strerror or error}); give another")

    def _clear(self) -> None:
        for name in _WRITTEN:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _obstacle(self, resume: Resume) -> str | None:
        """Why what lies here cannot go on, with the remedy; None where it can, or where there is nothing."""
        if (self.path / METRICS_FILE).exists():
            return "a finished run; give another --run_dir, or --overwrite to start it anew"
        if not self._begun():
            found = [name for name in _RESULTS if (self.path / name).exists()]
            if found:
                return f"{found[0]} and no run that could go on; give another --run_dir, or --overwrite to replace it"
            return None
        if resume == "never":
            return "an unfinished run; --resume auto goes on with it, --overwrite starts it anew"
        try:
            known = _flat(json.loads((self.path / SETTINGS_FILE).read_text(encoding="utf-8")))
        except (ValueError, AttributeError, OSError) as error:  # no JSON, no settings, not to be read
            return f"an unfinished run whose {SETTINGS_FILE} is damaged ({error}); --overwrite starts it anew"
        now = _flat(self.settings)
        for name in sorted(known.keys() | now.keys()):
            if known.get(name) != now.get(name) and not self._fruitless():
                values = f"{name} {known.get(name)!r}, now {now.get(name)!r}"
                return f"an unfinished run with {values}; give the same, another --run_dir, or --overwrite"
        return None

    def _replaced(self) -> bool:
        """Whether a run under other settings lies here, which :meth:`_obstacle` has let pass."""
        return json.loads((self.path / SETTINGS_FILE).read_text(encoding="utf-8")) != self.settings

    def _fruitless(self) -> bool:
        """Whether the run was stopped before it had written an edit: it begins anew, under whatever settings."""
        if (self.path / CHECKPOINT).is_file():
            return False
        try:
            journal = Journal(self.path / JOURNAL_FILE, read_only=True)
        except (RepairError, OSError):  # it is told of where the journal is needed
            return False
        try:
            ledger = journal.rebuild()
            return not any(ledger.entry(id).attempts for id in ledger)
        except RepairError:
            return False
        finally:
            journal.close()

    def _durable_point(self) -> tuple[int, int]:
        """The last event and the number of windows that the checkpoint holds; sets `checkpoint`. What it does not
        name is removed."""
        path = self.path / CHECKPOINT
        _aside(path).unlink(missing_ok=True)
        if not path.is_file():
            self.segments.sweep()
            return 0, 0
        found = self.journal.seq_of(files_hash([path]))
        if found is None:
            raise _damaged(path, "the journal knows no such content")
        try:
            self.segments.adopt(torch.load(path, weights_only=True).get(ROWS, {}))
        except RepairError as error:
            raise _damaged(path, str(error)) from error
        self.segments.sweep()
        self.checkpoint = path
        return found

    # -- saving -------------------------------------------------------------------------------------------------------

    def checkpoint_io(self, windows: Callable[[], int]) -> DurableCheckpointIO:
        """How the trainer saves: the journal knows a checkpoint before it gets its name."""
        return DurableCheckpointIO(lambda sha256: self.journal.checkpoint(sha256, windows()), self.segments)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _damaged(path: Path, problem: str) -> RepairError:
    return RepairError(
        f"checkpoint '{path}' is damaged: {problem}; restore it from a copy, or --overwrite starts the run anew"
    )


class WindowCheckpoint(ModelCheckpoint):
    """A checkpoint behind every window but the last: a stream that has ended is merged and scored before it counts.

    Where saving takes long, because thousands of edits are held, a window is left out now and then: no more than about
    a tenth of the time goes into saving, and no more than ten times as long as it takes is lost by a kill.
    """

    LONG, SHARE = 0.5, 0.1
    """Seconds from which on saving is rationed, and the share of the time that it may take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cost, self._saved_at = 0.0, 0.0

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        """Windows decide, not steps of an optimiser: a rank without a batch takes none, nor does a closed form."""
        return trainer.state.fn != TrainerFn.FITTING

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless nothing is left to arrive or to be written."""
        start = time.perf_counter()
        too_soon = self._cost > self.LONG and start - self._saved_at < self._cost / self.SHARE
        limit = trainer.max_epochs
        last = limit is not None and 0 <= limit <= trainer.current_epoch + 1
        too_soon = trainer.strategy.broadcast(too_soon)  # by the first rank's clock, for all
        if too_soon or last or trainer.datamodule.exhausted:  # type: ignore[attr-defined]
            return
        super().on_train_epoch_end(trainer, pl_module)
        self._saved_at = time.perf_counter()
        self._cost = self._saved_at - start


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there: written aside, read back, told, and renamed over the previous one.

    The rows (`ROWS`) of the run's own checkpoint go into segments, which are on the disk before; a checkpoint that is
    loaded has them again.

    Args:
        tell: called with the file's SHA-256 before it gets its name.
        segments: where the rows go; they belong to the checkpoint beside their folder.
    """

    def __init__(self, tell: Callable[[str], None], segments: Segments) -> None:
        super().__init__()
        self.tell, self.segments = tell, segments

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the previous one stays until this one is known to be good.

        Raises:
            RepairError: it cannot be written, or what is read back is not what was written.
        """
        path = Path(path)
        aside = _aside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if ROWS in checkpoint:
                store = self.segments.write if self._owns_segments(path) else unsegmented
                checkpoint = checkpoint | {ROWS: store(checkpoint[ROWS])}
            with open(aside, "wb") as file:
                hashed = _Hashed(file)
                torch.save(checkpoint, hashed)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            if files_hash([aside]) != hashed.hexdigest():
                raise RepairError(f"checkpoint '{path}': what is read back is not what was written; check the disk")
            self.tell(hashed.hexdigest())
            os.replace(aside, path)
            if self._owns_segments(path):
                self.segments.accept()
            sync(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise RepairError(
                f"checkpoint '{path}' cannot be written ({reason}); the previous one and the journal are whole: make "
                "room and give the same command again"
            ) from error
        finally:
            aside.unlink(missing_ok=True)  # what has failed takes no room; what was good has its name by now
            self.segments.sweep()

    def _owns_segments(self, path: Path) -> bool:
        """Whether a checkpoint is the run's own: another, which a user asked for, must not depend on what comes."""
        return path.resolve() == self.segments.folder.resolve().with_name(CHECKPOINT.name)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A checkpoint with its rows.

        Raises:
            RepairError: a segment is missing or damaged.
        """
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        if ROWS not in checkpoint:
            return checkpoint
        try:
            self.segments.adopt(checkpoint[ROWS])
            return checkpoint | {ROWS: self.segments.read(checkpoint[ROWS])}
        except RepairError as error:
            raise _damaged(Path(path), str(error)) from error


class _Hashed:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self._sha = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sha.update(data)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, and on the disk when this returns."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def plain(value: Any) -> Any:
    """Settings in the types that JSON knows, so that they compare equal after a round trip."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{start}{name}.") if isinstance(value, Mapping) else {f"{start}{name}": value}
    return found
