"""Everything that is scored once, at the end, beside the four kinds of prompts: the figures that a table of this field
has too. Docs: `docs/scores.md` says of each what is asked and how it is counted.

What needs questions of its own is asked of some edits alone, drawn at random with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.bootstrap import op_interval
from repair_lightning.scoring.follow import Row, fits, follow_scores
from repair_lightning.scoring.forms import form_scores, same_subject
from repair_lightning.scoring.in_text import text_scores
from repair_lightning.scoring.probability import probability_scores
from repair_lightning.scoring.protocols import kept_rows, mean_of, still_says
from repair_lightning.scoring.scorer import sample_of
from repair_lightning.texts import asking, dialogue
from repair_lightning.types import Edit

QUINTILES = 5
DENIAL = "It is not true that {}"
"""What a cloze prompt is put after. No edit is written in these words."""
_TOKENS = 16


def beside_scores(
    model: EditedModel,
    edits: Sequence[Edit],
    scored: Sequence[Edit],
    rows: Sequence[Mapping[str, Any]],
    base_changed: bool = False,
    forms: int = 128,
    further: int = 128,
) -> tuple[dict[str, Any], list[Row]]:
    """Figures for `metrics.json`, and each raw answer as a row.

    Args:
        edits: the whole stream.
        scored: those of its edits that are scored.
        rows: what the final model said to their prompts.
        forms: edits that are asked in every form; 0 for none.
        further: edits that further questions are asked about; 0 for none. A quarter of them is asked for a text.
    """
    about, said = same_subject(model, edits, base_changed)
    found: dict[str, Any] = {"forms": None, "same_subject": about}
    found |= {"op_interval": op_interval(rows), "old_answer": old_answer(scored, rows), "age": age(edits, rows)}
    if forms:
        found["forms"], in_forms = form_scores(model, scored, forms)
        said += in_forms
    if further:
        drawn = sample_of(scored, further)
        figures, more = follow_scores(model, drawn)
        texts, written = text_scores(model, sample_of(drawn, max(1, further // 4)), base_changed)
        denied, denials = negation(model, drawn, base_changed)
        found |= figures | texts | {"probability": probability_scores(model, drawn), "negation": denied}
        said += [*more, *written, *denials]
    return found, said


def old_answer(edits: Sequence[Edit], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of edit prompts and rephrases whose free answer contains what the target replaces; None where no record
    says what that is."""
    by_id = {edit.id: edit for edit in edits if edit.old_answer is not None}
    return mean_of(
        still_says(row["answer"], str(edit.old_answer), (edit.target, *edit.aliases))
        for row in rows
        if row["kind"] in ("edit", "rephrase") and (edit := by_id.get(row["id"])) is not None
    )


def age(edits: Sequence[Edit], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rel and Gen, in free generation, of each fifth of the stream, the oldest edits first."""
    fifth = {edit.id: QUINTILES * i // len(edits) for i, edit in enumerate(edits)}
    found = []
    for part in range(QUINTILES):
        marks = [(row["kind"], row["correct"]) for row in rows if fifth[row["id"]] == part]
        rel, gen = (mean_of(right for kind, right in marks if kind == of) for of in ("edit", "rephrase"))
        found.append({"edits": sum(kind == "edit" for kind, _ in marks), "rel": rel, "gen": gen})
    return found


def negation(
    model: EditedModel, edits: Sequence[Edit], base_changed: bool = False
) -> tuple[dict[str, Any] | None, list[Row]]:
    """Denied cloze prompts: the target would be false there, so the base's answer is to be kept. How many were asked,
    the shares that a shard answered and that kept the base's answer, and a row for each that was asked twice; None
    where no prompt is a cloze."""
    plain = [edit for edit in edits if not model.forms.is_rendered(edit.prompt)]
    denied = {text: edit.id for edit in plain if (text := _denied(edit)) is not None and fits(model, text, _TOKENS)}
    if not denied:
        return None, []
    memory, rows = kept_rows(model, "negation", denied, _TOKENS, base_changed)
    changed = sum(not row["kept"] for row in rows)
    shares = {"fires": float((memory >= 0).float().mean()), "kept": 1 - changed / len(denied)}
    return {"asked": len(denied), **shares}, rows


def _denied(edit: Edit) -> str | None:
    """A cloze prompt after a denial; None for a question, a dialogue, a passage, or what denies already."""
    prompt = edit.prompt
    if dialogue.parse(prompt) is not None or len(asking.sentences(prompt)) > 1:
        return None
    if asking.is_question(prompt) or asking.negated(prompt):
        return None
    named = edit.subject is not None and prompt.startswith(edit.subject)
    return DENIAL.format(prompt if named else prompt[:1].lower() + prompt[1:])
