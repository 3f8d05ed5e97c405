"""Segments: files that are written once and hold the rows that came between two checkpoints.

A checkpoint names the segments that it needs, each with its hash. They are on the disk and were read back before it is
written, and are removed only once another one has its name, so a process that is killed at any point leaves all that
its last checkpoint names. As in a log-structured merge tree, `FAN` segments of one level become one of the next, up to
`LARGEST`: a row is written a few times at most, however long the stream, and files stay few.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from repair_lightning.errors import RepairError
from repair_lightning.memory.rows import NUMBERS, Part, Rows
from repair_lightning.models.base import files_hash
from repair_lightning.storage.folders import sync

FAN = 8
"""Segments of one level that become one."""
LARGEST = 256 << 20
"""Bytes beyond which segments are not joined: what joining takes in memory stays bounded."""


@dataclass(frozen=True)
class Segment:
    """One file of `size` bytes: rows with numbers in [`first`, `stop`). It has no name before it is written."""

    first: int
    stop: int
    level: int
    size: int = 0
    sha256: str = ""
    name: str = ""


@dataclass(frozen=True)
class _Span:
    """What a segment covers of a table as it is now: places [`start`, `stop`) of its rows."""

    segment: Segment
    start: int
    stop: int

    @property
    def live(self) -> int:
        return self.stop - self.start


class Segments:
    """The segments of one checkpoint after another, in a folder of their own.

    :meth:`write` before a checkpoint gets its name, :meth:`accept` behind that; :meth:`sweep` at the end of both ways.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, tuple[Segment, ...]] = {}
        self._held: dict[str, Tensor] = {}  # the numbers of each segment's rows, by its name
        self._next = self._tables

    # -- saving -------------------------------------------------------------------------------------------------------

    def write(self, tables: Mapping[str, Rows]) -> dict[str, Any]:
        """Put what no segment holds yet on the disk; returns what a checkpoint must say of it, in plain types.

        Nothing is removed: what is no longer needed stays for the checkpoint that is still the last.

        Raises:
            RepairError: what is read back is not what was written.
            OSError: it cannot be written.
        """
        self._next, said = {}, {}
        for table, rows in tables.items():
            spans = planned(rows, [(segment, self._held[segment.name]) for segment in self._tables.get(table, ())])
            segments = tuple(self._stored(table, rows, span) for span in spans)
            self._next[table] = segments
            held = [runs(self._held[segment.name]) for segment in segments]
            plain = [list(astuple(segment)) for segment in segments]
            said[table] = {"segments": plain, "held": held, "rows": runs(rows.numbers)}
        return said

    def _stored(self, table: str, rows: Rows, span: _Span) -> Segment:
        """The segment of a span, written where it has no file yet."""
        if span.segment.name:
            return span.segment
        tensors = {key: value.detach().cpu().contiguous() for key, value in rows.take(span.start, span.stop).items()}
        tensors[NUMBERS] = rows.numbers[span.start : span.stop].contiguous()
        content = save(tensors)
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{table}-{span.segment.first}-{sha256[:16]}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checked(self.folder / name, content, sha256)
        sync(self.folder)
        self._held[name] = tensors[NUMBERS]
        return replace(span.segment, size=len(content), sha256=sha256, name=name)

    def accept(self) -> None:
        """The checkpoint that :meth:`write` was for has its name."""
        self._tables = self._next

    def sweep(self) -> None:
        """Remove what the last checkpoint does not name."""
        named = {segment.name for segments in self._tables.values() for segment in segments}
        self._held = {name: numbers for name, numbers in self._held.items() if name in named}
        for file in self.folder.glob("*") if self.folder.is_dir() else ():
            if file.name not in named:
                file.unlink()

    # -- reading ------------------------------------------------------------------------------------------------------

    def adopt(self, said: Mapping[str, Any]) -> None:
        """Go on behind a checkpoint: its segments are there and are what they were when it was written.

        Raises:
            RepairError: one is missing or damaged.
        """
        found = {
            table: tuple(Segment(*plain) for plain in about["segments"])
            for table, about in said.items()
            if "segments" in about
        }
        if found == self._tables:
            return
        for segment in (segment for segments in found.values() for segment in segments):
            path = self.folder / segment.name
            if not path.is_file():
                raise RepairError(f"segment '{path}' is missing")
            if files_hash([path]) != segment.sha256:
                raise RepairError(f"segment '{path}' is not as it was written")
        held = {
            segment.name: from_runs(numbers)
            for table, segments in found.items()
            for segment, numbers in zip(segments, said[table]["held"], strict=True)
        }
        self._tables = self._next = found
        self._held = held

    def read(self, said: Mapping[str, Any]) -> dict[str, list[Part]]:
        """The rows that a checkpoint names, by table.

        Raises:
            RepairError: a segment cannot be read, or a row is in none.
        """
        return {table: self._parts(about) for table, about in said.items()}

    def _parts(self, about: Mapping[str, Any]) -> list[Part]:
        if "tensors" in about:
            return [Part(about["tensors"], torch.ones(len(about["tensors"][NUMBERS]), dtype=torch.bool))]
        numbers = from_runs(about["rows"])
        parts = []
        for plain in about["segments"]:
            path = self.folder / Segment(*plain).name
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise RepairError(f"segment '{path}' cannot be read ({str(error).splitlines()[0]})") from error
            parts.append(Part(tensors, torch.isin(tensors[NUMBERS], numbers)))
        if sum(int(part.kept.sum()) for part in parts) != len(numbers):
            raise RepairError(f"the segments in '{self.folder}' do not hold all rows")
        return parts


