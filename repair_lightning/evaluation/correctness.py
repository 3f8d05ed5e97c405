"""Whether edits are answered right, from their own prompts alone: what the closed loop may look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from repair_lightning.evaluation import protocols
from repair_lightning.evaluation.protocols import AUTOREGRESSIVE

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor
    from repair_lightning.types import Edit


def correctness(
    editor: Editor, edits: Sequence[Edit], protocol: str = AUTOREGRESSIVE, memory: Tensor | None = None
) -> dict[str, float]:
    """Score in [0, 1] per edit id, on the edit's own prompt through the router.

    Args:
        editor: with its model loaded.
        edits: to ask; never their rephrases or other scoring prompts.
        protocol: `autoregressive` gives 0 or 1, `teacher_forced` the share of right tokens.
        memory: (n,) a choice to use instead of the router's.
    """
    if not edits:
        return {}
    prompts, targets = [edit.prompt for edit in edits], [edit.target for edit in edits]
    chosen = editor.choose(prompts).memory if memory is None else memory
    encoded = [editor.encode(edit.prompt, edit.target) for edit in edits]
    if protocol == AUTOREGRESSIVE:
        # Two tokens past the target are enough to see that an answer does not stop where it should.
        said = protocols.answers(editor.edited, prompts, chosen, [len(row.target) + 2 for row in encoded])
        scores = [float(protocols.normalise(a) == protocols.normalise(b)) for a, b in zip(said, targets, strict=True)]
    else:
        tokens = protocols.forced_tokens(editor.edited, prompts, targets, chosen)
        scores = [protocols.token_share(a, row.target) for a, row in zip(tokens, encoded, strict=True)]
    return {edit.id: score for edit, score in zip(edits, scores, strict=True)}
