"""RLSEdit: every edit is a term of one growing least-squares problem, whose exact minimiser the matrix is at any time.

Paper: "Beyond Hard Writes and Rigid Preservation: Soft Recursive Least-Squares for Lifelong LLM Editing". For each
written layer

    min_W  sum_i ||K_i W^T - V_i||^2 + lambda^2 ||W - W_0||^2 + mu^2 ||K_0 W^T - K_0 W_0^T||^2

is solved recursively (`functional.least_squares`): a write costs the same after ten thousand edits as after none, early
edits weigh as much as late ones, and an edit is taken back by downdating: the problem is as if it had never had the
edit's term. What later edits were given as keys and values stays as it was found while that edit was in.

What is provable: the minimum is not above the objective at W_0, which is `E = sum_i ||K_i W_0^T - V_i||^2`. So
`||W - W_0|| <= sqrt(E) / lambda` and `||K_0 (W - W_0)^T|| <= sqrt(E) / mu`. Both sides of both are logged.

Our deviations: values are absolute (the public code feeds differences and subtracts `K W` once more); by default each
target token has a key and a value of its own, because greedy decoding must say every one of them; anchors are what the
stream calls irrelevant, with the base's own answers; lambda is in units of the anchors' root mean squared norm (without
first tokens), mu^2 is divided by the number of anchors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import KEPT, register
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


def _prompts_in(file: str) -> list[str]:
    """The lines of a text file."""
    if not Path(file).is_file():
        raise ConfigError(f"anchors: '{file}' is no file; give a text file with a prompt per line, or null")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"anchors: '{file}' holds no prompt; give one per line, or null")
    return prompts


@register("rlsedit")
class RLSEdit(ValueEditor):
    """Soft recursive least squares; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layers: how many layers are written into.
        values: how values are found.
        ridge: lambda, what holds W to W_0, in units of the anchors' root mean squared norm.
        anchoring: mu, what holds the anchors' values; at 1 all anchors together weigh as much as a key per dimension.
        anchors: text file with an anchor prompt per line, or the prompts; None takes the irrelevant ones. Packs
            hold the prompts.
        common: what every editor takes, see `Editor`.
    """

    can_undo = True
    _anchors: tuple[list[str], dict[int, Tensor], dict[int, float]] | None = None

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
        super().__init__(base, layers=layers, values=values, **common)
        if not 0 < ridge < math.inf:
            raise ConfigError(
                f"ridge must be positive and finite, got {ridge}: without it the problem has no single solution"
            )
        if not 0 <= anchoring < math.inf:
            raise ConfigError(f"anchoring must be at least 0 and finite, got {anchoring}; 0 leaves the anchors out")
        self.ridge, self.anchoring = ridge, anchoring
        self.anchors = _prompts_in(anchors) if isinstance(anchors, str) else anchors
        if self.anchors == []:
            raise ConfigError("anchors: an empty list; give prompts, a file of them, or null")
        self.anchored: list[str] = []
        """The prompts whose answers the problems hold."""
        self.problems: dict[int, Recursion] = {}
        self.terms: dict[str, dict[int, Term]] = {}

    def on_fit_start(self) -> None:
        """Besides, leave anchors out that scoring asks."""
        self.leave_out_asked(self.trainer.datamodule.unrelated)  # type: ignore[attr-defined]
        super().on_fit_start()

    def leave_out_asked(self, unrelated: Callable[[Sequence[str]], list[str]]) -> None:
        """Keep those of the given anchors that are unrelated to what is scored.

        Raises:
            ConfigError: there is none.
        """
        if self.anchors is None:
            return
        left = unrelated(self.anchors)
        if not left:
            raise ConfigError(f"anchors: scoring asks all {len(self.anchors)} of them; give other prompts, or null")
        if len(left) < len(self.anchors):
            gone = len(self.anchors) - len(left)
            log.warning("anchors: %d of %d are asked in scoring or repeated: left out", gone, len(self.anchors))
        self.anchors = left

    def measure(self, background: Sequence[str]) -> None:
        """Besides, say which prompts are anchors; a problem that is there has its own."""
        super().measure(background)
        if not self.problems or not self.anchored:
            self.anchored = list(background[:KEPT] if self.anchors is None else self.anchors)

    @property
    def anchor_keys(self) -> dict[int, Tensor]:
        """By written layer, the anchors' keys (N, F) in the base as it was."""
        return self._measured()[1]

    @property
    def units(self) -> dict[int, float]:
        """By written layer, the mean squared norm of the anchors' keys but for each prompt's first token: many bases
        park values there that are hundreds of times as large as any other."""
        return self._measured()[2]

    def _measured(self) -> tuple[list[str], dict[int, Tensor], dict[int, float]]:
        if self._anchors is None or self._anchors[0] != self.anchored:
            said = self.said_by_base(self.anchored)
            with self.edited.weights.originals():
                _, keys, _ = self.states([row.ids for row in said])
            units = {
                layer: float(torch.cat([key[min(1, len(key) - 1) :] for key in each]).float().square().sum(-1).mean())
                for layer, each in keys.items()
            }
            found = {layer: torch.cat(each).float() for layer, each in keys.items()}
            self._anchors = list(self.anchored), found, units
        return self._anchors

    def strengths(self, layer: int) -> tuple[float, float]:
        """lambda^2 and mu^2 of a layer's problem, absolute."""
        keys = self.anchor_keys[layer]
        return self.ridge**2 * self.units[layer], self.anchoring**2 * keys.shape[1] / len(keys)

    def problem(self, layer: int) -> Recursion:
        """A layer's problem as it stands."""
        if layer not in self.problems:
            original = self.edited.weights.original(layer)
            self.problems[layer] = Recursion.start(original, self.anchor_keys[layer], *self.strengths(layer))
        return self.problems[layer]

    def solve(self, layer: int, ids: Sequence[str], of: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the edits in; one that was in already is replaced."""
        found = self.problem(layer)
        for id in ids:
            old = self.terms.get(id, {}).get(layer)
            found = found if old is None else found.remove(old.keys, old.values)
        found = found.absorb(keys, values)
        self._count(layer, found)
        at_start = (keys @ self.edited.weights.original(layer).T - values).square().sum(-1)
        for i, id in enumerate(ids):
            mine = of == i
            term = Term(keys[mine].clone(), values[mine].clone(), float(at_start[mine].sum()))
            self.terms[id] = {**self.terms.get(id, {}), layer: term}
        return found.weight

    def _count(self, layer: int, found: Recursion) -> None:
        if found.rebuilt > self.problem(layer).rebuilt:
            log.info("layer %d: float32 was not enough for a step; its inverse was computed anew in float64", layer)
        self.problems[layer] = found

    def forget(self, ids: Iterable[str]) -> None:
        """Take the edits' terms out of the problem; unknown ones are passed over."""
        known = [id for id in dict.fromkeys(ids) if id in self.terms]
        if not known:
            return
        gone = {id: self.terms[id] for id in known}
        self.terms = {id: terms for id, terms in self.terms.items() if id not in gone}
        for layer in self.written_layers:
            mine = [terms[layer] for terms in gone.values() if layer in terms]
            keys, values = (torch.cat([getattr(term, name) for term in mine]) for name in ("keys", "values"))
            self._count(layer, self.problem(layer).remove(keys, values))
            if self.terms:
                self.edited.weights.put(layer, self.problems[layer].weight)
        if not self.terms:
            self.problems = {}
            self.edited.weights.restore()

    # -- what is provable ---------------------------------------------------------------------------------------------

    def bounds(self, layer: int) -> dict[str, float]:
        """How far a layer's matrix has gone, and how far it can have gone at most.

        Returns:
            `weights`, `||W - W_0||`, and `weights_bound`; `anchors`, `||K_0 (W - W_0)^T||`, and `anchors_bound`.
        """
        moved = self.problem(layer).weight - self.edited.weights.original(layer)
        energy = sum(terms[layer].energy for terms in self.terms.values() if layer in terms)
        ridge, anchoring = self.strengths(layer)
        return {
            "weights": float(moved.norm()),
            "weights_bound": math.sqrt(energy / ridge),
            "anchors": float((self.anchor_keys[layer] @ moved.T).norm()),
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

    # -- state --------------------------------------------------------------------------------------------------------

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
        found |= {"anchored": list(self.anchored)} if self.problems else {}
        for layer in self.problems:
            problem, mine = self.problems[layer], [terms[layer] for terms in self.terms.values()]
            found |= {f"{layer}.{name}": getattr(problem, name) for name in ("weight", "inverse", "information")}
            found[f"{layer}.rebuilt"] = problem.rebuilt
            found[f"{layer}.sizes"] = torch.tensor([len(term.keys) for term in mine])
            found[f"{layer}.energies"] = torch.tensor([term.energy for term in mine], dtype=torch.float64)
            found |= {f"{layer}.{name}": torch.cat([getattr(t, name) for t in mine]) for name in ("keys", "values")}
        return found

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        ids, device = state.get("ids", []), self.edited.device
        self.anchored = list(state.get("anchored", self.anchored))
        self.problems, self.terms = {}, {id: {} for id in ids}
        for name in [name for name in state if name.endswith(".weight")]:
            layer = name.removesuffix(".weight")
            parts = {part: state[f"{layer}.{part}"].to(device) for part in ("weight", "inverse", "information")}
            self.problems[int(layer)] = Recursion(**parts, rebuilt=state[f"{layer}.rebuilt"])
            sizes = state[f"{layer}.sizes"].tolist()
            keys, values = (state[f"{layer}.{part}"].to(device).split(sizes) for part in ("keys", "values"))
            for each in zip(ids, keys, values, state[f"{layer}.energies"].tolist(), strict=True):
                self.terms[each[0]][int(layer)] = Term(*each[1:])
