"""What the editors that train shards of a side memory share: the inner steps, registration with the router, undo."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.adaptive import OPTIMIZERS, AdaptiveEditor, Steps
from repair_lightning.editors.inner_loop import Tail, TargetRows, tail_of
from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Query
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.types import Edit, EditBatch

CHECK_EVERY = 10  # steps between looks at the margin
REACH = 0.1  # a step of the normalised gradient, as a share of the length of the states that it moves, at a rate of 1
LEAD = 2.5  # steps of the normalised gradient end just beyond the margin; so much of it they go for
OFTEN = 3  # most of these steps between looks at the margin: there are few


class ShardEditor(AdaptiveEditor):
    """An editor whose edits live in shards of the side memory, found by a router.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        seed: of masks and samples.
        common: what every editor takes, see `Editor`.
    """

    can_prune = True
    can_undo = True
    can_share = True

    def __init__(self, base: str = "", seed: int = 0, **common: Any) -> None:
        super().__init__(base, **common)
        self.seed = seed
        self.lr_unit = self.value_rate = 1.0
        self.tail: Tail = "model"

    @property
    def stepping(self) -> str:
        """`writing.optimizer`, or what fits: a base with a chat template wants values that say little besides."""
        several = self.edited.forms.marks is not None
        return self.writing.optimizer or ("normalized" if several else "adam")

    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser that `writing` names."""
        return OPTIMIZERS[self.stepping](parameters, lr=self.writing.rate * self.lr_unit)

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides the router's part, find what is left to `auto`, and measure the base."""
        self.choose_settings(background, held_out)
        super().prepare(background, held_out)
        self.tail = tail_of(self)
        prompts = self.background.at_last()
        size = prompts.hidden.float().square().mean(-1).sqrt()
        reach = prompts.activations.float().abs().sum(-1)
        self.lr_unit = float((size / reach.clamp_min(1e-12)).mean())
        self.value_rate = self.writing.rate * float(size.mean())

    def pace(self, states: Tensor, otherwise: float) -> tuple[float | None, int, float]:
        """The margin that inner steps go for, how many come between looks at it, and their rate: `otherwise`, but for
        steps of the normalised gradient what suits the states (M, D) that they move."""
        margin = self.writing.margin
        if self.stepping != "normalized":
            return margin, CHECK_EVERY, otherwise
        sizes = states.float().norm(dim=-1)
        rate = self.writing.rate * REACH * float(sizes[sizes.isfinite()].mean())  # one bad edit spoils no other
        return None if margin is None else LEAD * margin, OFTEN, rate

    def rows(
        self, edits: Sequence[Edit], more: Sequence[tuple[int, Encoded]], rehearsed: Sequence[Edit] = ()
    ) -> TargetRows:
        """The training rows of a batch: the edits' own, then `more` as (member, row), then rehearsed edits."""
        plain = [self.encode(edit) for edit in edits]
        encoded = [*plain, *(row for _, row in more), *map(self.encode, rehearsed)]
        owners = [*range(len(edits)), *(i for i, _ in more), *range(len(edits), len(edits) + len(rehearsed))]
        captures = self.edited.captures([row.ids for row in encoded])
        texts = [self.edited.forms.asked(edit.prompt) for edit in edits]
        prompts = self.edited.query_of(texts, [row.prompt for row in plain], captures[: len(plain)])
        return TargetRows(encoded, captures, owners, len(edits), prompts)

    @property
    def in_step(self) -> bool:
        """Whether the ranks train the same shard at the same time."""
        return self.team.size > 1 and not self.team.deals

    def agreed(self, yes: Tensor) -> Tensor:
        """What every rank says that trains the same shard; elementwise."""
        return self.team.total((~yes).float()) == 0 if self.in_step else yes

    def share_gradient(self, parameter: torch.nn.Parameter, summed: bool = False) -> None:
        """The sum of the ranks' gradients where each has seen some rows; their mean where each has seen all."""
        if not self.in_step:
            return
        assert parameter.grad is not None
        total = self.team.total(parameter.grad)
        parameter.grad = total if summed else total / self.team.size

    def backpropagate(self, loss: Tensor) -> None:
        """Backward, through the trainer where there is one."""
        if self._trainer is None:
            loss.backward()
        else:
            self.manual_backward(loss)

    @contextmanager
    def bound(self, parameter: torch.nn.Parameter, rate: float) -> Iterator[Any]:
        """The trainer's optimiser, bound to a parameter with a fresh state; a plain one where there is no trainer."""
        optimizer: Any = self.build_optimizer([parameter]) if self._trainer is None else self.optimizers()
        raw = getattr(optimizer, "optimizer", optimizer)
        group = raw.param_groups[0]
        placeholder, group["params"] = group["params"], [parameter]
        group["lr"] = rate  # its unit was measured after the optimiser was made
        raw.state.clear()
        try:
            with torch.enable_grad():
                yield optimizer
        finally:
            group["params"] = placeholder
            raw.state.clear()

    def attempts(self, edits: Sequence[Edit]) -> int:
        """How often the hardest of some edits was written before."""
        return max((self.ledger.entry(edit.id).attempts for edit in edits if edit.id in self.ledger), default=0)

    def batch_limit(self, edits: Sequence[Edit]) -> int:
        """How many such edits are written together: fewer where targets are long."""
        tokens = [len(self.encode(edit).target) for edit in edits]
        return max(1, int(self.writing.batch_tokens / max(sum(tokens) / max(len(tokens), 1), 1)))

    def enter(self, edits: Sequence[Edit], shards: Sequence[int], prompts: Query) -> None:
        """Tell the router which shard answers which edit."""
        if not edits:
            return
        described = self.router.describe(self.anchors_of(edits), prompts, shards)
        take = self.router.insert if self.written is None else self.written.describe
        take([edit.id for edit in edits], described)

    def finish_window(self) -> None:
        """Calibrate the router."""
        self.calibrate()

    def forget(self, ids: Iterable[str]) -> None:
        """The router drops the edits; their prompts are the base's again where routing is by key."""
        self.router.forget(list(ids))

    def prune(self, shard: int) -> None:
        """Empty a shard; none of its edits is routed to it."""
        self.forget(self.ledger.owned_by(shard))
        self.memory.prune(shard)

    def undo(self, ids: Sequence[str]) -> list[str]:
        """Take edits back; a shard that others share is rebuilt for those."""
        shards = dict.fromkeys(shard for id in ids if (shard := self.ledger.owner_of(id)) is not None)
        self.ledger.undo(ids, "taken back on request")
        self.forget(ids)
        again: list[str] = []
        for shard in shards:
            rest = self.ledger.owned_by(shard)
            self.prune(shard)
            self.ledger.requeue(rest, f"shard {shard} is rebuilt without {', '.join(ids[:3])}")
            self._rebuild(shard, [self.ledger.edit(id) for id in rest])
            again += rest
        self.finish_window()
        return again

    def _rebuild(self, shard: int, edits: Sequence[Edit]) -> None:
        """Write the edits of an emptied shard again, all of them or none."""
        size = self.written_together(edits)
        groups = [tuple(edits[at : at + size]) for at in range(0, len(edits), size)]
        while groups:
            batch = EditBatch(groups.pop(0))
            reports = self.rewrite(batch, shard)
            self.ledger.written(reports)
            left = {report.id: report.error for report in reports if report.residual or report.error}
            if left and len(batch.edits) == 1:
                id = batch.ids[0]
                raise RepairError(f"edit {id!r} cannot be written again ({left[id]}): nothing is undone")
            groups += [(edit,) for edit in batch.edits if edit.id in left]

    @abstractmethod
    def written_together(self, edits: Sequence[Edit]) -> int:
        """How many edits of a shard that is rebuilt are written at once."""

    @abstractmethod
    def rewrite(self, batch: EditBatch, shard: int) -> list[Any]:
        """Write edits of an emptied shard again; one report per edit."""


__all__ = ["ShardEditor", "Steps"]
