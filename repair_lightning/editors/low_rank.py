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

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.inner_loop import AskedBack, TargetRows, TargetTail, descend
from repair_lightning.editors.rivals import rivals_of
from repair_lightning.memory.shards import Factors, HasFactors, LowRankShard, Selection

if TYPE_CHECKING:
    from repair_lightning.editors.keyed import Keyed

SPARED = (0.1, 0.03, 0.01)
"""Shares of a shard's sum of squares that are left out, where its edit holds without them; the largest first."""
RIDGE = 1e-4  # added to `K K^T`, as a share of its mean diagonal: two positions with one key must not blow up


class NormalizedGradient(torch.optim.Optimizer):
    """Steps of fixed length along each position's gradient, shorter where it has less to go than the worst position.

    Values stay in the span of what the head asks for. Adam moves each coordinate alike; what that adds besides says
    rare tokens where keys of another form mix the positions.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; every parameter is (..., R, D)."""
        found = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                size = parameter.grad.norm(dim=-1, keepdim=True)
                most = size.amax(dim=-2, keepdim=True) if size.dim() > 1 else size
                share = (size / most.clamp_min(1e-30)).sqrt()
                parameter -= group["lr"] * share * parameter.grad / size.clamp_min(1e-30)
        return found


class LowRankTraining:
    """The factors of n edits in training: `right` (n, R, F) is the dual basis of each edit's keys, zero past its own
    rank of `ranks` (n,); `values` (n, R, D) are trained, from zero or from what is `known` (n, R', D) of the same
    edits."""

    def __init__(self, rows: TargetRows, known: Tensor | None = None) -> None:
        keys = rows.reading(rows.activations).float()
        self._rows, self.ranks = rows, rows.ranks
        padded = keys.new_zeros(rows.members, int(self.ranks.max()), keys.shape[-1])
        padded[rows.edit, rows.slot] = keys
        gram = padded @ padded.mT
        empty = (padded.square().sum(-1) == 0).float()
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(-1) / self.ranks.to(gram.device)
        self.right = torch.linalg.solve(gram + torch.diag_embed(empty + ridge[:, None]), padded)
        self._responses = padded @ self.right.mT
        start = torch.zeros(*self.right.shape[:2], rows.hidden.shape[-1], device=keys.device)
        if known is not None:
            start.copy_(known[:, : start.shape[1]])
        self.values = nn.Parameter(start)

    def pushed(self) -> Tensor:
        """What the values add at the target tokens' positions, (M, D)."""
        return (self._responses @ self.values)[self._rows.edit, self._rows.slot]

    def product(self, activations: Tensor) -> Tensor:
        """What they add in each row, (B, T, D), for float32 activations (B, T, F)."""
        return activations @ self.right[self._rows.owner].mT @ self.values[self._rows.owner]


@dataclass(slots=True)
class Outcome:
    """What became of one edit: its factors, `left` (D, R) and `right` (R, F), the steps that it took, its last loss."""

    left: Tensor
    right: Tensor
    steps: int
    loss: float

    def factors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Both, as those of a shard."""
        return self.left, self.right

    def is_finite(self) -> bool:
        """Whether it may become a shard."""
        return math.isfinite(self.loss) and bool(self.left.isfinite().all() and self.right.isfinite().all())

    def turned(self) -> Outcome:
        """The same product by its singular vectors, the largest first, which lose less in a byte per number than a dual
        basis does; the columns of `left` have the singular values' lengths."""
        (outer, inner), (base, other) = torch.linalg.qr(self.left), torch.linalg.qr(self.right.T)
        left, sizes, right = torch.linalg.svd(inner @ other.T, full_matrices=False)
        return replace(self, left=outer @ left * sizes, right=right @ base.T)

    def without(self, spared: float) -> Outcome:
        """One that is :meth:`turned`, of the least rank that leaves out at most this share of its sum of squares."""
        share = self.left.square().sum(0).cumsum(0)
        rank = min(int((share < (1 - spared) * share[-1]).sum()) + 1, len(share))
        return replace(self, left=self.left[:, :rank], right=self.right[:rank])


