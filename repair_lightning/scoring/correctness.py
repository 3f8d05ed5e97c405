"""Whether edits are answered right, from their own prompts alone: what the closed loop may look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring import protocols
from repair_lightning.types import Edit


class Asked(Protocol):
    """An editor, as far as its edits are asked."""

    @property
    def edited(self) -> EditedModel:
        """Who is asked."""

    def choose_for(self, edits: Sequence[Edit]) -> Choice:
        """The router's choice for the edits' own prompts."""


def correctness(editor: Asked, edits: Sequence[Edit]) -> dict[str, float]:
    """1 or 0 per edit id: whether the edit's own prompt, never a scoring prompt, is answered right."""
    if not edits:
        return {}
    prompts, targets = [edit.prompt for edit in edits], [edit.target for edit in edits]
    right = protocols.answered(editor.edited, prompts, targets, editor.choose_for(edits).memory)
    return {edit.id: float(one) for edit, one in zip(edits, right, strict=True)}
