"""What editors share that write into the base's own value matrices, in one layer or in several neighbouring ones.

There is no side memory and nothing to route: the changed base answers every prompt. Its own matrices are kept, so that
`rollback` and packs bring back each bit; a window whose edits break too much is taken back as with any other editor.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from repair_lightning.editors.base import KEPT, WholeEditor
from repair_lightning.editors.checks import at_least
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.values import Asked, Places, Values, ValueSearch, pushing
from repair_lightning.errors import ConfigError
from repair_lightning.models.architectures import resolve_layer
from repair_lightning.models.base import Base
from repair_lightning.models.prefix import Capture, SplitModel, stack_left
from repair_lightning.models.prefix_cache import canonical_batches
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts.dialogue import behind
from repair_lightning.types import BASE, Edit, EditReport

log = logging.getLogger(__name__)

RIDGE = 1e-2
"""Added to a second moment of keys, as a share of its mean diagonal: fewer keys than dimensions must not blow up."""


class WeightEditor(WholeEditor):
    """Writes into W_v of `layers` neighbouring layers, the lowest of which is `layer`."""

    writes_base: ClassVar[bool] = True
    default_depth: ClassVar[float | None] = None
    """The uppermost written layer where none is named, as a share of the depth; None for `resolve_layer`'s default."""

    def __init__(self, layers: int = 1, **common: Any) -> None:
        super().__init__(**common)
        self.layers = layers
        at_least(1, self, "layers")

    def build(self, base: Base, layer: int) -> None:
        """Besides building, find the written layers; where none was named they end with the default."""
        last = resolve_layer(base.model, -1)
        if self.layer_option is None:
            top = layer if self.default_depth is None else int(self.default_depth * last + 1e-6)
            if self.layers > top + 1:
                log.warning(
                    "layers: %d asked for, the base has %d up to layer %d: all are written", self.layers, top + 1, top
                )
                self.layers = top + 1
            layer = top - self.layers + 1
        if layer + self.layers > last + 1:
            raise ConfigError(
                f"layers {layer} to {layer + self.layers - 1} are asked for, the base has {last + 1}; give a lower "
                "--model.layer or fewer --model.layers"
            )
        super().build(base, layer)
        self.written_layers = list(range(layer, layer + self.layers))
        self.top = self.edited.split if self.layers == 1 else SplitModel(base.model, self.written_layers[-1])

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> tuple[list[Capture], dict[int, list[Tensor]], list[Tensor]]:
        """Token rows in the base as it is now: each at the uppermost written layer; by written layer each row's
        activations (T, F); what leaves the uppermost, (T, D), where more than one layer is written (else empty)."""
        lowest = self.edited.captures(rows)
        if self.layers == 1:
            return lowest, {self.layer: [capture.activations for capture in lowest]}, []
        found: dict[int, tuple[Tensor, ...]] = {}
        for index, ids in canonical_batches(self.edited.split, rows):
            hidden = torch.stack([pad(lowest[i].hidden, (0, 0, 0, ids.shape[1] - len(rows[i]))) for i in index])
            entering, activations, left = self.edited.split.through(
                ids, torch.ones_like(ids), hidden, self.written_layers[-1]
            )
            for place, i in enumerate(index):
                found[i] = tuple(part[place, : len(rows[i])].clone() for part in (entering[-1], left, *activations))
        top, leaving, *keys = zip(*(found[i] for i in range(len(rows))), strict=True)
        by_layer = {layer: list(each) for layer, each in zip(self.written_layers, keys, strict=True)}
        return [Capture(*both) for both in zip(top, keys[-1], strict=True)], by_layer, list(leaving)

    def reports(self, edits: Sequence[Edit], losses: Sequence[float], steps: Sequence[int]) -> list[EditReport]:
        """The reports of edits that were written into the base."""
        triples = zip(edits, losses, steps, strict=True)
        return [EditReport(edit.id, BASE, loss, 0.0, taken) for edit, loss, taken in triples]

    def forget(self, ids: Iterable[str]) -> None:
        """What is in the weights stays there: it cannot be told apart."""


