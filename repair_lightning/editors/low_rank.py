"""Writing edits into low-rank shards of their own: the least change of the value matrix that says the target.

Ours, not the paper's. Let K (R, F) be A(x) at the R positions from which an edit's target tokens are read, and u (R, D)
what the value matrix must add there so that the target is said. Among all deltas with `delta k_t = u_t` the smallest is
`u^T (K K^T)^-1 K` (the constraint is ROME's, arXiv 2202.05262, there with one key and a covariance). So the right
factor is fixed by the frozen base, and only u is trained: a batch of edits is one padded step in which no edit disturbs
another, and each stops on its own.

Shapes: B rows, M target tokens in all, n edits, R target tokens of the edit that has most of them over all its rows,
D = d_model, F = d_ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repair_lightning.editors.dense import CHECK_EVERY
from repair_lightning.editors.inner_loop import TargetRows, TargetTail
from repair_lightning.functional import target_cross_entropy, target_margin
from repair_lightning.memory.shards import Selection

if TYPE_CHECKING:
    from repair_lightning.editors.keyed import Keyed

RIDGE = 1e-4
"""Added to `K K^T`, as a share of its mean diagonal: two positions with one key must not blow up."""
REACH = 0.1
"""A step of the normalised gradient, as a share of the length of the states that it moves, at a rate of 1."""


LEAD = 2.5
"""Steps of the normalised gradient end just beyond the margin; so much of it they go for."""
OFTEN = 3
"""Most of these steps between looks at the margin: there are few."""


class DualKeys:
    """The fixed right factors of n edits, and how their target tokens excite them.

    Args:
        rows: training rows.

    Attributes:
        token_edit: (M,) the edit of each target token.
        right: (n, R, F) the dual basis of each edit's keys, zero past its own rank.
        ranks: (n,) target tokens of each edit's rows.
    """

    def __init__(self, rows: TargetRows) -> None:
        keys = rows.reading(rows.activations).float()
        self.row_edit = rows.owner
        self.token_edit = self.row_edit[rows.row]
        self.ranks = self.token_edit.bincount(minlength=rows.members)
        order = self.token_edit.argsort(stable=True)
        before = self.ranks.cumsum(0) - self.ranks
        self._slot = torch.empty_like(order)
        self._slot[order] = torch.arange(len(order), device=order.device) - before.repeat_interleave(self.ranks)
        padded = keys.new_zeros(rows.members, int(self.ranks.max()), keys.shape[-1])
        padded[self.token_edit, self._slot] = keys
        gram = padded @ padded.mT
        empty = (padded.square().sum(-1) == 0).float()
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(-1) / self.ranks
        self.right = torch.linalg.solve(gram + torch.diag_embed(empty + ridge[:, None]), padded)
        self._responses = padded @ self.right.mT

    def pushed(self, values: Tensor) -> Tensor:
        """What `values` (n, R, D) add at the target tokens' positions, (M, D)."""
        return (self._responses @ values)[self.token_edit, self._slot]

    def lowest(self, tokens: Tensor) -> Tensor:
        """The least of token values (M,) of each edit, (n,)."""
        start = tokens.new_full((len(self.ranks),), torch.inf)
        return start.scatter_reduce(0, self.token_edit, tokens, "amin")


