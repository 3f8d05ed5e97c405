"""REPAIR: dense side-memory shards, homogeneous batches, distillation, a closed loop and a loss-aware merge.

Paper: "REPAIR: Robust Editing via Progressive Adaptive Intervention and Reintegration", arXiv 2510.01879, Sec. 2,
Alg. 1-4. WISE (arXiv 2405.14768) is the special case of one shard at a time, batches of one and no feedback.

Our deviations, each a switch (docs/studies/repair-on-a-real-model.md says why):
  * shards of a base with a chat template are trained in dual coordinates (`editors/dense.py`), of others by Adam;
    `writing.optimizer` takes the paper's steps;
  * an edit is written in several forms, and asked back in another;
  * routing by key is the default, the paper's activation score is `routing.router=activation`, both are `hybrid`;
  * the router sees the prompt alone, once per sequence; thresholds are calibrated on held-out irrelevant prompts;
  * the edit loss includes the end-of-sequence token and may be averaged over contexts that the base wrote;
  * rates and margins are relative to the base's own states and activations unless `relative` is off;
  * edits that the shard already holds are rehearsed beside the new ones (`writing.replay`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import register
from repair_lightning.editors.dense import DenseWriter
from repair_lightning.editors.inner_loop import AskedBack, TargetRows, in_halves
from repair_lightning.editors.shards import ShardEditor, Steps
from repair_lightning.errors import ConfigError
from repair_lightning.functional import Margins, activation_scores, fused_delta
from repair_lightning.functional.routing import Pool
from repair_lightning.memory.routers import ROUTERS, Router, make_router
from repair_lightning.memory.shards import Shard
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.base import Base
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts.dialogue import behind
from repair_lightning.types import Edit, EditBatch, EditReport

MERGE_RIDGE = 1e-3  # of the least-squares merge: ten times as much loses the edits


@dataclass
class Routing:
    """How prompts find their memory.

    Attributes:
        router: `key`, `activation` (the paper's) or `hybrid`.
        pool: `last`, `mean` or `max` over the prompt's tokens, for activation scores.
        act_ratio: the paper's threshold rule; None calibrates on held-out irrelevant prompts.
        false_fire_rate: share of irrelevant prompts that a calibrated threshold lets fire.
        relation_false_rate: share of other questions about a subject, from a bank of our own, that may pass for the one
            that was edited.
        in_text: whether the base reads the edits about a subject before it writes a text about it; not of `activation`.
        weight: lambda_a, the routing loss's weight; 0 leaves it out.
        margins: (g1, g2, g) of Eq. 7.
        relative: scores and margins in units of the base's typical `||A W_v^T||`, else absolute.
        sample: irrelevant prompts that writing keeps apart: those to which a shard, in dual coordinates, adds nothing,
            and how many take part in a step of the routing loss.
    """

    router: str = "key"
    pool: Pool = "last"
    act_ratio: float | None = None
    false_fire_rate: float = 0.01
    relation_false_rate: float = 0.01
    in_text: bool = True
    weight: float = 0.0
    margins: tuple[float, float, float] = (0.1, 1.0, 0.5)
    relative: bool = True
    sample: int = 256


@dataclass
class Writing(Steps):
    """How a batch is written into a dense shard; besides the inner steps:

    Attributes:
        relative: off, the rate is absolute, as the published ones are.
        capacity: most edits that a shard owns. Edits that failed are granted a quarter for each earlier attempt.
        contexts: texts written by the base, put before each prompt as further training rows.
        mask_ratio: rho, the share of a shard's coordinates that may train.
        shards: how many are opened at the start; more open when all are full.
        replay: most edits of the shard that are rehearsed beside a batch.
        init_scale: standard deviation of a fresh delta, in units of W_v's (sigma_init of Alg. 4).
    """

    relative: bool = True
    capacity: int = 16
    contexts: int = 0
    mask_ratio: float = 1.0
    shards: int = 0
    replay: int = 128
    init_scale: float = 0.0

    def check(self) -> None:
        """Refuse what cannot be."""
        super().check()
        if self.capacity < 1:
            raise ConfigError(f"writing.capacity must be at least 1, got {self.capacity}")
        if not 0 < self.mask_ratio <= 1:
            raise ConfigError(f"writing.mask_ratio must be in (0, 1], got {self.mask_ratio}")


@dataclass
class Distillation:
    """Intra-batch knowledge distillation, Eq. 4.

    Attributes:
        weight: lambda_KD; 0 leaves it out.
        cosine: lambda, weight of the cosine term.
        variance: theta, weight of the variance term.
        temperature: of the optional KL term; None leaves it out.
        consistency: eps_cons; edits whose distillation loss stays at or above it leave the batch. None keeps all.
    """

    weight: float = 0.0
    cosine: float = 0.2
    variance: float = 0.2
    temperature: float | None = None
    consistency: float | None = None


@register("repair")
class Repair(ShardEditor):
    """The REPAIR editor; see the options' own docstrings.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        routing: how prompts find their memory.
        writing: how a batch is written.
        distillation: intra-batch distillation.
        seed: of masks and samples; `seed_everything` where a command gives none.
        common: what every editor takes, see `Editor`.
    """

    can_merge = True

    def __init__(
        self,
        base: str = "",
        routing: Routing = Routing(),  # noqa: B008 - jsonargparse reads the defaults here
        writing: Writing = Writing(),  # noqa: B008
        distillation: Distillation = Distillation(),  # noqa: B008
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(base, seed, **common)
        self.routing, self.distillation = routing, distillation
        self.writing: Writing = writing
        self._check()

    def _check(self) -> None:
        self.writing.check()
        if self.routing.sample < 0:
            raise ConfigError(f"routing.sample must be at least 0, got {self.routing.sample}")
        router = self.routing.router
        if router in ROUTERS and router not in ("key", "activation", "hybrid"):
            raise ConfigError(f"routing.router must be key, activation or hybrid, got '{router}'")

    def build(self, base: Base, layer: int) -> None:
        """Besides, initialise the shards that are opened at the start."""
        super().build(base, layer)
        for shard in self.memory.ids:
            self._initialise(shard)

    def build_memory(self, shape: tuple[int, int]) -> SideMemory:
        """A bank with the shards that are opened at the start."""
        memory = SideMemory(shape, self.writing.mask_ratio, self.seed)
        for _ in range(self.writing.shards):
            memory.open_shard()
        return memory

    def build_router(self) -> Router:
        """The router that `routing` names, with the options that it takes."""
        options, kind = self.routing, ROUTERS.get(self.routing.router, Router)
        taken = {name: getattr(options, name) for name in inspect.signature(kind).parameters}
        router = make_router(options.router, **taken)
        router.reads_all_tokens = options.pool != "last"  # the routing loss and the assignment pool too
        return router

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, measure the unit of relative margins and let the base write contexts."""
        super().prepare(background, held_out)
        value = self.edited.split.value
        with self.edited.forced(None), torch.no_grad():
            last = self.background.at_last().activations
            self.unit = float(value(last).float().norm(dim=-1).mean())
        if not self.writing.relative:
            self.lr_unit, self.value_rate = 1.0, self.writing.rate
        number = self.writing.contexts
        self.contexts = self.base_texts(number, length=8) if number else []
        self.margins = Margins(*self.routing.margins)

    @property
    def reads_background(self) -> bool:
        """For the routing loss."""
        return bool(self.routing.weight)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Write a batch into the shard that :meth:`assign` names: train, register."""
        return self.rewrite(batch, self.assign(batch))

    def rewrite(self, batch: EditBatch, shard: int) -> list[EditReport]:
        """Write a batch into a shard. A loss that is not finite rolls the shard back: what spoils it is reported."""
        return in_halves(batch, lambda part: self._attempt(part, shard))

    def _attempt(self, batch: EditBatch, shard: int) -> list[EditReport]:
        module = self.memory[shard]
        assert isinstance(module, Shard)
        before = module.delta.detach().clone()
        budget = self.writing.steps * (1 + self.attempts(batch.edits))
        known = [id for id in self.ledger.owned_by(shard) if id not in batch.ids]
        rehearsed = [self.ledger.edit(id) for id in known[-self.writing.replay :]] if self.writing.replay else []
        rows, steps, loss, kd = self._train(module, batch.edits, rehearsed, budget)
        size = float(module.delta.detach().norm())  # a norm layer can hide an overflow from the loss
        if not all(math.isfinite(value) for value in [*loss, *kd, size]):
            module.delta.data.copy_(before)
            reason = f"the loss or the shard was not finite after {steps} steps: rolled back"
            return [EditReport(id, shard, loss[i], kd[i], steps, error=reason) for i, id in enumerate(batch.ids)]
        limit = self.distillation.consistency if self.distillation.weight and len(batch.edits) > 1 else None
        stays = [limit is None or value < limit for value in kd]
        kept = [edit for edit, stay in zip(batch.edits, stays, strict=True) if stay]
        self.enter(kept, [shard] * len(kept), rows.prompts.rows(torch.tensor(stays)))
        return [EditReport(id, shard, loss[i], kd[i], steps, not stays[i]) for i, id in enumerate(batch.ids)]

    def _train(
        self, module: Shard, edits: Sequence[Edit], rehearsed: Sequence[Edit], budget: int
    ) -> tuple[TargetRows, int, list[float], list[float]]:
        """Train a batch; where an edit does not hold in a form that it was not written in, once more with that form.

        Returns the rows, the steps taken, and each member's last edit loss and distillation loss.
        """
        rows = self._rows(edits, rehearsed)
        steps, loss, kd = DenseWriter(self).train(module, rows, budget)
        asked = AskedBack.of(self, edits) if self.stepping == "normalized" else None
        fails = [] if asked is None else asked.fails(module)
        if fails and all(map(math.isfinite, loss)):
            rows = self._rows(edits, rehearsed, [(i, row) for i, row in self.checks(edits) if i in fails])
            more, loss, kd = DenseWriter(self).train(module, rows, budget)
            steps += more
        return rows, steps, loss, kd

    def _rows(
        self, edits: Sequence[Edit], rehearsed: Sequence[Edit] = (), more: Sequence[tuple[int, Encoded]] = ()
    ) -> TargetRows:
        """The training rows of a batch: its own in several forms, each again after texts that the base wrote, `more`,
        and rehearsed edits."""
        texts = [(i, behind(context, edit.prompt)) for i, edit in enumerate(edits) for context in self.contexts]
        after = [(i, self._encode(text, edits[i].target)) for i, text in texts]
        return self.rows(
            edits, [*(self.variants(edits) if self.stepping == "normalized" else ()), *after, *more], rehearsed
        )

    @torch.no_grad()
    def least_squares(self, shards: Sequence[int], weights: Sequence[float]) -> Tensor:
        """The delta (D, F) that adds what the shards add where their own edits are read, as far as one can, and nothing
        to irrelevant prompts; edits of a shard with a larger weight are met more closely."""
        keys, values = [], []
        for shard, weight in zip(shards, weights, strict=True):
            edits = [self.ledger.edit(id) for id in self.ledger.owned_by(shard)]
            rows = self._rows(edits, more=self.checks(edits))
            own = rows.reading(rows.activations).float() * math.sqrt(weight * len(shards))
            keys.append(own)
            values.append(self.memory[shard].product(own))
        quiet = self.background.at_last().activations[: self.routing.sample, 0].float()
        keep = len(quiet) / sum(map(len, keys))
        return fused_delta(torch.cat(keys), torch.cat(values), quiet, keep, MERGE_RIDGE).to(quiet.device)

    def batch_limit(self, edits: Sequence[Edit]) -> int:
        """Besides, no more than `capacity`, a quarter of it after each attempt."""
        return max(1, min(self.writing.capacity, super().batch_limit(edits)) >> 2 * self.attempts(edits))

    def assign(self, batch: EditBatch) -> int:
        """The shard for a batch (Alg. 1): the highest activation for its teacher among those with room.

        Ties, as at the start where all deltas are zero, go to the emptiest. A shard is opened where none has room.
        """
        owned = self.ledger.sizes()
        load = {shard: owned.get(shard, 0) for shard in self.memory.ids if self.memory.own(shard)}
        limit = max(self.writing.capacity >> 2 * self.attempts(batch.edits), len(batch.edits))
        room = [shard for shard in load if load[shard] + len(batch.edits) <= limit]
        if not room:
            shard = self.memory.open_shard()
            self._initialise(shard)
            return shard
        teacher, deltas = self.query_of(batch.edits[:1]), [self.memory[shard].delta.detach() for shard in room]
        scores = activation_scores(teacher.activations.float(), deltas, teacher.mask, self.routing.pool)[0].tolist()
        return max(zip(room, scores, strict=True), key=lambda pair: (round(pair[1], 6), -load[pair[0]], -pair[0]))[0]

    def _initialise(self, shard: int) -> None:
        module = self.memory[shard]
        assert isinstance(module, Shard)
        if self.writing.init_scale:
            scale = self.writing.init_scale * float(self.edited.value_weight.float().std())
            seed = (self.seed * 1_000_003 + shard) * 1_000_003 + module.generation
            noise = torch.randn(module.delta.shape, generator=torch.Generator().manual_seed(seed)) * scale
            module.delta.data.copy_(noise if module.open is None else noise.to(module.open.device) * module.open)

    @property
    def shares(self) -> bool:
        """Whether ranks write different batches; where they split the rows of each, they write the same ones."""
        return super().shares and not self.splits_rows

    @property
    def splits_rows(self) -> bool:
        """Whether the ranks write each batch together, with part of its rows each."""
        return self.team.rows_of_batches and self.team.parts > 1

    @property
    def in_step(self) -> bool:
        """Whether the ranks train the same shard at the same time."""
        return super().in_step or (self.team.size > 1 and self.splits_rows)

    def prune(self, shard: int) -> None:
        """Empty a shard: it starts with a fresh delta and mask. None of its edits is routed to it."""
        super().prune(shard)
        if shard in self.memory.ids:
            self._initialise(shard)

    def written_together(self, edits: Sequence[Edit]) -> int:
        """How many edits of a shard that is rebuilt are written at once: all that it holds."""
        return self.writing.capacity

    def fuse(self, shards: Sequence[int], delta: Tensor) -> int:
        """Replace shards by one that holds `delta` and owns all their edits; returns its id."""
        fused = self.memory.fuse(shards, delta)
        self.router.reassign(shards, fused)
        return fused

    def fold(self, shard: int) -> None:
        """Write a shard into the base's W_v: it leaves the bank, and its edits need no router."""
        self._folded = (self.edited.weights.state(), self.memory.snapshot())
        self.edited.weights.add(self.layer, self.memory[shard].delta.detach())
        self.forget(self.ledger.owned_by(shard))
        self.memory.drop([shard])

    def unfold(self) -> None:
        """Take the last :meth:`fold` back, bit by bit; the router's state is the caller's to restore."""
        weights, snapshot = self._folded
        self.edited.weights.load(weights)
        self.memory.restore(snapshot)
