"""What every editing method is: a LightningModule that owns a frozen base and writes batches of edits.

A new method is one file: subclass `Editor`, implement :meth:`Editor.write`, say what it can do in the class attributes,
and the stream, the ledger, the scoring, the pack and the report work with it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from repair_lightning.data.ledger import Ledger
from repair_lightning.data.tokenizing import Encoded, encode
from repair_lightning.editors.adapt import AUTO, Adapted
from repair_lightning.errors import ConfigError
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.architectures import architecture_of, resolve_layer, value_shape
from repair_lightning.models.base import Base, load_base
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.models.sampling import own_texts
from repair_lightning.types import BASE, Edit, EditBatch, EditReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What an editor has learnt at one moment.

    Attributes:
        shards: of the side memory.
        router: its state.
        weight: W_v (as the base stores it) where it is no longer the base's own.
    """

    shards: tuple[dict[str, torch.nn.Module], int]
    router: dict[str, Any]
    weight: Tensor | None


class Editor(pl.LightningModule):
    """A frozen base under correction. One epoch is one window of the stream; one training step writes one batch.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: the edited layer, or None for the default of `resolve_layer`, or `auto` where the method can find it.
        precision: of the base: `auto`, `float32`, `bfloat16` or `float16`. Shards are float32.
        trust_remote_code: let the base's repository run its own code.
        cache_mib: memory for the prefix cache, in MiB; 0 goes without and runs the whole base again and again.
        cache_disk_mib: scratch space on disk for what the prefix cache cannot hold in memory, in MiB.
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

    strict_loading = False  # the base stays out of checkpoints

    def __init__(
        self,
        base: str = "",
        layer: int | str | None = None,
        precision: str = "auto",
        trust_remote_code: bool = False,
        cache_mib: int = 2048,
        cache_disk_mib: int = 8192,
    ) -> None:
        super().__init__()
        for name, value in (("cache_mib", cache_mib), ("cache_disk_mib", cache_disk_mib)):
            if value < 0:
                raise ConfigError(f"{name} must be at least 0, got {value}")
        if isinstance(layer, str) and not (self.can_adapt and layer == AUTO):
            words = "a whole number, null for the default, or 'auto'" if self.can_adapt else "a whole number or null"
            raise ConfigError(f"layer must be {words}, got '{layer}'; negative numbers count from the last layer")
        self.automatic_optimization = False
        self.base_option = base
        self.layer_option = layer
        self.precision_option = precision
        self.trust_remote_code = trust_remote_code
        self.cache_mib, self.cache_disk_mib = cache_mib, cache_disk_mib
        self.ledger = Ledger()
        self.base: Base | None = None
        self.adapted: Adapted | None = None
        """What was found for the options that were `auto`."""
        self.base_changed = False
        self.changed_weight: Tensor | None = None
        """A W_v that a merge has left, until :meth:`change_base` puts it in its place."""
        self.background_prompts: tuple[str, ...] = ()
        self.held_out_prompts: tuple[str, ...] = ()
        self.scratch: Path | None = None
        """A folder for what the prefix cache cannot hold in memory; None computes it anew."""

    # -- the base -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the base and build the memory around it; does nothing the second time."""
        if self.base is not None:
            return
        if not self.base_option:
            raise ConfigError("no base: give --model.base a folder in Hugging Face format or a hub name")
        base = load_base(self.base_option, self.precision_option, self.trust_remote_code)
        asked = None if isinstance(self.layer_option, str) else self.layer_option
        self.build(base, resolve_layer(base.model, asked))

    def build(self, base: Base, layer: int) -> None:
        """Build an empty memory around a layer of a base; who holds `edited` from an earlier layer goes on with it."""
        self.layer = layer
        value = architecture_of(base.model).value_module(base.model, layer)
        memory = self.build_memory(value_shape(value)).to(base.model.device)
        if self.base is None:
            self.edited = EditedModel(base.model, base.tokenizer, memory, self.build_router(), layer)
            self._encode = lru_cache(1 << 16)(partial(encode, base.tokenizer))
        else:
            self.edited.move_to(layer, memory)
        self.base = base
        self.edited.prefixes = self._prefix_cache()

    def _prefix_cache(self) -> PrefixCache:
        assert self.base is not None
        identity = f"{self.base.sha256[:16]}-{self.layer}-{str(self.base.model.dtype).removeprefix('torch.')}"
        scratch = self.scratch if self.cache_mib and self.cache_disk_mib else None
        return PrefixCache(self.edited.split, self.cache_mib << 20, scratch, self.cache_disk_mib << 20, identity)

    def adopt(self, found: Adapted) -> None:
        """Go on with settings that were found; another layer begins with an empty memory."""
        assert self.base is not None
        self.adapted, self.layer_option = found, found.layer
        if found.layer != self.layer:
            self.build(self.base, found.layer)

    def change_base(self) -> None:
        """Put the W_v that an earlier merge has left into the base, where there is one."""
        if self.changed_weight is not None:
            self.edited.value_weight.data.copy_(self.changed_weight)
            self.changed_weight, self.base_changed = None, True

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types; an editor keeps each under its name or as `<name>_option`."""
        found: dict[str, Any] = {}
        for name in list(inspect.signature(type(self)).parameters):
            value = getattr(self, f"{name}_option" if hasattr(self, f"{name}_option") else name)
            found[name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        return json.loads(json.dumps(found))

    def configure_model(self) -> None:
        """Lightning's hook for building the model."""
        self.load()

    @abstractmethod
    def build_memory(self, shape: tuple[int, int]) -> SideMemory:
        """The (empty) bank of shards for a value matrix of (D, F)."""

    @abstractmethod
    def build_router(self) -> Router:
        """The router over the bank."""

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
    def max_tokens(self) -> int:
        """The longest text that the base reads, in tokens."""
        config = self.edited.config
        known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
        return min([number for number in known if number] or [1 << 20])

    def train(self, mode: bool = True) -> Editor:
        """Shards may train; the base stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.base is not None:
            self.base.model.eval()
        return self

    # -- writing ------------------------------------------------------------------------------------------------------

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Take in irrelevant prompts: `background` for losses and centring, `held_out` for thresholds."""
        self.background_prompts = tuple(background)
        self.background = self.edited.query(background)
        self.held_out_prompts = tuple(held_out)
        self.held_out = self.edited.query(held_out)
        assert self.base is not None
        self.router.fit(self.background, self.base.embeddings)

    def batch_limit(self, edits: Sequence[Edit]) -> int:
        """Most edits of this kind in one batch."""
        return len(edits) if self.batchable else 1

    @abstractmethod
    def write(self, batch: EditBatch) -> list[EditReport]:
        """Write one batch into the memory; one report per edit."""

    @abstractmethod
    def forget(self, ids: Iterable[str]) -> None:
        """Stop answering for edits, as far as the method can; the base answers their prompts."""

    def undo(self, ids: Sequence[str]) -> list[str]:
        """Take edits back, ledger included; returns the ids of other edits that had to be written anew for it."""
        raise ConfigError(f"the editor {self.editor_name} cannot take edits back")  # type: ignore[attr-defined]

    def finish_window(self) -> None:
        """Called when a window's last batch is written, before anything is evaluated."""

    def snapshot(self) -> Snapshot:
        """The memory, the router and a changed W_v as they are, to go back to with :meth:`rollback`."""
        weight = self.edited.value_weight.detach().clone() if self.base_changed else None
        return Snapshot(self.memory.snapshot(writable=True), self.router.state_dict(), weight)

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to a :meth:`snapshot`, bit by bit; a snapshot serves once."""
        self.memory.restore(snapshot.shards)
        self.router.load_state_dict(snapshot.router)
        if snapshot.weight is not None:
            self.edited.value_weight.data.copy_(snapshot.weight)

    # -- what others may ask ------------------------------------------------------------------------------------------

    def encode(self, edit: Edit) -> Encoded:
        """An edit's prompt and target as token ids."""
        return self._encode(edit.prompt, edit.target)

    def in_context(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits asked behind a context that the base wrote itself: a stand-in for other words."""
        contexts = own_texts(self.edited.base, self.tokenizer, max(1, min(len(edits), 16)), length=8)
        return [replace(edit, prompt=f"{contexts[i % len(contexts)]}. {edit.prompt}") for i, edit in enumerate(edits)]

    def query_of(self, edits: Sequence[Edit]) -> Query:
        """The edits' prompts as a router sees them, from the one pass that serves their writing too."""
        rows = [self.encode(edit) for edit in edits]
        return self.edited.query_of([row.prompt for row in rows], self.edited.captures([row.ids for row in rows]))

    def features(self, edits: Sequence[Edit]) -> np.ndarray:
        """Unit features (n, D) of the edits' prompts in the frozen base, for clustering."""
        last = self.query_of(edits).last_hidden()
        return torch.nn.functional.normalize(last - self.background.last_hidden().mean(0), dim=-1).cpu().numpy()

    def choose(self, prompts: Sequence[str]) -> Choice:
        """The router's choice for prompts."""
        return self.edited.choose(prompts)

    @torch.no_grad()
    def choose_for(self, edits: Sequence[Edit]) -> Choice:
        """The router's choice for the edits' own prompts, from the states that are known of them."""
        return self.router.route(self.query_of(edits), self.memory) if edits else Choice.base(0)

    def owner_choice(self, ids: Sequence[str]) -> Tensor:
        """Oracle routing: the shard that owns each edit, or the base where none does."""
        owners = [self.ledger.owner_of(id) if id in self.ledger else None for id in ids]
        return torch.tensor([BASE if owner is None else owner for owner in owners], dtype=torch.long)

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser that each write binds to its shard; between writes it holds a placeholder."""
        return self.build_optimizer([torch.nn.Parameter(torch.zeros(0))])

    @abstractmethod
    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the inner steps."""

    def on_fit_start(self) -> None:
        """Share the stream's ledger and learn what is irrelevant."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        self.ledger = stream.ledger
        self.prepare(*stream.irrelevant_halves(self))
        self.change_base()  # of a resumed run or a pack; until here the base was asked as it was

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Write one batch and enter what came of it in the ledger."""
        reports = self.write(batch)
        self.ledger.written(reports)
        self.log_losses(reports)
        if self.trainer.is_last_batch:
            self.finish_window()

    def log_losses(self, reports: Sequence[EditReport]) -> None:
        """The batch's mean losses to the loggers."""
        size = len(reports)
        self.log("write/loss", sum(report.loss for report in reports) / size, batch_size=size)
        self.log("write/kd", sum(report.kd for report in reports) / size, batch_size=size)
        self.log("write/steps", float(reports[0].steps), batch_size=size)

    def log_now(self, values: Mapping[str, float]) -> None:
        """Values to the loggers at once, beside the number of edits written: for hooks in which Lightning's `log` is
        closed."""
        if self._trainer is None:
            return
        edits = float(len(self.trainer.datamodule.written()))  # type: ignore[attr-defined]
        for logger in self.trainer.loggers:
            logger.log_metrics({"edits": edits, **values}, step=self.trainer.fit_loop.total_batch_idx)

    def on_train_epoch_end(self) -> None:
        """Runs behind the callbacks: stop when the stream and the pools are empty."""
        if self.trainer.datamodule.exhausted:  # type: ignore[attr-defined]
            self.trainer.should_stop = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the base's weights."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("edited.base.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The router's thresholds and keys travel with the shards, and W_v where a merge wrote into it."""
        checkpoint["router"] = self.router.state_dict()
        if self.adapted is not None:
            checkpoint["adapted"] = self.adapted.as_dict()
        if self.base_changed:
            checkpoint["value_weight"] = self.edited.value_weight.detach().cpu()  # type: ignore[operator]
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
        if "adapted" in checkpoint:  # not chosen anew: the shards belong to what was chosen
            self.adopt(Adapted.from_dict(checkpoint["adapted"]))
        self.router.load_state_dict(checkpoint["router"])
        self.router.bind(self.base.embeddings)
        self.changed_weight = checkpoint.get("value_weight")


REGISTRY: dict[str, type[Editor]] = {}


def register(name: str) -> Callable[[type[Editor]], type[Editor]]:
    """Class decorator: make an editor known by name."""

    def add(editor: type[Editor]) -> type[Editor]:
        REGISTRY[name] = editor
        editor.editor_name = name  # type: ignore[attr-defined]
        return editor

    return add


def editor_class(name: str) -> type[Editor]:
    """An editor's class by name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in REGISTRY:
        close = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f" did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"unknown editor '{name}':{hint} known: {', '.join(REGISTRY)}")
    return REGISTRY[name]


def make_editor(name: str, options: Mapping[str, Any]) -> Editor:
    """An editor by name, from its :meth:`Editor.options`.

    Raises:
        ConfigError: unknown name.
        TypeError: an option that the editor does not know.
    """
    kind = editor_class(name)
    types = get_type_hints(kind.__init__)
    nested = {
        key: types[key](**{name: tuple(item) if isinstance(item, list) else item for name, item in value.items()})
        for key, value in options.items()
        if is_dataclass(types.get(key))
    }
    return kind(**{**options, **nested})
