"""Whether edits are answered right: from their own prompts alone for the closed loop, and before and after a run that
starts from a pack for its edits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

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
    """How some edits, without those that are `gone`, are answered: free generation through the router."""
    entries = [editor.ledger.entry(id) for id in ids]
    edits = [entry.edit for entry in entries if entry.status not in gone]
    found: Answered = {id: {"rel": [score == 1], "gen": []} for id, score in correctness(editor, edits).items()}
    asked = [(edit.id, prompt, edit.target) for edit in edits for prompt in edit.rephrases]
    if asked:
        owners, prompts, targets = (list(column) for column in zip(*asked, strict=True))
        chosen = editor.choose(prompts).memory
        for id, right in zip(owners, protocols.answered(editor.edited, prompts, targets, chosen), strict=True):
            found[id]["gen"].append(right)
    return found


def kept(before: Answered, after: Answered) -> dict[str, Any]:
    """The figures of `metrics.json`: Rel and Gen in [0, 1] before and after the run, of the edits that are asked after
    it, and the ids of those whose prompt was answered right and no longer is."""

    def shares(found: Answered) -> dict[str, float | None]:
        return {kind: mean_of(x for id in after for x in found[id][kind]) for kind in ("rel", "gen")}

    lost = [id for id, found in after.items() if before[id]["rel"] == [True] and found["rel"] == [False]]
    return {"n_edits": len(after), "before": shares(before), "after": shares(after), "lost": lost}
