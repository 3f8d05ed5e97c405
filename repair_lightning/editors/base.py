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
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from repair_lightning.editors.adapt import AUTO, Adapted
from repair_lightning.editors.exchange import Pace, Written
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.functional.relations import DIMENSIONS, SHRINKAGE, RelationSpace
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.memory.rows import Rows
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.architectures import architecture_of, resolve_layer, value_shape
from repair_lightning.models.base import Base, load_base
from repair_lightning.models.cache import kept_space
from repair_lightning.models.forms import Template
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.models.sampling import greedy_rows, own_texts
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts.dialogue import behind
from repair_lightning.texts.relations import STEM, bank
from repair_lightning.training.sharing import SharedModel
from repair_lightning.training.team import ALONE, Team
from repair_lightning.types import BASE, Edit, EditBatch, EditReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What an editor has learnt at one moment.

    Attributes:
        shards: of the side memory.
        router: its state.
        weights: by layer, W_v (as the base stores it) where it is no longer the base's own.
        own: what the method remembers besides, see `Editor.remember`.
    """

    shards: tuple[dict[str, torch.nn.Module], int]
    router: dict[str, Any]
    weights: dict[int, Tensor]
    own: Any


SAMPLED = 64
"""So many irrelevant prompts say how large the base's states are, where nothing else is asked of them."""
KEPT = 256
"""To so many irrelevant prompts the base's own answers are taken: with them, some thousands of tokens."""


