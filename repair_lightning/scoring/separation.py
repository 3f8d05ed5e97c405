"""How well a router keeps apart what a shard must answer from what it must leave alone, on a sample of edits.

It only routes: nothing is generated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from repair_lightning.memory.query import Choice
from repair_lightning.scoring.scorer import Question, confusion, questions_of
from repair_lightning.types import Edit

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

MEANT, OTHERS = ("edit", "rephrase"), ("locality", "near")
"""The kinds of prompts that a shard must answer, and those that it must leave to the base."""
SCORE = "score"


def auroc(meant: Tensor, others: Tensor) -> float | None:
    """The probability that one of `meant` (n,) is above one of `others` (m,), a tie counting half; None where either is
    empty."""
    if not len(meant) or not len(others):
        return None
    ranks = torch.cat([meant, others]).unique(return_inverse=True)[1]  # the metric takes values in [0, 1]
    labels = torch.arange(len(ranks)) < len(meant)
    return float(binary_auroc(ranks / max(int(ranks.max()), 1), labels.long()))


@dataclass(frozen=True, slots=True)
class Separation:
    """What the router makes of some prompts: N questions, one of each kind per edit; `owners` (N,), the shard that owns
    each prompt's edit, or `BASE`; the router's choice."""

    questions: tuple[Question, ...]
    owners: Tensor
    choice: Choice

    @classmethod
    def measure(cls, editor: Editor, edits: Iterable[Edit]) -> Separation:
        """Route the prompts of edits, the first of each kind of each."""
        first = {(question.edit, question.kind): question for question in reversed(questions_of(edits))}
        questions = tuple(reversed(first.values()))
        owners = editor.owner_choice([question.edit for question in questions])
        return cls(questions, owners, editor.choose([question.prompt for question in questions]))

    @property
    def values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What was measured of the prompts, and its limits, (N,) each: the score, and the router's further checks."""
        checks = {check.name: (check.value, check.limit) for check in self.choice.checks}
        return {SCORE: (self.choice.score, self.choice.threshold)} | checks

    def of(self, *kinds: str) -> Tensor:
        """Which prompts (N,) are of some kinds."""
        return torch.tensor([question.kind in kinds for question in self.questions], dtype=torch.bool)

    def auroc(self, name: str = SCORE, others: Collection[str] = OTHERS) -> float | None:
        """The probability that a prompt which is meant lies higher above its limit than one which is not; 1/2 tells
        nothing apart. None where one of the two sorts is missing, or nothing has a limit.

        Scores count relative to their limits, other values by the distance from theirs. A prompt that no edit is about,
        whose score no limit could meet, lies lowest.
        """
        value, limit = self.values[name]
        limited = limit.isfinite()
        if not limited.any():
            return None
        counts = limited | ((name == SCORE) & (limit == torch.inf))
        above = (value / limit if name == SCORE else value - limit).where(limited, torch.tensor(-torch.inf))
        return auroc(above[counts & self.of(*MEANT)], above[counts & self.of(*others)])

    def confusion(self) -> dict[str, dict[str, float] | None]:
        """Who answered, in shares per kind of prompt."""
        return confusion(self.questions, self.choice.memory, self.owners)

    def right(self) -> dict[str, float]:
        """The share of each kind's prompts that reached who must answer them; kinds without prompts are left out."""
        who = {True: "right", False: "base"}
        return {kind: found[who[kind in MEANT]] for kind, found in self.confusion().items() if found}
