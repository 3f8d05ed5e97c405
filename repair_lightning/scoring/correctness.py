"""Whether edits are answered right, from their own prompts alone: what the closed loop may look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from repair_lightning.scoring import protocols
from repair_lightning.scoring.protocols import AUTOREGRESSIVE

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor
    from repair_lightning.types import Edit


def correctness(
    editor: Editor, edits: Sequence[Edit], protocol: str = AUTOREGRESSIVE, memory: Tensor | None = None
) -> dict[str, float]:
    """Score in [0, 1] per edit id, on the edit's own prompt, never a scoring prompt: `autoregressive` gives 0 or 1,
    `teacher_forced` the share of right tokens. `memory` (n,) is a choice to use instead of the router's."""
    if not edits:
        return {}
    prompts, targets = [edit.prompt for edit in edits], [edit.target for edit in edits]
    chosen = editor.choose_for(edits).memory if memory is None else memory
    if protocol == AUTOREGRESSIVE:
        scores = [float(right) for right in protocols.answered(editor.edited, prompts, targets, chosen)]
    else:
        tokens = protocols.forced_tokens(editor.edited, prompts, targets, chosen)
        scores = [protocols.token_share(a, editor.encode(edit).target) for a, edit in zip(tokens, edits, strict=True)]
    return {edit.id: score for edit, score in zip(edits, scores, strict=True)}