class _Training(nn.Module):
    """The edits' factors in training, as what a hook on the value matrix adds to each row."""

    def __init__(self, keys: DualKeys, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def product(self, activations: Tensor) -> Tensor:
        """(B, T, D) for float32 activations (B, T, F)."""
        edit = self.keys.row_edit
        return activations @ self.keys.right[edit].mT @ self.values[edit]


@dataclass(slots=True)
class Outcome:
    """What became of one edit: its factors, `left` (D, R) and `right` (R, F), the steps that it took, its last loss."""

    left: Tensor
    right: Tensor
    steps: int
    loss: float


def held_outside(editor: Keyed, outcomes: Sequence[Outcome], rows: TargetRows) -> list[bool]:
    """Whether each edit's outcome says its target in rows that it was not trained on."""
    parts = [(outcomes[edit].left, outcomes[edit].right) for edit in rows.owner.tolist()]
    tail = TargetTail(editor.edited.split, rows, editor.tail)
    hook = Selection(len(rows), [(_Given(parts), None)])
    with torch.no_grad(), editor.cut(), editor.edited.forced(hook):
        of = rows.row.tolist()
        logits, _ = tail(lambda keys: torch.stack([_push(key, *parts[row]) for key, row in zip(keys, of, strict=True)]))
    wrong = set(rows.owner[rows.row[logits.argmax(-1) != rows.labels]].tolist())
    return [edit not in wrong for edit in range(len(outcomes))]


def _push(keys: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return keys @ right.T @ left.T


class _Given(nn.Module):
    """Finished factors, one pair for each row, as what a hook on the value matrix adds."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.parts = parts

    def product(self, activations: Tensor) -> Tensor:
        """(B, T, D) for float32 activations (B, T, F)."""
        return torch.stack([_push(row, *pair) for row, pair in zip(activations, self.parts, strict=True)])


class LowRankWriter:
    """Trains the low-rank shards of a batch side by side.

    Args:
        editor: whose options, base and optimiser are used.
    """

    def __init__(self, editor: Keyed) -> None:
        self.editor = editor

    def train(self, rows: TargetRows, budget: int) -> list[Outcome]:
        """One outcome per edit.

        Edits that are written leave; the others go on, with a fresh optimiser whenever half of them have left.
        """
        outcomes: dict[int, Outcome] = {}
        still, taken = list(range(rows.members)), 0
        known: Tensor | None = None
        while True:
            part = rows if len(still) == rows.members else rows.part(still)
            keys = DualKeys(part)
            values = self._start(keys, known)
            steps, done, losses = self._phase(part, keys, values, budget - taken)
            taken += steps
            for n, edit in enumerate(still):
                if taken >= budget or done[n]:
                    rank = int(keys.ranks[n])
                    left, right = values[n, :rank].T.detach().clone(), keys.right[n, :rank].clone()
                    outcomes[edit] = Outcome(left, right, taken, losses[n])
            going = [n for n, edit in enumerate(still) if edit not in outcomes]
            if not going:
                return [outcomes[edit] for edit in range(rows.members)]
            known = values.detach()[going]
            still = [still[n] for n in going]

    def _start(self, keys: DualKeys, known: Tensor | None) -> nn.Parameter:
        """Zeros, or what is known of the same edits (n, R', D), cut to the rank that they need."""
        shape = (*keys.right.shape[:2], self.editor.edited.memory.shape[0])
        start = torch.zeros(shape, device=keys.right.device)
        if known is not None:
            start.copy_(known[:, : shape[1]])
        return nn.Parameter(start)

    def _phase(
        self, rows: TargetRows, keys: DualKeys, values: nn.Parameter, budget: int
    ) -> tuple[int, list[bool], list[float]]:
        """Steps until half of the edits are written or the budget is used.

        Returns:
            the steps taken, and per edit whether it is written or beyond help, and its loss.
        """
        editor, margin, every = self.editor, self.editor.writing.margin, CHECK_EVERY
        tail = TargetTail(editor.edited.split, rows, editor.tail)
        hook = Selection(len(rows), [(_Training(keys, values), None)])
        rate = editor.value_rate
        if editor.stepping == "normalized":
            margin, every = None if margin is None else LEAD * margin, OFTEN
            sizes = tail.states.float().norm(dim=-1)
            rate = editor.writing.rate * REACH * float(sizes[sizes.isfinite()].mean())  # one bad edit spoils no other
        done = torch.zeros(len(keys.ranks), dtype=torch.bool)
        with editor.bound(values, rate) as optimizer, editor.cut(), editor.edited.forced(hook):
            for step in range(budget + 1):  # the last round only looks at what the steps made
                logits, _ = tail(lambda _: keys.pushed(values))
                losses = rows.per_row(target_cross_entropy(logits[:, None], rows.labels[:, None]))
                if margin is not None and step % every == 0:
                    known = keys.lowest(target_margin(logits.detach()[:, None], rows.labels[:, None]))
                    done = editor.agreed(~(known < margin)).cpu()  # what is not finite is not helped by more steps
                    if 2 * int(done.sum()) >= len(done):
                        break
                if step == budget:
                    break
                editor.backpropagate(losses.sum())
                editor.share_gradient(values)
                optimizer.step()
                values.grad = None
        return step, done.tolist(), rows.per_member(losses.detach()).tolist()
