"""The edits of the pack that a run started from: whether they are still answered as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.scoring import protocols
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.metrics import mean_of

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

Answered = dict[str, dict[str, list[bool]]]
"""Per edit: whether its prompt (`rel`) and its rephrases (`gen`) are answered with its target."""
NOT_LIVE = (EditStatus.SUPERSEDED, EditStatus.UNDONE, EditStatus.QUARANTINED)


def answered(editor: Editor, ids: Iterable[str], gone: Collection[EditStatus] = NOT_LIVE) -> Answered:
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
