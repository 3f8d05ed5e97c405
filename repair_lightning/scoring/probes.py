"""Questions that no edit should touch: general-knowledge probes, asked before and after, and questions about edited
subjects for what guards."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repair_lightning.edits.records import read_rows
from repair_lightning.errors import FieldError, RecordError
from repair_lightning.memory.routers import Anchor
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.texts.relations import STAND_IN, bank
from repair_lightning.types import BASE


@dataclass(frozen=True, slots=True)
class KnownQuestion:
    """A question and the answers that count as right; none where only the base's own answer is to be kept."""

    prompt: str
    answers: tuple[str, ...]


def load_probes(path: str | Path) -> tuple[KnownQuestion, ...]:
    """Reads probes: records with `question` or `prompt`, and `answers` (a list) or `answer`. Raises `RepairError` for
    the first bad record, or where the file cannot be read at all."""
    found = []
    for number, row in enumerate(read_rows(path), 1):
        if isinstance(row, FieldError):
            raise RecordError.at(str(path), number, row)
        row = row if isinstance(row, Mapping) else {}
        prompt = row.get("question") or row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            remedy = 'write {"question": ..., "answers": [...]}'
            raise RecordError(str(path), number, "question", "is missing or no text", remedy)
        answers = row.get("answers", row.get("answer")) or []
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise RecordError(str(path), number, "answers", "is no list of texts", 'write "answers": ["...", ...]')
        found.append(KnownQuestion(prompt, tuple(answers)))
    return tuple(found)


class ProbeScorer:
    """Asks a model its probes; the base is asked first, so make it before the first edit."""

    def __init__(self, model: EditedModel, probes: tuple[KnownQuestion, ...]) -> None:
        self.model, self.probes = model, probes
        self.base = self._said(range(len(probes)), torch.full((len(probes),), BASE))

    def score(self, base_changed: bool = False) -> dict[str, float | int]:
        """Shares of right answers before (`pre`) and now (`final`), of unchanged answers (`same`), and of probes that a
        shard answers (`fired`)."""
        memory = self.model.choose([probe.prompt for probe in self.probes]).memory
        fired = (memory != BASE).tolist()
        now = self.base | self._said([i for i, fires in enumerate(fired) if fires or base_changed], memory)
        number, same = max(len(self.probes), 1), sum(now[i] == said for i, said in self.base.items())
        pre, final = self._right(self.base), self._right(now)
        shares = {"pre": pre, "final": final, "same": same, "fired": sum(fired)}
        return {"number": len(self.probes)} | {name: count / number for name, count in shares.items()}

    def _said(self, at: Sequence[int], memory: Tensor) -> dict[int, str]:
        prompts = [self.probes[i].prompt for i in at]
        return dict(zip(at, protocols.answers(self.model, prompts, memory[list(at)], 32), strict=True))

    def _right(self, said: Mapping[int, str]) -> int:
        known = [set(map(protocols.normalise, probe.answers)) for probe in self.probes]
        return sum(protocols.normalise(text) in known[i] for i, text in said.items())


_EACH = 8
"""Most questions about one subject."""
_WORDINGS = 64
"""So many wordings of the bank, at even distances, are put to use: what the router reads of them it reads once."""


def guard_questions(anchors: Sequence[Anchor], number: int) -> list[str]:
    """At most `number` other questions about what some edits are about, for what guards, the same for the same edits:
    from the bank of wordings, so none that scoring asks."""
    named = [anchor for anchor in anchors if anchor.subject][:number]
    each = min(_EACH, number // max(len(named), 1))
    wordings = bank()[0][:: len(bank()[0]) // _WORDINGS]
    found = [
        wording.replace(STAND_IN, anchor.subject)
        for anchor in named
        for wording in random.Random(anchor.asked).sample(wordings, each)
    ]
    return list(dict.fromkeys(found))
