"""What every editing method is: a LightningModule that owns a frozen base and writes batches of edits.

A new method is one file: subclass `Editor`, implement :meth:`Editor.write`, say what it can do in the class attributes,
and the stream, the ledger, the scoring, the pack and the report work with it. One epoch is one window of the stream,
one training step writes one batch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any, get_type_hints

import lightning.pytorch as pl
import torch

from repair_lightning.editors.adapt import Adapted
from repair_lightning.editors.asked import AskedModel
from repair_lightning.editors.exchange import Written, pace
from repair_lightning.editors.inner_loop import in_halves
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.memory.query import Query
from repair_lightning.training.team import ALONE
from repair_lightning.types import BASE, Edit, EditBatch, EditReport

SAMPLED = 64
"""So many irrelevant prompts say how large the base's states are, where nothing else is asked of them."""
KEPT = 256
"""To so many irrelevant prompts the base's own answers are taken: with them, some thousands of tokens."""


class SingleEdits(pl.Callback):
    """Edits one by one: when all has been done for an edit and it is scored, the model is again what it was before the
    first."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Remember the empty model, before a checkpoint is loaded."""
        pl_module.load()
        self.fresh = pl_module.snapshot()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """An edit that was under way is written again; what was learnt before the first one stays."""
        pl_module.rollback(self.fresh)
        pl_module.changed_weights = {}
        if pl_module.learnt_beforehand:
            pl_module.load_own_state(checkpoint["own"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Remember the model that has seen the irrelevant prompts."""
        self.fresh = pl_module.snapshot()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The next edit begins anew."""
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if stream.complete:
            pl_module.ledger.undo(stream.written(), "scored by itself")
            pl_module.rollback(self.fresh)
            self.fresh = pl_module.snapshot()  # a snapshot serves once


class Editor(AskedModel):
    """A frozen base under correction: the contract of every method.

    A method must `write` and `forget`, and may `prepare` on irrelevant prompts, finish a window, take edits back
    (`undo`), limit its batches, keep a state of its own (`own_state`), and build another memory or router. See
    `HeldModel` for what every editor takes, and for the class attributes that say what a method can do.

    Attributes:
        guard_prompts: irrelevant prompts that neither writing nor thresholds have seen.
        adapted: what was found for the options that were `auto`.
        written: what this rank has written of the window, where the ranks share its batches.
        paces: per rank, what it wrote and how long that took; empty for a team of one.
    """

    background_prompts: tuple[str, ...] = ()
    held_out_prompts: tuple[str, ...] = ()
    guard_prompts: Sequence[str] = ()
    adapted: Adapted | None = None
    written: Written | None = None
    paces: Sequence[dict[str, float]] = ()

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

    @property
    def reads_background(self) -> bool:
        """Whether writing needs the states of all irrelevant prompts."""
        return False

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Take in irrelevant prompts, before the first edit: `background` for losses and centring, `held_out` for
        thresholds."""
        self.background_prompts, self.held_out_prompts = tuple(background), tuple(held_out)
        reads = self.router.reads_states or self.reads_background
        self.background = self._shared_queries(background if reads else background[:SAMPLED])
        self.held_out = self._shared_queries(held_out) if self.router.reads_states else self._asked(held_out)
        if self.router.needs_space:
            self.router.space = self._relation_space()  # type: ignore[attr-defined]
        self.router.fit(self.background if self.router.reads_states else self._asked(background))

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
        """Take edits back, ledger included; returns the ids of other edits that had to be written again for it."""
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

    def calibrate(self) -> None:
        """Thresholds again, from what the shards own and held-out irrelevant prompts; call it when a shard changed."""
        shards = self.memory.ids if self.router.needs_owned else []
        owned = {shard: [self.ledger.edit(id) for id in self.ledger.owned_by(shard)] for shard in shards}
        queries = {shard: self._shared_query_of(edits) for shard, edits in owned.items() if edits}
        self.router.calibrate(self.memory, queries, self.held_out)

    def _shared_query_of(self, edits: Sequence[Edit]) -> Query:
        return self.edited.shared_query(len(edits), lambda index: self.query_of([edits[i] for i in index]))

    def drop_unowned(self) -> None:
        """Drop the shards that no edit owns any more."""
        owned = self.ledger.sizes()
        self.memory.drop([shard for shard in self.memory.ids if shard not in owned])

    def figures(self) -> dict[str, Any]:
        """What the method has to say of its result, in plain types, for `metrics.json`."""
        deviations = self.edited.weights.deviations()
        return {"deviation": {str(layer): value for layer, value in deviations.items()}} if deviations else {}

    def configure_callbacks(self) -> list[pl.Callback]:
        """What goes back to the start after each edit, where the stream's edits are scored one by one."""
        return [SingleEdits()] if self.trainer.datamodule.singles else []  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Lightning's hook for building the model."""
        self.load()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser that each write binds to its shard; between writes it holds a placeholder."""
        return self.build_optimizer([torch.nn.Parameter(torch.zeros(0))])

    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the inner steps; methods without any never step it."""
        return torch.optim.SGD(parameters, lr=1.0)

    def train(self, mode: bool = True) -> Editor:
        """Shards may train; the base stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.base is not None:
            self.base.model.eval()
        return self

    def on_fit_start(self) -> None:
        """Share the stream's ledger and learn what is irrelevant."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        self.ledger = stream.ledger
        self.join(getattr(self.trainer.strategy, "team", ALONE))
        train, calibrate, self.guard_prompts = stream.irrelevant_parts(self)
        self.prepare(train, calibrate)
        self.change_base()  # of a resumed run or a pack; until here the base was asked as it was

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Write one batch and enter what came of it in the ledger; after the last one ranks exchange their work."""
        started = time.perf_counter()
        if self.shares:
            self.written = self.written or Written()
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
                self.written.reports += reports
                self.written.seconds += time.perf_counter() - started
        if self.trainer.is_last_batch:
            if self.written is not None:
                written, self.written = self.written, None
                self._enter_paces(written.exchange(self))
            self.finish_window()
            if self.writes_base and self.team.size > 1:  # each rank has written all edits: a GPU's last bits may differ
                found = self.edited.weights.state()
                self.edited.weights.load({layer: self.team.of_first(value) for layer, value in found.items()})

    def _enter_paces(self, found: Sequence[tuple[int, float]]) -> None:
        """Add what each rank wrote of a window, and the seconds that it took."""
        known = [(rank["edits"], rank["seconds"]) for rank in self.paces] or [(0, 0.0)] * len(found)
        self.paces = [pace(old[0] + new[0], old[1] + new[1]) for old, new in zip(known, found, strict=True)]
        for rank, new in enumerate(found):
            self.log(f"rank/{rank}/edits_per_minute", pace(*new)["edits_per_minute"], batch_size=1)

    def log_losses(self, reports: Sequence[EditReport]) -> None:
        """The batch's mean losses to the loggers."""
        size = len(reports)
        self.log("write/loss", sum(report.loss for report in reports) / size, batch_size=size)
        self.log("write/kd", sum(report.kd for report in reports) / size, batch_size=size)
        self.log("write/steps", float(reports[0].steps), batch_size=size)

    def log_now(self, values: Mapping[str, float]) -> None:
        """Values to the loggers at once, for hooks in which Lightning's `log` is closed."""
        if self._trainer is None:
            return
        edits = float(len(self.trainer.datamodule.written()))  # type: ignore[attr-defined]
        for logger in self.trainer.loggers:
            logger.log_metrics({"edits": edits, **values}, step=self.trainer.fit_loop.total_batch_idx)

    def on_train_epoch_end(self) -> None:
        """After the callbacks: the ranks make sure that they have all decided alike, and stop when nothing is left."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.team.size > 1:
            self.team.same("what became of the window", json.dumps([stream.verdict(), self.memory.ids[-64:]]))
        if stream.exhausted:
            self.trainer.should_stop = True


class WholeEditor(Editor):
    """An editor that writes a batch whole or not at all: where the loss or what was written is not finite, everything
    is put back, and the batch is written in halves until what spoils it stands alone."""

    @abstractmethod
    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Write edits; one report per edit."""

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Write a batch, or what of it can be written."""
        return in_halves(batch, self._attempt)

    def _attempt(self, batch: EditBatch) -> list[EditReport]:
        before = self.snapshot()
        try:
            reports = self.change(batch.edits)
            reason = f"the loss or what was written was not finite after {reports[0].steps} steps: rolled back"
        except torch.linalg.LinAlgError as error:
            reports = [EditReport(id, BASE, math.nan, 0.0, 0) for id in batch.ids]
            reason = f"the problem cannot be solved ({error}): rolled back"
        tensors = [*self.edited.weights.state().values()]
        for shard in {report.shard for report in reports} - {BASE}:
            tensors += self.memory[shard].state_dict().values()
        if all(tensor.isfinite().all() for tensor in tensors) and all(math.isfinite(one.loss) for one in reports):
            return reports
        self.rollback(before)
        return [replace(report, shard=BASE, error=reason) for report in reports]


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
