"""How edits hold in other forms than their own: bare, in chat, after a system message, in a second turn, inside
courtesy, and at the end of other text.

The words around the questions are this file's own: no edit is written in them, and no threshold sees them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.models.edited import EditedModel
from repair_lightning.models.forms import Forms
from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import contains, mean_of, same_answer
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
_BATCH = 32


def form_rows(forms: Forms, question: str) -> dict[str, list[int] | None]:
    """A question in each form as token ids; None where this base has no such form."""
    asked = {"role": "user", "content": question}
    system = {"role": "system", "content": _SYSTEM}
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), _EARLIER, strict=True)]
    other_text = " ".join([_PARAGRAPH] * max(_LONG // len(forms.bare(_PARAGRAPH)), 1))

    def chat(*messages: dict[str, str]) -> list[int] | None:
        return list(forms.in_chat(list(messages))) if forms.marks is not None else None

    return {
        "bare": list(forms.bare(question)),
        "chat": chat(asked),
        "system": chat(system, asked) if forms.takes_system else None,
        "second_turn": chat(*turns, asked),
        "wrapped": forms.ids(f"{_BEFORE} {question} {_AFTER}"),
        "long": forms.ids(f"{other_text} {question}"),
    }


def form_scores(
    model: EditedModel, edits: Sequence[Edit], number: int = 128
) -> tuple[dict[str, dict[str, float | None]], list[dict[str, Any]]]:
    """Shares per form, and each raw answer as a row, of `number` edits, drawn at random with a fixed seed where there
    are more. A prompt with as many tokens as the base reads is not asked."""
    drawn = random.Random(0).sample(list(edits), number) if len(edits) > number else list(edits)
    asked = [(edit, form_rows(model.forms, model.forms.asked(edit.prompt))) for edit in drawn]
    scores: dict[str, dict[str, float | None]] = {}
    lines: list[dict[str, Any]] = []
    for form in FORMS:
        rows = [(edit, row) for edit, forms in asked if (row := forms[form]) and len(row) < model.longest]
        parts = [_answered(model, rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
        found = [{"stage": "forms", "form": form, **line} for part in parts for line in part]
        scores[form] = {name: mean_of(line[name] for line in found) for name in FIGURES}
        lines += found
    return scores, lines


def _answered(model: EditedModel, asked: Sequence[tuple[Edit, list[int]]]) -> list[dict[str, Any]]:
    rows = [row for _, row in asked]
    limits = [len(model.forms.continued(row, edit.target).target) + 8 for edit, row in asked]
    choice = model.choose_rows(rows)
    targets = [model.target_of(nearest) or "" if nearest is not None else "" for nearest in choice.nearest]

    def answers(at: list[int], memory: Tensor) -> dict[int, str]:
        found = protocols.answer_rows(model, [rows[i] for i in at], memory[at], [limits[i] for i in at])
        return dict(zip(at, found, strict=True))

    fires = (choice.memory != BASE).tolist()
    # Where the choice has asked the shard for its target already, that is the answer.
    ask = [i for i, fired in enumerate(fires) if not (fired and model.router.vouches)]
    said = {i: protocols.shown_answer(target) for i, target in enumerate(targets)} | answers(ask, choice.memory)
    right = [same_answer(said[i], edit.target) for i, (edit, _) in enumerate(asked)]
    doubtful = [i for i, fired in enumerate(fires) if fired and not right[i]]
    base_says = answers(doubtful, torch.full_like(choice.memory, BASE))
    found = []
    for i, (edit, _) in enumerate(asked):
        garbled = i in base_says and said[i] != base_says[i] and not same_answer(said[i], targets[i])
        line = {"id": edit.id, "expected": edit.target, "answer": said[i], "memory": int(choice.memory[i])}
        line |= {"nearest": choice.nearest[i], "rel": right[i], "contains": contains(said[i], edit.target)}
        found.append(line | {"fires": fires[i], "garbled": garbled})
    return found
