"""The prefix cache: hidden states of texts that come again, in memory and behind it on disk, both bounded.

What was kept or read back is bitwise identical to what was computed. What was dropped is computed again in another
batch, and may differ from the first time by rounding; see :func:`canonical_batches`.

Legend for shapes: T tokens, D = d_model, F = d_ffn.
"""

from __future__ import annotations

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from repair_lightning.errors import RepairError
from repair_lightning.models.prefix import Capture, SplitModel

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, tuple[int, ...]]
"""The identity of what computes, and the token ids."""

LANES = 16
"""Widths are multiples of this, the floats in a vector of 512 bits: rows of like lengths have one shape."""


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


class PrefixCache:
    """Hidden states at the edited layer by token ids: least recently used entries leave when the budget is full.

    They leave for the disk if there is a place on it, and come back from there bit by bit; else they are computed again
    when they are asked for, equal up to rounding. A disk that fails or is full costs nothing but time: one warning, and
    the cache goes on without it. Not for use by several threads.

    Args:
        split: the model, cut at the edited layer.
        budget: most bytes in memory (the model's device); an entry that is larger alone is not kept there.
        spill: a folder for a scratch file, made when first needed; None goes without.
        spill_budget: most bytes on disk; the oldest are written over when they are full.
        identity: names what computes the states: the base, the layer and the dtype. A part of every key; set it again
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
        self._disk = None if spill is None else Spill(Path(spill), spill_budget)

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
        wanted = dict.fromkeys(keys)
        found = {key: self._entries[key] for key in wanted if key in self._entries}
        for key in found:
            self._entries.move_to_end(key)
        for key in [key for key in wanted if key not in found]:
            if (entry := self._read(key)) is not None:
                found[key] = entry
                self._keep(key, entry)
        missing = [key for key in wanted if key not in found]
        for key, entry in zip(missing, capture_rows(self.split, [ids for _, ids in missing], batch_size), strict=True):
            found[key] = entry
            self._keep(key, entry)
        return [found[key] for key in keys]

    def close(self) -> None:
        """Forget everything and remove the scratch file. The cache may be used further, in memory alone."""
        self._entries.clear()
        self.used = 0
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _keep(self, key: Key, entry: Capture) -> None:
        """Keep an entry in memory, or on disk where it is larger than the whole budget; others make room."""
        size = _nbytes(entry)
        if size > self.budget:
            self._write(key, entry)
            return
        while self.used + size > self.budget:
            old, oldest = self._entries.popitem(last=False)
            self.used -= _nbytes(oldest)
            self._write(old, oldest)
        self._entries[key] = entry
        self.used += size

    def _write(self, key: Key, entry: Capture) -> None:
        if self._disk is not None:
            try:
                self._disk.put(key, entry)
            except OSError as error:
                self._give_up(self._disk, error)

    def _read(self, key: Key) -> Capture | None:
        try:
            return None if self._disk is None else self._disk.get(key)
        except (OSError, SafetensorError) as error:  # the latter where the file is shorter than it was
            self._give_up(self._disk, error)
            return None

    def _give_up(self, disk: Spill, error: Exception) -> None:
        """Go on without the disk, and give back what was taken of it: something else may need the room."""
        log.warning("the prefix cache goes on without '%s' and computes again what it held: %s", disk.folder, error)
        disk.close()
        self._disk = None


def _nbytes(entry: Capture) -> int:
    return entry.hidden.nbytes + entry.activations.nbytes


class Spill:
    """Captures in a scratch file, written round and round: where it is full, the oldest are written over.

    The file has no name where the system allows that (`tempfile.TemporaryFile`), so nobody else can open it and it is
    gone with the process, even if it is killed.

    Args:
        folder: made when the first entry comes.
        budget: most bytes in the file.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self._file: IO[bytes] | None = None
        self._places: OrderedDict[Key, tuple[int, int, torch.device]] = OrderedDict()  # the oldest first
        self._end = 0  # of the newest

    @property
    def used(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._places.values())

    def put(self, key: Key, entry: Capture) -> None:
        """Write an entry unless it is there already or larger than the budget.

        Raises:
            OSError: the disk is full or fails.
        """
        if key in self._places:
            return
        data = save({"hidden": entry.hidden.contiguous(), "activations": entry.activations.contiguous()})
        if len(data) > self.budget:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        if self._end + len(data) > self.budget:  # another round
            self._forget(self._end, self.budget)
            self._end = 0
        self._forget(self._end, self._end + len(data))
        self._file.seek(self._end)
        self._file.write(data)
        self._file.flush()
        self._places[key] = (self._end, len(data), entry.hidden.device)
        self._end += len(data)

    def get(self, key: Key) -> Capture | None:
        """A copy of an entry on the device that it came from, or None.

        Raises:
            OSError: the disk fails.
            SafetensorError: the file is shorter than what was written into it.
        """
        if key not in self._places or self._file is None:
            return None
        start, size, device = self._places[key]
        self._file.seek(start)
        return Capture(**{name: tensor.to(device) for name, tensor in load(self._file.read(size)).items()})

    def close(self) -> None:
        """Remove the file, as the end of this object and that of the process do."""
        self._places.clear()
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses once more what it has refused to take
                self._file.close()

    def _forget(self, start: int, end: int) -> None:
        """Forget the oldest entries as long as they begin in this part of the file."""
        while self._places and start <= next(iter(self._places.values()))[0] < end:
            self._places.popitem(last=False)
