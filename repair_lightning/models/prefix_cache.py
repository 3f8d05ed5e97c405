"""The prefix cache: hidden states of texts that come again, in memory and behind it on disk, both bounded.

What was kept or read back is bitwise identical to what was computed. What was dropped is computed again in another
batch, and may differ from the first time by rounding; see :func:`canonical_batches`.

Legend for shapes: T tokens, D = d_model, F = d_ffn.
"""

from __future__ import annotations

import logging
import re
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from repair_lightning.errors import RepairError
from repair_lightning.models.prefix import Capture, SplitModel

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, tuple[int, ...]]
"""The identity of what computes, and the token ids."""

LANES = 16
"""Widths are multiples of this, the floats in a vector of 512 bits: rows of like lengths have one shape."""

SEGMENTS = 16
"""Into so many files the budget on disk is divided."""


def canonical_width(length: int, limit: int | None = None) -> int:
    """The padded width of a row of `length` tokens: the next multiple of `LANES`, in a base of `limit` positions."""
    width = -(-length // LANES) * LANES
    return width if limit is None else max(length, min(width, limit))


def canonical_batches(
    split: SplitModel, rows: Sequence[Sequence[int]], batch_size: int = 64
) -> Iterator[tuple[list[int], Tensor]]:
    """Token rows in passes in which each has its own canonical width, whatever rows are there beside it.

    Rows share a pass with rows of their own :func:`canonical_width` alone. They are padded on the right, which a causal
    model cannot see, so no mask is needed: the pass is the one of unpadded rows. The same batch run again gives the
    same bits. A row in another batch gives the same states up to rounding: libraries choose their sums by the shapes,
    the processor and the threads.

    Args:
        split: the model, cut at the edited layer.
        rows: token ids, at least one in each row.
        batch_size: most rows in one pass.

    Yields:
        the indices of a pass's rows, and its token ids (B, width).

    Raises:
        RepairError: a row is empty.
    """
    if not all(len(row) for row in rows):
        raise RepairError("a sequence without tokens has no hidden state; give each at least one token")
    limit = getattr(split.model.config, "max_position_embeddings", None)
    device = next(split.model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for width, group in groupby(order, key=lambda i: canonical_width(len(rows[i]), limit)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            index = alike[start : start + batch_size]
            padded = [[*rows[i], *[0] * (width - len(rows[i]))] for i in index]
            yield index, torch.tensor(padded, device=device)


def capture_rows(split: SplitModel, rows: Sequence[Sequence[int]], batch_size: int = 64) -> list[Capture]:
    """Capture token rows, each in its canonical form; see :func:`canonical_batches`.

    Returns:
        per row its capture without padding: `hidden` (T, D), `activations` (T, F).
    """
    captures: list[Any] = [None] * len(rows)
    for index, ids in canonical_batches(split, rows, batch_size):
        found = split.capture(ids, torch.ones_like(ids))
        for place, i in enumerate(index):
            n = len(rows[i])
            captures[i] = Capture(found.hidden[place, :n].clone(), found.activations[place, :n].clone())
    return captures


def nbytes(entry: Capture) -> int:
    """The size of a capture in bytes."""
    return entry.hidden.nbytes + entry.activations.nbytes


class PrefixCache:
    """Hidden states at the edited layer by token ids: least recently used entries leave when the budget is full.

    They leave for the disk if there is a place on it, and come back from there bit by bit; else they are computed again
    when they are asked for, equal up to rounding. A disk that fails or is full costs nothing but time: one warning, and
    the cache goes on without it. Not for use by several threads.

    Args:
        split: the model, cut at the edited layer.
        budget: most bytes in memory (the model's device); an entry that is larger alone is not kept there.
        spill: a folder for scratch files, made when first needed; None goes without.
        spill_budget: most bytes on disk; the oldest sixteenth leaves when they are full.
        identity: names what computes the states: the base, the layer and the dtype. A part of every key; set it anew
            and nothing known before is found.

    Attributes:
        used: bytes in memory, never more than `budget`.
    """

    def __init__(
        self,
        split: SplitModel,
        budget: int = 2 << 30,
        spill: Path | None = None,
        spill_budget: int = 8 << 30,
        identity: str = "",
    ) -> None:
        self.split = split
        self.budget = budget
        self.identity = identity
        self.used = 0
        self._entries: OrderedDict[Key, Capture] = OrderedDict()
        prefix = re.sub(r"[^\w.-]+", "-", identity or "prefix")
        self._disk = None if spill is None else Spill(Path(spill), spill_budget, prefix)

    def __len__(self) -> int:
        """The number of entries in memory."""
        return len(self._entries)

    @property
    def spilled(self) -> int:
        """Bytes on disk, never more than `spill_budget`."""
        return 0 if self._disk is None else self._disk.used

    @torch.inference_mode(False)  # entries outlive the call, and what inference mode makes cannot be trained upon
    @torch.no_grad()
    def get(self, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> list[Capture]:
        """The captures of token sequences, each without padding: `hidden` (T, D), `activations` (T, F).

        They are the cache's own tensors: keep them as long as you like, but do not write into them.

        Args:
            sequences: token ids; the same sequence may come twice.
            batch_size: most sequences in one pass of the model.

        Raises:
            RepairError: a sequence is empty.
        """
        keys = [(self.identity, tuple(sequence)) for sequence in sequences]
        found = {key: self._entries[key] for key in dict.fromkeys(keys) if key in self._entries}
        for key in found:
            self._entries.move_to_end(key)
        for key, entry in self._read([key for key in dict.fromkeys(keys) if key not in found]):
            found[key] = entry
            self._keep(key, entry)
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for key, entry in zip(missing, capture_rows(self.split, [ids for _, ids in missing], batch_size), strict=True):
            found[key] = entry
            self._keep(key, entry)
        return [found[key] for key in keys]

    def close(self) -> None:
        """Forget everything and remove the files. The cache may be used further, in memory alone."""
        self._entries.clear()
        self.used = 0
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _keep(self, key: Key, entry: Capture) -> None:
        """Keep an entry in memory, or on disk where it is larger than the whole budget; others make room."""
        size = nbytes(entry)
        if size > self.budget:
            self._write(key, entry)
            return
        while self.used + size > self.budget:
            old, oldest = self._entries.popitem(last=False)
            self.used -= nbytes(oldest)
            self._write(old, oldest)
        self._entries[key] = entry
        self.used += size

    def _write(self, key: Key, entry: Capture) -> None:
        if self._disk is not None:
            try:
                self._disk.put(key, entry)
            except OSError as error:
                self._give_up(self._disk, error)

    def _read(self, keys: Sequence[Key]) -> Iterator[tuple[Key, Capture]]:
        """Those of the entries that are on disk."""
        for key in keys:
            if self._disk is None:
                return
            try:
                entry = self._disk.get(key)
            except (OSError, ValueError) as error:  # numpy's word for a file that is shorter than it was
                self._give_up(self._disk, error)
                return
            if entry is not None:
                yield key, entry

    def _give_up(self, disk: Spill, error: Exception) -> None:
        """Go on without the disk, and give back what was taken of it: something else may need the room."""
        log.warning("the prefix cache goes on without '%s' and computes anew what it held: %s", disk.folder, error)
        disk.close()
        self._disk = None


@dataclass(slots=True, eq=False)
class _Segment:
    """A file, the bytes in it, and the entries that go when it goes."""

    file: IO[bytes]
    size: int = 0
    keys: list[Key] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an entry lies, and tensors that know its shapes, dtypes and device but have no content."""

    segment: _Segment
    offset: int
    hidden: Tensor
    activations: Tensor
    device: torch.device


class Spill:
    """Captures on disk, as raw bytes in memory-mapped files; the oldest file leaves when the budget is full.

    The files have no name where the system allows that (`tempfile.TemporaryFile`), so nobody else can open them and
    they are gone with the process, even if it is killed. Data is written with `write` and not through the map, where a
    full disk would end the process instead of raising an error.

    Args:
        folder: made when the first entry comes.
        budget: most bytes in all files.
        prefix: how the files' names begin where they have one.
    """

    def __init__(self, folder: Path, budget: int, prefix: str) -> None:
        self.folder = folder
        self.budget = budget
        self.prefix = prefix
        self._segments: list[_Segment] = []
        self._places: dict[Key, _Place] = {}
        self._finalizer = weakref.finalize(self, _close, self._segments)

    @property
    def used(self) -> int:
        """Bytes in all files."""
        return sum(segment.size for segment in self._segments)

    def put(self, key: Key, entry: Capture) -> None:
        """Write an entry unless it is there already or larger than the budget.

        Raises:
            OSError: the disk is full or fails; what was there before can still be read.
        """
        size = nbytes(entry)
        if key in self._places or size > self.budget:
            return
        while self.used + size > self.budget:
            self._drop_oldest()
        segment = self._segment_for(size)
        segment.file.seek(segment.size)
        for tensor in (entry.hidden, entry.activations):
            _write_all(segment.file, _flat(tensor.cpu().contiguous()))
        like = (entry.hidden.to("meta"), entry.activations.to("meta"))
        self._places[key] = _Place(segment, segment.size, *like, entry.hidden.device)
        segment.keys.append(key)
        segment.size += size

    def get(self, key: Key) -> Capture | None:
        """A copy of an entry on the device that it came from, or None.

        Raises:
            OSError: the disk fails.
            ValueError: the file is shorter than what was written into it.
        """
        place = self._places.get(key)
        if place is None:
            return None
        size = place.hidden.nbytes + place.activations.nbytes
        data: np.ndarray = np.memmap(place.segment.file, np.uint8, "r", place.offset, (size,))
        parts = []
        for like in (place.hidden, place.activations):
            parts.append(torch.empty_like(like, device="cpu"))
            _flat(parts[-1])[:] = data[: like.nbytes]
            data = data[like.nbytes :]
        return Capture(parts[0].to(place.device), parts[1].to(place.device))

    def close(self) -> None:
        """Remove the files, as the end of this object and that of the process do."""
        self._places.clear()
        self._finalizer()

    def _segment_for(self, size: int) -> _Segment:
        """The newest file if it has room for `size` bytes more, or a new one."""
        if not self._segments or self._segments[-1].size + size > max(size, self.budget // SEGMENTS):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(buffering=0, prefix=f"{self.prefix}-", dir=self.folder)  # noqa: SIM115
            self._segments.append(_Segment(file))
        return self._segments[-1]

    def _drop_oldest(self) -> None:
        oldest = self._segments.pop(0)
        for key in oldest.keys:
            del self._places[key]
        _close([oldest])


def _close(segments: list[_Segment]) -> None:
    """Close files, which removes them."""
    while segments:
        try:
            segments.pop().file.close()
        except OSError as error:  # a network's file system may report a full disk here
            log.debug("a scratch file of the prefix cache: %s", error)


def _flat(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, in its own memory."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _write_all(file: IO[bytes], data: Any) -> None:
    """Write all of `data`, which an unbuffered file may take in pieces."""
    while len(data):
        data = data[file.write(data) :]
