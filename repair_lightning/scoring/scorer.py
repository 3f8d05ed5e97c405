"""The score of an edited model on a set of edits: both protocols, routing confusion, every raw answer.

The base is asked once; later only prompts that a shard answers are asked again, because the others get the base's bits.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, KIND_OF_PROMPT, Scores, mean_of, scores_of
from repair_lightning.storage.files import rounded
from repair_lightning.types import BASE, READS, Edit

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

Reply = tuple[str, list[int]]
"""What a model says to a question: its answer, and its argmax tokens when the expected text is fed."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of an edit of a kind in `KIND_OF_PROMPT`; `expected` is the data set's answer, and `aliases` are other
    spellings of it, which are right in free generation alone."""

    edit: str
    kind: str
    prompt: str
    expected: str | None
    aliases: tuple[str, ...] = ()

    @property
    def keeps_base(self) -> bool:
        """Whether the right answer is the base's own."""
        return self.kind in ("locality", "near")


def questions_of(edits: Iterable[Edit]) -> list[Question]:
    """All prompts of the edits, kind by kind within each edit."""
    found: list[Question] = []
    for edit in edits:
        asked = [("edit", edit.prompt), *(("rephrase", prompt) for prompt in edit.rephrases)]
        found += [Question(edit.id, kind, prompt, edit.target, edit.aliases) for kind, prompt in asked]
        found += [Question(edit.id, "locality", probe.prompt, probe.answer) for probe in edit.locality]
        found += [Question(edit.id, "near", probe.prompt, probe.answer) for probe in edit.near]
    return found


def sample_of(edits: Sequence[Edit], number: int) -> list[Edit]:
    """At most `number` of the edits in their order, drawn at random with a fixed seed; 0 gives all of them."""
    if not number or len(edits) <= number:
        return list(edits)
    return [edits[i] for i in sorted(random.Random(0).sample(range(len(edits)), number))]


def scored_of(sample: Sequence[Edit], edits: Sequence[Edit]) -> dict[str, int] | None:
    """How many of the edits are scored, for `metrics.json`; None where all are."""
    return {"edits": len(sample), "of": len(edits)} if len(sample) < len(edits) else None


@dataclass(frozen=True, slots=True)
class Result:
    """One stage's score. `rows` holds every question with its raw answers, `routing` the confusion in shares."""

    stage: str
    scores: Scores
    routing: dict[str, dict[str, float] | None]
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)


