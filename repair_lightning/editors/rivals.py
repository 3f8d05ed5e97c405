"""The few tokens that matter to a step: an edit's targets and the tokens that compete with them.

Ours. The head is most of what an inner step costs where a vocabulary is large, forward and backward. Between two looks
at all of it, steps run the rows of each edit's own rivals alone; what all other tokens weigh in the softmax stays what
it was at the last look. Whether an edit is written is only ever decided by the whole vocabulary. (Sampled softmax,
arXiv 1412.2007, draws its few tokens at random.)

Shapes: M target tokens of n edits, R of the edit that has most, K rivals of each, D = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.inner_loop import TargetTail

MOST = 256
"""Rivals of an edit, its targets among them."""
WORTH = 16
"""A vocabulary so many times as large is worth it."""


class Rivals(nn.Module):
    """Stands in the head's place for some steps, and gives the logits of each edit's rivals alone.

    Args:
        tail: what gives the logits; it must run the positions that are read alone.
        every: steps between two looks at the whole vocabulary.
    """

    def __init__(self, tail: TargetTail, every: int) -> None:
        super().__init__()
        model: Any = tail.split.model
        self.every, self._rows = every, tail.rows
        self._of = model, model.get_output_embeddings()  # a module that held the model would be a part of itself
        ranks = self._rows.ranks.tolist()
        self._places, self._longest = self._rows.order.split(ranks), max(ranks)

    def forward(self, features: Tensor) -> Tensor:
        """The logits (M, 1, K) of each position's rivals, from what enters the head, (M, 1, D)."""
        padded = features.new_zeros(len(self._weight), self._longest, features.shape[-1])
        logits = padded.index_put((self._rows.edit, self._rows.slot), features[:, 0]) @ self._weight.mT
        if self._bias is not None:
            logits = logits + self._bias[:, None]
        return logits[self._rows.edit, self._rows.slot][:, None]

    def due(self, step: int) -> bool:
        """Whether it is time to look at the whole vocabulary."""
        return step % self.every == 0

    def losses(self, step: int, logits: Tensor, logits_of: Callable[[], Tensor]) -> Tensor:
        """The cross-entropy (M,) of the target tokens, nats.

        `logits` (M, V) are those of the last look, and `logits_of` gives new ones, of what stands in the head's place.
        """
        if self.due(step):
            self._look(logits)
        model, head = self._of
        model.set_output_embeddings(self)
        try:
            seen = torch.cat([logits_of().float(), self._others[:, None]], -1)
        finally:
            model.set_output_embeddings(head)
        return seen.logsumexp(-1) - seen.gather(-1, self._label)[:, 0]

    @torch.no_grad()
    def _look(self, logits: Tensor) -> None:
        """Choose the rivals by the logits (M, V) as they are now."""
        logits, labels, (_, head) = logits.float(), self._rows.labels, self._of
        whole = logits.logsumexp(-1)
        nearest = torch.stack([(logits[at] - whole[at, None]).amax(0) for at in self._places])
        nearest[self._rows.edit, labels] = torch.inf  # all targets are among them
        rivals = nearest.nan_to_num(-torch.inf, posinf=torch.inf).topk(MOST, dim=-1).indices
        own = rivals[self._rows.edit]
        self._label = (own == labels[:, None]).int().argmax(-1, keepdim=True)
        share = (logits.gather(-1, own).logsumexp(-1) - whole).clamp(max=-1e-6)
        self._others = whole + torch.log1p(-share.exp())
        self._weight = head.weight[rivals]
        self._bias = None if head.bias is None else head.bias[rivals]


def rivals_of(tail: TargetTail, every: int) -> Rivals | None:
    """The rivals of a write's edits; None where steps had better see the whole vocabulary."""
    head: Any = tail.split.model.get_output_embeddings()  # type: ignore[operator]
    if tail.kind != "positions" or not isinstance(head, nn.Linear) or len(head.weight) < WORTH * MOST or every < 2:
        return None
    room = 2 * int(tail.rows.ranks.max()) <= MOST  # beside an edit's targets, for their rivals
    return Rivals(tail, every) if room else None
