"""The edited model as an editor holds it: the frozen base, the memory and router around it, and what was learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor

from repair_lightning.editors.adapt import AUTO
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.memory.bank import BankState
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.architectures import architecture_of, resolve_layer, value_shape
from repair_lightning.models.base import A_BASE, Base, load_base
from repair_lightning.models.forms import Template
from repair_lightning.models.kept_answers import KeptAnswers
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.models.weights import Place
from repair_lightning.training.team import ALONE, SharedModel, Team


@dataclass(frozen=True)
class Snapshot:
    """What an editor has learnt at one moment.

    `weights` are what was written into the base, see `BaseWeights.state`; `own` is what the method remembers besides,
    see `Editor.remember`.
    """

    shards: BankState
    router: Any
    weights: dict[Place, Tensor]
    own: Any


class HeldModel(pl.LightningModule):
    """A frozen base, a bank of shards and a router, under Lightning's checkpoints.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: the edited layer, or None for the default of `resolve_layer`, or `auto` where the method can find it.
        precision: of the base: `auto`, `float32`, `bfloat16` or `float16`. Shards are float32.
        cache_mib: memory for the prefix cache, in MiB; 0 goes without and runs the whole base again and again.
        template: how the base is asked a text: `chat` through its chat template, `none` bare, `auto` through the
            template where it has one.
    """

    batchable: ClassVar[bool] = True
    """Whether several edits can be written in one step."""
    can_merge: ClassVar[bool] = False
    """Whether the memory can be fused."""
    can_prune: ClassVar[bool] = False
    """Whether a part of the memory can be forgotten and written anew."""
    can_undo: ClassVar[bool] = False
    """Whether single edits can be taken back."""
    can_adapt: ClassVar[bool] = False
    """Whether options may be `auto`, to be found by probe edits."""
    can_share: ClassVar[bool] = False
    """Whether ranks may write different batches of a window side by side; else each of them writes all."""
    writes_base: ClassVar[bool] = False
    """Whether edits may live in the base's own weights, so that `BASE` owns them."""

    learnt_beforehand: ClassVar[bool] = False
    """Whether :meth:`own_state` is what was learnt before the first edit, and holds nothing of any edit."""

    strict_loading = False  # the base stays out of checkpoints

    def __init__(
        self,
        base: str = "",
        layer: int | str | None = None,
        precision: str = "auto",
        cache_mib: int = 2048,
        template: Template = "auto",
    ) -> None:
        super().__init__()
        lacks = [n for n in dir(type(self)) if getattr(getattr(type(self), n, None), "__isabstractmethod__", False)]
        if lacks:
            raise ConfigError(f"{type(self).__name__} must have {' and '.join(lacks)}; see docs/adding-an-editor.md")
        if cache_mib < 0:
            raise ConfigError(f"cache_mib must be at least 0, got {cache_mib}")
        if isinstance(layer, str) and not (self.can_adapt and layer == AUTO):
            words = "a whole number, null for the default, or 'auto'" if self.can_adapt else "a whole number or null"
            raise ConfigError(f"layer must be {words}, got '{layer}'; negative numbers count from the last layer")
        self.automatic_optimization = False
        self.base_option, self.layer_option, self.precision_option = base, layer, precision
        self.template, self.cache_mib = template, cache_mib
        self.ledger = Ledger()
        self.base: Base | None = None
        self.changed_weights: dict[Place, Tensor] = {}
        """What writing or a merge has left in the base, by place, until :meth:`change_base` puts it there."""
        self.team = ALONE
        self.scratch: Path | None = None
        """A folder for what the prefix cache cannot hold in memory; None computes it anew."""

    def load(self) -> None:
        """Load the base and build the memory around it; does nothing the second time."""
        if self.base is not None:
            return
        if not self.base_option:
            raise ConfigError(f"no base: give --model.base {A_BASE}")
        base = load_base(self.base_option, self.precision_option)
        asked = None if isinstance(self.layer_option, str) else self.layer_option
        self.build(base, resolve_layer(base.model, asked))

    def build(self, base: Base, layer: int) -> None:
        """Build an empty memory around a layer of a base; who holds `edited` from an earlier layer goes on with it."""
        self.layer = layer
        value = architecture_of(base.model).value_module(base.model, layer)
        memory = self.build_memory(value_shape(value)).to(base.model.device)
        if self.base is None:
            forms = base.forms(self.template)
            self.edited = SharedModel(base.model, base.tokenizer, memory, self.build_router(), layer, forms)
            self.edited.edit_of = lambda id: self.ledger.edit(id) if id in self.ledger else None
            self._encode = lru_cache(1 << 16)(forms.encode)
        else:
            self.edited.move_to(layer, memory)
        self.base = base
        scratch = self.scratch if self.cache_mib else None
        heads = self.edited.forms.heads if self.edited.forms.marks is not None else ()
        self.edited.prefixes = PrefixCache(self.edited.split, self.cache_mib << 20, scratch, heads=heads)
        self.join(self.team)

    def join(self, team: Team) -> None:
        """Work among the ranks of a team: all of them must do the same from here on."""
        self.team = team
        if self.base is not None:
            self.edited.team = team
            # Ranks that run the base together must all run it, or none; so they look nothing up.
            known = team.deals and self.base.as_stored
            self.edited.kept = KeptAnswers.of(self.base.model, self.base.sha256) if known else None
            self.memory.turn = (team.rank, team.size) if self.shares else (0, 1)

    @property
    def shares(self) -> bool:
        """Whether the ranks write different batches of a window side by side."""
        return self.can_share and self.team.parts > 1

    def build_memory(self, shape: tuple[int, int]) -> SideMemory:
        """The (empty) bank of shards for a value matrix of (D, F); it stays empty where a method has no side memory."""
        return SideMemory(shape)

    def build_router(self) -> Router:
        """The router over the bank; by default the base answers every prompt."""
        return make_router("nobody")

    @property
    def memory(self) -> SideMemory:
        """The bank of shards."""
        return self.edited.memory

    @property
    def router(self) -> Router:
        """The router over the bank."""
        return self.edited.router

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.edited.tokenizer

    @property
    def identity(self) -> str:
        """Names what computes the states at the edited layer."""
        assert self.base is not None
        return f"{self.base.sha256[:16]}-{self.layer}-{str(self.base.model.dtype).removeprefix('torch.')}"

    def change_base(self) -> None:
        """Put each W_v that earlier writing or a merge has left into the base, where there is any."""
        if self.changed_weights:
            self.edited.weights.load(self.changed_weights)
            self.changed_weights = {}

    @property
    def base_changed(self) -> bool:
        """Whether the base has a W_v that is not its own."""
        return bool(self.edited.weights)

    def snapshot(self) -> Snapshot:
        """What was learnt and written so far, to go back to with :meth:`rollback`."""
        shards = self.memory.snapshot(writable=True)
        return Snapshot(shards, self.router.remember(), self.edited.weights.state(), self.remember())

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to a :meth:`snapshot`, bit by bit; a snapshot serves once."""
        self.memory.restore(snapshot.shards)
        self.router.recall(snapshot.router)
        self.edited.weights.load(snapshot.weights)
        self.recall(snapshot.own)

    def remember(self) -> Any:
        """What :meth:`recall` goes back to, within this process; who remembers much gives references."""
        return self.own_state()

    def recall(self, kept: Any) -> None:
        """Go back to what :meth:`remember` gave."""
        self.load_own_state(kept)

    def own_state(self) -> dict[str, Any]:
        """What the method remembers besides memory, router and weights: tensors and plain types by name.

        It travels with checkpoints and packs. Its tensors are never changed in place.
        """
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`; called before or after :meth:`prepare`."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the base's weights."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("edited.base.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The router's thresholds and keys travel with the shards, and each W_v that was written into."""
        checkpoint["router"] = self.router.common_state()
        checkpoint["rows"] = {"shards": self.memory.rows(), "router": self.router.rows()}
        checkpoint["value_weights"] = {layer: value.cpu() for layer, value in self.edited.weights.state().items()}
        checkpoint["own"] = self.own_state()
        checkpoint["base"] = {"name": self.base.name, "sha256": self.base.sha256} if self.base else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`on_save_checkpoint`; a checkpoint of another base is refused."""
        self.load()
        assert self.base is not None
        known = checkpoint.get("base", {}).get("sha256")
        if known and known != self.base.sha256:
            raise ConfigError(
                f"the checkpoint belongs to base {known[:12]}, but '{self.base.name}' is {self.base.sha256[:12]}; "
                "give --model.base the base that it was made with"
            )
        rows = checkpoint["rows"]
        self.memory.offered = rows.get("shards", {})
        self.router.load_state_dict(checkpoint["router"] | self.router.from_rows(rows.get("router", {})))
        self.changed_weights = checkpoint["value_weights"]
        self.load_own_state(checkpoint["own"])