class Scorer:
    """Asks a model the prompts of a set of edits, before and after editing.

    Answers have at most as many tokens as the longest target, or alias, and 8 more, or 32. In free generation an alias
    is right wherever the target is, under teacher forcing nowhere.
    """

    def __init__(self, model: EditedModel, edits: Sequence[Edit]) -> None:
        self.model, self.questions = model, questions_of(edits)
        right = ((e.prompt, answer) for e in edits for answer in (e.target, *e.aliases))
        longest = max((len(model.forms.encode(*pair).target) for pair in right), default=0)
        self.max_new_tokens = max(32, longest + 8)
        self._fed: list[str] = []
        self._said: dict[tuple[int, str], Reply] = {}

    def subset(self, ids: Collection[str]) -> Scorer:
        """A scorer of some of the edits that shares what the base replied."""
        wanted = [i for i, question in enumerate(self.questions) if question.edit in ids]
        part = copy(self)
        part.base, part._said = [self.base[i] for i in wanted], {}
        part.questions, part._fed = [self.questions[i] for i in wanted], [self._fed[i] for i in wanted]
        return part

    @property
    def nobody(self) -> Tensor:
        """`BASE` (n,) for each question."""
        return torch.full((len(self.questions),), BASE)

    @cached_property
    def base(self) -> list[Reply]:
        """The base's own replies; asked once, so ask before anything changes the base."""
        return self._ask(list(range(len(self.questions))), self.nobody)

    def score(self, stage: str, who: Choice | Tensor, owners: Tensor, fresh: bool = False) -> Result:
        """Score a stage, given who answers each question, a choice or memories (n,), and `owners` (n,), the shard that
        owns its edit, or `BASE`. `fresh` asks every question again, because the base itself has changed."""
        choice = who if isinstance(who, Choice) else replace(Choice.base(len(who)), memory=who)
        marks, rows, held = [], [], []
        for i, (said, tokens) in enumerate(self._replies(choice, fresh)):
            question, (own, own_tokens) = self.questions[i], self.base[i]
            right: tuple[str, ...] = (own,)
            right_tokens = own_tokens
            if not question.keeps_base:
                right = (question.expected or "", *question.aliases)
                right_tokens = list(self.model.forms.encode(question.prompt, self._fed[i]).target)
            exact = protocols.says(said, right)
            held += [protocols.holds(said, right)] if question.kind == "edit" else []
            marks.append((question.kind, float(exact), protocols.token_share(tokens, right_tokens)))
            row: dict[str, Any] = {"stage": stage, "id": question.edit, "kind": question.kind}
            row |= {"prompt": question.prompt, "expected": question.expected, "answer": said, "base_answer": own}
            row |= {"correct": exact, "teacher_forced": rounded(marks[-1][2]), "memory": int(choice.memory[i])}
            row |= {"score": rounded(float(choice.score[i])), "threshold": rounded(float(choice.threshold[i]))}
            rows.append(row | {"nearest": choice.nearest[i], "checks": _checks(choice, i)})
        scores = {name: found | {"contains": None, "garbled": None} for name, found in scores_of(marks).items()}
        scores[AUTOREGRESSIVE] |= {
            "contains": mean_of(held),
            "garbled": mean_of(self._garbled(row) for row in rows),
        }
        return Result(stage, scores, confusion(self.questions, choice.memory, owners), rows)

    def by_base(self, stage: str, fresh: bool = False) -> Result:
        """Score a stage in which the base answers everything and owns every edit."""
        return self.score(stage, self.nobody, self.nobody, fresh)

    def by_oracle(self, owners: Tensor, fresh: bool = False) -> Result:
        """Score perfect routing: an edit's prompts to its owner, everything else to the base."""
        keeps = torch.tensor([question.keeps_base for question in self.questions], dtype=torch.bool)
        return self.score("oracle", owners.masked_fill(keeps, BASE), owners, fresh)

    def choose(self) -> Choice:
        """The router's choice for every question, from its prompt alone."""
        return self.model.choose([question.prompt for question in self.questions])

    def perplexity(self, memory: Tensor) -> float:
        """Perplexity of the targets after the edits' own prompts."""
        return protocols.perplexity([self.target_loss(memory)])

    def target_loss(self, memory: Tensor) -> tuple[float, int]:
        """Of the targets after the edits' own prompts, see `protocols.target_loss`."""
        asked = {i: question for i, question in enumerate(self.questions) if question.kind == "edit"}
        prompts, targets = [q.prompt for q in asked.values()], [q.expected or "" for q in asked.values()]
        return protocols.target_loss(self.model, prompts, targets, memory[list(asked)])

    def _ask(self, index: list[int], memory: Tensor, vouched: Mapping[int, str] | None = None) -> list[Reply]:
        """The replies to some questions; the base is the first to be asked.

        `vouched` gives the answers that choosing who answers has found already: their memory says just that.
        """
        text, tokens = dict(vouched or {}), {}
        ask = [n for n, i in enumerate(index) if i not in text]
        prompts = {i: self.questions[i].prompt for i in index}
        said = protocols.answers(self.model, [prompts[index[n]] for n in ask], memory[ask], self.max_new_tokens)
        text |= zip((index[n] for n in ask), said, strict=True)
        if not self._fed:  # where the data set gives no answer to feed, the base's own serves
            self._fed = [self.questions[i].expected or text[i] or "." for i in index]
        for i, answer in (vouched or {}).items():
            if answer == protocols.shown_answer(self._fed[i]):
                tokens[i] = list(self.model.forms.encode(prompts[i], self._fed[i]).target)
        ask = [n for n, i in enumerate(index) if i not in tokens]
        fed = [self._fed[index[n]] for n in ask]
        forced = protocols.forced_tokens(self.model, [prompts[index[n]] for n in ask], fed, memory[ask])
        tokens |= zip((index[n] for n in ask), forced, strict=True)
        return [(text[i], tokens[i]) for i in index]

    def _replies(self, choice: Choice, fresh: bool) -> list[Reply]:
        """What each question's memory says; it is asked again only if it changed since it was last asked."""
        memory = choice.memory
        changed = f"base {self.model.weights.fingerprint()} " if fresh else ""
        holds = {BASE: changed}  # what each memory in use holds, as a hash: equal ones give equal answers
        for shard in set(memory.tolist()) - {BASE}:
            held = "" if shard == READS else self.model.memory[shard].fingerprint()
            holds[shard] = changed + held + self.model.router.fingerprint(shard)
        keys = {i: (i, holds[shard]) for i, shard in enumerate(memory.tolist()) if fresh or shard != BASE}
        base = self.base  # asked first
        if ask := [i for i, key in keys.items() if key not in self._said]:
            known = protocols.vouched(self.model, choice)
            replies = self._ask(ask, memory[ask], {i: known[i] for i in ask if i in known})
            self._said.update(zip((keys[i] for i in ask), replies, strict=True))
        return [self._said[keys[i]] if i in keys else own for i, own in enumerate(base)]

    def _garbled(self, row: dict[str, Any]) -> bool:
        """Whether a shard's answer is neither a target nor the base's."""
        if row["memory"] < 0 or row["answer"] == row["base_answer"] or row["correct"]:
            return False
        of_shard = self.model.target_of(row["nearest"]) if row["nearest"] is not None else None
        return not protocols.says(row["answer"], [target for target in (of_shard, row["expected"]) if target])


