"""Where the corrections of a live model become durable: a run's directory, which never ends.

Each correction is events in the journal, its rows beside them, and a checkpoint of all else, as after a window of a
run. What the journal tells beyond the last checkpoint was answered to nobody, and is void.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repair_lightning.commands.run_dir import CHECKPOINT, SETTINGS_FILE, RunDirectory, plain, written
from repair_lightning.editors import Editor
from repair_lightning.edits.checkpoints import JournaledCheckpointIO, settle
from repair_lightning.edits.journal import Journal
from repair_lightning.errors import ConfigError, RepairError

log = logging.getLogger(__name__)

FORMAT = 1


class Store:
    """A live model's directory, held by this process. Raises `ConfigError` where another process has it, or it belongs
    to something else; `RepairError` where it is damaged or cannot be written.

    Args:
        path: made where it is missing.
        settings: what the model is; a directory goes on with the same alone, or begins anew where nothing was
            corrected in it.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self._run, asked = RunDirectory(path), plain({"live": FORMAT, **settings})
        file = self._run.path / SETTINGS_FILE
        known = file.read_text(encoding="utf-8") if file.is_file() else None
        if known not in (None, written(asked)) and not self._run.fruitless:
            there, aside = shlex.quote(str(path)), shlex.quote(f"{path}.before")
            words = f"'{path}' holds the corrections of something else ({' '.join(str(known).split())[:200]})"
            remedy = f"`repair-lightning log --run {there}` lists them, `mv {there} {aside}` begins without them"
            raise ConfigError(f"{words}; {remedy}")
        self._run.open(asked)
        self._run.begin()
        self._windows = 0
        self._io: JournaledCheckpointIO = self._run.checkpoint_io(lambda: self._windows, self._run.journal.tables)

    @property
    def path(self) -> Path:
        """The directory."""
        return self._run.path

    @property
    def point(self) -> int:
        """Where the journal stands."""
        return self._run.journal.last

    def load(self, editor: Editor) -> None:
        """Give a prepared editor what the directory holds, and be told of all that it does."""
        journal = self._run.journal
        if self._run.checkpoint is not None:
            found = self._io.load_checkpoint(self.path / CHECKPOINT, weights_only=True)
            editor.ledger.load_state_dict(journal.rebuild().state_dict())
            editor.on_load_checkpoint(found)
            editor.load_state_dict(found["state_dict"], strict=False)
            editor.change_base()
        journal.follow(editor.ledger)

    def save(self, editor: Editor) -> None:
        """All that was corrected so far is on the disk when this returns.

        Once the journal knows the checkpoint, it has happened: a file that cannot get its name then gets it later.
        """
        path, journal = self.path / CHECKPOINT, self._run.journal
        try:
            settle(path, journal.checkpoint)
        except OSError as error:
            words = f"'{path}' cannot be written ({error.strerror or error})"
            raise RepairError(f"{words}; make room, and send the correction again") from error
        self._windows = max((entry.window + 1 for entry in editor.ledger.values()), default=0)
        checkpoint: dict[str, Any] = {"state_dict": editor.state_dict()}
        editor.on_save_checkpoint(checkpoint)
        try:
            self._io.save_checkpoint(checkpoint, path)
        except RepairError as error:
            known = journal.checkpoint
            if known is None or known.seq != journal.last:
                raise
            log.warning("the correction is kept, its file has not got its name yet: %s", error)

    def rewind(self, point: int) -> None:
        """Take back what the journal was told after a point."""
        if self._run.journal.last > point:
            self._run.journal.rewind(point, "a correction was not finished")

    def events(self, id: str) -> Iterator[dict[str, Any]]:
        """The history of a correction, without what is void; a connection of its own, so that any thread may ask."""
        journal = Journal(self._run.journal.path, read_only=True)
        try:
            yield from (event for event in journal.events(id) if not event["void"])
        finally:
            journal.close()

    def close(self) -> None:
        """Let go of the directory."""
        self._run.close()
