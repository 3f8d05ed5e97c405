"""How edits hold in other forms than their own: bare, in chat, after a system message, in a second turn, inside
courtesy, and at the end of other text; and other questions about their subjects.

The words around the questions, and some of the other questions, are this file's own: no edit is written in them, and no
threshold sees them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from repair_lightning.models.edited import EditedModel
from repair_lightning.models.forms import Forms, shared
from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import holds, mean_of, same_answer, says
from repair_lightning.scoring.scorer import sample_of
from repair_lightning.texts import asking
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
    are more. A prompt with as many tokens as the base reads is not asked; an alias of the target is right too."""
    asked = [(edit, form_rows(model.forms, model.forms.asked(edit.prompt))) for edit in sample_of(edits, number)]
    lines: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for form in FORMS:
        rows = [(edit, row) for edit, forms in asked if (row := forms[form]) and len(row) < model.longest]
        first, last = (pick((row for _, row in rows), default=[]) for pick in (min, max))
        begins = first[: shared(first, last)]  # what stands before each question is read once
        with model.prefixes.heads.also(begins) if model.prefixes else nullcontext():
            for start in range(0, len(rows), _BATCH):
                found = _answered(model, rows[start : start + _BATCH])
                lines[form] += [{"stage": "forms", "form": form, **line} for line in found]
    scores = {form: {name: mean_of(line[name] for line in lines[form]) for name in FIGURES} for form in FORMS}
    return scores, [line for found in lines.values() for line in found]


def _answered(model: EditedModel, asked: Sequence[tuple[Edit, list[int]]]) -> list[dict[str, Any]]:
    rows = [row for _, row in asked]
    expected = [(edit.target, *edit.aliases) for edit, _ in asked]
    limits = [
        max(len(model.forms.continued(row, answer).target) for answer in answers) + 8
        for (_, row), answers in zip(asked, expected, strict=True)
    ]
    choice = model.choose_rows(rows)
    targets = [model.target_of(nearest) or "" if nearest is not None else "" for nearest in choice.nearest]

    def answers(at: list[int], memory: Tensor) -> dict[int, str]:
        found = protocols.answer_rows(model, [rows[i] for i in at], memory[at], [limits[i] for i in at])
        return dict(zip(at, found, strict=True))

    fires, known = (choice.memory >= 0).tolist(), protocols.vouched(model, choice)
    said = known | answers([i for i in range(len(rows)) if i not in known], choice.memory)
    right = [says(said[i], expected[i]) for i in range(len(asked))]
    doubtful = [i for i, fired in enumerate(fires) if fired and not right[i]]
    base_says = answers(doubtful, torch.full_like(choice.memory, BASE))
    found = []
    for i, (edit, _) in enumerate(asked):
        garbled = i in base_says and said[i] != base_says[i] and not same_answer(said[i], targets[i])
        line = {"id": edit.id, "expected": edit.target, "answer": said[i], "memory": int(choice.memory[i])}
        line |= {"nearest": choice.nearest[i], "rel": right[i], "contains": holds(said[i], expected[i])}
        found.append(line | {"fires": fires[i], "garbled": garbled})
    return found


# -- other questions about edited subjects -----------------------------------------------------------------------------

OWN = (
    "What do people usually say about {}?",
    "What does {} smell of?",
    "Who are the best friends of {}?",
    "What colour does {} like most?",
    "How far is {} from the sea?",
    "What does {} cost?",
    "Is {} open on Sundays?",
    "How does one get to {} by train?",
    "What did {} have for breakfast?",
    "Why is {} well known?",
    "How do you spell {}?",
    "What is a good gift for somebody who likes {}?",
)
_EACH = 4
"""Questions of our own about each subject, at the least one."""


def questions_about_subjects(edits: Sequence[Edit], number: int = 200) -> dict[str, str]:
    """At most `number` questions, each with the id of an edit whose subject it names; the same for the same edits: from
    what other edits ask, with the subject put in, and of our own. What some record gives as rephrases of one another
    are not other questions."""
    dice = random.Random(0)
    named = [edit for edit in edits if edit.subject and asking.places(edit.prompt, asking.spellings(edit.subject))]
    asked_already = {(edit.subject, _plain(edit.prompt, edit.subject)) for edit in named}
    meaning = _meanings(named)
    found: dict[str, str] = {}
    each = max(1, min(len(OWN), -(-number // max(len(named), 1))))
    for edit in dice.sample(named, len(named)):
        drawn = dice.sample(named, min(len(named), 4 * each))
        others = [o for o in drawn if o.subject != edit.subject and meaning[o.id] != meaning[edit.id]]
        made = [asking.without(o.prompt, asking.spellings(str(o.subject)), str(edit.subject)) for o in others[:each]]
        made += [text.format(edit.subject) for text in dice.sample(OWN, min(_EACH, each) if others else each)]
        for text in made[: 2 * each]:
            if text and (edit.subject, _plain(text, edit.subject)) not in asked_already:
                found.setdefault(text, edit.id)
    kept = dice.sample(list(found), number) if len(found) > number else found
    return {text: found[text] for text in kept}


def _meanings(edits: Sequence[Edit]) -> dict[str, str]:
    """Of each edit's id one wording of what it asks, the same for edits whose records' rephrases join their prompts."""
    joined: dict[str, str] = {}

    def root(text: str, subject: str | None) -> str:
        text = _plain(text, subject)
        while joined.setdefault(text, text) != text:
            text = joined[text]
        return text

    for edit in edits:
        for text in edit.rephrases:
            joined[root(text, edit.subject)] = root(edit.prompt, edit.subject)
    return {edit.id: root(edit.prompt, edit.subject) for edit in edits}


def _plain(text: str, subject: str | None) -> str:
    return " ".join(asking.spellings(asking.without(text, asking.spellings(subject or ""), "_") or text))


@torch.no_grad()
def same_subject(
    model: EditedModel, edits: Sequence[Edit], base_changed: bool = False
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """How many were asked, and the shares of them that a shard answered and whose answer changed; and a row for each,
    of what the base answers as before without answers. None where no edit names a subject."""
    questions = questions_about_subjects(edits)
    if not questions:
        return None, []
    memory, rows = protocols.kept_rows(model, "same_subject", questions, 16, base_changed)
    changed = sum(not row["kept"] for row in rows)
    fires = float((memory >= 0).float().mean())
    twice = {row["prompt"] for row in rows}
    same: dict[str, Any] = {"stage": "further", "kind": "same_subject", "kept": True, "memory": BASE}
    same |= {"answer": None, "base_answer": None}
    rows += [same | {"id": id, "prompt": text} for text, id in questions.items() if text not in twice]
    return {"asked": len(questions), "fires": fires, "changed": changed / len(questions)}, rows
