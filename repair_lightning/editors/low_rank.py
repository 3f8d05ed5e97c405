"""Writing edits into low-rank shards of their own: the least change of the value matrix that says the target.

Ours, not the paper's. Let K (R, F) be A(x) at the R positions from which an edit's target tokens are read, and u (R, D)
what the value matrix must add there so that the target is said. Among all deltas with `delta k_t = u_t` the smallest is
`u^T (K K^T)^-1 K` (the constraint is ROME's, arXiv 2202.05262, there with one key and a covariance). So the right
factor is fixed by the frozen base, and only u is trained: a batch of edits is one padded step in which no edit disturbs
another, and each stops on its own.

Shapes: B rows, M target tokens in all, n batch members in G groups that share a shard, R target tokens of the largest
group, D = d_model, F = d_ffn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.inner_loop import TargetRows, TargetTail
from repair_lightning.functional import target_cross_entropy, target_margin
from repair_lightning.memory.side_memory import Selection

if TYPE_CHECKING:
    from repair_lightning.editors.repair import Repair

RIDGE = 1e-4
"""Added to `K K^T`, as a share of its mean diagonal: two positions with one key must not blow up."""


REACH = 0.1
"""A step of the normalised gradient, as a share of the length of the states that it moves, at a rate of 1."""


LEAD = 2.5
"""Steps of the normalised gradient end just beyond the margin; so much of it they go for."""
OFTEN = 3
"""Most of these steps between looks at the margin: there are few."""


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


class DualKeys:
    """The fixed right factors of G groups, and how their target tokens excite them.

    Args:
        rows: training rows.
        group: (n,) the group of each member.

    Attributes:
        token_group: (M,) the group of each target token.
        right: (G, R, F) the dual basis of each group's keys, zero past its own rank.
        ranks: (G,) target tokens of each group.
    """

    def __init__(self, rows: TargetRows, group: Tensor) -> None:
        keys = rows.reading(rows.activations).float()
        self.row_group = group[rows.owner]
        self.token_group = self.row_group[rows.row]
        groups = int(group.max()) + 1
        self.ranks = self.token_group.bincount(minlength=groups)
        order = self.token_group.argsort(stable=True)
        before = self.ranks.cumsum(0) - self.ranks
        self._slot = torch.empty_like(order)
        self._slot[order] = torch.arange(len(order), device=order.device) - before.repeat_interleave(self.ranks)
        padded = keys.new_zeros(groups, int(self.ranks.max()), keys.shape[-1])
        padded[self.token_group, self._slot] = keys
        gram = padded @ padded.mT
        empty = (padded.square().sum(-1) == 0).float()
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(-1) / self.ranks
        self.right = torch.linalg.solve(gram + torch.diag_embed(empty + ridge[:, None]), padded)
        self._responses = padded @ self.right.mT

    def pushed(self, values: Tensor) -> Tensor:
        """What `values` (G, R, D) add at the target tokens' positions, (M, D)."""
        return (self._responses @ values)[self.token_group, self._slot]

    def lowest(self, tokens: Tensor) -> Tensor:
        """The least of token values (M,) in each group, (G,)."""
        start = tokens.new_full((len(self.ranks),), torch.inf)
        return start.scatter_reduce(0, self.token_group, tokens, "amin")


