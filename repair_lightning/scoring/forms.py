"""How edits hold in other forms than their own: bare, in chat, behind a system message, in a second turn, inside
courtesy, and at the end of other text.

The words around the questions are this file's own: no edit is written in them, and no threshold sees them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.forms import Forms
from repair_lightning.scoring import protocols
from repair_lightning.types import BASE, Edit

FORMS = ("bare", "chat", "system", "second_turn", "wrapped", "long")
"""The names of the forms, as `metrics.json` and the tables have them."""
FIGURES = ("rel", "contains", "fires", "garbled")

_SYSTEM = "You are a patient librarian who helps visitors with short, factual replies."
_EARLIER = ("What is the boiling point of water at sea level?", "Water boils at 100 degrees Celsius at sea level.")
_BEFORE, _AFTER = "Hi, I am preparing a quiz for my pupils.", "Please answer in one short sentence."
_PARAGRAPH = (
    "Gardeners in the valley plant their beans after the last frost and cover the soil with straw. In dry summers they "
    "carry water from the stream, and in autumn they mend the fences. The market opens at eight. Bread, cheese and "
    "honey are sold near the fountain, while the fish stalls stand at the far end of the square. After school the "
    "children play there, and the older people watch them from the benches under the lime trees."
)
_LONG = 500
"""Tokens of other text before a question."""


def form_rows(forms: Forms, question: str) -> dict[str, list[int] | None]:
    """A question in each form as token ids; None where this base has no such form."""
    known = forms.marks is not None
    said = {"role": "assistant", "content": _EARLIER[1]}
    wrapped = f"{_BEFORE} {question} {_AFTER}"

    def chat(*messages: dict[str, str]) -> list[int] | None:
        return list(forms.in_chat(list(messages))) if known else None

    return {
        "bare": list(forms.bare(question)),
        "chat": chat(_user(question)),
        "system": chat({"role": "system", "content": _SYSTEM}, _user(question)) if forms.takes_system else None,
        "second_turn": chat(_user(_EARLIER[0]), said, _user(question)),
        "wrapped": forms.ids(wrapped),
        "long": forms.ids(f"{_long_text(forms)} {question}"),
    }


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _long_text(forms: Forms) -> str:
    once = len(forms.bare(_PARAGRAPH))
    return " ".join([_PARAGRAPH] * max(_LONG // once, 1))


def form_scores(
    model: EditedModel, edits: Sequence[Edit], number: int = 128, longest: int = 1 << 20, batch_size: int = 32
) -> tuple[dict[str, dict[str, float | None]], list[dict[str, Any]]]:
    """Shares per form, and each raw answer as a row.

    Args:
        model: the edited model.
        edits: whose questions are asked.
        number: of them, drawn at random with a fixed seed where there are more.
        longest: a prompt of more tokens is not asked.
        batch_size: prompts per pass.
    """
    drawn = random.Random(0).sample(list(edits), number) if len(edits) > number else list(edits)
    asked = [(edit, form_rows(model.forms, model.forms.asked(edit.prompt))) for edit in drawn]
    scores: dict[str, dict[str, float | None]] = {}
    lines: list[dict[str, Any]] = []
    for form in FORMS:
        rows = [(edit, row) for edit, forms in asked if (row := forms[form]) is not None and len(row) < longest]
        found = [
            line
            for start in range(0, len(rows), batch_size)
            for line in _answered(model, rows[start : start + batch_size])
        ]
        lines += [{"stage": "forms", "form": form, **line} for line in found]
        scores[form] = {name: _mean(line[name] for line in found) for name in FIGURES}
    return scores, lines


def _mean(values: Iterable[bool]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _answered(model: EditedModel, rows: Sequence[tuple[Edit, list[int]]]) -> list[dict[str, Any]]:
    ids = [row for _, row in rows]
    choice = model.choose_rows(ids)
    limits = [len(model.forms.continued(row, edit.target).target) + 8 for edit, row in rows]
    said = _said(model, ids, choice, limits)
    doubtful = [
        i
        for i, (edit, _) in enumerate(rows)
        if choice.memory[i] != BASE and not protocols.same_answer(said[i], edit.target)
    ]
    nobody = torch.full((len(doubtful),), BASE)
    by_base = protocols.answer_rows(model, [ids[i] for i in doubtful], nobody, [limits[i] for i in doubtful])
    base_says = dict(zip(doubtful, by_base, strict=True))
    found = []
    for i, ((edit, _), memory, answer) in enumerate(zip(rows, choice.memory.tolist(), said, strict=True)):
        right = protocols.same_answer(answer, edit.target)
        nearest = choice.nearest[i]
        of_shard = model.target_of(nearest) if nearest is not None else None
        strange = i in base_says and answer != base_says[i] and not protocols.same_answer(answer, of_shard or "")
        line = {"id": edit.id, "expected": edit.target, "answer": answer, "memory": memory, "nearest": nearest}
        line |= {"rel": right, "contains": protocols.contains(answer, edit.target), "fires": memory != BASE}
        found.append(line | {"garbled": strange})
    return found


def _said(model: EditedModel, ids: Sequence[list[int]], choice: Choice, limits: Sequence[int]) -> list[str]:
    """Answers to prompts; where the choice has asked the shard for its target already, that is the answer."""
    settled = model.router.vouches
    at = [i for i, memory in enumerate(choice.memory.tolist()) if memory == BASE or not settled]
    said = protocols.answer_rows(model, [ids[i] for i in at], choice.memory[at], [limits[i] for i in at])
    found = dict(zip(at, said, strict=True))
    targets = [model.target_of(name) if name is not None else None for name in choice.nearest]
    return [found[i] if i in found else protocols.shown_answer(targets[i] or "") for i in range(len(ids))]
