"""WISE: edits live in masked copies of a value matrix, one after the other; an activation score says who answers.

Paper: "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", arXiv 2405.14768.
REPAIR descends from it, so its parts are REPAIR's: dense shards with Bernoulli masks of ratio rho (Sec. 2.3.2), trained
one edit at a time with the routing loss (Eq. 6), found by activation (Eq. 5). This file has what is WISE's own: side
memories are filled one after the other, `writing.capacity` edits each; `retrieve` keeps all of them; `merge` fuses them
by TIES whenever a window is over and `subspaces` of them are full. What was fused is one memory; later edits begin
others, which are fused with it in their turn.

Defaults: `hparams/WISE/llama-7b.yaml` of github.com/zjunlp/EasyEdit, and `WISE.py` there for `OLD_WEIGHT`. Deviations:
margins are relative to the base (theirs, 5, 20 and 10, are in one base's activations); the end of sequence is trained
too; where signs conflict `ties_merge` keeps the strongest value whole; a merge comes at a window's end; there is no
bound on the norm of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from repair_lightning.editors.adapt import AUTO
from repair_lightning.editors.base import register
from repair_lightning.editors.checks import at_least
from repair_lightning.editors.repair import Distillation, Repair, Routing, Writing
from repair_lightning.errors import ConfigError
from repair_lightning.functional import ties_merge, trim
from repair_lightning.types import Edit, EditBatch

Mode = Literal["retrieve", "merge"]  # what becomes of side memories that are full
ROUTING = Routing(router="activation", pool="mean", act_ratio=0.88, weight=1.0, margins=(0.25, 1.0, 0.5), sample=64)
"""How memories are found, by default."""
WRITING = Writing(optimizer="sgd", relative=False, steps=70, stop_margin=None, mask_ratio=0.2, capacity=500, replay=0)
"""How they are written, by default."""
OLD_WEIGHT = 0.6  # what a merged memory weighs in the next merge; the new ones share the rest


@register("wise")
class WISE(Repair):
    """Side memories that are retrieved or merged.

    Args:
        routing: how prompts find their memory.
        writing: how a batch is written.
        distillation: REPAIR's, off.
        seed: of masks and samples; `seed_everything` where a command gives none.
        mode: `retrieve` or `merge`.
        subspaces: merge: how many full memories are fused, at least 2.
        density: merge: share of a memory's coordinates that is kept before, in (0, 1].
    """

    can_adapt = False
    can_share = False

    def __init__(
        self,
        routing: Routing = ROUTING,
        writing: Writing = WRITING,
        distillation: Distillation = Distillation(),  # noqa: B008 - jsonargparse reads the defaults here
        seed: int = 0,
        mode: Mode = "retrieve",
        subspaces: int = 2,
        density: float = 0.53,
        **common: Any,
    ) -> None:
        self.mode, self.subspaces, self.density = mode, subspaces, density
        super().__init__(routing=routing, writing=writing, distillation=distillation, seed=seed, **common)
        self.merged: list[int] = []
        """The memories that came of a merge: what is fused is not written into."""

    def _check(self) -> None:
        super()._check()
        for name in ("lr", "stop_margin"):
            if getattr(self.writing, name) == AUTO:
                raise ConfigError(f"writing.{name} must be a number, got '{AUTO}': repair can find it, wise cannot")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got '{self.mode}'")
        at_least(2, self, "subspaces")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density must be in (0, 1], got {self.density}")

    def assign(self, batch: EditBatch) -> int:
        """The memory that is being filled; another one is opened when it has no room."""
        for shard in [shard for shard in self.memory.ids if shard not in self.merged][-1:]:
            if self.ledger.sizes().get(shard, 0) + len(batch.edits) <= self.writing.capacity:
                return shard
        shard = self.memory.open_shard()
        self._initialise(shard)
        return shard

    def finish_window(self) -> None:
        """Merge the full memories, if that is asked and they are enough; then set the thresholds again.

        Full are all but the last, and that one if it takes no more edits.
        """
        load = self.ledger.sizes()
        filled = [shard for shard in self.memory.ids if shard not in self.merged and load.get(shard, 0)]
        full = [s for s in filled if s != filled[-1] or load[s] >= self.writing.capacity]
        if self.mode == "merge" and len(full) >= self.subspaces:
            self.merge([*(shard for shard in self.merged if shard in self.memory.ids), *full])
        super().finish_window()

    def written_together(self, edits: Sequence[Edit]) -> int:
        """One: a memory that is rebuilt after an undo is filled as it was, edit by edit in their order."""
        return 1

    def merge(self, shards: Sequence[int]) -> int:
        """Fuse side memories by TIES into one, which owns their edits; returns its id."""
        edits = [id for shard in shards for id in self.ledger.owned_by(shard)]
        old = sum(shard in self.merged for shard in shards)
        new = (1 - OLD_WEIGHT if old else 1.0) / max(len(shards) - old, 1)
        weights = torch.tensor([OLD_WEIGHT / old if shard in self.merged else new for shard in shards])
        trimmed = torch.stack([trim(delta, self.density) for delta in self.memory.stacked(shards).detach()])
        one = self.fuse(shards, ties_merge(trimmed, weights))
        self.ledger.reassign(edits, one)
        self.merged = [*(shard for shard in self.merged if shard not in shards), one]
        return one

    def remember(self) -> dict[str, Any]:
        """Besides, who owns which edits: a merge moves them."""
        return self.own_state() | {"owners": {shard: self.ledger.owned_by(shard) for shard in self.memory.ids}}

    def recall(self, kept: Any) -> None:
        """Besides, give the edits that a merge has moved back to the memories that are there again."""
        self.load_own_state(kept)
        for shard, ids in kept["owners"].items():
            moved = [id for id in ids if self.ledger.owner_of(id) not in (None, shard)]
            if moved:
                self.ledger.reassign(moved, shard, "unmerged")

    def prune(self, shard: int) -> None:
        """Empty a memory: it has a fresh mask, and may be filled again."""
        super().prune(shard)
        self.merged = [merged for merged in self.merged if merged != shard]

    def own_state(self) -> dict[str, Any]:
        """Which memories came of a merge."""
        return {"merged": list(self.merged)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        self.merged = list(state["merged"])
