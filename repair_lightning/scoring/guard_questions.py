"""Other questions about edited subjects for what guards: from the bank of wordings, so none that scoring asks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from repair_lightning.texts.naming import named_in
from repair_lightning.texts.relations import STAND_IN, bank
from repair_lightning.types import Edit

_EACH = 8
"""Most questions about one subject."""
_WORDINGS = 64
"""So many wordings of the bank, at even distances, are put to use: what the router reads of them it reads once."""


def guard_questions(edits: Sequence[Edit], number: int) -> list[str]:
    """At most `number` questions about what some edits are about, the same for the same edits."""
    named = [(edit, edit.subject or named_in(edit.prompt)) for edit in edits]
    named = [(edit, subject) for edit, subject in named if subject][:number]
    wordings = bank()[0][:: len(bank()[0]) // _WORDINGS]
    each = min(_EACH, number // max(len(named), 1))
    found = [
        wording.replace(STAND_IN, subject)
        for edit, subject in named
        for wording in random.Random(edit.id).sample(wordings, each)
    ]
    return list(dict.fromkeys(found))
