"""The bank of shards: deltas of one FFN value matrix, or what is put out in its place.

REPAIR (arXiv 2510.01879), Sec. 2.2. A shard stands for `delta = W'_i - W_v` in float32, in the layout (D, F) whatever
the base's own storage order, and is applied to the value matrix's output: `y + A(x) delta^T`. It is stored dense (the
paper's, with its mask), or as two factors (ours). Rows that no shard answers are not touched, so their bits stay the
base's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from repair_lightning.errors import RepairError
from repair_lightning.functional import bernoulli_mask, pack_mask, pack_values, unpack_mask, unpack_values
from repair_lightning.memory.rows import NUMBERS, Part, Rows, joined
from repair_lightning.types import BASE

_LOW_RANK = "low_rank."
"""What the names of the low-rank shards' tensors begin with."""


def content_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


class Shard(nn.Module):
    """One side memory: `delta` (D, F), trainable where `mask` (D, F) is open, zero elsewhere.

    `generation` counts the re-initialisations; each draws a fresh mask.
    """

    delta: nn.Parameter
    mask: Tensor

    def __init__(self, shape: tuple[int, int], mask: Tensor | None = None, generation: int = 0) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mask", mask if mask is not None else torch.ones(0, dtype=torch.bool))
        self.generation = generation

    @property
    def open(self) -> Tensor | None:
        """The mask (D, F), or None where every coordinate is open."""
        return self.mask if self.mask.numel() else None

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""
        return nn.functional.linear(activations, self.delta)

    def fingerprint(self) -> str:
        """A hash of what it holds."""
        return content_hash(self.delta)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Of a masked shard only what the mask opens is stored, beside the mask in bits."""
        delta = self.delta if keep_vars else self.delta.detach()
        if self.open is None:
            destination[f"{prefix}delta"] = delta
        else:
            destination[f"{prefix}mask"] = pack_mask(self.mask)
            destination[f"{prefix}values"] = pack_values(delta, self.mask)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
        if f"{prefix}delta" in state_dict:
            self.mask = torch.ones(0, dtype=torch.bool, device=self.delta.device)
            found = state_dict[f"{prefix}delta"]
        else:
            self.mask = unpack_mask(state_dict[f"{prefix}mask"], self.delta.shape).to(self.delta.device)
            found = unpack_values(state_dict[f"{prefix}values"].to(self.delta.device), self.mask)
        with torch.no_grad():
            self.delta.copy_(found)


class LowRankShard(nn.Module):
    """A side memory `delta = left right` of rank R, with `left` (D, R) and `right` (R, F). It never changes.

    `number` tells it from every other shard of its bank, also from those that had its id before a rollback. On the
    `host` it stays in the CPU's memory wherever the bank goes, and is brought to the device when it answers.
    """

    left: Tensor
    right: Tensor
    open = None
    generation = 0

    def __init__(self, left: Tensor, right: Tensor, number: int, host: bool = False) -> None:
        super().__init__()
        self.number, self.host = number, host
        place = torch.device("cpu") if host else left.device
        self.register_buffer("left", left.detach().to(place, torch.float32))
        self.register_buffer("right", right.detach().to(place, torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> LowRankShard:
        """What moves modules to devices leaves one on the host alone."""
        return self if self.host else super()._apply(fn, recurse)  # type: ignore[return-value]

    @property
    def delta(self) -> Tensor:
        """The whole matrix (D, F), computed anew each time."""
        return self.left @ self.right

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""
        left, right = self.left.to(activations.device), self.right.to(activations.device)
        return nn.functional.linear(nn.functional.linear(activations, right), left)

    def fingerprint(self) -> str:
        """A hash of what it holds."""
        return content_hash(self.left) + content_hash(self.right)

    def _save_to_state_dict(self, *_: object) -> None:
        """The bank stores its low-rank shards together."""

    def _load_from_state_dict(self, *_: object) -> None:
        """They were loaded when they were made."""


class ValueShard(nn.Module):
    """A side memory that is one output: `value` (D,) takes the place of the value matrix's output at every token.

    It never changes.
    """

    value: Tensor
    open = None
    generation = 0

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().float())

    @property
    def delta(self) -> Tensor:
        """It has none.

        Raises:
            RepairError: always.
        """
        raise RepairError("a shard that replaces the output has no delta: it cannot be merged or scored by activation")

    def product(self, activations: Tensor) -> Tensor:
        """It adds nothing, so this is refused too."""
        return activations @ self.delta.T

    def fingerprint(self) -> str:
        """A hash of what it holds."""
        return content_hash(self.value)


AnyShard = Shard | LowRankShard | ValueShard


def shard_from(shape: tuple[int, int], state: Mapping[str, Tensor], generation: int = 0) -> Shard | ValueShard:
    """A shard for a value matrix of (D, F) from its own `state_dict`, trainable where its kind is."""
    if "value" in state:
        return ValueShard(state["value"])
    shard = Shard(shape, generation=generation)
    shard.load_state_dict(dict(state))
    return shard


class Factors(nn.Module):
    """The low-rank shards of some rows, gathered: `left` (n, D, R) and `right` (n, R, F), each row with its own."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left, self.right = left, right

    @classmethod
    def of(cls, shards: Sequence[LowRankShard], device: torch.device) -> Factors:
        """Shards of any ranks, filled up with zeros to the highest, on a device."""
        left = pad_sequence([shard.left.T for shard in shards], batch_first=True).mT
        right = pad_sequence([shard.right for shard in shards], batch_first=True)
        return cls(left.to(device), right.to(device))

    def product(self, activations: Tensor) -> Tensor:
        """`A_n delta_n^T` (n, T, D) for float32 activations (n, T, F)."""
        return activations @ self.right.mT @ self.left.mT