class ValueEditor(WeightEditor):
    """Finds values by gradient, then solves for each layer's matrix; subclasses say how it is solved.

    The missing part of a value is spread over the written layers as in MEMIT: each takes an equal share of what is
    still missing when its turn comes.
    """

    def __init__(self, values: Values, **common: Any) -> None:
        super().__init__(**common)
        self.values = values
        values.check()

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, let the base write contexts, and measure the unit of the learning rate on irrelevant prompts."""
        super().prepare(background, held_out)
        self.contexts = self.base_texts(self.values.contexts, length=8) if self.values.contexts else []
        self.unit = 1.0
        if self.values.relative:
            top, _, _ = self.states([self.edited.forms.ids(text) for text in background[:64]])
            self.unit = float(torch.stack([c.hidden[-1].float().square().mean().sqrt() for c in top]).mean())
        self.adds_up = self.top.adds_up()

    def keys_of(self, prompts: Sequence[str]) -> dict[int, list[Tensor]]:
        """By written layer the keys (T, F) of each prompt with the base's answer, in the base as it was."""
        said = self.said_by_base(prompts)
        with self.edited.weights.originals():
            return self.states([row.ids for row in said])[1]

    @cached_property
    def moments(self) -> dict[int, Tensor]:
        """By written layer, the mean of `k k^T`, (F, F), with `RIDGE`, over the keys of all tokens of irrelevant
        prompts and the base's answers to them. (The papers take 100,000 texts from Wikipedia.)"""
        found = {}
        for layer, each in self.keys_of(self.background_prompts[:KEPT]).items():
            whole = torch.cat(each).float()
            found[layer] = whole.T @ whole / len(whole)
            found[layer].diagonal().add_(RIDGE * found[layer].diagonal().mean())
        return found

    def build(self, base: Base, layer: int) -> None:
        """Besides building, refuse the last layer where values act at the subject: from there they reach no answer."""
        super().build(base, layer)
        if self.values.at == "subject" and self.written_layers[-1] == len(self.edited.split.layers) - 1:
            raise ConfigError(
                f"values.at subject needs a layer above the written ones, which carries the value to where the answer "
                f"is read; got layer {self.written_layers[-1]}, the last: give a lower --model.layer"
            )

    @abstractmethod
    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A layer's new matrix (D, F), that should give values (S, D) for keys (S, F), of the edits with these ids;
        `of` (S,) says which edit each key belongs to."""

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Find the values of some edits, then change one layer after the other."""
        asked = [(i, edit.prompt) for i, edit in enumerate(edits)]
        asked += [(i, behind(context, edit.prompt)) for i, edit in enumerate(edits) for context in self.contexts]
        encoded = [self._encode(prompt, edits[i].target) for i, prompt in asked]
        ids = [row.ids for row in encoded]
        top, activations, leaving = self.states(ids)
        rows = TargetRows(encoded, top, [i for i, _ in asked], len(edits))
        places = self.places(edits, encoded, rows)
        search = ValueSearch(self.top, self.values, self.adds_up, self.unit)
        shifts, losses, steps = search.run((rows, places), self._essence(edits))
        missing = shifts
        if self.layers > 1:
            with torch.no_grad(), self.top.skipping(), pushing(self.top.value, places.spread(shifts, rows)):
                aims = places.read(self.top.layer_output(rows.ids, rows.mask, rows.hidden))
        for done, layer in enumerate(self.written_layers):
            if done:
                _, activations, leaving = self.states(ids)
            if self.layers > 1:
                missing = aims - places.read(stack_left(leaving))
            keys, matrix = places.read(stack_left(activations[layer])), self.edited.weights.matrix(layer)
            values = keys @ matrix.T + missing / (self.layers - done)
            solved = self.solve(layer, [edit.id for edit in edits], places.member, keys, values)
            self.edited.weights.put(layer, solved)
        return self.reports(edits, losses, steps)

    def places(self, edits: Sequence[Edit], encoded: Sequence[Encoded], rows: TargetRows) -> Places:
        """Where values act in the rows of some edits."""
        if self.values.at == "targets":
            return Places.of_targets(rows)
        of = rows.owner.tolist()
        at = [self._subject_token(edits[i].subject, row) for i, row in zip(of, encoded, strict=True)]
        return Places.of_subjects(rows, at)

    def _subject_token(self, subject: str | None, row: Encoded) -> int:
        """The index of the subject's last token in a prompt; the prompt's last where it does not hold the subject."""
        decoded = [self.tokenizer.decode(row.prompt[: i + 1]) for i in range(len(row.prompt))] if subject else []
        if not decoded or str(subject) not in decoded[-1]:
            return len(row.prompt) - 1
        end = decoded[-1].rfind(str(subject)) + len(str(subject))
        return next(i for i, text in enumerate(decoded) if len(text) >= end)

    def _essence(self, edits: Sequence[Edit]) -> Asked | None:
        """Each subject alone, behind which the next token is to stay as likely as it is."""
        if not self.values.essence:
            return None
        subjects = [edit.subject or edit.prompt for edit in edits]
        encoded = [Encoded(tuple(ids), (self.tokenizer.eos_token_id,)) for ids in self.tokenizer(subjects)["input_ids"]]
        top, _, _ = self.states([row.ids for row in encoded])
        rows = TargetRows(encoded, top, range(len(edits)), len(edits))
        return rows, Places.of_subjects(rows, [len(row.prompt) - 1 for row in encoded])
