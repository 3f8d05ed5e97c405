"""Files that are written whole: by way of a temporary name, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def rounded(value: Any, digits: int = 6) -> Any:
    """Plain numbers, rounded through mappings and lists; what is not finite becomes None, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return round(value, digits) if abs(value) < float("inf") else None
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file by way of a temporary name, so that a reader never sees half of it."""
    replace_text(path, json.dumps(rounded(content), indent=1, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, likewise."""
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace_text(path: Path, text: str) -> None:
    """Write a text by way of a temporary name."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary name, which is not left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(path.name + ".part")
    try:
        waiting.write_bytes(content)
        sync(waiting)
        os.replace(waiting, path)
    finally:
        waiting.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Let what was written to a file, or renamed in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
