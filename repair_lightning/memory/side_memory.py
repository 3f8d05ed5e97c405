"""The bank of shards: trainable deltas of one FFN value matrix and the router that picks among them.

REPAIR (arXiv 2510.01879), Sec. 2.2. A shard is stored as `delta = W'_i - W_v` in float32, in the layout (D, F)
whatever the base's own storage order, and is applied to the value matrix's output: `y + A(x) delta^T`. Rows that no
shard answers are not touched, so their bits stay the base's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from repair_lightning.errors import RepairError
from repair_lightning.functional import bernoulli_mask
from repair_lightning.types import BASE


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


class SideMemory(nn.Module):
    """The shards by id. Ids are never used twice; a pruned shard keeps its id and starts a new generation.

    Args:
        shape: (D, F) of the value matrix.
        mask_ratio: share of the coordinates that a shard may train (rho); 1 opens all.
        seed: with the shard's id and generation it determines the mask.
    """

    _place: Tensor

    def __init__(self, shape: tuple[int, int], mask_ratio: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in (0, 1], got {mask_ratio}")
        self.shape = shape
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.next_id = 0
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

    def __getitem__(self, shard: int) -> Shard:
        if str(shard) not in self.shards:
            raise RepairError(f"there is no shard {shard}; known: {self.ids}")
        return self.shards[str(shard)]  # type: ignore[return-value]

    def open_shard(self) -> int:
        """Add an empty shard with a fresh mask; returns its id."""
        shard = self.next_id
        self.next_id += 1
        self._put(shard, Shard(self.shape, self._mask(shard, 0)))
        return shard

    def prune(self, shard: int) -> None:
        """Forget what a shard holds: its delta becomes zero and its mask is drawn anew."""
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

    def snapshot(self) -> tuple[dict[str, nn.Module], int]:
        """The shards as they are, to go back to with :meth:`restore`; fusing and pruning replace, they never change."""
        return dict(self.shards.items()), self.next_id

    def restore(self, snapshot: tuple[dict[str, nn.Module], int]) -> None:
        """Go back to a :meth:`snapshot`."""
        shards, self.next_id = snapshot
        self.shards = nn.ModuleDict(shards)

    def stacked(self, shards: Iterable[int] | None = None) -> Tensor:
        """The deltas (K, D, F) of the given shards, by default of all."""
        chosen: list[Tensor] = [self[shard].delta for shard in (self.ids if shards is None else shards)]
        return torch.stack(chosen) if chosen else torch.zeros(0, *self.shape, device=self.device)

    def apply_rows(self, output: Tensor, activations: Tensor, choice: Tensor) -> Tensor:
        """Add each row's shard to the value matrix's output; rows routed to the base keep their bits.

        Args:
            output: (B, T, D), the base's own output.
            activations: (B, T, F), the value matrix's input.
            choice: (B,) shard ids or `BASE`, on the CPU or the model's device.
        """
        wanted = [shard for shard in choice.unique().tolist() if shard != BASE]
        if not wanted:
            return output
        if len(wanted) == 1 and bool((choice == wanted[0]).all()):
            return output + self._product(activations, wanted[0], output.dtype)
        output = output.clone()
        for shard in wanted:
            rows = (choice == shard).nonzero().squeeze(-1).to(output.device)
            output[rows] = output[rows] + self._product(activations[rows], shard, output.dtype)
        return output

    def _product(self, activations: Tensor, shard: int, dtype: torch.dtype) -> Tensor:
        return nn.functional.linear(activations.float(), self[shard].delta).to(dtype)

    def _mask(self, shard: int, generation: int) -> Tensor | None:
        if self.mask_ratio == 1:
            return None
        generator = torch.Generator().manual_seed(
            ((self.seed * 1_000_003 + shard) * 1_000_003 + generation) % (1 << 63)
        )
        return bernoulli_mask(self.shape, self.mask_ratio, generator)

    def _put(self, shard: int, module: Shard) -> None:
        self.shards[str(shard)] = module.to(self.device)

    def get_extra_state(self) -> dict:
        """What tensors cannot say: the ids and generations, so that a loaded bank has the same shards."""
        generations = {key: shard.generation for key, shard in self.shards.items()}  # type: ignore[union-attr]
        return {"next_id": self.next_id, "generations": generations}

    def set_extra_state(self, state: dict) -> None:
        """Accepts what :meth:`get_extra_state` gave; the shards themselves were made by `_load_from_state_dict`."""
        self.next_id = state["next_id"]
        for key, generation in state["generations"].items():
            self.shards[key].generation = generation

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        keys = [key for key in state_dict if key.startswith(f"{prefix}shards.") and key.endswith(".delta")]
        names = sorted((key[len(prefix) + 7 : -6] for key in keys), key=int)
        self.shards = nn.ModuleDict()
        for name in names:
            mask = state_dict[f"{prefix}shards.{name}.mask"]
            self.shards[name] = Shard(self.shape, mask if mask.numel() else None)
        super()._load_from_state_dict(state_dict, prefix, *args)
