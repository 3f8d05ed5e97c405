"""What the inner steps of a write compute: the logits of its target tokens as a function of the value matrix's delta.

Shared by the editors that train. Nothing in here waits for the device: whatever depends on the rows alone is worked out
before the first step.

Shapes: B rows of T tokens, M target tokens in all, n batch members, D = d_model, F = d_ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repair_lightning.memory.query import Query
from repair_lightning.memory.shards import Shard
from repair_lightning.models.prefix import Capture, SplitModel, pad_left, stack_left
from repair_lightning.models.tokenizing import Encoded, target_labels

Tail = Literal["positions", "rows", "model"]
"""How much runs in a step: the positions that are read, whole rows from the edited layer on, or the whole model."""


class TargetRows:
    """Training rows of one write.

    Args:
        encoded: B prompts with their targets.
        captures: their states at the edited layer.
        owners: B indices: the edit that a row belongs to; rehearsed edits are counted on behind the members.
        members: n; the first n rows are the members' own, without a context.
        prompts: the members' prompts, where the writer asks for them.

    Attributes:
        ids, mask: (B, T), padded on the left.
        hidden: (B, T, D) where it enters the edited layer.
        activations: (B, T, F), A(x).
        labels: (M,) the target tokens, row by row.
        row: (M,) the row of each.
        firsts: (B,) where each row's first target token stands among the M: it is read at the prompt's last token.
        span: of how many last positions of a row the logits are needed.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        captures: Sequence[Capture],
        owners: Sequence[int],
        members: int,
        prompts: Query | None = None,
    ) -> None:
        self._source = (list(encoded), list(captures), list(owners))
        self.hidden = stack_left([capture.hidden for capture in captures])
        self.activations = stack_left([capture.activations for capture in captures])
        device = self.hidden.device
        self.ids, self.mask = pad_left([row.ids for row in encoded], device=device)
        labels = target_labels(encoded)
        self.row, column = ((labels >= 0).nonzero().T).to(device)
        self.labels = labels[labels >= 0].to(device)
        self.span = labels.shape[1] + 1
        self._at = self.row * self.span + column
        lengths = torch.tensor([len(row.target) for row in encoded])
        self.firsts = (lengths.cumsum(0) - lengths).to(device)
        self._per_row = lengths.to(device)
        own = torch.tensor([i for i, owner in enumerate(owners) if owner < members])
        self._own = own.to(device)
        self._owner = torch.tensor(list(owners))[own].to(device)
        self._per_member = torch.tensor(list(owners))[own].bincount(minlength=members).to(device)
        self.members, self._prompts = members, prompts

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompts(self) -> Query:
        """The members' prompts."""
        assert self._prompts is not None
        return self._prompts

    def part(self, owners: Sequence[int]) -> TargetRows:
        """The rows of some of the members, in their order, and of some rehearsed edits behind them."""
        place = {owner: i for i, owner in enumerate(owners)}
        rows = [row for row in zip(*self._source, strict=True) if row[2] in place]
        encoded, captures, old = zip(*rows, strict=True)
        members = [owner for owner in owners if owner < self.members]
        prompts = None if self._prompts is None else self._prompts.rows(torch.tensor(members))
        return TargetRows(encoded, captures, [place[owner] for owner in old], len(members), prompts)

    @property
    def owners(self) -> int:
        """How many edits the rows belong to: members and rehearsed ones."""
        return len(set(self._source[2]))

    @property
    def owner(self) -> Tensor:
        """(B,) the edit that a row belongs to."""
        return torch.tensor(self._source[2], device=self.ids.device)

    def reading(self, states: Tensor) -> Tensor:
        """States (B, `span` or more, ...) at the positions from which the M target tokens are read, (M, ...)."""
        return states[:, -self.span :].flatten(0, 1).index_select(0, self._at)

    def per_row(self, tokens: Tensor) -> Tensor:
        """The mean of token values (M,) in each row, (B,)."""
        return tokens.new_zeros(len(self)).index_add(0, self.row, tokens) / self._per_row

    def per_member(self, rows: Tensor) -> Tensor:
        """The mean of row values (B,) of each member, (n,)."""
        return rows.new_zeros(self.members).index_add(0, self._owner, rows[self._own]) / self._per_member


class TargetTail:
    """The logits of a write's target tokens as a function of what the shard adds.

    Where the last layer is edited and its value output is simply added, only the positions that are read take part;
    otherwise the edited layer and those above it run over whole rows, or, without a prefix cache, the whole model.

    Attributes:
        states: (M, D) at the positions that are read: what leaves the layer where these take part alone, else what
            enters it.
    """

    def __init__(self, split: SplitModel, rows: TargetRows, kind: Tail) -> None:
        self.split, self.rows, self.kind = split, rows, kind
        self.states = rows.reading(rows.hidden)
        if kind == "positions":
            with split.skipping():
                self.states = self.out = rows.reading(split.layer_output(rows.ids, rows.mask, rows.hidden))
            self.activations = rows.reading(rows.activations).float()

    def __call__(self, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (M, V) and the features (M, D) that enter the head.

        Args:
            product: what the shard adds, (M, D), for activations (M, F) at the positions that are read. Where more than
                these positions run, it is the model's own hook that adds it.
        """
        rows = self.rows
        if self.kind == "positions":
            return self.split.readout(self.out + product(self.activations).to(self.out.dtype))
        hidden = rows.hidden if self.kind == "rows" else None
        logits, features = self.split.tail(rows.ids, rows.mask, hidden, rows.span)
        return rows.reading(logits), rows.reading(features)


class OpenCoordinates:
    """What an optimiser sees of a shard: all of its delta, or as one vector the coordinates that its mask opens.

    Neither a step nor its momentum can reach a closed coordinate (Lemma 6), and neither costs anything there.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.index = None if shard.open is None else shard.open.flatten().nonzero()[:, 0]
        self.parameter: nn.Parameter = shard.delta
        if self.index is not None:
            self.parameter = nn.Parameter(shard.delta.detach().flatten()[self.index])

    def step(self, optimizer: Any) -> None:
        """One step from the gradient of the shard's delta, which is used up."""
        delta = self.shard.delta
        if self.index is None:
            optimizer.step()
        else:
            assert delta.grad is not None
            self.parameter.grad = delta.grad.flatten()[self.index]
            optimizer.step()
            delta.data.view(-1).index_copy_(0, self.index, self.parameter.detach())
        delta.grad = None
