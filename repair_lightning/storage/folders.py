"""Folders that are there whole or not at all: written aside, synced, checked, and swapped in by rename.

`pack` is written as `.pack.part`; once it is on the disk and checked it is `.pack.new`; then `pack` becomes `.pack.old`
and `.pack.new` becomes `pack`. A process that is killed between the last two leaves no `pack` but both others: readers
find what is there (:func:`whereabouts`), and the next writer puts it in its place (:func:`settle`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from repair_lightning.errors import RepairError
from repair_lightning.storage.files import sync


def whereabouts(folder: str | Path) -> Path:
    """Where a folder's content is: there, or in what a killed writer left beside it. Changes nothing."""
    folder = Path(folder).expanduser()
    return folder if folder.exists() else next((left for left in _asides(folder)[1:] if left.is_dir()), folder)


def replace_folder(
    folder: str | Path, fill: Callable[[Path], None], ours: Collection[str] | None = None, what: str = "folder"
) -> Path:
    """Write a folder; until the new content is on the disk and checked, the old one stays.

    Args:
        folder: where; made where it is missing.
        fill: writes the content into an empty folder and raises where it is not good.
        ours: names that belong to the content; others, which a user put there, are kept. None keeps nothing.
        what: what the folder is, for errors.

    RepairError where it cannot be written (a full disk, no permission); what was there before is whole.
    """
    folder = Path(folder).expanduser().resolve()
    part, new, old = _asides(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        settle(folder, ours)
        part.mkdir()
        fill(part)
        for path in (*part.rglob("*"), part):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for the owner alone
            sync(path)
        os.rename(part, new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        sync(folder.parent)
        settle(folder, ours)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)  # what has failed takes no room
        if not isinstance(error, OSError):
            raise
        raise RepairError(
            f"{what} '{folder}' cannot be written ({error.strerror or error}); what was there before is whole: free "
            "the place or give another"
        ) from error
    return folder


def settle(folder: Path, ours: Collection[str] | None = None) -> None:
    """Finish or take back what a killed writer left beside a folder; see :func:`replace_folder` for `ours`."""
    part, new, old = _asides(folder)
    if not folder.exists() and (found := whereabouts(folder)) != folder:
        os.rename(found, folder)
    if old.is_dir():
        for entry in old.iterdir() if ours is not None else ():
            if entry.name not in ours and not (folder / entry.name).exists():  # type: ignore[operator]
                os.rename(entry, folder / entry.name)
    for left in (old, part, new):
        if left.is_dir():
            shutil.rmtree(left)


def _asides(folder: Path) -> list[Path]:
    return [folder.with_name(f".{folder.name}.{name}") for name in ("part", "new", "old")]