class Editor(pl.LightningModule):
    """A frozen base under correction. One epoch is one window of the stream; one training step writes one batch.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: the edited layer, or None for the default of `resolve_layer`, or `auto` where the method can find it.
        precision: of the base: `auto`, `float32`, `bfloat16` or `float16`. Shards are float32.
        trust_remote_code: let the base's repository run its own code.
        cache_mib: memory for the prefix cache, in MiB; 0 goes without and runs the whole base again and again.
        cache_disk_mib: scratch space on disk for what the prefix cache cannot hold in memory, in MiB.
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
        trust_remote_code: bool = False,
        cache_mib: int = 2048,
        cache_disk_mib: int = 8192,
        template: Template = "auto",
    ) -> None:
        super().__init__()
        kind = type(self)
        lacks = [name for name in dir(kind) if getattr(getattr(kind, name, None), "__isabstractmethod__", False)]
        if lacks:
            raise ConfigError(f"{type(self).__name__} must have {' and '.join(lacks)}; see docs/adding-an-editor.md")
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
        self.template = template
        self.ledger = Ledger()
        self.base: Base | None = None
        self.adapted: Adapted | None = None
        """What was found for the options that were `auto`."""
        self.changed_weights: dict[int, Tensor] = {}
        """Each W_v that writing or a merge has left, by layer, until :meth:`change_base` puts them in their place."""
        self.background_prompts: tuple[str, ...] = ()
        self.held_out_prompts: tuple[str, ...] = ()
        self.guard_prompts: Sequence[str] = ()
        """Irrelevant prompts that neither writing nor thresholds have seen."""
        self.team = ALONE
        self.fresh: Snapshot | None = None
        """What the model was before the first edit, where each is written by itself."""
        self.written: Written | None = None
        """What this rank has written of the window, where the ranks share its batches."""
        self.paces: list[Pace] = []
        """Per rank, what it wrote and how long that took; empty for a team of one."""
        self.rows_apart = False
        """Whether what never changes is kept out of checkpoints' tensors, as rows that their writer stores once."""
        self.scratch: Path | None = None
        """A folder for what the prefix cache cannot hold in memory; None computes it anew."""

    # -- the base -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the base and build the memory around it; does nothing the second time."""
        if self.base is not None:
            return
        if not self.base_option:
            raise ConfigError(
                "no base: give --model.base a folder in Hugging Face format, a hub name, a .gguf file, 'smollm2' or "
                "'world'"
            )
        base = load_base(self.base_option, self.precision_option, self.trust_remote_code)
        asked = None if isinstance(self.layer_option, str) else self.layer_option
        self.build(base, resolve_layer(base.model, asked))

    def build(self, base: Base, layer: int) -> None:
        """Build an empty memory around a layer of a base; who holds `edited` from an earlier layer goes on with it."""
        self.layer = layer
        value = architecture_of(base.model).value_module(base.model, layer)
        memory = self.build_memory(value_shape(value)).to(base.model.device)
        memory.rows_apart = self.rows_apart
        if self.base is None:
            forms = base.forms(self.template)
            self.edited = SharedModel(base.model, base.tokenizer, memory, self.build_router(), layer, forms)
            self.edited.target_of = self._target_of
            self._encode = lru_cache(1 << 16)(forms.encode)
        else:
            self.edited.move_to(layer, memory)
        self.base = base
        self.edited.prefixes = self._prefix_cache()
        self.join(self.team)

    def _target_of(self, id: str) -> str | None:
        return self.ledger.edit(id).target if id in self.ledger else None

    def join(self, team: Team) -> None:
        """Work among the ranks of a team: all of them must do the same from here on."""
        self.team = team
        if self.base is not None:
            self.edited.team = team
            self.memory.turn = (team.rank, team.size) if self.shares else (0, 1)

    @property
    def reads_background(self) -> bool:
        """Whether writing needs the states of all irrelevant prompts."""
        return False

    @property
    def shares(self) -> bool:
        """Whether the ranks write different batches of a window side by side."""
        return self.can_share and self.team.parts > 1

    def _prefix_cache(self) -> PrefixCache:
        scratch = self.scratch if self.cache_mib and self.cache_disk_mib else None
        return PrefixCache(self.edited.split, self.cache_mib << 20, scratch, self.cache_disk_mib << 20)

    @property
    def _identity(self) -> str:
        """Names what computes the states at the edited layer."""
        assert self.base is not None
        return f"{self.base.sha256[:16]}-{self.layer}-{str(self.base.model.dtype).removeprefix('torch.')}"

    def adopt(self, found: Adapted) -> None:
        """Go on with settings that were found; another layer begins with an empty memory."""
        assert self.base is not None
        self.adapted, self.layer_option = found, found.layer
        if found.layer != self.layer:
            self.build(self.base, found.layer)

    def change_base(self) -> None:
        """Put each W_v that earlier writing or a merge has left into the base, where there is any."""
        if self.changed_weights:
            self.edited.weights.load(self.changed_weights)
            self.changed_weights = {}

    @property
    def base_changed(self) -> bool:
        """Whether the base has a W_v that is not its own."""
        return bool(self.edited.weights)

    @classmethod
    def arguments(cls) -> list[str]:
        """The names of the constructor's arguments; `**common` stands for those that every editor has."""
        own = inspect.signature(cls).parameters
        named = [name for name, found in own.items() if found.kind is not inspect.Parameter.VAR_KEYWORD]
        common = list(inspect.signature(Editor).parameters) if len(named) < len(own) else []
        return list(dict.fromkeys([*common, *named]))

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types; an editor keeps each under its name or as `<name>_option`."""
        found: dict[str, Any] = {}
        for name in self.arguments():
            value = getattr(self, f"{name}_option" if hasattr(self, f"{name}_option") else name)
            found[name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        return json.loads(json.dumps(found))

    def configure_model(self) -> None:
        """Lightning's hook for building the model."""
        self.load()

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
        self.background_prompts, self.held_out_prompts = tuple(background), tuple(held_out)
        reads = self.router.reads_states or self.reads_background
        self.background = self._shared_queries(background if reads else background[:SAMPLED])
        self.held_out = self._shared_queries(held_out) if self.router.reads_states else self._asked(held_out)
        if self.router.needs_space:
            self.router.space = self._relation_space()  # type: ignore[attr-defined]
        self.router.fit(self.background if self.router.reads_states else self._asked(background))

    def _asked(self, prompts: Sequence[str]) -> Query:
        return Query.of_texts([self.edited.forms.asked(prompt) for prompt in prompts])

    def _relation_space(self) -> RelationSpace:
        """The router's space of relations: learnt once per base, layer, precision and form, and kept on the disk."""
        learning = (str(SHRINKAGE), str(DIMENSIONS), str(STEM))
        known = (
            self._identity,
            str(self.edited.forms.chat),
            *learning,
            *map(str, self.router.options().values()),
            *bank()[0],
        )
        return kept_space(known, lambda: self.router.learn_space(self.edited.last_states))  # type: ignore[attr-defined]

    def _shared_queries(self, prompts: Sequence[str]) -> Query:
        return self.edited.shared_query(len(prompts), lambda index: self.edited.query([prompts[i] for i in index]))

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
        if not self.can_undo:
            raise ConfigError(
                f"the editor {self.editor_name} cannot take edits back; a new run without the record can"  # type: ignore[attr-defined]
            )
        self.ledger.undo(ids, "taken back on request")
        self.forget(ids)
        self.finish_window()
        return []

    def finish_window(self) -> None:
        """Called when a window's last batch is written, before anything is evaluated."""

    def snapshot(self) -> Snapshot:
        """What was learnt and written so far, to go back to with :meth:`rollback`."""
        shards = self.memory.snapshot(writable=True)
        return Snapshot(shards, self.router.state_dict(), self.edited.weights.state(), self.remember())

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to a :meth:`snapshot`, bit by bit; a snapshot serves once."""
        self.memory.restore(snapshot.shards)
        self.router.load_state_dict(snapshot.router)
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

    def figures(self) -> dict[str, Any]:
        """What the method has to say of its result, in plain types, for `metrics.json`."""
        deviations = self.edited.weights.deviations()
        return {"deviation": {str(layer): value for layer, value in deviations.items()}} if deviations else {}

    # -- what others may ask ------------------------------------------------------------------------------------------

    def encode(self, edit: Edit) -> Encoded:
        """An edit's prompt and target as token ids."""
        return self._encode(edit.prompt, edit.target)

    def in_context(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits asked behind a context that the base wrote itself: a stand-in for other words."""
        contexts = self.base_texts(max(1, min(len(edits), 16)), length=8)
        return [replace(edit, prompt=behind(contexts[i % len(contexts)], edit.prompt)) for i, edit in enumerate(edits)]

    def base_texts(self, number: int, length: int = 12) -> list[str]:
        """Texts that the base wrote by itself, the same on every rank; see `own_texts`."""
        return self.team.first(own_texts(self.edited.base, self.tokenizer, number, length))

    def said_by_base(self, prompts: Sequence[str], length: int = 8) -> list[Encoded]:
        """Prompts with what the base as it was says to them, in at most so many tokens."""
        with self.edited.forced(None), self.edited.weights.originals():
            return [Encoded(*row) for row in greedy_rows(self.edited.base, self.edited.forms, prompts, length)]

    def query_of(self, edits: Sequence[Edit]) -> Query:
        """The edits' prompts as a router sees them, from the one pass that serves their writing too."""
        texts = [self.edited.forms.asked(edit.prompt) for edit in edits]
        rows = [self.encode(edit) for edit in edits]
        captures = self.edited.captures([row.ids for row in rows])
        return self.edited.query_of(texts, [row.prompt for row in rows], captures)

    def features(self, edits: Sequence[Edit]) -> np.ndarray:
        """Unit features (n, D) of the edits' prompts in the frozen base, for clustering."""
        mine = self.team.mine_of([edit.prompt for edit in edits])
        centre = self.background.last_hidden().mean(0)
        part = self.query_of([edits[i] for i in mine]).last_hidden() if mine else centre[None][:0]
        (last,) = self.team.rows(mine, part)
        return torch.nn.functional.normalize(last - centre, dim=-1).cpu().numpy()

    def choose(self, prompts: Sequence[str]) -> Choice:
        """The router's choice for prompts."""
        return self.edited.choose(prompts)

    @torch.no_grad()
    def choose_for(self, edits: Sequence[Edit]) -> Choice:
        """The router's choice for the edits' own prompts, from the states that are known of them."""
        mine = self.team.mine_of([edit.prompt for edit in edits])
        own = [edits[i] for i in mine]
        if not own:
            return self.edited.shared_choice(mine, Choice.base(0))
        texts = [self.edited.forms.asked(edit.prompt) for edit in own]
        query = self.query_of(own) if self.router.reads_states else Query.of_texts(texts)
        part = self.edited.held(self.router.route(query, self.memory), [self.encode(edit).prompt for edit in own])
        return self.edited.shared_choice(mine, part)

    def owner_choice(self, ids: Sequence[str]) -> Tensor:
        """Oracle routing: the shard that owns each edit, or the base where none does."""
        owners = [self.ledger.owner_of(id) if id in self.ledger else None for id in ids]
        return torch.tensor([BASE if owner is None else owner for owner in owners], dtype=torch.long)

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser that each write binds to its shard; between writes it holds a placeholder."""
        return self.build_optimizer([torch.nn.Parameter(torch.zeros(0))])

    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the inner steps; methods without any never step it."""
        return torch.optim.SGD(parameters, lr=1.0)

    def on_fit_start(self) -> None:
        """Share the stream's ledger and learn what is irrelevant."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        self.ledger = stream.ledger
        self.join(getattr(self.trainer.strategy, "team", ALONE))
        train, calibrate, self.guard_prompts = stream.irrelevant_parts(self)
        self.prepare(train, calibrate)
        self.change_base()  # of a resumed run or a pack; until here the base was asked as it was
        self.fresh = self.snapshot() if stream.singles else None

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Write one batch and enter what came of it in the ledger; behind the last one ranks exchange their work."""
        if self.shares:
            self.written = self.written or Written()
            self.written.begin()
        if batch.edits:  # empty ones fill up a rank that has fewer than others
            reports = self.write(batch)
            if sorted(report.id for report in reports) != sorted(batch.ids):
                raise RepairError(
                    f"{type(self).__name__}.write must return one report for each edit of its batch; got "
                    f"{[report.id for report in reports][:5]} for {list(batch.ids[:5])}"
                )
            self.ledger.written(reports)
            self.log_losses(reports)
            if self.written is not None:
                self.written.add(reports)
        if self.trainer.is_last_batch:
            if self.written is not None:
                self.exchange(self.written)
            self.finish_window()
            if self.writes_base and self.team.size > 1:  # each rank has written all edits: a GPU's last bits may differ
                found = self.edited.weights.state()
                self.edited.weights.load({layer: self.team.of_first(value) for layer, value in found.items()})

    def exchange(self, written: Written) -> None:
        """Give all ranks what each has written of a window, and take in what the others have."""
        self.written = None
        parts = written.exchange(self)
        self.paces = [known.plus(new) for known, new in zip(self.paces or [Pace()] * len(parts), parts, strict=True)]
        for rank, pace in enumerate(parts):
            self.log(f"rank/{rank}/edits_per_minute", pace.per_minute, batch_size=1)

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
        """Runs behind the callbacks: stop when the stream and the pools are empty.

        Before anything else is written, the ranks make sure that they have all decided alike.
        """
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.fresh is not None and stream.complete:
            self.begin_anew()
        if self.team.size > 1:
            self.team.same("what became of the window", json.dumps([stream.verdict(), self.memory.ids[-64:]]))
        if stream.exhausted:
            self.trainer.should_stop = True

    def begin_anew(self) -> None:
        """Where edits are scored one by one: go back to the model that the stream began with, for the next one."""
        assert self.fresh is not None
        self.ledger.undo(self.trainer.datamodule.written(), "scored by itself")  # type: ignore[attr-defined]
        self.rollback(self.fresh)
        self.fresh = self.snapshot()  # a snapshot serves once

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the base's weights."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("edited.base.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The router's thresholds and keys travel with the shards, and each W_v that was written into."""
        if self.rows_apart:
            checkpoint["router"], checkpoint["rows"] = self._parted()
        else:
            checkpoint["router"] = self.router.state_dict()
        if self.adapted is not None:
            checkpoint["adapted"] = self.adapted.as_dict()
        checkpoint["value_weights"] = {layer: value.cpu() for layer, value in self.edited.weights.state().items()}
        checkpoint["own"] = self.own_state()
        checkpoint["base"] = {"name": self.base.name, "sha256": self.base.sha256} if self.base else {}

    def _parted(self) -> tuple[dict[str, Any], dict[str, Rows]]:
        """The router's state, and what is told apart from it and from the memory's: their rows, where there are any."""
        tables = {"shards": self.memory.rows(), "router": self.router.rows()}
        rows = {name: table for name, table in tables.items() if table is not None and len(table.numbers)}
        return (self.router.state_beside_rows() if "router" in rows else self.router.state_dict()), rows

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
        if self._trainer is not None and self.trainer.datamodule.singles:  # type: ignore[attr-defined]
            checkpoint["state_dict"] = {}  # a single edit that was under way is written anew
            if self.learnt_beforehand:
                self.load_own_state(checkpoint["own"])
            return
        rows, state = checkpoint.get("rows", {}), checkpoint["router"]
        if "shards" in rows:
            found = self.memory.state_of_rows(rows["shards"])
            checkpoint["state_dict"] |= {f"edited.memory.{name}": tensor for name, tensor in found.items()}
        self.router.load_state_dict(self.router.state_of_rows(state, rows["router"]) if "router" in rows else state)
        self.changed_weights = checkpoint["value_weights"]
        self.load_own_state(checkpoint["own"])


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
        own = "one of your own must be imported first (undo: --import MODULE)"
        raise ConfigError(f"unknown editor '{name}';{hint} known: {', '.join(REGISTRY)}; {own}")
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
