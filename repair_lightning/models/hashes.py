"""SHA-256 over files and chunks of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, one after the other."""
    return digest_of(chunk for file in files for chunk in _chunks(file))


def digest_of(chunks: Iterable[bytes]) -> str:
    """SHA-256 over chunks of bytes, one after the other."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path, size: int = 1 << 22) -> Iterable[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(size):
            yield chunk
