"""RLSEdit: every edit is a term of one growing least-squares problem, whose exact minimiser the matrix is at any time.

Paper: "Beyond Hard Writes and Rigid Preservation: Soft Recursive Least-Squares for Lifelong LLM Editing". For each
written layer

    min_W  sum_i ||K_i W^T - V_i||^2 + lambda^2 ||W - W_0||^2 + mu^2 ||K_0 W^T - K_0 W_0^T||^2

is solved recursively (`functional.least_squares`): a write costs the same after ten thousand edits as after none, and
an edit is taken back by downdating, as if the problem had never had its term.

What is provable: the minimum is not above the objective at W_0, which is `E = sum_i ||K_i W_0^T - V_i||^2`. So
`||W - W_0|| <= sqrt(E) / lambda` and `||K_0 (W - W_0)^T|| <= sqrt(E) / mu`. Both sides of both are logged.

Deviations: values are absolute (the public code feeds differences and subtracts `K W` once more); by default each
target token has a key and a value of its own; anchors are the irrelevant prompts with the base's own answers; lambda is
in units of the anchors' root mean squared norm (without first tokens), mu^2 is divided by the number of anchors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import KEPT, register
from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.values import Values
from repair_lightning.editors.weights import ValueEditor
from repair_lightning.errors import ConfigError
from repair_lightning.functional.least_squares import Recursion
from repair_lightning.types import EditReport

log = logging.getLogger(__name__)

VALUES = Values(lr=0.03, check_every=3)
"""Small steps: what takes a target there with the least shift disturbs the least."""
RIDGE, ANCHORING = 0.1, 1.0


@dataclass(frozen=True)
class Term:
    """What an edit adds to a layer's objective: `keys` (u, F), `values` (u, D), and `energy`, what it is at W_0."""

    keys: Tensor
    values: Tensor
    energy: float


