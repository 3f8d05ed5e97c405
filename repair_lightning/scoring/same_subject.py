"""Other questions about edited subjects: how many a shard answers, and how many answers change.

They are made from what other edits ask, with the subject put in, and from questions of this file's own; neither writing
nor any threshold sees them. Questions that some record gives as rephrases of one another are not other questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.texts import asking
from repair_lightning.types import BASE, Edit

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


def questions_about_subjects(edits: Sequence[Edit], number: int = 200) -> list[str]:
    """At most `number` questions, the same for the same edits."""
    dice = random.Random(0)
    named = [edit for edit in edits if edit.subject and asking.places(edit.prompt, asking.spellings(edit.subject))]
    asked_already = {(edit.subject, _plain(edit.prompt, edit.subject)) for edit in named}
    meaning = _meanings(named)
    found: dict[str, None] = {}
    each = max(1, min(len(OWN), -(-number // max(len(named), 1))))
    for edit in dice.sample(named, len(named)):
        drawn = dice.sample(named, min(len(named), 4 * each))
        others = [o for o in drawn if o.subject != edit.subject and meaning[o.id] != meaning[edit.id]]
        made = [asking.without(o.prompt, asking.spellings(str(o.subject)), str(edit.subject)) for o in others[:each]]
        made += [text.format(edit.subject) for text in dice.sample(OWN, min(_EACH, each) if others else each)]
        for text in made[: 2 * each]:
            if text and (edit.subject, _plain(text, edit.subject)) not in asked_already:
                found[text] = None
    return dice.sample(list(found), number) if len(found) > number else list(found)


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
def same_subject(model: EditedModel, edits: Sequence[Edit], base_changed: bool = False) -> dict[str, Any] | None:
    """How many were asked, and the shares of them that a shard answered and whose answer changed; None where no edit
    names a subject."""
    questions = questions_about_subjects(edits)
    if not questions:
        return None
    memory = model.choose(questions).memory
    fires = memory != BASE
    at = [i for i, fired in enumerate(fires.tolist()) if fired or base_changed]
    asked = [questions[i] for i in at]
    now = protocols.answers(model, asked, memory[at], 16)
    with model.weights.originals():
        before = protocols.answers(model, asked, torch.full((len(at),), BASE), 16)
    changed = sum(a != b for a, b in zip(now, before, strict=True))
    return {"asked": len(questions), "fires": float(fires.float().mean()), "changed": changed / len(questions)}
