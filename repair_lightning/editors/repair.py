"""REPAIR: side-memory shards, homogeneous batches, distillation, a closed loop and a loss-aware merge.

Paper: "REPAIR: Robust Editing via Progressive Adaptive Intervention and Reintegration", arXiv 2510.01879, Sec. 2,
Alg. 1-4. WISE (arXiv 2405.14768) is the special case of one shard at a time, batches of one and no feedback.

Our deviations, each a switch:
  * routing by key is the default, the paper's activation score is `routing.router=activation`;
  * the router sees the prompt alone, once per sequence; thresholds are calibrated on held-out irrelevant prompts;
  * the edit loss includes the end-of-sequence token and may be averaged over contexts that the base wrote;
  * margins are in units of the model's typical `||A W_v^T||` unless `routing.relative` is off;
  * edits that the shard already holds are rehearsed beside the new ones (`writing.replay`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from repair_lightning.editors.adapt import AUTO, Adapted, adapt
from repair_lightning.editors.base import Editor, register
from repair_lightning.editors.inner_loop import OpenCoordinates, Tail, TargetRows, TargetTail
from repair_lightning.editors.low_rank import LowRankWriter, NormalizedGradient, Outcome, held_outside
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.functional import (
    Margins,
    activation_scores,
    kd_loss,
    routing_margin_loss,
    soft_kd_loss,
    target_cross_entropy,
    target_margin,
)
from repair_lightning.functional.routing import Pool
from repair_lightning.memory.query import Query
from repair_lightning.memory.routers import Anchor, Router, make_router
from repair_lightning.memory.side_memory import Shard, SideMemory
from repair_lightning.models.base import Base
from repair_lightning.models.forms import Template
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts.dialogue import behind
from repair_lightning.types import BASE, Edit, EditBatch, EditReport

log = logging.getLogger(__name__)

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "normalized": NormalizedGradient,
}


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
        two_level_from: activation: from how many shards on candidates are looked for first, by their sketches; None
            takes 256, from where it was measured to pay.
        candidates: activation: how many shards are then looked at; None takes 32.
        weight: lambda_a, the routing loss's weight; 0 leaves it out.
        margins: (g1, g2, g) of Eq. 7.
        relative: scores and margins in units of the base's typical `||A W_v^T||`, else absolute.
        sample: irrelevant prompts per step in the routing loss.
    """

    router: str = "key"
    pool: Pool = "last"
    act_ratio: float | None = None
    false_fire_rate: float = 0.01
    relation_false_rate: float = 0.01
    two_level_from: int | None = None
    candidates: int | None = None
    weight: float = 0.0
    margins: tuple[float, float, float] = (0.1, 1.0, 0.5)
    relative: bool = True
    sample: int = 64


