"""The bank that holds the shards by id, and how they are stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.errors import RepairError
from repair_lightning.memory.rows import Rows
from repair_lightning.memory.shards import AnyShard, LowRankShard, Shard, ValueShard

BankState = tuple[dict[str, nn.Module], dict[int, LowRankShard], int]
"""Shards that are modules by id in digits, low-rank shards by id, and the next id."""


class ShardBank(nn.Module):
    """Shards by id, oldest first.

    Args:
        shape: (D, F) of the value matrix.
        host: keep low-rank shards in the CPU's memory, wherever the rest of the bank is.
        int8: keep new low-rank shards in a byte per entry, see `LowRankShard`.
    """

    _place: Tensor

    def __init__(self, shape: tuple[int, int], host: bool = False, int8: bool = False) -> None:
        super().__init__()
        self.shape, self.host, self.int8 = shape, host, int8
        self.next_id = self.next_number = 0
        self.offered: Mapping[int, Mapping[str, Tensor]] = {}
        """The :meth:`rows` that belong to the state that is loaded next."""
        self.shards = nn.ModuleDict()  # but for low-rank ones, which are no modules
        self._low: dict[int, LowRankShard] = {}
        self.register_buffer("_place", torch.zeros(0), persistent=False)  # follows the bank to its device

    @property
    def device(self) -> torch.device:
        """Where the shards are."""
        return self._place.device

    @property
    def ids(self) -> list[int]:
        """The ids of the shards, oldest first."""
        return sorted([*map(int, self.shards), *self._low]) if len(self.shards) else list(self._low)

    @property
    def nbytes(self) -> int:
        """What the shards take."""
        dense = sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))
        return dense + sum(shard.nbytes for shard in self._low.values())

    def __len__(self) -> int:
        return len(self.shards) + len(self._low)

    def __contains__(self, shard: int) -> bool:
        return shard in self._low or str(shard) in self.shards

    def __getitem__(self, shard: int) -> AnyShard:
        if shard in self._low:
            return self._low[shard]
        if str(shard) not in self.shards:
            raise RepairError(f"there is no shard {shard}; known: {self.ids}")
        return self.shards[str(shard)]  # type: ignore[return-value]

    def snapshot(self, writable: bool = False) -> BankState:
        """The shards as they are, to go back to with :meth:`restore`.

        Fusing and pruning replace shards and never change one. Writing changes dense shards: where it may happen before
        the way back (`writable`), these are copied.
        """
        shards = {
            name: copy.deepcopy(shard) if writable and isinstance(shard, Shard) else shard
            for name, shard in self.shards.items()
        }
        return shards, dict(self._low), self.next_id

    def restore(self, snapshot: BankState) -> None:
        """Go back to a :meth:`snapshot`, or take over what a new bank holds."""
        shards, low, self.next_id = snapshot
        self.shards, self._low = nn.ModuleDict(shards), dict(low)
        self.next_number = max(self.next_number, 1 + max((s.number for s in self._low.values()), default=-1))

    def _low_rank_shard(self, left: Tensor, right: Tensor) -> LowRankShard:
        """A shard with a number that is never given twice, whatever is restored."""
        self.next_number += 1
        make = LowRankShard.in_int8 if self.int8 else LowRankShard
        return make(left, right, self.next_number - 1)

    def _put(self, shard: int, found: AnyShard) -> int:
        if isinstance(found, LowRankShard):
            place = torch.device("cpu") if self.host else self.device
            self._low[shard] = found.moved(lambda tensor: tensor.to(place))
        else:
            self.shards[str(shard)] = found.to(self.device)
        return shard

    def _remove(self, shard: int) -> None:
        if self._low.pop(shard, None) is None:
            del self.shards[str(shard)]

    def _sort(self) -> None:
        self.shards = nn.ModuleDict({key: self.shards[key] for key in sorted(self.shards, key=int)})
        self._low = dict(sorted(self._low.items()))

    def _apply(self, fn: Any, recurse: bool = True) -> ShardBank:
        """What moves modules to devices moves low-rank shards too, but those on the host."""
        if not self.host:
            self._low = {id: shard.moved(fn) for id, shard in self._low.items()}
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def rows(self) -> Rows[LowRankShard]:
        """The low-rank shards, which a `state_dict` leaves out, by number."""
        return Rows({shard.number: shard for shard in self._low.values()}, LowRankShard.state_dict)

    def low_rank_tensors(self, shards: Iterable[int] | None = None) -> dict[str, Tensor]:
        """Low-rank shards, by default all, as tensors: `ids` and `ranks` (N,), `left` (sum R, D), `right` (sum R, F)
        and, of those in int8, `scale` (sum R,); nothing where there are none. Beside shards in half precision, of an
        earlier version, those in int8 are given in half precision too, which holds them exactly."""
        ids = list(self._low if shards is None else shards)
        if not ids:
            return {}
        found = [self._low[shard] for shard in ids]
        parts = [shard.state_dict() | {"left": shard.left.T} for shard in found]
        if any(shard.scale is not None for shard in found):
            parts = [{"scale": torch.ones(len(part["right"]), device=part["right"].device)} | part for part in parts]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {"ids": torch.tensor(ids), "ranks": torch.tensor([len(shard.right) for shard in found])} | joined

    def load_low_rank(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`low_rank_tensors` gave, beside the shards that are here."""
        ids, ranks = tensors["ids"].tolist(), tensors["ranks"].tolist()
        parts = {name: part.split(ranks) for name, part in tensors.items() if name not in ("ids", "ranks")}
        for i, id in enumerate(ids):
            part = {name: found[i] for name, found in parts.items()}
            self.next_number += 1
            self._put(id, LowRankShard(**part | {"left": part["left"].T}, number=self.next_number - 1))
        self._sort()

    def get_extra_state(self) -> dict:
        """What tensors cannot say: the ids and generations, so that a loaded bank has the same shards."""
        dense = {key: shard.generation for key, shard in self.shards.items() if isinstance(shard, Shard)}
        apart = torch.tensor([[*self._low], [low.number for low in self._low.values()]])
        return {"next_id": self.next_id, "next_number": self.next_number, "generations": dense, "low_rank": apart}

    def set_extra_state(self, state: dict) -> None:
        """The inverse of :meth:`get_extra_state`; makes the low-rank shards from the `offered` rows."""
        self.next_id = state["next_id"]
        self.next_number = max(self.next_number, state["next_number"])
        for key, generation in state["generations"].items():
            self.shards[key].generation = generation  # type: ignore[assignment]
        ids, numbers = state["low_rank"].tolist()
        lacking = set(numbers) - self.offered.keys()
        if lacking:
            raise RepairError(f"this state lacks {len(lacking)} low-rank shards; set `offered` to the `rows` beside it")
        for shard, number in zip(ids, numbers, strict=True):
            self._put(shard, LowRankShard(**self.offered[number], number=number))
        self.offered = {}
        self._sort()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Make the shards that are stored; the dense ones load themselves."""
        start = f"{prefix}shards."
        names = {key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)}
        values = {name: state_dict.get(f"{start}{name}.value") for name in names}
        made = {name: Shard(self.shape) if value is None else ValueShard(value) for name, value in values.items()}
        self._low = {}
        self.shards = nn.ModuleDict({name: made[name].to(self.device) for name in sorted(names, key=int)})
        super()._load_from_state_dict(state_dict, prefix, *args)