class Adds(Protocol):
    """What can be added to the value matrix's output."""

    def product(self, activations: Tensor) -> Tensor:
        """`A delta^T` (..., D) for float32 activations (..., F)."""


class Selection:
    """The shards that answer the rows of a batch, sorted out once and applied at every token.

    Args:
        size: B, the number of rows.
        parts: what is added to which rows; None stands for all of them.
        replaced: values (n, D) that take the output's place, at every token, in the rows (n,).
    """

    def __init__(
        self,
        size: int,
        parts: Sequence[tuple[Adds, Tensor | None]],
        replaced: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.size = size
        self._parts = parts
        self._replaced = replaced

    def __bool__(self) -> bool:
        """Whether any row is a shard's."""
        return bool(self._parts) or self._replaced is not None

    def __call__(self, output: Tensor, activations: Tensor) -> Tensor:
        """Add each row's shard to the value matrix's output; rows routed to the base keep their bits.

        Args:
            output: (B, T, D), the base's own output.
            activations: (B, T, F), the value matrix's input.
        """
        changed = output
        for shard, rows in self._parts:
            if rows is None:
                return output + shard.product(activations.float()).to(output.dtype)
            changed = output.clone() if changed is output else changed
            pushed = shard.product(activations.index_select(0, rows).float())
            changed.index_add_(0, rows, pushed.to(output.dtype))
        return changed if self._replaced is None else _replace(changed, *self._replaced)


def _replace(output: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """An output (B, ..., D) that is values (n, D) throughout its rows (n,)."""
    spread = values.to(output.dtype).view(len(values), *[1] * (output.ndim - 2), values.shape[-1])
    return output.index_copy(0, rows, spread.expand(len(values), *output.shape[1:]))


class SideMemory(nn.Module):
    """The shards by id. Ids are never used twice; a pruned shard keeps its id and starts a new generation.

    Args:
        shape: (D, F) of the value matrix.
        mask_ratio: share of the coordinates that a shard may train (rho); 1 opens all.
        seed: with the shard's id and generation it determines the mask.
        host: keep low-rank shards in the CPU's memory, wherever the rest of the bank is.

    Attributes:
        rows_apart: leave the low-rank shards out of `state_dict`, because who stores it asks for :meth:`rows`.
    """

    _place: Tensor

    def __init__(self, shape: tuple[int, int], mask_ratio: float = 1.0, seed: int = 0, host: bool = False) -> None:
        super().__init__()
        self.host = host
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in (0, 1], got {mask_ratio}")
        self.shape = shape
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.next_id = 0
        self.next_number = 0
        self.rows_apart = False
        self.turn = (0, 1)
        """Of several banks that open shards side by side: which one this is, and how many there are."""
        self.shards = nn.ModuleDict()
        self.register_buffer("_place", torch.zeros(0), persistent=False)  # follows the bank to its device

    @property
    def device(self) -> torch.device:
        """Where the shards are."""
        return self._place.device

    @property
    def ids(self) -> list[int]:
        """The ids of the shards, oldest first."""
        return [int(key) for key in self.shards]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, shard: int) -> AnyShard:
        if str(shard) not in self.shards:
            raise RepairError(f"there is no shard {shard}; known: {self.ids}")
        return self.shards[str(shard)]  # type: ignore[return-value]

    def open_shard(self) -> int:
        """Add an empty shard with a fresh mask; returns its id."""
        shard = self._new_id()
        self._put(shard, Shard(self.shape, self._mask(shard, 0)))
        return shard

    def add(self, left: Tensor, right: Tensor) -> int:
        """Add a low-rank shard `left` (D, R) times `right` (R, F); returns its id."""
        shard = self._new_id()
        self._put(shard, LowRankShard(left, right, self._number(), self.host))
        return shard

    def add_value(self, value: Tensor) -> int:
        """Add a shard that is one output (D,); returns its id."""
        shard = self._new_id()
        self._put(shard, ValueShard(value))
        return shard

    def put_value(self, shard: int, value: Tensor) -> None:
        """Replace a shard by one that is one output (D,), under its id."""
        self[shard]  # an unknown id is refused
        self._put(shard, ValueShard(value))

    def _new_id(self) -> int:
        """The next id that is this bank's to give."""
        place, banks = self.turn
        shard = self.next_id + (place - self.next_id) % banks
        self.next_id = shard + 1
        return shard

    def own(self, shard: int) -> bool:
        """Whether a shard is written by this bank, of those that stand side by side."""
        return shard % self.turn[1] == self.turn[0]

    def put(self, shard: int, left: Tensor, right: Tensor) -> None:
        """Replace a shard by another low-rank one, under its id."""
        self[shard]  # an unknown id is refused
        self._put(shard, LowRankShard(left, right, self._number(), self.host))

    def drop(self, shards: Iterable[int]) -> None:
        """Take shards out for good."""
        for shard in list(shards):
            del self.shards[str(shard)]

    def prune(self, shard: int) -> None:
        """Forget what a shard holds: a dense one's delta becomes zero and its mask is drawn anew, another leaves."""
        if not isinstance(self[shard], Shard):
            self.drop([shard])
            return
        generation = self[shard].generation + 1
        self._put(shard, Shard(self.shape, self._mask(shard, generation), generation))

    def fuse(self, shards: Sequence[int], delta: Tensor) -> int:
        """Replace several shards by one new shard that holds `delta` (D, F); returns its id."""
        gone = {shard: self[shard] for shard in shards}  # an unknown id is refused before anything changes
        fused = self.next_id
        self.next_id += 1
        for shard in gone:
            del self.shards[str(shard)]
        self._put(fused, Shard(self.shape, None if self.mask_ratio == 1 else delta.ne(0)))
        self[fused].delta.data.copy_(delta)
        return fused

    def snapshot(self, writable: bool = False) -> tuple[dict[str, nn.Module], int]:
        """The shards as they are, to go back to with :meth:`restore`.

        Fusing and pruning replace shards and never change one. Writing changes dense shards: where it may happen before
        the way back (`writable`), these are copied.
        """
        shards = {
            name: copy.deepcopy(shard) if writable and isinstance(shard, Shard) else shard
            for name, shard in self.shards.items()
        }
        return shards, self.next_id

    def restore(self, snapshot: tuple[dict[str, nn.Module], int]) -> None:
        """Go back to a :meth:`snapshot`, or take over what a new bank holds."""
        shards, self.next_id = snapshot
        self.shards = nn.ModuleDict(shards)
        self.next_number = max(self.next_number, 1 + max((s.number for s in self._low_rank().values()), default=-1))

    def stacked(self, shards: Iterable[int] | None = None) -> Tensor:
        """The deltas (K, D, F) of the given shards, by default of all."""
        chosen = [self[shard].delta for shard in (self.ids if shards is None else shards)]
        return torch.stack(chosen) if chosen else torch.zeros(0, *self.shape, device=self.device)

    def select(self, choice: Tensor) -> Selection:
        """What a choice (B,) of shard ids or `BASE` does to the value matrix's output."""
        choice = choice.cpu()
        wanted = [shard for shard in choice.unique().tolist() if shard != BASE]
        values = [shard for shard in wanted if isinstance(self[shard], ValueShard)]
        if values:
            rest = torch.where(torch.isin(choice, torch.tensor(values)), BASE, choice)
            return Selection(len(choice), self._added(rest), self._replaced(choice, values))
        return Selection(len(choice), self._added(choice))

    def _replaced(self, choice: Tensor, shards: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The values (n, D) of the rows (n,) that some shards replace."""
        rows = [i for i, shard in enumerate(choice.tolist()) if shard in shards]
        found = torch.stack([self[shard].value for shard in choice[rows].tolist()])  # type: ignore[union-attr, misc]
        return found.to(self.device), torch.tensor(rows, device=self.device)

    def _added(self, choice: Tensor) -> list[tuple[Adds, Tensor | None]]:
        """What the shards of a choice (B,) add, and to which rows."""
        wanted = [shard for shard in choice.unique().tolist() if shard != BASE]
        if len(wanted) == 1 and bool((choice == wanted[0]).all()):
            return [(self[wanted[0]], None)]
        dense = [shard for shard in wanted if isinstance(self[shard], Shard)]
        parts: list[tuple[Adds, Tensor | None]] = [
            (self[shard], (choice == shard).nonzero()[:, 0].to(self.device)) for shard in dense
        ]
        rows = [i for i, shard in enumerate(choice.tolist()) if shard != BASE and shard not in dense]
        if rows:
            shards = [self[shard] for shard in choice[rows].tolist()]
            factors = Factors.of(shards, self.device)  # type: ignore[arg-type]
            parts.append((factors, torch.tensor(rows, device=self.device)))
        return parts

    def _number(self) -> int:
        """A number for a low-rank shard; none is given twice, whatever is restored."""
        self.next_number += 1
        return self.next_number - 1

    def _mask(self, shard: int, generation: int) -> Tensor | None:
        if self.mask_ratio == 1:
            return None
        generator = torch.Generator().manual_seed(
            ((self.seed * 1_000_003 + shard) * 1_000_003 + generation) % (1 << 63)
        )
        return bernoulli_mask(self.shape, self.mask_ratio, generator)

    def _put(self, shard: int, module: AnyShard) -> None:
        self.shards[str(shard)] = module.to(self.device)

    def get_extra_state(self) -> dict:
        """What tensors cannot say: the ids and generations, so that a loaded bank has the same shards."""
        dense = {key: shard.generation for key, shard in self.shards.items() if isinstance(shard, Shard)}
        return {"next_id": self.next_id, "next_number": self.next_number, "generations": dense}

    def set_extra_state(self, state: dict) -> None:
        """Accepts what :meth:`get_extra_state` gave; the shards themselves were made by `_load_from_state_dict`."""
        self.next_id = state["next_id"]
        self.next_number = max(self.next_number, state.get("next_number", 0))
        for key, generation in state["generations"].items():
            if isinstance(self.shards[key], Shard):
                self.shards[key].generation = generation  # type: ignore[assignment]

    def low_rank_tensors(self, shards: Iterable[int] | None = None) -> dict[str, Tensor]:
        """Low-rank shards, by default all, as tensors: `ids`, `ranks` and numbers (N,), `left` (sum R, D) and `right`
        (sum R, F); nothing where there are none."""
        found = self._low_rank()
        found = found if shards is None else {shard: found[shard] for shard in shards}
        return _stacked([*found], [*found.values()]) if found else {}

    def _low_rank(self) -> dict[int, LowRankShard]:
        return {int(key): shard for key, shard in self.shards.items() if isinstance(shard, LowRankShard)}

    def rows(self) -> Rows:
        """The low-rank shards as rows."""
        found = sorted(self._low_rank().items(), key=lambda pair: pair[1].number)
        ids, shards = [id for id, _ in found], [shard for _, shard in found]

        def take(start: int, stop: int) -> dict[str, Tensor]:
            return _stacked(ids[start:stop], shards[start:stop])

        return Rows(torch.tensor([shard.number for shard in shards], dtype=torch.long), take)

    @staticmethod
    def state_of_rows(parts: Sequence[Part]) -> dict[str, Tensor]:
        """What stored :meth:`rows` add to a `state_dict` that lacks them."""
        found = {name: joined(parts, name) for name in ("ids", "ranks", NUMBERS)}
        for name in ("left", "right"):
            whole = [part.kept.repeat_interleave(part.tensors["ranks"]) for part in parts]
            found[name] = torch.cat([part.tensors[name][kept] for part, kept in zip(parts, whole, strict=True)])
        return {f"{_LOW_RANK}{name}": tensor for name, tensor in found.items()}

    def load_low_rank(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`low_rank_tensors` gave, beside the shards that are here; without numbers they get new
        ones."""
        ids, ranks = tensors["ids"].tolist(), tensors["ranks"].tolist()
        numbers = tensors[NUMBERS].tolist() if NUMBERS in tensors else [self._number() for _ in ids]
        factors = zip(tensors["left"].split(ranks), tensors["right"].split(ranks), strict=True)
        for id, number, (left, right) in zip(ids, numbers, factors, strict=True):
            self._put(id, LowRankShard(left.T.clone(), right.clone(), number, self.host))
        self._sort()

    def put_dense(self, shard: int, generation: int, delta: Tensor) -> None:
        """Take in what another bank has written into a dense shard, a new one or one that is here."""
        if str(shard) not in self.shards:
            self._put(shard, Shard(self.shape, self._mask(shard, generation), generation))
            self._sort()
        self[shard].delta.data.copy_(delta)

    def _sort(self) -> None:
        self.shards = nn.ModuleDict({key: self.shards[key] for key in sorted(self.shards, key=int)})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        low_rank = {} if self.rows_apart else self.low_rank_tensors()
        destination.update({f"{prefix}{_LOW_RANK}{key}": value for key, value in low_rank.items()})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Make the shards that are stored; the dense ones load themselves."""
        start = f"{prefix}shards."
        names = {key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)}
        values = {name: state_dict.get(f"{start}{name}.value") for name in names}
        made = {name: Shard(self.shape) if value is None else ValueShard(value) for name, value in values.items()}
        self.shards = nn.ModuleDict({name: made[name].to(self.device) for name in sorted(names, key=int)})
        start = f"{prefix}{_LOW_RANK}"
        low_rank = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        if low_rank:
            self.load_low_rank(low_rank)
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected: list[str] = args[3]
        unexpected[:] = [key for key in unexpected if not key.startswith(start)]


def _stacked(ids: Sequence[int], shards: Sequence[LowRankShard]) -> dict[str, Tensor]:
    """Low-rank shards in four tensors, see :meth:`SideMemory.low_rank_tensors`."""
    return {
        "ids": torch.tensor(ids),
        "ranks": torch.tensor([len(shard.right) for shard in shards]),
        "left": torch.cat([shard.left.T for shard in shards]),
        "right": torch.cat([shard.right for shard in shards]),
    }
