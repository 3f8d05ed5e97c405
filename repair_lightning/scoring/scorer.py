"""The score of an edited model on a set of edits: both protocols, routing confusion, every raw answer.

The base is asked once; later only prompts that a shard answers are asked again, because the others get the base's bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.scoring.metrics import KIND_OF_PROMPT, EditScores
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, TEACHER_FORCED
from repair_lightning.types import BASE, Edit


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of an edit: `kind` is `edit`, `rephrase`, `locality` or `near`; `expected` is the data set's
    answer."""

    edit: str
    kind: str
    prompt: str
    expected: str | None

    @property
    def keeps_base(self) -> bool:
        """Whether the right answer is the base's own."""
        return self.kind in ("locality", "near")


def questions_of(edits: Iterable[Edit]) -> list[Question]:
    """All prompts of the edits, kind by kind within each edit."""
    found: list[Question] = []
    for edit in edits:
        found.append(Question(edit.id, "edit", edit.prompt, edit.target))
        found += [Question(edit.id, "rephrase", prompt, edit.target) for prompt in edit.rephrases]
        found += [Question(edit.id, "locality", probe.prompt, probe.answer) for probe in edit.locality]
        found += [Question(edit.id, "near", probe.prompt, probe.answer) for probe in edit.near]
    return found


@dataclass(slots=True)
class _Replies:
    """What a model said to each question: its text, and its argmax tokens when the expected text is fed."""

    text: list[str]
    tokens: list[list[int]]


@dataclass(frozen=True, slots=True)
class Result:
    """One stage's score. `rows` holds every question with its raw answers, `routing` the confusion in shares."""

    stage: str
    scores: dict[str, dict[str, float | None]]
    routing: dict[str, dict[str, float] | None]
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)


