"""The prefix cache: hidden states of texts that come again, in memory and after it on disk, both bounded.

What was kept or read back is bitwise identical to what was computed. What was dropped is computed again in another
batch, and may differ by rounding.

Legend for shapes: T tokens, D = d_model, F = d_ffn.
"""

from __future__ import annotations

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from repair_lightning.errors import RepairError
from repair_lightning.models.prefix import Capture, SplitModel

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[int, ...]
LANES = 16
"""Widths are multiples of this, the floats in a vector of 512 bits: rows of like lengths have one shape."""


def canonical_batches(
    split: SplitModel, rows: Sequence[Sequence[int]], batch_size: int = 64, taken: int = 0
) -> Iterator[tuple[list[int], Tensor]]:
    """Token rows in passes in which each has its own width, whatever rows are there beside it.

    The width is the next multiple of `LANES`. Rows are padded on the right, which a causal model cannot see, so no mask
    is needed. The same batch run again gives the same bits; in another batch a row's states are equal up to rounding:
    libraries choose their sums by the shapes, the processor and the threads.

    Yields the indices of a pass's rows, and its token ids (B, width), behind at most `taken` other positions.
    RepairError where a row is empty.
    """
    if not all(map(len, rows)):
        raise RepairError("a sequence without tokens has no hidden state; give each at least one token")
    limit: int = split.model.config.max_position_embeddings - taken  # type: ignore[union-attr, operator, assignment]
    device = next(split.model.parameters()).device

    def width_of(i: int) -> int:
        return max(len(rows[i]), min(-(-len(rows[i]) // LANES) * LANES, limit))

    for width, group in groupby(sorted(range(len(rows)), key=lambda i: len(rows[i])), key=width_of):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            index = alike[start : start + batch_size]
            padded = [[*rows[i], *[0] * (width - len(rows[i]))] for i in index]
            yield index, torch.tensor(padded, device=device)


def capture_rows(
    split: SplitModel, rows: Sequence[Sequence[int]], batch_size: int = 64, heads: Heads | None = None
) -> list[Capture]:
    """The capture of each token row without padding: `hidden` (T, D), `activations` (T, F)."""
    captures: list[Any] = [None] * len(rows)
    found_heads = [heads.of(row) if heads else () for row in rows]
    own = [row[len(head) :] for row, head in zip(rows, found_heads, strict=True)]
    for index, ids in canonical_batches(split, own, batch_size, max(map(len, found_heads), default=0)):
        past, mask = None, torch.ones_like(ids)
        known: list[Capture | None] = [None] * len(index)
        if heads and any(found_heads[i] for i in index):
            past, before, known = heads.behind([found_heads[i] for i in index])
            mask = torch.cat([before, mask], 1)
        found = split.capture(ids, mask, past)
        for place, i in enumerate(index):
            states = (found.hidden[place, : len(own[i])], found.activations[place, : len(own[i])])
            head = known[place]
            parts = [states] if head is None else [(head.hidden, head.activations), states]
            captures[i] = Capture(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return captures


class Heads:
    """What texts begin with again and again, as the words that a chat template puts before a question: read once.

    Args:
        split: the model, cut at the edited layer; nothing below it may change.
        rows: such beginnings, as token ids.
    """

    SHORTEST = 8
    """Fewer tokens are not worth it."""

    def __init__(self, split: SplitModel, rows: Iterable[Sequence[int]]) -> None:
        self.split = split
        self._rows = self._worth(rows)
        self._known: dict[Key, tuple[Capture, list[tuple[Tensor, Tensor]]]] = {}

    def _worth(self, rows: Iterable[Sequence[int]]) -> list[Key]:
        return sorted({tuple(row) for row in rows if len(row) >= self.SHORTEST}, key=len, reverse=True)

    @contextmanager
    def also(self, row: Sequence[int]) -> Iterator[None]:
        """Inside, a beginning more; nothing where it is too short, or known."""
        rows = self._rows
        self._rows = self._worth([*rows, row])
        try:
            yield
        finally:
            self._rows = rows
            self._known = {head: found for head, found in self._known.items() if head in rows}

    def of(self, row: Sequence[int]) -> Key:
        """The longest that a row begins with, and does not end with; empty where there is none."""
        return next((head for head in self._rows if len(row) > len(head) and tuple(row[: len(head)]) == head), ())

    def behind(self, rows: Sequence[Key]) -> tuple[DynamicCache, Tensor, list[Capture | None]]:
        """A key-value cache that holds a head for each of B rows, padded on the left to S tokens; its mask (B, S); the
        heads' own states, None where a row has no head."""
        kept = [self._read(head) if head else None for head in rows]
        width, past = max(map(len, rows)), DynamicCache()
        blank = next(layers for one in kept if one is not None for layers in [one[1]])
        for i, (keys, values) in enumerate(blank):
            nothing = keys[:, :, :0], values[:, :, :0]
            both = [one[1][i] if one is not None else nothing for one in kept]
            padded = [[pad(x, (0, 0, width - x.shape[2], 0)) for x in pair] for pair in both]
            past.update(torch.cat([pair[0] for pair in padded]), torch.cat([pair[1] for pair in padded]), i)
        mask = torch.tensor([[0] * (width - len(head)) + [1] * len(head) for head in rows], device=blank[0][0].device)
        return past, mask, [one and one[0] for one in kept]

    def _read(self, head: Key) -> tuple[Capture, list[tuple[Tensor, Tensor]]]:
        """A head's own states, and each layer's keys and values (1, H, S, E)."""
        if head not in self._known:
            ids, cache = torch.tensor([head], device=next(self.split.model.parameters()).device), DynamicCache()
            found = self.split.capture(ids, torch.ones_like(ids), cache)
            layers: Any = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
            self._known[head] = Capture(found.hidden[0], found.activations[0]), layers
        return self._known[head]

    def forget(self) -> None:
        """Drop what was read."""
        self._known.clear()


class PrefixCache:
    """Captures by token ids: the least recently used leave for the disk when the budget is full. For one thread.

    Args:
        split: the model, cut at the edited layer.
        budget: most bytes in memory (the model's device); `used` says how many there are.
        spill: a folder for a scratch file, made when first needed; None goes without.
        spill_budget: most bytes on disk.
        heads: what texts begin with again and again, as token ids.
    """

    def __init__(
        self,
        split: SplitModel,
        budget: int = 2 << 30,
        spill: Path | None = None,
        spill_budget: int = 8 << 30,
        heads: Iterable[Sequence[int]] = (),
    ) -> None:
        self.split, self.budget, self.used = split, budget, 0
        self.heads = Heads(split, heads)
        self.disk = Spill(spill or Path(), spill_budget if spill else 0)
        self._entries: OrderedDict[Key, Capture] = OrderedDict()

    @torch.inference_mode(False)  # entries outlive the call, and what inference mode makes cannot be trained upon
    @torch.no_grad()
    def get(self, sequences: Sequence[Sequence[int]]) -> list[Capture]:
        """What :func:`capture_rows` gives, for sequences of which some may be the same; not to be written into."""
        keys = [tuple(sequence) for sequence in sequences]
        found: dict[Key, Any] = {key: self._entries.pop(key, None) for key in dict.fromkeys(keys)}
        self._entries.update((key, entry) for key, entry in found.items() if entry)  # the last used are the last
        read: dict[Key, Any] = {key: self.disk.get(key) for key, entry in found.items() if entry is None}
        missing = [key for key, entry in read.items() if entry is None]
        read |= zip(missing, capture_rows(self.split, missing, heads=self.heads), strict=True)
        found |= read
        self._entries |= read
        self.used += sum(map(_nbytes, read.values()))
        while self.used > self.budget:
            key, oldest = self._entries.popitem(last=False)
            self.used -= _nbytes(oldest)
            self.disk.put(key, oldest)
        return [found[key] for key in keys]

    def close(self) -> None:
        """Forget everything and remove the scratch file. The cache may be used further, in memory alone."""
        self._entries.clear()
        self.heads.forget()
        self.used = 0
        self.disk.close()


def _nbytes(entry: Capture) -> int:
    return entry.hidden.nbytes + entry.activations.nbytes


class Spill:
    """Captures in a scratch file of at most `budget` bytes: where it is full, it is begun anew.

    The file has no name where the system allows that (`tempfile.TemporaryFile`), so nobody else can open it and it is
    gone with the process, even if it is killed. A disk that fails or is full costs time alone: one warning, and nothing
    is kept any more.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._file: IO[bytes] | None = None
        self._places: dict[Key, tuple[int, int, torch.device]] = {}
        self._end = 0

    def put(self, key: Key, entry: Capture) -> None:
        """Write an entry unless it is there already or larger than the budget."""
        if key in self._places or _nbytes(entry) > self.budget:
            return
        data = save({"hidden": entry.hidden, "activations": entry.activations})
        if self._end + len(data) > self.budget:
            self._places, self._end = {}, 0
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
            self._places[key] = (self._end, len(data), entry.hidden.device)
            self._end += len(data)
        except OSError as error:
            self._give_up(error)

    def get(self, key: Key) -> Capture | None:
        """A copy of an entry, or None."""
        if key not in self._places or self._file is None:
            return None
        start, size, device = self._places[key]
        try:
            self._file.seek(start)
            found = load(self._file.read(size))
        except (OSError, SafetensorError) as error:  # the latter where the file is shorter than it was
            self._give_up(error)
            return None
        return Capture(**{name: tensor.to(device) for name, tensor in found.items()})

    def _give_up(self, error: Exception) -> None:
        log.warning("the prefix cache goes on without '%s' and computes again what it held: %s", self.folder, error)
        self.close()

    def close(self) -> None:
        """Remove the file, as the end of this object and that of the process do, and keep nothing more."""
        self._places.clear()
        self.budget = 0
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses once more what it has refused to take
                self._file.close()
