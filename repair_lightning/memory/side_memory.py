"""The bank of shards: which there are, and what a choice of them does to the value matrix's output."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.errors import RepairError
from repair_lightning.functional import bernoulli_mask
from repair_lightning.memory.shards import Adds, AnyShard, Factors, LowRankShard, Selection, Shard, ValueShard
from repair_lightning.types import BASE


class SideMemory(nn.Module):
    """The shards by id. Ids are never used twice; a pruned shard keeps its id and starts a new generation.

    Args:
        shape: (D, F) of the value matrix.
        mask_ratio: share of the coordinates that a shard may train (rho); 1 opens all.
        seed: with the shard's id and generation it determines the mask.
        host: keep low-rank shards in the CPU's memory, wherever the rest of the bank is.
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
        self.offered: Mapping[int, Mapping[str, Tensor]] = {}
        """The :meth:`rows` that belong to the state that is loaded next."""
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
        apart = {shard: low.number for shard, low in self._low_rank().items()}
        return {"next_id": self.next_id, "next_number": self.next_number, "generations": dense, "low_rank": apart}

    def set_extra_state(self, state: dict) -> None:
        """Accepts what :meth:`get_extra_state` gave, and makes the low-rank shards from the `offered` rows; others were
        made by `_load_from_state_dict`."""
        self.next_id = state["next_id"]
        self.next_number = max(self.next_number, state["next_number"])
        for key, generation in state["generations"].items():
            if isinstance(self.shards[key], Shard):
                self.shards[key].generation = generation  # type: ignore[assignment]
        lacking = set(state["low_rank"].values()) - self.offered.keys()
        if lacking:
            raise RepairError(f"this state lacks {len(lacking)} low-rank shards; set `offered` to the `rows` beside it")
        for shard, number in state["low_rank"].items():
            self._put(shard, LowRankShard(**self.offered[number], number=number, host=self.host))
        self.offered = {}
        self._sort()

    def low_rank_tensors(self, shards: Iterable[int] | None = None) -> dict[str, Tensor]:
        """Low-rank shards, by default all, as tensors: `ids`, `ranks` and numbers (N,), `left` (sum R, D) and `right`
        (sum R, F); nothing where there are none."""
        found = self._low_rank()
        found = found if shards is None else {shard: found[shard] for shard in shards}
        return _stacked([*found], [*found.values()]) if found else {}

    def _low_rank(self) -> dict[int, LowRankShard]:
        return {int(key): shard for key, shard in self.shards.items() if isinstance(shard, LowRankShard)}

    def rows(self) -> dict[int, dict[str, Tensor]]:
        """The low-rank shards, which a `state_dict` leaves out, by number."""
        return {shard.number: shard.row for shard in self._low_rank().values()}

    def load_low_rank(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`low_rank_tensors` gave, beside the shards that are here."""
        ids, ranks = tensors["ids"].tolist(), tensors["ranks"].tolist()
        factors = zip(tensors["left"].split(ranks), tensors["right"].split(ranks), strict=True)
        for id, (left, right) in zip(ids, factors, strict=True):
            self._put(id, LowRankShard(left.T.clone(), right.clone(), self._number(), self.host))
        self._sort()

    def put_dense(self, shard: int, generation: int, delta: Tensor) -> None:
        """Take in what another bank has written into a dense shard, a new one or one that is here."""
        if str(shard) not in self.shards:
            self._put(shard, Shard(self.shape, self._mask(shard, generation), generation))
            self._sort()
        self[shard].delta.data.copy_(delta)

    def _sort(self) -> None:
        self.shards = nn.ModuleDict({key: self.shards[key] for key in sorted(self.shards, key=int)})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Make the shards that are stored; the dense ones load themselves."""
        start = f"{prefix}shards."
        names = {key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)}
        values = {name: state_dict.get(f"{start}{name}.value") for name in names}
        made = {name: Shard(self.shape) if value is None else ValueShard(value) for name, value in values.items()}
        self.shards = nn.ModuleDict({name: made[name].to(self.device) for name in sorted(names, key=int)})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _stacked(ids: Sequence[int], shards: Sequence[LowRankShard]) -> dict[str, Tensor]:
    """Low-rank shards in four tensors, see :meth:`SideMemory.low_rank_tensors`."""
    return {
        "ids": torch.tensor(ids),
        "ranks": torch.tensor([len(shard.right) for shard in shards]),
        "left": torch.cat([shard.left.T for shard in shards]),
        "right": torch.cat([shard.right for shard in shards]),
    }
