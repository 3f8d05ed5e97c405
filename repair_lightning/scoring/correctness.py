"""Whether edits are answered right, from their own prompts alone: what the closed loop may look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import AUTOREGRESSIVE
from repair_lightning.types import Edit


class Asked(Protocol):
    """An editor, as far as its edits are asked."""

    @property
    def edited(self) -> EditedModel:
        """Who is asked."""

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
