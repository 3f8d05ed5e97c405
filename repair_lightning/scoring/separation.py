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


@dataclass(frozen=True, slots=True)
class Separation:
    """What the router makes of some prompts.

    Attributes:
        questions: N prompts, one of each kind per edit.
        owners: (N,) the shard that owns each prompt's edit, or `BASE`.
        choice: the router's.
    """

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

    def of(self, kind: str, owner: int | None = None) -> Tensor:
        """Which prompts (N,) are of a kind, and of one shard's edits if asked."""
        wanted = torch.tensor([question.kind == kind for question in self.questions], dtype=torch.bool)
        return wanted if owner is None else wanted & (self.owners == owner)

    def auroc(self, name: str = SCORE, others: Collection[str] = OTHERS) -> float | None:
        """The probability that a prompt which is meant lies higher above its limit than one which is not; 1/2 tells
        nothing apart. None where one of the two sorts is missing, or nothing has a limit.

        A prompt that no edit is about, whose score no limit could meet, lies lowest.

        Args:
            name: of the measure. Scores count relative to their limits, other values by the distance from theirs.
            others: the kinds of prompts that are not meant.
        """
        value, limit = self.values[name]
        kinds = [question.kind for question in self.questions]
        meant = torch.tensor([kind in MEANT for kind in kinds], dtype=torch.bool)
        limited = limit.isfinite()
        counts = limited | ((name == SCORE) & (limit == torch.inf))
        counts &= meant | torch.tensor([kind in others for kind in kinds], dtype=torch.bool)
        above = (value / limit if name == SCORE else value - limit).where(limited, torch.tensor(-torch.inf))[counts]
        meant = meant[counts]
        if meant.all() or not meant.any() or not limited.any():
            return None
        ranks = above.unique(return_inverse=True)[1]  # the metric takes values in [0, 1]
        return float(binary_auroc(ranks / max(int(ranks.max()), 1), meant.long()))

    def confusion(self) -> dict[str, dict[str, float] | None]:
        """Who answered, in shares per kind of prompt."""
        return confusion(self.questions, self.choice.memory, self.owners)

    def right(self) -> dict[str, float]:
        """The share of each kind's prompts that reached who must answer them; kinds without prompts are left out."""
        shares = {kind: found for kind, found in self.confusion().items() if found}
        return {kind: found["right" if kind in MEANT else "base"] for kind, found in shares.items()}