@register("rlsedit")
class RLSEdit(ValueEditor):
    """Soft recursive least squares.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layers: how many layers are written into.
        values: how values are found.
        ridge: lambda, what holds W to W_0, in units of the anchors' root mean squared norm.
        anchoring: mu, what holds the anchors' values; at 1 all anchors together weigh as much as a key per dimension.
        anchors: text file with an anchor prompt per line, or the prompts; None takes the irrelevant ones. Packs
            hold the prompts.
    """

    can_undo = True

    def __init__(
        self,
        base: str = "",
        layers: int = 1,
        values: Values = VALUES,
        ridge: float = RIDGE,
        anchoring: float = ANCHORING,
        anchors: str | list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(base=base, layers=layers, values=values, **common)
        self.ridge, self.anchoring = ridge, anchoring
        positive(self, "ridge")
        at_least(0, self, "anchoring")
        self.anchors = anchors
        if isinstance(anchors, str):
            if not Path(anchors).is_file():
                raise ConfigError(f"anchors: '{anchors}' is no file; give a text file with a prompt per line, or null")
            self.anchors = [line.strip() for line in Path(anchors).read_text("utf-8").splitlines() if line.strip()]
        if self.anchors == []:
            raise ConfigError(f"anchors: {anchors!r} holds no prompt; give prompts, a file with one per line, or null")
        self.anchored: list[str] = []  # the prompts whose answers the problems hold
        self.problems: dict[int, Recursion] = {}
        self.terms: dict[str, dict[int, Term]] = {}
        self._measured = lru_cache(1)(self._measure)

    def on_fit_start(self) -> None:
        """Besides, leave anchors out that scoring asks."""
        if self.anchors is not None:
            given = len(self.anchors)
            self.anchors = self.trainer.datamodule.unrelated(self.anchors)  # type: ignore[attr-defined]
            if not self.anchors:
                raise ConfigError(f"anchors: scoring asks all {given} of them; give other prompts, or null")
            if gone := given - len(self.anchors):
                log.warning("anchors: %d of %d are asked in scoring or repeated: left out", gone, given)
        super().on_fit_start()

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, say which prompts are anchors; a problem that is there has its own."""
        super().prepare(background, held_out)
        if not self.problems or not self.anchored:
            self.anchored = list(background[:KEPT] if self.anchors is None else self.anchors)

    def _measure(self, anchored: tuple[str, ...]) -> dict[int, tuple[Tensor, float]]:
        """By written layer, the anchors' keys (N, F) in the base as it was, and the mean of their squared norms,
        without each prompt's first token: many bases park values there that are hundreds of times as large as any
        other."""
        found = {}
        for layer, each in self.keys_of(anchored).items():
            later = torch.cat([key[min(1, len(key) - 1) :] for key in each]).float()
            found[layer] = torch.cat(each).float(), float(later.square().sum(-1).mean())
        return found

    def anchor_keys(self, layer: int) -> Tensor:
        """The anchors' keys (N, F) at a written layer, in the base as it was."""
        return self._measured(tuple(self.anchored))[layer][0]

    def strengths(self, layer: int) -> tuple[float, float]:
        """lambda^2 and mu^2 of a layer's problem, absolute."""
        keys, unit = self._measured(tuple(self.anchored))[layer]
        return self.ridge**2 * unit, self.anchoring**2 * keys.shape[1] / len(keys)

    def problem(self, layer: int) -> Recursion:
        """A layer's problem as it stands."""
        if layer not in self.problems:
            original = self.edited.weights.original(layer)
            self.problems[layer] = Recursion.start(original, self.anchor_keys(layer), *self.strengths(layer))
        return self.problems[layer]

    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the edits in; one that was in already is replaced."""
        found = self.problem(layer)
        for id in ids:
            old = self.terms.get(id, {}).get(layer)
            found = found if old is None else found.remove(old.keys, old.values)
        self._go_on(layer, found.absorb(keys, values))
        at_start = (keys @ self.edited.weights.original(layer).T - values).square().sum(-1)
        for i, id in enumerate(ids):
            mine = of == i
            term = Term(keys[mine].clone(), values[mine].clone(), float(at_start[mine].sum()))
            self.terms[id] = {**self.terms.get(id, {}), layer: term}
        return self.problems[layer].weight

    def _go_on(self, layer: int, found: Recursion) -> None:
        if found.rebuilt > self.problem(layer).rebuilt:
            log.info("layer %d: float32 was not enough for a step; its inverse was computed again in float64", layer)
        self.problems[layer] = found

    def forget(self, ids: Iterable[str]) -> None:
        """Take the edits' terms out of the problem; unknown ones are passed over."""
        gone = {id: self.terms[id] for id in ids if id in self.terms}
        self.terms = {id: terms for id, terms in self.terms.items() if id not in gone}
        for layer in self.written_layers if gone else []:
            keys, values = _joined([terms[layer] for terms in gone.values() if layer in terms])
            self._go_on(layer, self.problem(layer).remove(keys, values))
            self.edited.weights.put(layer, self.problems[layer].weight)
        if gone and not self.terms:
            self.problems = {}
            self.edited.weights.restore()

    def bounds(self, layer: int) -> dict[str, float]:
        """How far a layer's matrix has gone, `weights` or `||W - W_0||` and `anchors` or `||K_0 (W - W_0)^T||`, and how
        far it can have gone at most, `weights_bound` and `anchors_bound`."""
        moved = self.problem(layer).weight - self.edited.weights.original(layer)
        energy = sum(terms[layer].energy for terms in self.terms.values() if layer in terms)
        ridge, anchoring = self.strengths(layer)
        return {
            "weights": float(moved.norm()),
            "weights_bound": math.sqrt(energy / ridge),
            "anchors": float((self.anchor_keys(layer) @ moved.T).norm()),
            "anchors_bound": math.sqrt(energy / anchoring) if anchoring else math.inf,
        }

    def figures(self) -> dict[str, Any]:
        """Besides, the bounds, and how often float32 was not enough."""
        layers = self.written_layers if self.terms else []
        return super().figures() | {
            "bounds": {str(layer): self.bounds(layer) for layer in layers},
            "rebuilt": {str(layer): self.problem(layer).rebuilt for layer in layers},
        }

    def log_losses(self, reports: Sequence[EditReport]) -> None:
        """Besides, the deviations with their bounds."""
        super().log_losses(reports)
        if self.terms:
            for name, value in self.bounds(self.written_layers[-1]).items():
                self.log(f"write/{name}", value, batch_size=len(reports))

    def remember(self) -> Any:
        """References: neither a problem nor a term is changed in place, and a copy of all would cost more with each."""
        return dict(self.problems), dict(self.terms), self.anchored

    def recall(self, kept: Any) -> None:
        """The inverse of :meth:`remember`."""
        problems, terms, self.anchored = kept
        self.problems, self.terms = dict(problems), dict(terms)

    def own_state(self) -> dict[str, Any]:
        """The problems with their anchors' prompts, and what each edit added to them."""
        found: dict[str, Any] = {"ids": list(self.terms)}
        if self.problems:
            found["anchored"] = list(self.anchored)
        for layer, problem in self.problems.items():
            mine = [terms[layer] for terms in self.terms.values()]
            keys, values = _joined(mine)
            sizes = torch.tensor([len(term.keys) for term in mine])
            energies = torch.tensor([term.energy for term in mine], dtype=torch.float64)
            parts = vars(problem) | {"keys": keys, "values": values, "sizes": sizes, "energies": energies}
            found |= {f"{layer}.{name}": part for name, part in parts.items()}
        return found

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        ids, device = state.get("ids", []), self.edited.device
        self.anchored = list(state.get("anchored", self.anchored))
        self.problems, self.terms = {}, {id: {} for id in ids}
        for layer in [name.removesuffix(".weight") for name in state if name.endswith(".weight")]:
            parts = {part: state[f"{layer}.{part}"].to(device) for part in ("weight", "inverse", "information")}
            self.problems[int(layer)] = Recursion(**parts, rebuilt=state[f"{layer}.rebuilt"])
            sizes = state[f"{layer}.sizes"].tolist()
            keys, values = (state[f"{layer}.{part}"].to(device).split(sizes) for part in ("keys", "values"))
            for id, *term in zip(ids, keys, values, state[f"{layer}.energies"].tolist(), strict=True):
                self.terms[id][int(layer)] = Term(*term)


def _joined(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    return torch.cat([term.keys for term in terms]), torch.cat([term.values for term in terms])
