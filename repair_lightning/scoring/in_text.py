"""Whether an edit holds in text: a sentence or a paragraph about its subject is asked for, before and after.

The request is the record's own (CounterFact's `generation_prompts`), else one of this file's. Greedy generation through
the router, at most `TOKENS` tokens. No edit is written in these words, and no threshold sees them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.follow import GENERATION, Row, fits
from repair_lightning.scoring.protocols import both_answers, holds, mean_of, still_says
from repair_lightning.types import Edit

ASKED = ("Write a short paragraph about {}.", "Tell me in one sentence about {}.")
"""Requests for a text, used in turn."""
TOKENS = 64


def requests(edits: Sequence[Edit]) -> list[tuple[Edit, str]]:
    """Edits with the request for a text about their subject; those that name none and bring no request are left out."""
    found = []
    for i, edit in enumerate(edits):
        own = [one.prompt for one in edit.further if one.kind == GENERATION]
        own += [ASKED[i % len(ASKED)].format(edit.subject)] if edit.subject else []
        found += [(edit, own[0])] if own else []
    return found


def text_scores(
    model: EditedModel, edits: Sequence[Edit], base_changed: bool = False
) -> tuple[dict[str, Any], list[Row]]:
    """`in_text` and `fluency` for `metrics.json`, None where no edit has a subject, and each text as a row.

    `in_text`: shares of the texts that hold the target (`new`; `new_before`, of the base's texts), and, of edits that
    say what their target replaces, that do not hold that (`without_old`), and both. `fluency`: see :func:`entropy`.
    """
    asked = [(edit, prompt) for edit, prompt in requests(edits) if fits(model, prompt, TOKENS)]
    if not asked:
        return {"in_text": None, "fluency": None}, []
    prompts = list(dict.fromkeys(prompt for _, prompt in asked))
    memory, both = both_answers(model, prompts, TOKENS, base_changed)
    after, before = ({prompt: said[which] for prompt, said in zip(prompts, both, strict=True)} for which in (0, 1))
    shard = dict(zip(prompts, memory.tolist(), strict=True))
    rows = [_row(edit, prompt, after[prompt], before[prompt]) | {"memory": shard[prompt]} for edit, prompt in asked]
    known = [row for row in rows if row["without_old"] is not None]
    shares = {name: mean_of(row[name] for row in rows) for name in ("new", "new_before")}
    shares["without_old"] = mean_of(row["without_old"] for row in known)
    shares["both"] = mean_of(row["new"] and row["without_old"] for row in known)
    fluency = {"before": mean_of(map(entropy, before.values())), "after": mean_of(map(entropy, after.values()))}
    return {"in_text": {"asked": len(rows), **shares}, "fluency": fluency}, rows


def _row(edit: Edit, prompt: str, said: str, base_said: str) -> Row:
    right, old = (edit.target, *edit.aliases), edit.old_answer
    row: Row = {"stage": "further", "id": edit.id, "kind": GENERATION, "prompt": prompt, "expected": edit.target}
    row |= {"answer": said, "base_answer": base_said, "new": holds(said, right), "new_before": holds(base_said, right)}
    return row | {"without_old": None if old is None else not still_says(said, old, right)}


def entropy(text: str) -> float:
    """The n-gram entropy of a text in bits, weighted as ROME's: (2/3 of the bigrams' + 4/3 of the trigrams') / 2.

    Words and signs are the grams; a text without any has 0. Higher is less repetitive, and longer texts have more.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    two, three = (_bits(list(zip(*(words[i:] for i in range(n)), strict=False))) for n in (2, 3))
    return (2 / 3 * two + 4 / 3 * three) / 2


def _bits(grams: Sequence[Any]) -> float:
    shares = [count / len(grams) for count in Counter(grams).values()]
    return -sum(share * math.log2(share) for share in shares)
