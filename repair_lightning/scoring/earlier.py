"""The edits of the pack that a run started from: whether they are still answered as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.scoring import protocols
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.metrics import mean_of

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

Answered = dict[str, dict[str, list[bool]]]
"""Per edit: whether its prompt (`rel`) and its rephrases (`gen`) are answered with its target."""


@dataclass
class EarlierEdits:
    """How a pack's edits are answered `before` the run and `after` it, there without those that new records replaced:
    free generation through the router."""

    before: Answered
    after: Answered = field(default_factory=dict)

    @classmethod
    def ask(cls, editor: Editor, ids: Sequence[str]) -> EarlierEdits:
        """Ask the live ones among some edits before the run."""
        gone = (EditStatus.SUPERSEDED, EditStatus.UNDONE, EditStatus.QUARANTINED)
        return cls(_answered(editor, [id for id in ids if editor.ledger.entry(id).status not in gone]))

    def ask_again(self, editor: Editor) -> None:
        """Ask them after the run."""
        gone = set(editor.ledger.with_status(EditStatus.SUPERSEDED))
        self.after = _answered(editor, [id for id in self.before if id not in gone])

    def report(self) -> dict[str, Any]:
        """The figures of `metrics.json`: of the edits that are still live, Rel and Gen in [0, 1] before and after, and
        the ids of those whose prompt was answered right and no longer is."""
        before = {id: self.before[id] for id in self.after}
        lost = [id for id, found in self.after.items() if before[id]["rel"] == [True] and found["rel"] == [False]]

        def shares(answered: Answered) -> dict[str, float | None]:
            return {kind: mean_of(x for found in answered.values() for x in found[kind]) for kind in ("rel", "gen")}

        return {"n_edits": len(self.after), "before": shares(before), "after": shares(self.after), "lost": lost}


def _answered(editor: Editor, ids: Sequence[str]) -> Answered:
    edits = [editor.ledger.edit(id) for id in ids]
    found: Answered = {id: {"rel": [score == 1], "gen": []} for id, score in correctness(editor, edits).items()}
    asked = [(edit.id, prompt, edit.target) for edit in edits for prompt in edit.rephrases]
    if asked:
        owners, prompts, targets = (list(column) for column in zip(*asked, strict=True))
        chosen = editor.choose(prompts).memory
        for id, right in zip(owners, protocols.answered(editor.edited, prompts, targets, chosen), strict=True):
            found[id]["gen"].append(right)
    return found