class _Training(nn.Module):
    """The groups' factors in training, as what a hook on the value matrix adds to each row."""

    def __init__(self, keys: DualKeys, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def product(self, activations: Tensor) -> Tensor:
        """(B, T, D) for float32 activations (B, T, F)."""
        group = self.keys.row_group
        return activations @ self.keys.right[group].mT @ self.values[group]


@dataclass(slots=True)
class Outcome:
    """What became of one group: its factors, `left` (D, R) and `right` (R, F), the steps that it took, and of each of
    its members the last edit loss and distillation loss."""

    left: Tensor
    right: Tensor
    steps: int
    loss: dict[int, float]
    kd: dict[int, float]

    def moved(self, members: Sequence[int]) -> Outcome:
        """The same, of members that stand elsewhere."""
        loss, kd = ({members[i]: value for i, value in found.items()} for found in (self.loss, self.kd))
        return Outcome(self.left, self.right, self.steps, loss, kd)


def held_outside(editor: Repair, outcomes: Sequence[Outcome], rows: TargetRows) -> list[bool]:
    """Whether each outcome says its members' targets in rows that it was not trained on."""
    owner = {member: outcome for outcome in outcomes for member in outcome.loss}
    parts = [(owner[int(member)].left, owner[int(member)].right) for member in rows.owner.tolist()]
    tail = TargetTail(editor.edited.split, rows, editor.tail)
    hook = Selection(len(rows), [(_Given(parts), None)])
    with torch.no_grad(), editor.cut(), editor.edited.forced(hook):
        of = rows.row.tolist()
        logits, _ = tail(lambda keys: torch.stack([_push(key, *parts[row]) for key, row in zip(keys, of, strict=True)]))
    wrong = rows.owner[rows.row[logits.argmax(-1) != rows.labels]].unique().tolist()
    return [not any(member in wrong for member in outcome.loss) for outcome in outcomes]


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

    def __init__(self, editor: Repair) -> None:
        self.editor = editor

    def train(self, rows: TargetRows, budget: int) -> list[Outcome]:
        """One outcome per group of `writing.capacity` members, in their order.

        Groups that are written leave; the others go on, with a fresh optimiser whenever half of them have left.
        """
        size = self.editor.writing.capacity_of_a_shard
        group = torch.arange(rows.members, device=rows.ids.device) // size
        members = [list(range(at, min(at + size, rows.members))) for at in range(0, rows.members, size)]
        outcomes: dict[int, Outcome] = {}
        open_groups, taken = list(range(len(members))), 0
        known: Tensor | None = None
        while True:
            inside = [member for i in open_groups for member in members[i]]
            part = rows if len(inside) == rows.members else rows.part(inside)
            part_group = torch.tensor([n for n, i in enumerate(open_groups) for _ in members[i]], device=group.device)
            keys = DualKeys(part, part_group)
            values = self._start(keys, known)
            steps, done, losses, kd = self._phase(part, keys, values, budget - taken)
            taken += steps
            left = [n for n in range(len(open_groups)) if taken < budget and not done[n]]
            for n, i in enumerate(open_groups):
                if n in left:
                    continue
                rank = int(keys.ranks[n])
                own = {member: inside.index(member) for member in members[i]}
                outcomes[i] = Outcome(
                    values[n, :rank].T.detach().clone(),
                    keys.right[n, :rank].clone(),
                    taken,
                    {member: losses[at] for member, at in own.items()},
                    {member: kd[at] for member, at in own.items()},
                )
            if not left:
                return [outcomes[i] for i in range(len(members))]
            known = values.detach()[left]
            open_groups = [open_groups[n] for n in left]

    def _start(self, keys: DualKeys, known: Tensor | None) -> nn.Parameter:
        """Zeros, or what is known of the same groups (G, R', D), cut to the rank that they need."""
        shape = (*keys.right.shape[:2], self.editor.edited.memory.shape[0])
        start = torch.zeros(shape, device=keys.right.device)
        if known is not None:
            start.copy_(known[:, : shape[1]])
        return nn.Parameter(start)

    def _phase(
        self, rows: TargetRows, keys: DualKeys, values: nn.Parameter, budget: int
    ) -> tuple[int, list[bool], list[float], list[float]]:
        """Steps until half of the groups are written or the budget is used.

        Returns:
            the steps taken, per group whether it is written or beyond help, and per member the losses.
        """
        editor, margin, every = self.editor, self.editor.writing.margin, self.editor.writing.check_every
        tail = TargetTail(editor.edited.split, rows, editor.tail)
        hook = Selection(len(rows), [(_Training(keys, values), None)])
        rate = editor.value_rate
        if editor.stepping == "normalized":
            margin, every = None if margin is None else LEAD * margin, min(every, OFTEN)
            sizes = tail.states.float().norm(dim=-1)
            rate = editor.writing.rate * REACH * float(sizes[sizes.isfinite()].mean())  # one bad edit spoils no other
        done = torch.zeros(len(keys.ranks), dtype=torch.bool)
        with editor.bound(values, rate) as optimizer, editor.cut(), editor.edited.forced(hook):
            for step in range(budget + 1):  # the last round only looks at what the steps made
                logits, features = tail(lambda _: keys.pushed(values))
                losses = rows.per_row(target_cross_entropy(logits[:, None], rows.labels[:, None]))
                kd, per_sample = editor.distil(logits, features, rows)
                if margin is not None and step % every == 0:
                    known = keys.lowest(target_margin(logits.detach()[:, None], rows.labels[:, None]))
                    done = editor.agreed(~(known < margin)).cpu()  # what is not finite is not helped by more steps
                    if 2 * int(done.sum()) >= len(done):
                        break
                if step == budget:
                    break
                editor.backpropagate(losses.sum() + editor.distillation.weight * kd)
                editor.share_gradient(values)
                optimizer.step()
                values.grad = None
        return step, done.tolist(), rows.per_member(losses.detach()).tolist(), per_sample.detach().tolist()
