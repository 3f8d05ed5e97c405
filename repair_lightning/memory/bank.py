"""The bank that holds the shards by id, and how they are stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.errors import RepairError
from repair_lightning.memory.shards import AnyShard, LowRankShard, Shard, ValueShard


class ShardBank(nn.Module):
    """Shards by id, oldest first.

    Args:
        shape: (D, F) of the value matrix.
        host: keep low-rank shards in the CPU's memory, wherever the rest of the bank is.
    """

    _place: Tensor

    def __init__(self, shape: tuple[int, int], host: bool = False) -> None:
        super().__init__()
        self.shape, self.host = shape, host
        self.next_id = self.next_number = 0
        self.offered: Mapping[int, Mapping[str, Tensor]] = {}
        """The :meth:`rows` that belong to the state that is loaded next."""
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

    def _low_rank_shard(self, left: Tensor, right: Tensor) -> LowRankShard:
        """A shard with a number that is never given twice, whatever is restored."""
        self.next_number += 1
        return LowRankShard(left, right, self.next_number - 1, self.host)

    def _put(self, shard: int, module: AnyShard) -> int:
        self.shards[str(shard)] = module.to(self.device)
        return shard

    def _sort(self) -> None:
        self.shards = nn.ModuleDict({key: self.shards[key] for key in sorted(self.shards, key=int)})

    def _low_rank(self) -> dict[int, LowRankShard]:
        return {int(key): shard for key, shard in self.shards.items() if isinstance(shard, LowRankShard)}

    def rows(self) -> dict[int, dict[str, Tensor]]:
        """The low-rank shards, which a `state_dict` leaves out, by number."""
        return {shard.number: {"left": shard.left, "right": shard.right} for shard in self._low_rank().values()}

    def low_rank_tensors(self, shards: Iterable[int] | None = None) -> dict[str, Tensor]:
        """Low-rank shards, by default all, as tensors: `ids` and `ranks` (N,), `left` (sum R, D) and `right`
        (sum R, F); nothing where there are none."""
        found = self._low_rank()
        ids = list(found if shards is None else shards)
        if not ids:
            return {}
        return {
            "ids": torch.tensor(ids),
            "ranks": torch.tensor([len(found[shard].right) for shard in ids]),
            "left": torch.cat([found[shard].left.T for shard in ids]),
            "right": torch.cat([found[shard].right for shard in ids]),
        }

    def load_low_rank(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`low_rank_tensors` gave, beside the shards that are here."""
        ids, ranks = tensors["ids"].tolist(), tensors["ranks"].tolist()
        factors = zip(tensors["left"].split(ranks), tensors["right"].split(ranks), strict=True)
        for id, (left, right) in zip(ids, factors, strict=True):
            self._put(id, self._low_rank_shard(left.T.clone(), right.clone()))
        self._sort()

    def get_extra_state(self) -> dict:
        """What tensors cannot say: the ids and generations, so that a loaded bank has the same shards."""
        dense = {key: shard.generation for key, shard in self.shards.items() if isinstance(shard, Shard)}
        apart = {shard: low.number for shard, low in self._low_rank().items()}
        return {"next_id": self.next_id, "next_number": self.next_number, "generations": dense, "low_rank": apart}

    def set_extra_state(self, state: dict) -> None:
        """The inverse of :meth:`get_extra_state`; makes the low-rank shards from the `offered` rows."""
        self.next_id = state["next_id"]
        self.next_number = max(self.next_number, state["next_number"])
        for key, generation in state["generations"].items():
            self.shards[key].generation = generation  # type: ignore[assignment]
        lacking = set(state["low_rank"].values()) - self.offered.keys()
        if lacking:
            raise RepairError(f"this state lacks {len(lacking)} low-rank shards; set `offered` to the `rows` beside it")
        for shard, number in state["low_rank"].items():
            self._put(shard, LowRankShard(**self.offered[number], number=number, host=self.host))
        self.offered = {}
        self._sort()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Make the shards that are stored; the dense ones load themselves."""
        start = f"{prefix}shards."
        names = {key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)}
        values = {name: state_dict.get(f"{start}{name}.value") for name in names}
        made = {name: Shard(self.shape) if value is None else ValueShard(value) for name, value in values.items()}
        self.shards = nn.ModuleDict({name: made[name].to(self.device) for name in sorted(names, key=int)})
        super()._load_from_state_dict(state_dict, prefix, *args)
