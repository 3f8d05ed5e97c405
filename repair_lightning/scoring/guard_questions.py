"""Other questions about edited subjects for what guards: from the bank of wordings, so none that scoring asks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from repair_lightning.memory.routers import Anchor
from repair_lightning.texts.relations import STAND_IN, bank

_EACH = 8
"""Most questions about one subject."""
_WORDINGS = 64
"""So many wordings of the bank, at even distances, are put to use: what the router reads of them it reads once."""


def guard_questions(anchors: Sequence[Anchor], number: int) -> list[str]:
    """At most `number` questions about what some edits are about, the same for the same edits."""
    named = [anchor for anchor in anchors if anchor.subject][:number]
    each = min(_EACH, number // max(len(named), 1))
    wordings = bank()[0][:: len(bank()[0]) // _WORDINGS]
    found = [
        wording.replace(STAND_IN, anchor.subject)
        for anchor in named
        for wording in random.Random(anchor.asked).sample(wordings, each)
    ]
    return list(dict.fromkeys(found))
