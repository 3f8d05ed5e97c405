"""What follows from edits, as their records ask it: portability, several hops, and other persons' ways of asking.

Each question is asked once, of the final model and through its router, in free generation. A data set's answer to a
question that follows is seldom the whole of what a model says to it, so portability and hops count an answer that
contains it as whole words; a persona's question is one more rephrase, and is right as `Gen` is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from repair_lightning.errors import ConfigError, counted
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.protocols import holds, mean_of, routed_answers, says
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit, Further

log = logging.getLogger(__name__)

Row = dict[str, Any]

MULTI_HOP, PERSONA, GENERATION, PORTABILITY = "multi_hop", "persona", "generation", "portability/"
"""The kinds of further questions; of the last the sort follows."""
_TOKENS = 32
"""Most tokens of an answer, or 8 more than the longest that is right."""


def follow_scores(model: EditedModel, edits: Sequence[Edit]) -> tuple[dict[str, Any], list[Row]]:
    """`portability`, `multi_hop` and `personas` for `metrics.json`, None where no record asks such a question, and each
    raw answer as a row."""
    asked = [(edit, one) for edit in edits for one in edit.further if one.kind != GENERATION]
    rows = _answered(model, [(edit, one) for edit, one in asked if fits(model, one.prompt, _limit(model, one))])
    if len(rows) < len(asked):
        left_out = counted(len(asked) - len(rows), "further question")
        log.warning("%s cannot be asked of this base (too long, or a dialogue that it has no template for)", left_out)
    figures = {
        "portability": _portability([row for row in rows if row["kind"].startswith(PORTABILITY)]),
        "multi_hop": _multi_hop([row for row in rows if row["kind"].startswith(MULTI_HOP)]),
        "personas": mean_of(row["correct"] for row in rows if row["kind"] == PERSONA),
    }
    return figures, rows


def fits(model: EditedModel, prompt: str, room: int) -> bool:
    """Whether the base can be asked a prompt that it has not been checked for, with `room` for an answer in tokens."""
    try:
        return len(model.forms.ids(prompt)) + room <= model.longest
    except ConfigError:  # a dialogue
        return False


def _limit(model: EditedModel, one: Further) -> int:
    return max(_TOKENS, *(len(model.forms.spelling.plain(answer)) + 8 for answer in one.answers))


def _answered(model: EditedModel, asked: Sequence[tuple[Edit, Further]]) -> list[Row]:
    limits: dict[str, int] = {}  # several records may ask one question
    for _, one in asked:
        limits[one.prompt] = max(limits.get(one.prompt, 0), _limit(model, one))
    memory, said = routed_answers(model, list(limits), list(limits.values()))
    by = dict(zip(limits, zip(memory.tolist(), said, strict=True), strict=True))
    rows = []
    for edit, one in asked:
        shard, answer = by[one.prompt]
        row: Row = {"stage": "further", "id": edit.id, "kind": one.kind, "prompt": one.prompt}
        row |= {
            "expected": one.answers[0],
            "answers": one.answers,
            "answer": answer,
            "correct": says(answer, one.answers),
        }
        row["contains"] = holds(answer, one.answers)
        rows.append(row | {"leaks": holds(dialogue.shown(one.prompt), one.answers), "memory": shard})
    return rows


def _portability(rows: Sequence[Row]) -> dict[str, dict[str, Any]] | None:
    """Shares per sort and over `all`: `with_leak` of all questions, `without_leak` of those that do not state an answer
    themselves."""
    sorts = dict.fromkeys(row["kind"].removeprefix(PORTABILITY) for row in rows)
    found = {}
    for sort in ("all", *sorts):
        of_sort = [row for row in rows if sort in ("all", row["kind"].removeprefix(PORTABILITY))]
        closed = [row["contains"] for row in of_sort if not row["leaks"]]
        shares = {"with_leak": mean_of(row["contains"] for row in of_sort), "without_leak": mean_of(closed)}
        found[sort] = {"asked": len(of_sort), **shares}
    return found if rows else None


def _multi_hop(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Shares of the cases with any and with all of their questions right; cases with the same questions are one."""
    of_case: dict[tuple[str, str], dict[str, bool]] = {}
    for row in rows:
        of_case.setdefault((row["id"], row["kind"]), {})[row["prompt"]] = row["contains"]
    cases = {tuple(sorted(found)): list(found.values()) for found in of_case.values()}.values()
    shares = {"any_of_3": mean_of(map(any, cases)), "all_of_3": mean_of(map(all, cases))}
    return {"cases": len(cases), **shares} if cases else None