class Scorer:
    """Asks a model the prompts of a set of edits, before and after editing.

    Args:
        model: the edited model.
        edits: whose prompts are asked.
        max_new_tokens: most tokens of an answer; None takes the longest target and 8 more, at least 32.
        batch_size: prompts per forward pass.
    """

    def __init__(
        self, model: EditedModel, edits: Sequence[Edit], max_new_tokens: int | None = None, batch_size: int = 64
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.questions = questions_of(edits)
        longest = max((len(model.forms.encode(e.prompt, e.target).target) for e in edits), default=0)
        self.max_new_tokens = max(32, longest + 8) if max_new_tokens is None else max_new_tokens
        self._base: _Replies | None = None
        self._said: dict[tuple[int, str], tuple[str, list[int]]] = {}

    def subset(self, ids: Collection[str]) -> Scorer:
        """A scorer of some of the edits that shares what the base replied."""
        wanted = [i for i, question in enumerate(self.questions) if question.edit in ids]
        part = Scorer(self.model, (), self.max_new_tokens, self.batch_size)
        part.questions = [self.questions[i] for i in wanted]
        part._base = _Replies([self.base.text[i] for i in wanted], [self.base.tokens[i] for i in wanted])
        part.fed = [self.fed[i] for i in wanted]
        return part

    @property
    def base(self) -> _Replies:
        """The base's own replies; asked once, so ask before anything changes the base."""
        if self._base is None:
            memory = torch.full((len(self.questions),), BASE)
            text = self._generate(self.questions, memory)
            # Where the data set gives no answer to feed, the base's own serves.
            self.fed = [q.expected or said or "." for q, said in zip(self.questions, text, strict=True)]
            self._base = _Replies(text, self._force(self.questions, self.fed, memory))
        return self._base

    def score(self, stage: str, choice: Choice, owners: Tensor, fresh: bool = False) -> Result:
        """Score a stage.

        Args:
            stage: its name in the report.
            choice: the memory of each question.
            owners: (n,) the shard that owns each question's edit, or `BASE`.
            fresh: ask every question again, because the base itself has changed.
        """
        replies = self._replies(choice.memory, fresh)
        metrics = {AUTOREGRESSIVE: EditScores(), TEACHER_FORCED: EditScores()}
        rows = []
        for i, question in enumerate(self.questions):
            exact, share = self._judge(i, replies)
            kind = KIND_OF_PROMPT[question.kind]
            metrics[AUTOREGRESSIVE].update(kind, torch.tensor([float(exact)]))
            metrics[TEACHER_FORCED].update(kind, torch.tensor([share]))
            rows.append(self._row(stage, i, replies.text[i], exact, share, choice))
        scores = {name: metric.compute() | {"contains": None, "garbled": None} for name, metric in metrics.items()}
        scores[AUTOREGRESSIVE] |= self._beside(rows)
        return Result(stage, scores, confusion(self.questions, choice.memory, owners), rows)

    def choose(self) -> Choice:
        """The router's choice for every question, from its prompt alone."""
        return self.model.choose([question.prompt for question in self.questions], self.batch_size)

    def perplexity(self, memory: Tensor) -> float:
        """Perplexity of the targets after the edits' own prompts."""
        return protocols.perplexity([self.target_loss(memory)])

    def target_loss(self, memory: Tensor) -> tuple[float, int]:
        """Of the targets after the edits' own prompts, see `protocols.target_loss`."""
        index = [i for i, question in enumerate(self.questions) if question.kind == "edit"]
        asked = [self.questions[i] for i in index]
        prompts, targets = [q.prompt for q in asked], [q.expected or "" for q in asked]
        return protocols.target_loss(self.model, prompts, targets, memory[index], self.batch_size)

    def _replies(self, memory: Tensor, fresh: bool) -> _Replies:
        """What each question's memory says; it is asked again only if it changed since it was last asked."""
        base, state = self.base, self._fingerprints(memory, fresh)
        keys = [(i, state[shard]) for i, shard in enumerate(memory.tolist()) if fresh or shard != BASE]
        ask = [i for i, key in keys if (i, key) not in self._said]
        if ask:
            chosen, questions = memory[ask], [self.questions[i] for i in ask]
            said = self._generate(questions, chosen)
            argmax = self._force(questions, [self.fed[i] for i in ask], chosen)
            known = dict(keys)
            self._said |= {(i, known[i]): (text, row) for i, text, row in zip(ask, said, argmax, strict=True)}
        text, tokens = list(base.text), list(base.tokens)
        for i, key in keys:
            text[i], tokens[i] = self._said[i, key]
        return _Replies(text, tokens)

    def _fingerprints(self, memory: Tensor, fresh: bool) -> dict[int, str]:
        """What each memory in use holds, as a hash: equal ones give equal answers."""
        changed = f"base {self.model.weights.fingerprint()} " if fresh else ""
        used = [shard for shard in memory.unique().tolist() if shard != BASE]
        return {BASE: changed} | {
            shard: changed + self.model.memory[shard].fingerprint() + self.model.router.fingerprint(shard)
            for shard in used
        }

    def _judge(self, i: int, replies: _Replies) -> tuple[bool, float]:
        question, base = self.questions[i], self.base
        right_text = base.text[i] if question.keeps_base else question.expected or ""
        exact = protocols.same_answer(replies.text[i], right_text)
        right = base.tokens[i] if question.keeps_base else self._target(i)
        return exact, protocols.token_share(replies.tokens[i], right)

    def _target(self, i: int) -> tuple[int, ...]:
        return self.model.forms.encode(self.questions[i].prompt, self.fed[i]).target

    def _beside(self, rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        """Of free answers: the share of edits whose answer holds the target, and of all answers those of a shard that
        are neither a target nor the base's."""
        edits = [protocols.contains(row["answer"], row["expected"]) for row in rows if row["kind"] == "edit"]
        garbled = [self._garbled(row) for row in rows]
        return {
            "contains": sum(edits) / len(edits) if edits else None,
            "garbled": sum(garbled) / len(garbled) if garbled else None,
        }

    def _garbled(self, row: dict[str, Any]) -> bool:
        if row["memory"] == BASE or row["answer"] == row["base_answer"]:
            return False
        of_shard = self.model.target_of(row["nearest"]) if row["nearest"] is not None else None
        targets = [target for target in (of_shard, row["expected"]) if target]
        return not any(protocols.same_answer(row["answer"], target) for target in targets)

    def _row(self, stage: str, i: int, said: str, exact: bool, share: float, choice: Choice) -> dict[str, Any]:
        question = self.questions[i]
        return {
            "stage": stage,
            "id": question.edit,
            "kind": question.kind,
            "prompt": question.prompt,
            "expected": question.expected,
            "answer": said,
            "base_answer": self.base.text[i],
            "correct": exact,
            "teacher_forced": round(share, 6),
            "memory": int(choice.memory[i]),
            "score": _finite(choice.score[i]),
            "threshold": _finite(choice.threshold[i]),
            "nearest": choice.nearest[i],
        }

    def _generate(self, questions: Sequence[Question], memory: Tensor) -> list[str]:
        prompts = [question.prompt for question in questions]
        return protocols.answers(self.model, prompts, memory, self.max_new_tokens, self.batch_size)

    def _force(self, questions: Sequence[Question], fed: Sequence[str], memory: Tensor) -> list[list[int]]:
        prompts = [question.prompt for question in questions]
        return protocols.forced_tokens(self.model, prompts, fed, memory, self.batch_size)


def confusion(questions: Sequence[Question], memory: Tensor, owners: Tensor) -> dict[str, dict[str, float] | None]:
    """Who answered, in shares per kind of prompt: the base, the `right` shard or a `wrong` one.

    Args:
        questions: N prompts.
        memory: (N,) who answered each.
        owners: (N,) the shard that owns each question's edit, or `BASE`.
    """
    counts = {kind: Counter[str]() for kind in KIND_OF_PROMPT}
    for question, chosen, owner in zip(questions, memory.tolist(), owners.tolist(), strict=True):
        counts[question.kind]["base" if chosen == BASE else "right" if chosen == owner else "wrong"] += 1
    return {kind: _shares(count) for kind, count in counts.items()}


def oracle_choice(questions: Sequence[Question], owners: Tensor) -> Choice:
    """Perfect routing: an edit's prompts to its owner, everything else to the base."""
    memory = [BASE if q.keeps_base else owner for q, owner in zip(questions, owners.tolist(), strict=True)]
    return replace(Choice.base(len(questions)), memory=torch.tensor(memory, dtype=torch.long))


def _shares(count: Counter[str]) -> dict[str, float] | None:
    total = sum(count.values())
    return {name: count[name] / total for name in ("base", "right", "wrong")} if total else None


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return round(number, 6) if abs(number) != float("inf") else None
