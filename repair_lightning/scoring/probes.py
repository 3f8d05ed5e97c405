"""General-knowledge probes: questions that no edit touches, asked before and after, to see what else changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repair_lightning.edits.records import read_rows
from repair_lightning.errors import FieldError, RecordError
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.types import BASE


@dataclass(frozen=True, slots=True)
class KnownQuestion:
    """A question and the answers that count as right; none where only the base's own answer is to be kept."""

    prompt: str
    answers: tuple[str, ...]


def load_probes(path: str | Path) -> tuple[KnownQuestion, ...]:
    """Reads probes: records with `question` or `prompt`, and `answers` (a list) or `answer`.

    Raises:
        RecordError: for the first bad record.
        RepairError: where the file cannot be read at all.
    """
    return tuple(_probe(str(path), number, row) for number, row in enumerate(read_rows(path), 1))


def _probe(source: str, number: int, row: Any) -> KnownQuestion:
    if isinstance(row, FieldError):
        raise RecordError.at(source, number, row)
    row = row if isinstance(row, Mapping) else {}
    prompt = row.get("question") or row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RecordError(
            source, number, "question", "is missing or no text", 'write {"question": ..., "answers": [...]}'
        )
    answers = row.get("answers", row.get("answer")) or []
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RecordError(source, number, "answers", "is no list of texts", 'write "answers": ["...", ...]')
    return KnownQuestion(prompt, tuple(answers))


class ProbeScorer:
    """Asks a model its probes; the base is asked at once, so make it before the first edit.

    Args:
        model: the edited model.
        probes: what to ask.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts per forward pass.
    """

    def __init__(
        self, model: EditedModel, probes: tuple[KnownQuestion, ...], max_new_tokens: int = 32, batch_size: int = 64
    ) -> None:
        self.model, self.probes = model, probes
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.base = self._answers([BASE] * len(probes), range(len(probes)))

    def score(self, base_changed: bool = False) -> dict[str, float | int]:
        """Shares of right answers before (`pre`) and now (`final`), of unchanged answers (`same`), and of probes that a
        shard answers (`fired`)."""
        chosen = self.model.choose([probe.prompt for probe in self.probes], self.batch_size).memory.tolist()
        now = dict(self.base)
        now |= self._answers(chosen, [i for i, memory in enumerate(chosen) if base_changed or memory != BASE])
        number = max(len(self.probes), 1)
        return {
            "number": len(self.probes),
            "pre": sum(self._right(i, said) for i, said in self.base.items()) / number,
            "final": sum(self._right(i, said) for i, said in now.items()) / number,
            "same": sum(now[i] == said for i, said in self.base.items()) / number,
            "fired": sum(memory != BASE for memory in chosen) / number,
        }

    def _answers(self, chosen: list[int], index: Any) -> dict[int, str]:
        ask = list(index)
        memory = torch.tensor([chosen[i] for i in ask], dtype=torch.long)
        prompts = [self.probes[i].prompt for i in ask]
        said = protocols.answers(self.model, prompts, memory, self.max_new_tokens, self.batch_size)
        return dict(zip(ask, said, strict=True))

    def _right(self, i: int, said: str) -> bool:
        return protocols.normalise(said) in {protocols.normalise(answer) for answer in self.probes[i].answers}
