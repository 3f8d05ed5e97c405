"""Edits that are scored one by one, each the only one that the model ever got (N = 1 in the field's tables)."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from repair_lightning.scoring.protocols import perplexity, scores_of
from repair_lightning.scoring.scorer import Result, Scorer, confusion

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor


@dataclass
class Singles:
    """What single edits came to, in plain types; a score over them is the mean over all their prompts."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # of each prompt its line of `generations.jsonl`,
    owners: list[int] = field(default_factory=list)  # the shard that owned its edit,
    oracle: list[tuple[str, float, float]] = field(default_factory=list)  # and its mark under perfect routing
    memory_bytes: list[int] = field(default_factory=list)  # of each edit what it left,
    deviations: list[dict[str, float]] = field(default_factory=list)  # how far each layer of the base went,
    target_losses: list[tuple[float, int]] = field(default_factory=list)  # and for a hallucination record its loss

    def take(self, editor: Editor, part: Scorer, memory_bytes: int, losses: bool = False) -> None:
        """Score one edit, the only one that the editor holds: `part` asks its prompts, `memory_bytes` is what it has
        left in a pack, `losses` asks for that of its target."""
        owners = editor.owner_choice([question.edit for question in part.questions])
        choice, fresh = part.choose(), editor.base_changed
        self.rows += part.score("final", choice, owners, fresh).rows
        self.owners += owners.tolist()
        self.oracle += _marks(part.by_oracle(owners, fresh).rows)
        self.memory_bytes.append(memory_bytes)
        self.deviations.append({str(layer): x for layer, x in editor.edited.weights.deviations().items()})
        if losses:
            self.target_losses.append(part.target_loss(choice.memory))

    def result(self, stage: str, scorer: Scorer) -> Result:
        """The score over all of them, as of a stage; the scorer is that of all the edits."""
        places = {(q.edit, q.kind, q.prompt): q for q in scorer.questions}
        questions = [places[row["id"], row["kind"], row["prompt"]] for row in self.rows]
        memory = torch.tensor([row["memory"] for row in self.rows], dtype=torch.long)
        routing = confusion(questions, memory, torch.tensor(self.owners, dtype=torch.long))
        return Result(stage, scores_of(_marks(self.rows)), routing, [row | {"stage": stage} for row in self.rows])

    def figures(self) -> dict[str, Any]:
        """Means over the edits for `metrics.json`; the perplexity is over all tokens of all targets."""
        found: dict[str, Any] = {"number": len(self.memory_bytes), "memory_bytes": mean(self.memory_bytes or [0])}
        layers = dict.fromkeys(layer for one in self.deviations for layer in one)
        if layers:
            found["deviation"] = {layer: mean(one.get(layer, 0.0) for one in self.deviations) for layer in layers}
        return found | ({"perplexity": perplexity(self.target_losses)} if self.target_losses else {})


def _marks(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    return [(row["kind"], float(row["correct"]), row["teacher_forced"]) for row in rows]
