"""A run's directory: held by one process, resumed where it was left, never overwritten unasked.

`run.json` says what was asked for, `journal.sqlite` what became of every edit and what never changes of it, such as its
shard and key, `checkpoints/last.ckpt` the rest of the state after the last window, and `metrics.json` is written last
and means that the run has finished.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

from repair_lightning.edits.checkpoints import JournaledCheckpointIO, settle
from repair_lightning.edits.journal import FILE as JOURNAL_FILE
from repair_lightning.edits.journal import Journal, Tables
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.storage.files import replace_text

log = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints") / "last.ckpt"
METRICS_FILE, SETTINGS_FILE, LOCK_FILE = "metrics.json", "run.json", ".lock"
_FILES = ("config.yaml", "edits.parquet", "generations.jsonl", "curves.jsonl", "features.json", "report.html")
_RESULTS = ("pack", "checkpoints", *_FILES)
"""What a run writes beside its journal: without one it is not ours to remove."""
_JOURNAL = (JOURNAL_FILE, f"{JOURNAL_FILE}-wal", f"{JOURNAL_FILE}-shm")
_WRITTEN = (SETTINGS_FILE, *_JOURNAL, "scratch", *_RESULTS, METRICS_FILE)
"""All that a run writes, and `overwrite` therefore removes; nothing else in the directory is touched."""

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
        self.journal: Journal
        self.checkpoint: Path | None = None
        self._made: list[Path] = []  # what was not there before, the innermost first

    def open(self, settings: Mapping[str, Any], resume: Resume = "auto", overwrite: bool = False) -> None:
        """Take hold of the directory and refuse what cannot go on in it; nothing is changed yet.

        A run is resumed under the same `settings`, which are all that decides what it computes. With `overwrite`, what
        cannot go on (finished, other settings, not to be resumed) is going to be removed. Raises `ConfigError` where
        another process has the directory, or a run that cannot go on lies there, and `RepairError` where it cannot be
        written.
        """
        self.settings = plain(settings)
        self.hold()
        obstacle = self._obstacle(resume)
        if obstacle and not overwrite:
            self._held.close()
            raise ConfigError(f"run_dir '{self.path}' holds {obstacle}")
        # Other settings that are no obstacle are those of a run that has written nothing.
        self._anew = bool(obstacle) or not self._begun() or self._known() != self.settings

    def hold(self) -> None:
        """Take hold of the directory, for as long as this process lives or until :meth:`close`; errors as of `open`."""
        places = (self.path / LOCK_FILE, self.path, *self.path.parents)
        new = [place for place in places if not place.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = open(self.path / LOCK_FILE, "a")  # noqa: SIM115 - held on purpose
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._made = new
        except BlockingIOError as error:
            raise ConfigError(f"run_dir '{self.path}' is in use by another run; wait for it or give another") from error
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def resumes(self) -> bool:
        """Whether the run is going to go on from a checkpoint."""
        if self._anew:
            return False
        with closing(Journal(self.path / JOURNAL_FILE, read_only=True)) as journal:
            return journal.checkpoint is not None

    def begin(self) -> None:
        """Open the journal: a new one, or the unfinished run's, after its last durable point. Raises `RepairError` if
        the checkpoint or the journal is damaged, or the directory cannot be written."""
        try:
            if self._anew:
                for name in _WRITTEN:  # also what a run left that was killed before it had said what it is
                    path = self.path / name
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                replace_text(self.path / SETTINGS_FILE, written(self.settings))
                self.journal = Journal(self.path / JOURNAL_FILE)
                return
            self.journal = Journal(self.path / JOURNAL_FILE)
            known = self.journal.checkpoint
            settle(self.path / CHECKPOINT, known)
            self.journal.check_rows()
        except OSError as error:
            raise self._unwritable(error) from error
        seq, windows = (known.seq, known.windows) if known else (0, 0)
        self.checkpoint = self.path / CHECKPOINT if known else None
        void = self.journal.rewind(seq, f"resumed after window {windows}")
        log.info("resuming '%s' after window %d; void: %s", self.path, windows, counted(void, "later event"))

    def close(self) -> None:
        """Let go of the journal and of the directory."""
        self.journal.close()
        self._held.close()

    def leave(self) -> None:
        """Where no edit was written: remove what :meth:`hold` has made, and nothing that was there before."""
        if self._begun() and not self.fruitless:
            return
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        for place in self._made:
            with suppress(OSError):  # others have put something there
                place.rmdir() if place.is_dir() else place.unlink()

    def _begun(self) -> bool:
        return (self.path / JOURNAL_FILE).is_file() and (self.path / SETTINGS_FILE).is_file()

    def _known(self) -> Any:
        return json.loads((self.path / SETTINGS_FILE).read_text(encoding="utf-8"))

    def _unwritable(self, error: OSError) -> RepairError:
        return RepairError(f"run_dir '{self.path}' cannot be written ({error.strerror or error}); give another")

    def _obstacle(self, resume: Resume) -> str | None:
        """Why what lies here cannot go on, with the remedy; None where it can, or where there is nothing."""
        if (self.path / METRICS_FILE).exists():
            return "a finished run; give another --run_dir, or --overwrite to start it anew"
        if not self._begun():
            found = next((name for name in _RESULTS if (self.path / name).exists()), None)
            words = "and no run that could go on; give another --run_dir, or --overwrite to replace it"
            return found and f"{found} {words}"
        if resume == "never":
            return "an unfinished run; --resume auto goes on with it, --overwrite starts it anew"
        try:
            known = _flat(self._known())
        except (ValueError, AttributeError, OSError) as error:  # no JSON, no settings, not to be read
            return f"an unfinished run whose {SETTINGS_FILE} is damaged ({error}); --overwrite starts it anew"
        now = _flat(self.settings)
        for name in sorted(known.keys() & now.keys()):  # what one of them lacks is an option of another version
            if known[name] != now[name] and not self.fruitless:
                values = f"{name} {known[name]!r}, now {now[name]!r}"
                return f"an unfinished run with {values}; give the same, another --run_dir, or --overwrite"
        return None

    @property
    def fruitless(self) -> bool:
        """Whether the run was stopped before it had written an edit, whatever it took over from a pack: it begins anew,
        under whatever settings."""
        if (self.path / CHECKPOINT).is_file():
            return False
        try:
            with closing(Journal(self.path / JOURNAL_FILE, read_only=True)) as journal:
                return journal.checkpoint is None and journal.last_note("written") is None
        except (RepairError, OSError):  # it is told of where the journal is needed
            return False

    def checkpoint_io(self, windows: Callable[[], int], tables: Callable[[], Tables]) -> JournaledCheckpointIO:
        """How the trainer saves, given how many windows have ended, and where it finds the rows again."""

        return JournaledCheckpointIO(
            self.path / CHECKPOINT, lambda sha256, found: self.journal.save(sha256, windows(), found), tables
        )


def plain(value: Any) -> Any:
    """Settings in the types that JSON knows, so that they compare equal after a round trip."""
    return json.loads(json.dumps(value, default=str))


def written(settings: Mapping[str, Any]) -> str:
    """Plain settings as `run.json` holds them."""
    return json.dumps(settings, indent=1, ensure_ascii=False)


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{start}{name}.") if isinstance(value, Mapping) else {f"{start}{name}": value}
    return found