class LowRankWriter:
    """Trains the low-rank shards of a batch side by side, with an editor's options, base and optimiser."""

    def __init__(self, editor: Keyed) -> None:
        self.editor = editor

    def train(self, rows: TargetRows, budget: int) -> list[Outcome]:
        """One outcome per edit. What is written leaves, and whenever half have left, the rest begin another phase."""
        outcomes: dict[int, Outcome] = {}
        still, taken, known = list(range(rows.members)), 0, None
        while True:
            part = rows if len(still) == rows.members else rows.part(still)
            training = LowRankTraining(part, known)
            steps, done, losses = self._phase(part, training, budget - taken)
            taken += steps
            values, ranks = training.values.detach(), training.ranks.tolist()
            for n, edit in enumerate(still):
                if taken >= budget or done[n]:
                    left, right = values[n, : ranks[n]].T.clone(), training.right[n, : ranks[n]].clone()
                    outcomes[edit] = Outcome(left, right, taken, losses[n])
            going = [n for n, edit in enumerate(still) if edit not in outcomes]
            if not going:
                return [outcomes[edit] for edit in range(rows.members)]
            known = values[going]
            still = [still[n] for n in going]

    def _phase(self, rows: TargetRows, training: LowRankTraining, budget: int) -> tuple[int, list[bool], list[float]]:
        """Steps until half of the edits are done or the budget is used; returns how many, who is, and the losses."""
        editor, values = self.editor, training.values
        tail = TargetTail(editor.edited.split, rows, editor.tail)
        margin, every, rate = editor.pace(tail.states, editor.value_rate)
        ready = torch.zeros(rows.members, dtype=torch.bool)

        def done(step: int, logits: Tensor, losses: Tensor) -> bool:
            nonlocal ready
            if margin is None or step % every:
                return False
            ready = editor.agreed(rows.lead(logits, margin)).cpu()
            return 2 * int(ready.sum()) >= len(ready)

        def backward(loss: Tensor) -> None:
            editor.backpropagate(loss)
            editor.share_gradient(values)

        hook = Selection(len(rows), [(training, None)])
        with editor.bound(values, rate) as optimizer, tail.cut(), editor.edited.forced(hook):
            step, losses = descend(
                *(rows, lambda: tail(lambda _: training.pushed())[0], optimizer, budget, done),
                backward=backward,
                rivals=rivals_of(tail, every),
            )
        return step, ready.tolist(), losses


def factors_of(outcomes: Sequence[HasFactors], rows: TargetRows) -> Factors:
    """What each row's edit adds to it."""
    return Factors([outcomes[edit] for edit in rows.owner.tolist()], rows.hidden.device)


def shortened(
    outcomes: list[Outcome], written: AskedBack, other: AskedBack | None, margin: float | None
) -> list[Outcome]:
    """The outcomes of the least rank at which each edit, as it is kept, has its margin in the rows that it was
    `written` in, and holds in those of the `other` forms: the same answers in fewer bytes. One that has no margin at
    any rank, as where the steps have run out, loses none."""
    still = [i for i, one in enumerate(outcomes) if one.is_finite()]
    whole = [one.turned() if one.is_finite() else one for one in outcomes]
    found = list(whole)
    for spared in SPARED if still else ():
        tried, kept = {i: whole[i].without(spared) for i in still}, list[HasFactors](whole)
        for i, one in tried.items():
            kept[i] = LowRankShard.in_int8(one.left, one.right)
        fails = set(written.fails(factors_of(kept, written.rows), margin))
        fails.update(() if other is None else other.fails(factors_of(kept, other.rows)))
        for i in set(still) - fails:
            found[i] = tried[i]
        still = [i for i in still if i in fails]
        if not still:
            break
    return found