@dataclass
class Writing:
    """How a batch is written.

    Attributes:
        form: `low_rank` gives each edit a shard of its own, the least change that says its target; `dense` trains whole
            copies of the value matrix, each for many edits, as the paper does.
        optimizer: `adam`, `adamw`, `sgd`, or `normalized` (the gradient of each position's value at a fixed length, to
            two and a half times the margin, looked at every three steps); None takes `normalized` for low-rank shards
            of a base that is asked in several forms, and `adam` elsewhere.
        lr: its learning rate, in units of `relative`; `auto` finds it by probe edits.
        relative: the rate is relative to the base: at 1, one Adam step may move each coordinate of the layer's output
            by the root mean square of what enters the layer. Off, the rate is absolute, as the published ones are.
        steps: most inner steps per batch (n_iter); as many again for each earlier attempt of its hardest edit.
        stop_margin: stop once every target token leads its best rival by this many nats; None takes all steps, `auto`
            finds it by probe edits.
        check_every: steps between looks at the margin.
        capacity: most edits that a shard owns; None takes 1 for `low_rank` and 128 for `dense`. Of a dense shard edits
            that failed are granted a quarter for each earlier attempt.
        batch_tokens: most target tokens of a batch, and so of a dense shard: long targets make smaller batches.
        hold: low_rank: where shards are kept, on the base's `device` or on the `host`, in the CPU's memory: many
            edits of a large base are more than a GPU holds (docs/scaling.md).
        contexts: texts written by the base, put before each prompt as further training rows.
        mask_ratio: dense: rho, the share of a shard's coordinates that may train.
        shards: dense: how many are opened at the start; more open when all are full.
        replay: dense: most edits of the shard that are rehearsed beside a batch.
        init_scale: dense: standard deviation of a fresh delta, in units of W_v's (sigma_init of Alg. 4).
    """

    form: Literal["low_rank", "dense"] = "low_rank"
    optimizer: Literal["adam", "adamw", "sgd", "normalized"] | None = None
    lr: float | str = 1.0
    relative: bool = True
    steps: int = 150
    stop_margin: float | str | None = 2.0
    check_every: int = 10
    capacity: int | None = None
    batch_tokens: int = 1024
    hold: Literal["device", "host"] = "device"
    contexts: int = 0
    mask_ratio: float = 1.0
    shards: int = 0
    replay: int = 128
    init_scale: float = 0.0

    @property
    def capacity_of_a_shard(self) -> int:
        """`capacity`, or the form's own."""
        return self.capacity or (1 if self.form == "low_rank" else 128)

    @property
    def rate(self) -> float:
        """`lr`; while `auto` has not found it, the default."""
        return 1.0 if isinstance(self.lr, str) else self.lr

    @property
    def margin(self) -> float | None:
        """`stop_margin`; while `auto` has not found it, the default."""
        return 2.0 if isinstance(self.stop_margin, str) else self.stop_margin


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
class Repair(Editor):
    """The REPAIR editor; see the options' own docstrings.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: the edited layer; None for the default of `resolve_layer`, `auto` to find it by probe edits.
        precision: of the base.
        trust_remote_code: let the base's repository run its own code.
        cache_mib: memory for the prefix cache, in MiB; 0 goes without and runs the whole base again and again.
        cache_disk_mib: scratch space on disk for what the prefix cache cannot hold in memory, in MiB.
        routing: how prompts find their memory.
        writing: how a batch is written.
        distillation: intra-batch distillation.
        template: how the base is asked a text: `chat` through its chat template, `none` bare, `auto` through the
            template where it has one.
        seed: of masks and samples; on the command line 0 follows `seed_everything`.
    """

    can_merge = True
    can_prune = True
    can_adapt = True
    can_undo = True
    can_share = True

    def __init__(
        self,
        base: str = "",
        layer: int | str | None = None,
        precision: str = "auto",
        trust_remote_code: bool = False,
        cache_mib: int = 2048,
        cache_disk_mib: int = 8192,
        routing: Routing = Routing(),  # noqa: B008 - jsonargparse reads the defaults here
        writing: Writing = Writing(),  # noqa: B008
        distillation: Distillation = Distillation(),  # noqa: B008
        seed: int = 0,
        template: Template = "auto",
    ) -> None:
        super().__init__(base, layer, precision, trust_remote_code, cache_mib, cache_disk_mib, template)
        self.routing = routing
        self.writing = writing
        self.distillation = distillation
        self.seed = seed
        self.lr_unit = 1.0
        self._check()

    def _check(self) -> None:
        for name in ("two_level_from", "candidates"):
            value = getattr(self.routing, name)
            if value is not None and value < 1:
                raise ConfigError(f"routing.{name} must be at least 1, or null for the default, got {value}")
        if self.writing.steps < 1:
            raise ConfigError(f"writing.steps must be at least 1, got {self.writing.steps}")
        if self.writing.check_every < 1:
            raise ConfigError(f"writing.check_every must be at least 1, got {self.writing.check_every}")
        if self.writing.capacity is not None and self.writing.capacity < 1:
            raise ConfigError(f"writing.capacity must be at least 1, got {self.writing.capacity}")
        if not 0 < self.writing.mask_ratio <= 1:
            raise ConfigError(f"writing.mask_ratio must be in (0, 1], got {self.writing.mask_ratio}")
        for name in ("lr", "stop_margin"):
            value = getattr(self.writing, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(f"writing.{name} must be a number or 'auto', got '{value}'")
        if self.routing.router == "nobody":
            raise ConfigError(
                "routing.router must be key, activation or hybrid, got 'nobody': no edit would be answered"
            )
        if not self.writing.rate > 0:
            raise ConfigError(f"writing.lr must be positive, got {self.writing.lr}")
        if self.writing.hold == "host" and (self.writing.form, self.routing.router) != ("low_rank", "key"):
            raise ConfigError(
                "writing.hold host is for low-rank shards that are found by key: give writing.form low_rank and "
                "routing.router key, or writing.hold device"
            )
        if self.writing.form == "low_rank":
            plain = Writing()
            dense = [
                name
                for name in ("mask_ratio", "shards", "init_scale")
                if getattr(self.writing, name) != getattr(plain, name)
            ]
            dense += ["routing.weight"] if self.routing.weight else []
            if dense:
                raise ConfigError(f"{dense[0]} is for dense shards; give writing.form dense or leave it out")

    # -- building -----------------------------------------------------------------------------------------------------

    def build(self, base: Base, layer: int) -> None:
        """Besides building, initialise the shards that are opened at the start."""
        super().build(base, layer)
        for shard in self.memory.ids:
            self._initialise(shard)

    @contextmanager
    def trial(self, layer: int) -> Iterator[Repair]:
        """Another editor of the same base, with a ledger, a memory and a router of its own; afterwards it is gone."""
        assert self.base is not None
        other = Repair(
            layer=layer,
            cache_mib=self.cache_mib,
            routing=self.routing,
            writing=replace(self.writing, lr=self.writing.rate, stop_margin=self.writing.margin),
            distillation=self.distillation,
            seed=self.seed,
            template=self.template,
        )
        other.build(self.base, layer)
        try:
            yield other
        finally:
            other.edited.release()

    def adopt(self, found: Adapted) -> None:
        """Besides the layer, take over the learning rate and the margin."""
        super().adopt(found)
        self.writing = replace(self.writing, lr=found.lr, stop_margin=found.stop_margin)

    def build_memory(self, shape: tuple[int, int]) -> SideMemory:
        """A bank with the shards that are opened at the start."""
        memory = SideMemory(shape, self.writing.mask_ratio, self.seed, self.writing.hold == "host")
        for _ in range(self.writing.shards):
            memory.open_shard()
        return memory

    def build_router(self) -> Router:
        """The router that `routing` names, with the options that it takes."""
        options = self.routing
        scoring: dict[str, Any] = {
            "pool": options.pool,
            "act_ratio": options.act_ratio,
            "false_fire_rate": options.false_fire_rate,
        }
        levels = {"two_level_from": options.two_level_from, "candidates": options.candidates}
        levels = {name: value for name, value in levels.items() if value is not None}
        keys: dict[str, Any] = {"relation_false_rate": options.relation_false_rate}
        by_name: dict[str, dict[str, Any]] = {"activation": scoring | levels, "key": keys, "hybrid": scoring | keys}
        router = make_router(options.router, **by_name.get(options.router, {}))
        router.reads_all_tokens = options.pool != "last"  # the routing loss and the assignment pool too
        return router

    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser that `writing` names."""
        return OPTIMIZERS[self.stepping](parameters, lr=self.writing.rate * self.lr_unit)

    @property
    def stepping(self) -> str:
        """`writing.optimizer`, or what fits: many forms want values that say little besides, one form wants strong
        ones."""
        several = self.writing.form == "low_rank" and self.edited.forms.marks is not None
        return self.writing.optimizer or ("normalized" if several else "adam")

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides the router's, measure the unit of relative margins and let the base write contexts.

        First of all find what is left to `auto`.
        """
        if AUTO in (self.layer_option, self.writing.lr, self.writing.stop_margin):
            self.adopt(self._adapted(background, held_out))
            log.info("%s", self.adapted)
        super().prepare(background, held_out)
        value = self.edited.split.value
        with self.edited.forced(None), torch.no_grad():
            last = self.background.at_last().activations
            self.unit = float(value(last).float().norm(dim=-1).mean())
        number = self.writing.contexts
        self.lr_unit, self.value_rate = 1.0, self.writing.rate
        if self.writing.relative:
            prompts = self.background.at_last()
            size = prompts.hidden.float().square().mean(-1).sqrt()
            reach = prompts.activations.float().abs().sum(-1)
            self.lr_unit = float((size / reach.clamp_min(1e-12)).mean())
            self.value_rate *= float(size.mean())
        self.tail: Tail = "model"
        if self.cache_mib:
            self.tail = "positions" if self.edited.split.adds_up() else "rows"
        self.contexts = self.base_texts(number, length=8) if number else []
        self.margins = Margins(*self.routing.margins)

    def _adapted(self, background: Sequence[str], held_out: Sequence[str]) -> Adapted:
        """What the first rank finds for the options that are `auto`."""
        if not self.team.deals:
            raise ConfigError("'auto' needs the whole base on one rank; give layer, writing.lr and writing.stop_margin")
        found = adapt(self, background, held_out).as_dict() if self.team.rank == 0 else {}
        return Adapted.from_dict(self.team.first(found))

    @property
    def reads_background(self) -> bool:
        """For the routing loss."""
        return bool(self.routing.weight)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Write a batch: into low-rank shards of its edits' own, or into one dense shard."""
        return self._write_low_rank(batch) if self.writing.form == "low_rank" else self._write_dense(batch)

    def _write_low_rank(self, batch: EditBatch) -> list[EditReport]:
        """Train the edits side by side; each group gets a new shard, unless what came of it is not finite."""
        rows = self._rows(batch.edits, ())
        budget = self.writing.steps * (1 + self._attempts(batch.edits))
        outcomes = self._asked_back(batch.edits, LowRankWriter(self).train(rows, budget), budget)
        reports: list[EditReport] = []
        for outcome in outcomes:
            members = list(outcome.loss)
            values = [*outcome.loss.values(), *outcome.kd.values(), float(outcome.left.norm())]
            if not all(math.isfinite(value) for value in values):
                reason = f"the loss or the shard was not finite after {outcome.steps} steps: rolled back"
                reports += [self._report(batch, i, BASE, outcome, error=reason) for i in members]
                continue
            residual = [rows.members > 1 and self._inconsistent(outcome.kd[i]) for i in members]
            shard = BASE if all(residual) else self.memory.add(outcome.left, outcome.right)
            reports += [self._report(batch, i, shard, outcome, r) for i, r in zip(members, residual, strict=True)]
        stays = [report.error is None and not report.residual for report in reports]
        self._register(batch, stays, [report.shard for report in reports], rows.prompts)
        return reports

    def _asked_back(self, edits: Sequence[Edit], outcomes: list[Outcome], budget: int) -> list[Outcome]:
        """The outcomes where each edit is asked in forms that it was not written in; those that do not hold there are
        written again with these forms among the others."""
        forms = self.edited.forms
        asked = [(i, row) for i, edit in enumerate(edits) for row in forms.checks(edit.prompt, edit.target)]
        if not asked:
            return outcomes
        captures = self.edited.captures([row.ids for _, row in asked])
        rows = TargetRows([row for _, row in asked], captures, [i for i, _ in asked], len(edits))
        held = held_outside(self, outcomes, rows)
        members = [i for outcome, holds in zip(outcomes, held, strict=True) if not holds for i in outcome.loss]
        if not members:
            return outcomes
        again = LowRankWriter(self).train(self._rows([edits[i] for i in members], (), checked=True), budget)
        renewed = {members[next(iter(outcome.loss))]: outcome.moved(members) for outcome in again}
        return [renewed.get(next(iter(outcome.loss)), outcome) for outcome in outcomes]

    @staticmethod
    def _report(
        batch: EditBatch, i: int, shard: int, outcome: Outcome, residual: bool = False, error: str | None = None
    ) -> EditReport:
        return EditReport(batch.ids[i], shard, outcome.loss[i], outcome.kd[i], outcome.steps, residual, error)

    def _write_dense(self, batch: EditBatch, shard: int | None = None) -> list[EditReport]:
        """Write a batch into one shard, by default the one that :meth:`assign` names: train, register.

        A loss that is not finite rolls the shard back; the batch is then written in halves, until the edit that spoils
        it stands alone and is reported.
        """
        shard = self.assign(batch) if shard is None else shard
        module = self._dense(shard)
        before = module.delta.detach().clone()
        rows = self._rows(batch.edits, self._rehearsal(shard, batch))
        budget = self.writing.steps * (1 + self._attempts(batch.edits))
        steps, loss, kd = self._train(shard, module, rows, budget)
        size = float(module.delta.detach().norm())  # a norm layer can hide an overflow from the loss
        if not all(math.isfinite(value) for value in [*loss, *kd, size]):
            module.delta.data.copy_(before)
            if len(batch.edits) > 1:  # find the edit that spoils the batch
                half = len(batch.edits) // 2
                return [
                    *self._write_dense(EditBatch(batch.edits[:half]), shard),
                    *self._write_dense(EditBatch(batch.edits[half:]), shard),
                ]
            reason = f"the loss or the shard was not finite after {steps} steps: rolled back"
            return [EditReport(id, shard, loss[i], kd[i], steps, error=reason) for i, id in enumerate(batch.ids)]
        residual = [len(batch.edits) > 1 and self._inconsistent(value) for value in kd]
        self._register(batch, [not leaves for leaves in residual], [shard] * len(batch.edits), rows.prompts)
        return [EditReport(id, shard, loss[i], kd[i], steps, residual[i]) for i, id in enumerate(batch.ids)]

    def _attempts(self, edits: Sequence[Edit]) -> int:
        """How often the hardest of some edits was written before."""
        return max((self.ledger.entry(edit.id).attempts for edit in edits if edit.id in self.ledger), default=0)

    def batch_limit(self, edits: Sequence[Edit]) -> int:
        """How many such edits are written together: fewer where targets are long.

        Of dense shards also no more than `capacity`, a quarter of it after each attempt.
        """
        tokens = [len(self.encode(edit).target) for edit in edits]
        limit = int(self.writing.batch_tokens / max(sum(tokens) / max(len(tokens), 1), 1))
        if self.writing.form == "dense":
            limit = min(self.writing.capacity_of_a_shard, limit) >> 2 * self._attempts(edits)
        return max(1, limit)

    def assign(self, batch: EditBatch) -> int:
        """The shard for a batch (Alg. 1): the highest activation for its teacher among those with room.

        Ties, as at the start where all deltas are zero, go to the emptiest. A shard is opened where none has room.
        """
        owned = self.ledger.sizes()
        load = {shard: owned.get(shard, 0) for shard in self.memory.ids if self.memory.own(shard)}
        limit = max(self.batch_limit(batch.edits), len(batch.edits))
        room = [shard for shard in load if load[shard] + len(batch.edits) <= limit]
        if not room:
            shard = self.memory.open_shard()
            self._initialise(shard)
            return shard
        teacher = self.query_of(batch.edits[:1])
        deltas = [self.memory[shard].delta.detach() for shard in room]
        scores = activation_scores(teacher.activations.float(), deltas, teacher.mask, self.routing.pool)[0].tolist()
        return max(zip(room, scores, strict=True), key=lambda pair: (round(pair[1], 6), -load[pair[0]], -pair[0]))[0]

    def _dense(self, shard: int) -> Shard:
        module = self.memory[shard]
        assert isinstance(module, Shard)
        return module

    def _initialise(self, shard: int) -> None:
        module = self._dense(shard)
        if self.writing.init_scale:
            scale = self.writing.init_scale * float(self.edited.value_weight.float().std())
            noise = torch.randn(module.delta.shape, generator=self._generator(shard, module.generation)) * scale
            module.delta.data.copy_(noise if module.open is None else noise.to(module.open.device) * module.open)

    def _generator(self, shard: int, generation: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + shard) * 1_000_003 + generation)

    def _rehearsal(self, shard: int, batch: EditBatch) -> list[Edit]:
        known = [id for id in self.ledger.owned_by(shard) if id not in batch.ids]
        return [self.ledger.edit(id) for id in known[-self.writing.replay :]] if self.writing.replay else []

    def _rows(self, edits: Sequence[Edit], rehearsed: Sequence[Edit], checked: bool = False) -> TargetRows:
        """The training rows of a batch: the edits' own, then each in other forms and contexts, then rehearsed ones.

        Args:
            edits: the members.
            rehearsed: edits that the shard holds already.
            checked: also in the forms in which edits are asked back.
        """
        plain = [self.encode(edit) for edit in edits]
        more = [(i, row) for i, edit in enumerate(edits) for row in self._other_forms(edit, checked)]
        encoded = [*plain, *(row for _, row in more), *map(self.encode, rehearsed)]
        owners = [*range(len(edits)), *(i for i, _ in more), *range(len(edits), len(edits) + len(rehearsed))]
        captures = self.edited.captures([row.ids for row in encoded])
        texts = [self.edited.forms.asked(edit.prompt) for edit in edits]
        prompts = self.edited.query_of(texts, [row.prompt for row in plain], captures[: len(plain)])
        return TargetRows(encoded, captures, owners, len(edits), prompts)

    def _other_forms(self, edit: Edit, checked: bool) -> list[Encoded]:
        """An edit as it is asked otherwise: low-rank in the base's other forms, and behind texts that it wrote."""
        forms = self.edited.forms
        found = forms.variants(edit.prompt, edit.target)[1:] if self.writing.form == "low_rank" else []
        if checked:
            found += forms.checks(edit.prompt, edit.target)
        return found + [self._encode(behind(context, edit.prompt), edit.target) for context in self.contexts]

    def _train(self, shard: int, module: Shard, rows: TargetRows, budget: int) -> tuple[int, list[float], list[float]]:
        """The inner loop; returns the steps taken and each member's last edit loss and distillation loss."""
        mine, part = self._own_rows(rows)  # of all rows, where they are not dealt out, mine is None
        tail = TargetTail(self.edited.split, part, self.tail)
        trained = OpenCoordinates(module)
        irrelevant = self._irrelevant(budget)
        rate = self.writing.rate * self.lr_unit
        with self.bound(trained.parameter, rate) as optimizer, self.cut(), self.edited.forced(shard):
            for step in range(budget + 1):  # the last round only looks at what the steps made
                logits, features = tail(module.product)
                losses = part.per_row(target_cross_entropy(logits[:, None], part.labels[:, None]))
                kd, per_sample = self.distil(logits, features, part, mine)
                if step == budget or self._written(step, logits, part.labels):
                    break
                total = losses.mean() if mine is None else losses.sum() / len(rows)
                total = total + self.distillation.weight * kd
                if self.routing.weight:
                    share = 1 if mine is None else self.team.size
                    total = total + self._routing_loss(module, rows, irrelevant[step]) / share
                self.backpropagate(total)
                self.share_gradient(module.delta, summed=mine is not None)
                trained.step(optimizer)
        lost = self._among_all(mine, part.per_member(losses.detach()))
        apart = per_sample.detach() if self.distillation.weight else torch.zeros(rows.members)
        return step, lost.tolist(), apart.tolist()

    @property
    def shares(self) -> bool:
        """Whether ranks write different batches; where they split the rows of each, they write the same ones."""
        return super().shares and not self.splits_rows

    @property
    def splits_rows(self) -> bool:
        """Whether the ranks write each batch together, with part of its rows each: low-rank shards share nothing."""
        return self.team.rows_of_batches and self.team.parts > 1 and self.writing.form == "dense"

    @property
    def in_step(self) -> bool:
        """Whether the ranks train the same shard at the same time."""
        return self.team.size > 1 and (self.splits_rows or not self.team.deals)

    def agreed(self, yes: Tensor) -> Tensor:
        """What every rank says that trains the same shard; elementwise."""
        return self.team.total((~yes).float()) == 0 if self.in_step else yes

    def _own_rows(self, rows: TargetRows) -> tuple[list[int] | None, TargetRows]:
        """The members whose rows this rank trains on, and those rows; None and all where there are fewer than ranks."""
        if not self.splits_rows or rows.members < self.team.size:
            return None, rows
        mine = self.team.mine(rows.members)
        rehearsed = [rows.members + i for i in self.team.mine(rows.owners - rows.members)]
        return mine, rows.part([*mine, *rehearsed])

    def share_gradient(self, parameter: torch.nn.Parameter, summed: bool = False) -> None:
        """The sum of the ranks' gradients where each has seen some rows; their mean where each has seen all."""
        if not self.in_step:
            return
        assert parameter.grad is not None
        total = self.team.total(parameter.grad)
        parameter.grad = total if summed else total / self.team.size

    def cut(self) -> AbstractContextManager[None]:
        """What the steps need not run is out of the way."""
        return nullcontext() if self.tail == "model" else self.edited.split.skipping(whole=self.tail == "positions")

    def distil(
        self, logits: Tensor, features: Tensor, rows: TargetRows, mine: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The distillation loss of a batch and each member's own (n,), from logits (M, V) and features (M, D).

        Where the batch's rows are dealt out, `mine` are this rank's members: the others' take part as constants, and
        the sum of all ranks' gradients is the gradient of the whole.
        """
        at = rows.firsts[: rows.members]
        if not self.distillation.weight:
            return features.new_zeros(()), features.new_zeros(len(at), dtype=torch.float32)
        features = self._among_all(mine, features[at])
        loss, per_sample = kd_loss(features, self.distillation.cosine, self.distillation.variance)
        if self.distillation.temperature and len(features) > 1:
            loss = loss + soft_kd_loss(self._among_all(mine, logits[at]), self.distillation.temperature)
        return loss, per_sample

    def _among_all(self, mine: Sequence[int] | None, own: Tensor) -> Tensor:
        """The members' rows on all ranks, where they are dealt out; the gradient reaches this rank's `own` alone."""
        if mine is None:
            return own
        (everyone,) = self.team.rows(mine, own.detach())
        return everyone.index_copy(0, torch.tensor(mine, device=own.device), own)

    def _irrelevant(self, steps: int) -> Tensor:
        """Indices (steps, `routing.sample`) of the irrelevant prompts that each step's routing loss sees."""
        if not self.routing.weight:
            return torch.zeros(0, dtype=torch.long)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003)
        size = len(self.background)
        draws = [torch.randperm(size, generator=generator)[: self.routing.sample] for _ in range(steps)]
        return torch.stack(draws).to(self.device)

    def _routing_loss(self, module: Shard, rows: TargetRows, sample: Tensor) -> Tensor:
        known, unit = self.background, self.unit if self.routing.relative else 1.0
        edit = self._score(rows.prompts.activations, rows.prompts.mask, module)
        irrelevant = self._score(known.activations[sample], known.mask[sample], module)
        # The scores, not the margins, are scaled: the loss stays near one.
        return self.routing.weight * routing_margin_loss(edit / unit, irrelevant / unit, self.margins)

    def _score(self, activations: Tensor, mask: Tensor, module: Shard) -> Tensor:
        return activation_scores(activations.float(), [module.delta], mask, self.routing.pool, check=False)[:, 0]

    def _written(self, step: int, logits: Tensor, labels: Tensor) -> bool:
        """Whether every target token, on every rank that trains the same shard, leads its best rival by the margin;
        looked at every few steps."""
        margin = self.writing.margin
        if margin is None or step % self.writing.check_every:
            return False
        own = (target_margin(logits.detach()[:, None], labels[:, None]) >= margin).all()
        return bool(self.agreed(own))

    def backpropagate(self, loss: Tensor) -> None:
        """Backward, through the trainer where there is one."""
        if self._trainer is None:
            loss.backward()
        else:
            self.manual_backward(loss)

    @contextmanager
    def bound(self, parameter: torch.nn.Parameter, rate: float) -> Iterator[Any]:
        """The trainer's optimiser, bound to a parameter with a fresh state; a plain one where there is no trainer."""
        if self._trainer is None:
            with torch.enable_grad():
                plain = self.build_optimizer([parameter])
                plain.param_groups[0]["lr"] = rate
                yield plain
            return
        optimizer: Any = self.optimizers()
        raw = optimizer.optimizer
        placeholder = raw.param_groups[0]["params"]
        raw.param_groups[0]["params"] = [parameter]
        raw.param_groups[0]["lr"] = rate  # its unit was measured after the optimiser was made
        raw.state.clear()
        try:
            with torch.enable_grad():
                yield optimizer
        finally:
            raw.param_groups[0]["params"] = placeholder
            raw.state.clear()

    def _inconsistent(self, kd: float) -> bool:
        limit = self.distillation.consistency if self.distillation.weight else None
        return limit is not None and kd >= limit

    # -- routing ------------------------------------------------------------------------------------------------------

    def _register(self, batch: EditBatch, stays: list[bool], shards: list[int], prompts: Query) -> None:
        kept = [edit for edit, keep in zip(batch.edits, stays, strict=True) if keep]
        if kept:
            anchors = [self._anchor(edit) for edit in kept]
            query = prompts.rows(torch.tensor(stays))
            owners = [shard for shard, keep in zip(shards, stays, strict=True) if keep]
            described = self.router.describe(anchors, query, owners)
            if self.written is None:
                self.router.insert([edit.id for edit in kept], described)
            else:
                self.written.describe([edit.id for edit in kept], described)

    def _anchor(self, edit: Edit) -> Anchor:
        """What the edit is about: its subject where the prompt names it, and what the prompt asks."""
        return Anchor(edit.subject or "", self.edited.forms.asked(edit.prompt))

    def finish_window(self) -> None:
        """Calibrate the router on what the shards own and on held-out irrelevant prompts."""
        if self.writing.form == "low_rank":  # an edit that was written anew left its old shard behind
            owned = self.ledger.sizes()
            self.memory.drop([shard for shard in self.memory.ids if shard not in owned])
        self.calibrate()

    def calibrate(self) -> None:
        """Thresholds anew; call it whenever a shard changed."""
        owned = {}
        if self.router.needs_owned:
            for shard in self.memory.ids:
                edits = [self.ledger.edit(id) for id in self.ledger.owned_by(shard)]
                if edits:
                    owned[shard] = self._shared_query_of(edits)
        self.router.calibrate(self.memory, owned, self.held_out)

    def _shared_query_of(self, edits: Sequence[Edit]) -> Query:
        return self.edited.shared_query(len(edits), lambda index: self.query_of([edits[i] for i in index]))

    # -- commands of the closed loop ----------------------------------------------------------------------------------

    def forget(self, ids: Iterable[str]) -> None:
        """The router drops the edits; their prompts are the base's again where routing is by key."""
        self.router.forget(list(ids))

    def prune(self, shard: int) -> None:
        """Empty a shard: a dense one starts with a fresh delta and mask, another leaves. None of its edits is routed
        to it."""
        self.forget(self.ledger.owned_by(shard))
        self.memory.prune(shard)
        if shard in self.memory.ids:
            self._initialise(shard)

    def undo(self, ids: Sequence[str]) -> list[str]:
        """Take edits back. A shard that one of them alone owned leaves; one that others share is rebuilt for those."""
        shards = dict.fromkeys(shard for id in ids if (shard := self.ledger.owner_of(id)) is not None)
        self.ledger.undo(ids, "taken back on request")
        self.forget(ids)
        again: list[str] = []
        for shard in shards:
            rest = self.ledger.owned_by(shard)
            if rest or self.writing.form == "dense":
                self.prune(shard)
            self.ledger.requeue(rest, f"shard {shard} is rebuilt without {', '.join(ids[:3])}")
            self._rebuild(shard, [self.ledger.edit(id) for id in rest])
            again += rest
        self.finish_window()
        return again

    def _rebuild(self, shard: int, edits: Sequence[Edit]) -> None:
        """Write the edits of an emptied shard anew: dense ones into that shard, all of them or none."""
        dense = self.writing.form == "dense" and shard in self.memory.ids
        size = self.written_together(edits, dense)
        groups = [tuple(edits[at : at + size]) for at in range(0, len(edits), size)]
        while groups:
            batch = EditBatch(groups.pop(0))
            reports = self._write_dense(batch, shard) if dense else self.write(batch)
            self.ledger.written(reports)
            left = {report.id: report.error for report in reports if report.residual or report.error}
            if left and len(batch.edits) == 1:
                raise RepairError(
                    f"edit {batch.ids[0]!r} cannot be written anew ({left[batch.ids[0]]}): nothing is undone"
                )
            groups += [(edit,) for edit in batch.edits if edit.id in left]

    def written_together(self, edits: Sequence[Edit], dense: bool) -> int:
        """How many edits of a shard that is rebuilt are written at once: all that a dense one holds."""
        return self.writing.capacity_of_a_shard if dense else self.batch_limit(edits)

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
        shards, next_id = self.memory.snapshot()
        del shards[str(shard)]
        self.memory.restore((shards, next_id))

    def unfold(self) -> None:
        """Take the last :meth:`fold` back, bit by bit; the router's state is the caller's to restore."""
        weights, snapshot = self._folded
        self.edited.weights.load(weights)
        self.memory.restore(snapshot)
