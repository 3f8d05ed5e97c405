"""What the inner steps of a write share: its training rows, the logits of their target tokens, the loop of steps.

Nothing in here waits for the device: whatever depends on the rows alone is worked out before the first step.

Shapes: B rows of T tokens, M target tokens in all, n batch members, D = d_model, F = d_ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from repair_lightning.functional import target_cross_entropy, target_margin
from repair_lightning.memory.query import Query
from repair_lightning.memory.shards import Adds, Selection, Shard
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix import Capture, SplitModel, pad_left, stack_left
from repair_lightning.models.tokenizing import Encoded, target_labels
from repair_lightning.types import Edit, EditBatch, EditReport

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor
    from repair_lightning.editors.rivals import Rivals
    from repair_lightning.editors.shards import ShardEditor

Tail = Literal["positions", "rows", "model"]
"""How much runs in a step: the positions that are read, whole rows from the edited layer on, or the whole model."""


def tail_of(editor: Editor) -> Tail:
    """The least that a step of an editor must run."""
    if not editor.cache_mib:
        return "model"
    return "positions" if editor.edited.split.adds_up() else "rows"


class TargetRows:
    """Training rows of one write.

    Args:
        encoded: B prompts with their targets.
        captures: their states at the edited layer.
        owners: B indices: the edit that a row belongs to; rehearsed edits are counted on behind the members.
        members: n; the first n rows are the members' own, without a context.
        prompts: the members' prompts, where the writer asks for them.

    Attributes:
        ids, mask, hidden, activations: (B, T, ...) padded on the left: tokens, what enters the edited layer, A(x).
        labels, row: (M,) the target tokens, row by row, and the row of each.
        lengths, firsts: (B,) how many target tokens each row has, and where its first one stands among the M.
        span: of how many last positions of a row the logits are needed.
        owner: (B,) the edit that a row belongs to; `owners` is how many there are, rehearsed ones included.
        edit, slot, order: (M,) the edit that a target token belongs to, its place among those of that edit, and the
            target tokens edit by edit.
        ranks: (`owners`,) how many target tokens each edit has, on the CPU.
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
        self._leaving: Tensor | None = None
        self.hidden = stack_left([capture.hidden for capture in captures])
        self.activations = stack_left([capture.activations for capture in captures])
        device = self.hidden.device
        self.ids, self.mask = pad_left([row.ids for row in encoded], device=device)
        labels = target_labels(encoded)
        self.row, column = ((labels >= 0).nonzero().T).to(device)
        self.labels = labels[labels >= 0].to(device)
        self.span = labels.shape[1] + 1
        self._at = self.row * self.span + column
        self.lengths = torch.tensor([len(row.target) for row in encoded]).to(device)
        self.firsts = self.lengths.cumsum(0) - self.lengths
        self.members, self._prompts, self.owners = members, prompts, len(set(owners))
        self.owner = torch.tensor(list(owners)).to(device)
        self._per_owner = torch.tensor(list(owners)).bincount().to(device)
        edit = torch.tensor(list(owners))[(labels >= 0).nonzero()[:, 0]]
        self.ranks, order = edit.bincount(minlength=self.owners), edit.argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order)) - (self.ranks.cumsum(0) - self.ranks).repeat_interleave(self.ranks)
        self.edit, self.slot, self.order = edit.to(device), slot.to(device), order.to(device)

    @classmethod
    def of(cls, edited: EditedModel, encoded: Sequence[Encoded], members: int | None = None) -> TargetRows:
        """Rows that are an edit each, with their states; by default all of them are members."""
        captures = edited.captures([row.ids for row in encoded])
        return cls(encoded, captures, range(len(encoded)), len(encoded) if members is None else members)

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

    def reading(self, states: Tensor) -> Tensor:
        """States (B, `span` or more, ...) at the positions from which the M target tokens are read, (M, ...)."""
        return states[:, -self.span :].flatten(0, 1).index_select(0, self._at)

    def leaving(self, split: SplitModel) -> Tensor:
        """The states (M, D) that leave the edited layer where target tokens are read; computed once."""
        if self._leaving is None:
            with split.skipping():
                self._leaving = self.reading(split.layer_output(self.ids, self.mask, self.hidden))
        return self._leaving

    def losses(self, logits: Tensor) -> Tensor:
        """The cross-entropy (M,) of the target tokens, nats, from their logits (M, V)."""
        return target_cross_entropy(logits[:, None], self.labels[:, None])

    def per_row(self, tokens: Tensor) -> Tensor:
        """The mean of token values (M,) in each row, (B,)."""
        return tokens.new_zeros(len(self)).index_add(0, self.row, tokens) / self.lengths

    def per_member(self, rows: Tensor) -> Tensor:
        """The mean of row values (B,) of each member, (n,)."""
        sums = rows.new_zeros(self.owners).index_add(0, self.owner, rows)
        return (sums / self._per_owner)[: self.members]

    def lead(self, logits: Tensor, margin: float | None) -> Tensor:
        """(n,) whether all of a member's target tokens lead their best rival by `margin`, in nats; for None no one's.
        What is not finite counts as leading: no further step helps it."""
        if margin is None:
            return torch.zeros(self.members, dtype=torch.bool, device=logits.device)
        margins = target_margin(logits[:, None], self.labels[:, None])
        lowest = margins.new_full((self.owners,), torch.inf)
        return ~(lowest.scatter_reduce(0, self.edit, margins, "amin") < margin)[: self.members]


