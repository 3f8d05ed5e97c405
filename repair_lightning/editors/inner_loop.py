"""What the inner steps of a write compute: the logits of its target tokens as a function of the value matrix's delta.

Shared by the editors that train. Shapes: B rows of T tokens, M target tokens in all, n batch members, D = d_model,
F = d_ffn, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repair_lightning.memory.query import Query
from repair_lightning.models.prefix import SplitModel


@dataclass(slots=True)
class TargetRows:
    """Training rows of one write: B rows of T tokens, M target tokens in all, n batch members."""

    ids: Tensor
    """(B, T) token ids, padded on the left."""
    mask: Tensor
    """(B, T) attention mask."""
    hidden: Tensor
    """(B, T, D) where it enters the edited layer."""
    activations: Tensor
    """(B, T, F), A(x)."""
    labels: Tensor
    """(B, longest target), `IGNORED` where a target is shorter."""
    owner: Tensor
    """(B,) index of the edit that a row belongs to; rehearsed edits are counted on behind the members."""
    members: int
    """n; the first n rows are the members' own, without a context."""
    prompts: Query
    """The members' prompts."""

    @property
    def real(self) -> Tensor:
        """(B, longest target) true at target tokens."""
        return self.labels >= 0

    @property
    def row(self) -> Tensor:
        """(M,) the row of each target token."""
        return self.real.nonzero()[:, 0]

    @property
    def firsts(self) -> Tensor:
        """(B,) where each row's first target token stands among the M: read at the prompt's last token."""
        lengths = self.real.sum(-1)
        return lengths.cumsum(0) - lengths

    def reading(self, states: Tensor) -> Tensor:
        """States (B, T, ...) at the positions from which the M target tokens are read, (M, ...)."""
        return states[:, -self.labels.shape[1] - 1 : -1][self.real]


class TargetTail:
    """The logits of a write's target tokens as a function of the shard: everything above the value matrix.

    Where the last layer is edited and its value output is simply added, only the positions that are read take part;
    otherwise the edited layer and those above it run over whole rows.
    """

    def __init__(self, split: SplitModel, rows: TargetRows, short: bool) -> None:
        self.split, self.rows, self.short = split, rows, short
        if short:
            with split.skipping():
                self.out = rows.reading(split.layer_output(rows.ids, rows.mask, rows.hidden))
            self.activations = rows.reading(rows.activations).float()

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, V) and the features (M, D) that enter the head, with the shard `delta` (D, F)."""
        if self.short:
            pushed = torch.nn.functional.linear(self.activations, delta).to(self.out.dtype)
            return self.split.readout(self.out + pushed)
        rows = self.rows
        logits, features = self.split.tail(rows.ids, rows.mask, rows.hidden, rows.labels.shape[1] + 1)
        return logits[:, :-1][rows.real], features[:, :-1][rows.real]


def mean_by(group: Tensor, values: Tensor, groups: int) -> Tensor:
    """The mean of values (M,) by group index (M,), (groups,); every group has at least one."""
    return values.new_zeros(groups).index_add_(0, group, values) / group.bincount(minlength=groups)