def unsegmented(tables: Mapping[str, Rows]) -> dict[str, Any]:
    """Tables as they are, for a checkpoint that needs no file but its own; :meth:`Segments.read` reads them too."""
    return {table: {"tensors": _whole(rows)} for table, rows in tables.items()}


def _whole(rows: Rows) -> dict[str, Tensor]:
    tensors = {**rows.take(0, len(rows.numbers)), NUMBERS: rows.numbers}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # a view would bring all behind it


def planned(rows: Rows, known: Sequence[tuple[Segment, Tensor]]) -> list[_Span]:
    """Which segments shall hold a table's rows: known ones, and others, without a name, that are to be written.

    Args:
        rows: the table as it is now.
        known: segments in the order of their rows, each with the numbers that it holds.
    """
    spans = [_span(rows.numbers, segment, held) for segment, held in known]
    spans = [span for span in spans if span.live]
    begins, ends = [span.start for span in spans], [0, *(span.stop for span in spans)]
    if begins != ends[:-1]:  # what was gone came back: begin anew
        spans, ends = [], [0]
    start, stop = ends[-1], len(rows.numbers)
    if start == stop:
        return spans
    bytes_of_a_row = sum(tensor.nbytes for tensor in rows.take(start, start + 1).values())
    most = max(1, LARGEST // max(bytes_of_a_row, 1))
    for at in range(start, stop, most):
        spans.append(_new(rows.numbers, at, min(at + most, stop), 0))
        while _joinable(spans[-FAN:], most):
            together = spans[-FAN:]
            level = together[-1].segment.level + 1
            spans[-FAN:] = [_new(rows.numbers, together[0].start, together[-1].stop, level)]
    return spans


def _span(numbers: Tensor, segment: Segment, held: Tensor) -> _Span:
    """What a segment covers of rows with these numbers; without its name where it is to be written anew, because it
    lacks one of them or most of what it holds is gone."""
    start, stop = torch.searchsorted(numbers, torch.tensor([segment.first, segment.stop])).tolist()
    whole = bool(torch.isin(numbers[start:stop], held, assume_unique=True).all())
    if whole and 2 * (stop - start) >= len(held):
        return _Span(segment, start, stop)
    return _Span(Segment(segment.first, segment.stop, segment.level), start, stop)


def _joinable(spans: Sequence[_Span], most: int) -> bool:
    levels = {span.segment.level for span in spans}
    return len(spans) == FAN and len(levels) == 1 and sum(span.live for span in spans) <= most


def _new(numbers: Tensor, start: int, stop: int, level: int) -> _Span:
    return _Span(Segment(int(numbers[start]), int(numbers[stop - 1]) + 1, level), start, stop)


def runs(numbers: Tensor) -> Tensor:
    """Ascending numbers (N,) as runs (R, 2) of consecutive ones: where each begins and how long it is."""
    first = torch.ones(len(numbers), dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1] + 1
    places = first.nonzero()[:, 0]
    lengths = torch.diff(places, append=torch.tensor([len(numbers)]))
    return torch.stack([numbers[places], lengths], dim=1)


def from_runs(found: Tensor) -> Tensor:
    """The inverse of :func:`runs`."""
    begins, lengths = found.unbind(1)
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (begins - offsets).repeat_interleave(lengths)


def write_checked(path: Path, content: bytes, sha256: str) -> None:
    """Write a file aside, read it back from the disk, and give it its name.

    Raises:
        RepairError: what is read back is not what was written.
        OSError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if files_hash([aside]) != sha256:
            raise RepairError(f"segment '{path}': what is read back is not what was written; check the disk")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
