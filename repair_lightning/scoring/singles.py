"""Edits that are scored one by one, each the only one that the model ever got (N = 1 in the field's tables)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from repair_lightning.scoring.protocols import Scores, perplexity, scores_of
from repair_lightning.scoring.scorer import Result, Scorer, confusion

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor


@dataclass
class Singles:
    """What single edits came to; a score over them is the mean over all their prompts, as over those of one model.

    Of each prompt, asked of the model with its edit alone: its line of `generations.jsonl`, the shard that owned its
    edit, and under perfect routing its kind and two scores. Of each edit: what it left in bytes, how far the base's own
    weights went by layer, and for a hallucination record its target's summed loss and number of tokens.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    oracle: list[tuple[str, float, float]] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    deviations: list[dict[str, float]] = field(default_factory=list)
    target_losses: list[tuple[float, int]] = field(default_factory=list)

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

    def oracle_scores(self) -> Scores:
        """Under perfect routing."""
        return scores_of(self.oracle)

    def figures(self) -> dict[str, Any]:
        """Means over the edits for `metrics.json`; the perplexity is over all tokens of all targets."""
        found: dict[str, Any] = {"number": len(self.memory_bytes), "memory_bytes": mean(self.memory_bytes or [0])}
        layers = dict.fromkeys(layer for one in self.deviations for layer in one)
        if layers:
            found["deviation"] = {layer: mean(one.get(layer, 0.0) for one in self.deviations) for layer in layers}
        return found | ({"perplexity": perplexity(self.target_losses)} if self.target_losses else {})

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints; `Singles(**state)` is the inverse."""
        return asdict(self)


def _marks(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    return [(row["kind"], float(row["correct"]), row["teacher_forced"]) for row in rows]