def _checks(choice: Choice, i: int) -> dict[str, list[float | None]]:
    """What a prompt had to pass besides its score, by name: the value, and the limit that it had to reach."""
    asked = [(one.name, float(one.value[i]), float(one.limit[i])) for one in choice.checks if one.limit[i].isfinite()]
    return {name: [rounded(value), rounded(limit)] for name, value, limit in asked}


def confusion(questions: Sequence[Question], memory: Tensor, owners: Tensor) -> dict[str, dict[str, float] | None]:
    """Who answered N prompts, in shares per kind of prompt: the base, the `right` shard or a `wrong` one. `memory` (N,)
    is who answered each, `owners` (N,) the shard that owns each question's edit, or `BASE`."""
    who: dict[str, list[str]] = {kind: [] for kind in KIND_OF_PROMPT}
    for question, chosen, owner in zip(questions, memory.tolist(), owners.tolist(), strict=True):
        who[question.kind].append("base" if chosen < 0 else "right" if chosen == owner else "wrong")
    return {
        kind: {name: found.count(name) / len(found) for name in ("base", "right", "wrong")} if found else None
        for kind, found in who.items()
    }


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

    def result(self, stage: str) -> Result:
        """The score over all of them, as of a stage."""
        questions = [Question(row["id"], row["kind"], row["prompt"], row["expected"]) for row in self.rows]
        memory = torch.tensor([row["memory"] for row in self.rows], dtype=torch.long)
        routing = confusion(questions, memory, torch.tensor(self.owners, dtype=torch.long))
        return Result(stage, scores_of(_marks(self.rows)), routing, [row | {"stage": stage} for row in self.rows])

    def figures(self) -> dict[str, Any]:
        """Means over the edits for `metrics.json`; the perplexity is over all tokens of all targets."""
        found: dict[str, Any] = {"number": len(self.memory_bytes), "memory_bytes": mean(self.memory_bytes or [0])}
        layers = dict.fromkeys(layer for one in self.deviations for layer in one)
        if layers:
            found["deviation"] = {layer: mean(one.get(layer, 0.0) for one in self.deviations) for layer in layers}
        return found | ({"perplexity": protocols.perplexity(self.target_losses)} if self.target_losses else {})


def _marks(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    return [(row["kind"], float(row["correct"]), row["teacher_forced"]) for row in rows]