class TargetTail:
    """The logits of a write's target tokens as a function of what the shard adds.

    Where the last layer is edited and its value output is simply added, only the positions that are read take part;
    otherwise the edited layer and those above it run over whole rows, or, without a prefix cache, the whole model.
    `states` (M, D) are those that leave the layer in the first case, else those that enter it.
    """

    def __init__(self, split: SplitModel, rows: TargetRows, kind: Tail) -> None:
        self.split, self.rows, self.kind = split, rows, kind
        self.states = rows.reading(rows.hidden)
        if kind == "positions":
            self.states = self.out = rows.leaving(split)
            self.activations = rows.reading(rows.activations).float()

    def __call__(self, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (M, V) and the features (M, D) that enter the head.

        `product` gives what the shard adds, (M, D), for activations (M, F) at the positions that are read. Where more
        than these positions run, it is the model's own hook that adds it.
        """
        rows = self.rows
        if self.kind == "positions":
            return self.split.readout(self.out + product(self.activations).to(self.out.dtype))
        hidden = rows.hidden if self.kind == "rows" else None
        logits, features = self.split.tail(rows.ids, rows.mask, hidden, rows.span)
        return rows.reading(logits), rows.reading(features)

    def cut(self) -> AbstractContextManager[None]:
        """Inside, what the steps need not run is out of the way."""
        return nullcontext() if self.kind == "model" else self.split.skipping(whole=self.kind == "positions")


def descend(
    rows: TargetRows,
    logits_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    done: Callable[[int, Tensor, Tensor], bool],
    total: Callable[[Tensor], Tensor] = torch.sum,
    after: Callable[[], None] = lambda: None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    rivals: Rivals | None = None,
) -> tuple[int, list[float]]:
    """Take steps until a write is done; returns how many, and each member's last loss.

    Args:
        rows: what is trained on.
        logits_of: gives the target tokens' logits (M, V) as things stand.
        optimizer: of what is trained.
        steps: the most.
        done: asked before each step and after the last, with its number, the logits and the rows' losses (B,); with
            `rivals` as often as these look at the whole vocabulary.
        total: what is minimised, of the rows' losses.
        after: called after each step.
        backward: of the total.
        rivals: the tokens that steps see instead of the whole vocabulary.
    """
    with torch.enable_grad():
        for step in range(steps + 1):
            if rivals is None or rivals.due(step) or step == steps:
                with torch.set_grad_enabled(rivals is None):
                    logits = logits_of()
                    losses = rows.per_row(rows.losses(logits))
                if done(step, logits.detach(), losses.detach()) or step == steps:
                    break
            if rivals is not None:
                losses = rows.per_row(rivals.losses(step, logits, logits_of))
            optimizer.zero_grad()
            backward(total(losses))
            optimizer.step()
            with torch.no_grad():
                after()
    return step, rows.per_member(losses.detach()).tolist()


def in_halves(batch: EditBatch, attempt: Callable[[EditBatch], list[EditReport]]) -> list[EditReport]:
    """The reports of a batch; while all it has is errors it is written in halves, until what spoils it stands alone.

    `attempt` writes edits; where something is not finite it puts everything back and reports errors.
    """
    reports, half = attempt(batch), len(batch.edits) // 2
    if not half or not all(report.error for report in reports):
        return reports
    first, second = (EditBatch(part) for part in (batch.edits[:half], batch.edits[half:]))
    return [*in_halves(first, attempt), *in_halves(second, attempt)]


class AskedBack:
    """Asks rows of an editor's edits, again and again, whether something says their targets."""

    @torch.no_grad()
    def __init__(self, editor: ShardEditor, rows: TargetRows) -> None:
        self._editor, self.rows, self._tail = editor, rows, TargetTail(editor.edited.split, rows, editor.tail)

    @classmethod
    def of(cls, editor: ShardEditor, edits: Sequence[Edit]) -> AskedBack | None:
        """In the forms that edits are asked back in; None where a base has no such form."""
        found = editor.checks(edits)
        if not found:
            return None
        captures = editor.edited.captures([row.ids for _, row in found])
        return cls(editor, TargetRows([row for _, row in found], captures, [i for i, _ in found], len(edits)))

    @torch.no_grad()
    def fails(self, added: Adds, margin: float | None = None) -> list[int]:
        """The edits whose target what is added to the rows does not say everywhere, or not by a margin in nats, on any
        rank that trains the same shard."""
        rows, tail = self.rows, self._tail
        with tail.cut(), self._editor.edited.forced(Selection(len(rows), [(added, None)])):
            logits, _ = tail(lambda _: rows.reading(added.product(rows.activations.float())))
        held = rows.lead(logits, margin)
        if margin is None:
            held = torch.ones_like(held)
            held[rows.edit[logits.argmax(-1) != rows.labels]] = False
        return (~self._editor.agreed(held)).nonzero()[:, 0].tolist()


class OpenCoordinates:
    """What an optimiser sees of a shard: all of its delta, or as one vector the coordinates that its mask opens.

    Neither a step nor its momentum can reach a closed coordinate (Lemma 6), and neither costs anything there.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard, self.product = shard, shard.product
        self.index = None if shard.open is None else shard.open.flatten().nonzero()[:, 0]
        self.parameter: nn.Parameter = shard.delta
        if self.index is not None:
            self.parameter = nn.Parameter(shard.delta.detach().flatten()[self.index])

    @property
    def trained(self) -> nn.Parameter:
        """What a backward pass leaves its gradient in."""
        return self.shard.delta

    def delta(self) -> Tensor:
        """The whole delta (D, F), which gradients reach."""
        return self.shard.delta

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

    def finish(self) -> None:
        """The shard already holds what was trained."""
