"""Whether edits are answered right: from their own prompts alone for the closed loop, and before and after a run that
starts from a pack for its edits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, mean_of
from repair_lightning.types import Edit

Answered = dict[str, dict[str, list[bool]]]
"""Per edit: whether its prompt (`rel`) and its rephrases (`gen`) are answered with its target."""
NOT_LIVE = (EditStatus.SUPERSEDED, EditStatus.UNDONE, EditStatus.QUARANTINED)


class Asked(Protocol):
    """An editor, as far as its edits are asked."""

    ledger: Ledger

    @property
    def edited(self) -> EditedModel:
        """Who is asked."""

    def choose(self, prompts: Sequence[str]) -> Choice:
        """The router's choice for prompts."""

    def choose_for(self, edits: Sequence[Edit]) -> Choice:
        """The router's choice for the edits' own prompts."""


def correctness(editor: Asked, edits: Sequence[Edit], protocol: str = AUTOREGRESSIVE) -> dict[str, float]:
    """Score in [0, 1] per edit id, on the edit's own prompt, never a scoring prompt: `autoregressive` gives 0 or 1,
    `teacher_forced` the share of right tokens."""
    if not edits:
        return {}
    prompts, targets = [edit.prompt for edit in edits], [edit.target for edit in edits]
    model, chosen = editor.edited, editor.choose_for(edits).memory
    if protocol == AUTOREGRESSIVE:
        scores = [float(right) for right in protocols.answered(model, prompts, targets, chosen)]
    else:
        tokens = protocols.forced_tokens(model, prompts, targets, chosen)
        right = [model.forms.encode(edit.prompt, edit.target).target for edit in edits]
        scores = list(map(protocols.token_share, tokens, right))
    return {edit.id: score for edit, score in zip(edits, scores, strict=True)}


def answered(editor: Asked, ids: Iterable[str], gone: Collection[EditStatus] = NOT_LIVE) -> Answered:
    """How some edits, without those that are `gone`, are answered: free generation through the router, in which their
    aliases are right too."""
    entries = [editor.ledger.entry(id) for id in ids]
    edits = [entry.edit for entry in entries if entry.status not in gone]
    found: Answered = {edit.id: {"rel": [], "gen": []} for edit in edits}
    others = [(edit, prompt) for edit in edits for prompt in edit.rephrases]
    for kind, asked in (("rel", [(edit, edit.prompt) for edit in edits]), ("gen", others)):
        if asked:
            prompts = [prompt for _, prompt in asked]
            chosen = editor.choose_for(edits) if kind == "rel" else editor.choose(prompts)
            answers = [(edit.target, *edit.aliases) for edit, _ in asked]
            for (edit, _), right in zip(asked, _any(editor.edited, prompts, answers, chosen.memory), strict=True):
                found[edit.id][kind].append(right)
    return found


def _any(model: EditedModel, prompts: Sequence[str], answers: Sequence[tuple[str, ...]], memory: Tensor) -> list[bool]:
    """Whether each prompt is answered with one of its answers; the second is tried where the first is not said."""
    found = [False] * len(prompts)
    for n in range(max(map(len, answers), default=0)):
        at = [i for i, right in enumerate(found) if not right and n < len(answers[i])]
        if not at:
            break
        asked = [prompts[i] for i in at], [answers[i][n] for i in at], memory[at]
        for i, right in zip(at, protocols.answered(model, *asked), strict=True):
            found[i] = right
    return found


def kept(before: Answered, after: Answered) -> dict[str, Any]:
    """The figures of `metrics.json`: Rel and Gen in [0, 1] before and after the run, of the edits that are asked after
    it, and the ids of those whose prompt was answered right and no longer is."""

    def shares(found: Answered) -> dict[str, float | None]:
        return {kind: mean_of(x for id in after for x in found[id][kind]) for kind in ("rel", "gen")}

    lost = [id for id, found in after.items() if before[id]["rel"] == [True] and found["rel"] == [False]]
    return {"n_edits": len(after), "before": shares(before), "after": shares(after), "lost": lost}
