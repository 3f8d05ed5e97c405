"""GRACE: a codebook of keys and values beside a layer; what lies near a key gets its value instead of the output.

Paper: "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", arXiv 2211.11031, Sec. 3 and Alg. 1.
An entry's key is what enters the layer's value matrix at the prompt's last token. A prompt whose key lies in an entry's
ball gets the entry's value, at every token, in place of what the matrix puts out. When a key comes, the nearest entry
alone is looked at. Defaults: `grace/config/editor/grace.yaml` of github.com/Thartvigsen/GRACE; the layer is at 27/31 of
the depth, as in EasyEdit's `hparams/GRACE/llama-7b.yaml`.

Deviations: an entry is chosen once per prompt; values start from what the layer puts out at the key (theirs: from
noise); a batch's keys are placed one after the other, then its values are trained side by side, until
each edit leads by `stop_margin`; epsilon and the rate may be relative to the base, because published ones are in units
of one base's activations; a conflict never makes a ball larger (theirs sets both radii to half the distance, also
where one was shorter), and a key that is already there with another label takes over: half of no distance would leave
neither of the two a ball.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.base import WholeEditor, register
from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.inner_loop import TargetRows, TargetTail, descend
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.memory.routers import BallRouter, make_router
from repair_lightning.memory.shards import Selection
from repair_lightning.models.architectures import resolve_layer
from repair_lightning.models.base import Base
from repair_lightning.types import Edit, EditBatch, EditReport

TOGETHER = 64  # so many edits at most are written at once where some are written again
DEPTH = 27 / 31  # the edited layer where none is named, as a share of the depth
SAME = 1e-3  # keys closer than this share of the first radius are one key: they differ by rounding
COVER = 1.001  # a ball grows to the distance times this, so that what it grew for is inside it in spite of rounding
OUT_OF_REACH = -1.0  # the radius of an entry that nothing reaches


def was_cut(distance: float, radius: float, first: float) -> bool:
    """Whether a ball of this radius ends where a key at this distance cut it short, or has the same key."""
    return distance <= SAME * first or math.isclose(radius, distance / 2, rel_tol=1e-6)


def placement(distance: float, radius: float, same_label: bool, first: float) -> tuple[float | None, float]:
    """Where a key goes, by its distance to the nearest entry's key, the radius of that entry's ball, whether both say
    the same, and epsilon, the radius of an entry's `first` ball: the radius of the entry that it opens, None where it
    joins the nearest one; and from now on that of the nearest entry's ball."""
    if distance > radius + first:
        return first, radius
    if same_label:
        return None, max(radius, distance * COVER)
    if distance <= SAME * first:
        return first, OUT_OF_REACH
    return min(first, distance / 2), min(radius, distance / 2)


@register("grace")
class GRACE(WholeEditor):
    """General retrieval adaptors for continual editing.

    Args:
        layer: the edited layer, below the last; None takes it at 27/31 of the depth.
        eps: epsilon, the radius of a new entry's ball.
        relative: epsilon is in units of the median distance from an irrelevant prompt to its nearest other one, and the
            rate in units of the root mean square of what the layer puts out; off, both are absolute, as published.
        lr: of Adam.
        steps: most steps per batch.
        stop_margin: an edit is done once every target token leads its best rival by this many nats; None takes all
            steps.
    """

    can_undo = True

    def __init__(
        self,
        eps: float = 1.0,
        relative: bool = False,
        lr: float = 1.0,
        steps: int = 100,
        stop_margin: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.eps, self.relative, self.lr, self.steps, self.stop_margin = eps, relative, lr, steps, stop_margin
        positive(self, "eps", "lr")
        at_least(1, self, "steps")

    def build(self, base: Base, layer: int) -> None:
        """Besides building, refuse the last layer; where none was named, take the published share of the depth."""
        last = resolve_layer(base.model, -1)
        layer = int(DEPTH * last) if self.layer_option is None else layer
        if layer == last:
            raise ConfigError(
                f"layer must lie below the last, got {layer}: one value for all tokens, with nothing above it, can say "
                "one token only; give a lower --model.layer"
            )
        super().build(base, layer)

    def build_router(self) -> BallRouter:
        """Balls of radius epsilon."""
        return make_router("ball", radius=self.eps)  # type: ignore[return-value]

    @property
    def balls(self) -> BallRouter:
        """The router."""
        assert isinstance(self.router, BallRouter)
        return self.router

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, measure the units of epsilon and of the rate."""
        super().prepare(background, held_out)
        self.first, self.rate = self.eps, self.lr
        if not self.relative:
            return
        keys = self.balls.key_of(self.background)
        apart = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        self.first = self.eps * float(apart.amin(-1).median()) if len(keys) > 1 else self.eps
        self.rate = self.lr * float(self._outputs(self.background.at_last().activations).square().mean().sqrt())

    @torch.no_grad()
    def _outputs(self, activations: Tensor) -> Tensor:
        """What the value matrix puts out, (n, D) in float32, for activations (n, 1, F) or (n, F)."""
        with self.edited.forced(None):
            return self.edited.split.value(activations.flatten(0, -2)).float()

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Place the edits' keys, then train their entries' values; what was written before of these edits is gone."""
        self.forget(batch.ids)
        return super().write(batch)

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Place the edits' keys, then train their entries' values."""
        rows, prompts = TargetRows.of(self.edited, [*map(self.encode, edits)]), self.query_of(edits)
        outputs = self._outputs(prompts.at_last().activations)
        shards = [self._placed(*one) for one in zip(edits, self.balls.key_of(prompts), outputs, strict=True)]
        steps, losses = self._train(rows, shards)
        written = zip(edits, shards, losses, strict=True)
        return [EditReport(edit.id, shard, loss, 0.0, steps) for edit, shard, loss in written]

    def _placed(self, edit: Edit, key: Tensor, output: Tensor) -> int:
        """The shard of one edit, by its key (F,); a new one begins with `output` (D,), what the layer puts out."""
        balls, radius = self.balls, self.first
        distances = balls.distances(key[None])[0].masked_fill(balls.radii < 0, torch.inf)
        if distances.isfinite().any():
            entry = int(distances.argmin())
            same = self.ledger.edit(balls.members[entry][0]).target == edit.target
            opened, nearest = placement(float(distances[entry]), float(balls.radii[entry]), same, self.first)
            balls.reach(entry, nearest)
            if opened is None:
                balls.join(edit.id, entry)
                return int(balls.shards[entry])
            radius = opened
        shard = self.memory.add_value(output)
        balls.open(edit.id, key, radius, shard)
        return shard

    def _train(self, rows: TargetRows, shards: Sequence[int]) -> tuple[int, list[float]]:
        """Train the values of the edits' shards side by side, each until its edits are said."""
        own = list(dict.fromkeys(shards))
        of = torch.tensor([own.index(shard) for shard in shards], device=rows.ids.device)
        every = torch.arange(len(rows), device=of.device)
        values = nn.Parameter(torch.stack([self.memory[shard].value for shard in own]))  # type: ignore[union-attr, misc]
        tail = TargetTail(self.edited.split, rows, "rows" if self.cache_mib else "model")
        said, held = torch.zeros(0), values.detach()

        def logits() -> Tensor:
            with self.edited.forced(Selection(len(rows), [], (values[of], every))):
                return tail(lambda _: values)[0]

        def done(_: int, logits: Tensor, losses: Tensor) -> bool:
            nonlocal said, held
            silent = (~rows.lead(logits, self.stop_margin)).float()
            said = silent.new_zeros(len(own)).index_add(0, of, silent) == 0
            held = values.detach().clone()
            return bool(said.all())

        def hold() -> None:
            values[said] = held[said]

        with tail.cut():
            optimizer = torch.optim.Adam([values], lr=self.rate)
            step, losses = descend(rows, logits, optimizer, self.steps, done, after=hold)
        for i, shard in enumerate(own):
            self.memory.put_value(shard, values[i])
        return step, losses

    def finish_window(self) -> None:
        """Drop the entries that no edit owns any more."""
        self.drop_unowned()
        kept, members = set(self.memory.ids), zip(self.balls.shards.tolist(), self.balls.members, strict=True)
        self.balls.forget([id for shard, ids in members for id in ids if shard not in kept])

    def forget(self, ids: Iterable[str]) -> None:
        """An entry whose last edit is forgotten is gone. Balls that it had cut short stay as they are."""
        self.balls.forget(list(ids))

    def undo(self, ids: Sequence[str]) -> list[str]:
        """Take edits back. What shared an entry with them, or a ball that theirs had cut short, is written again."""
        again = self._entangled(ids)
        self.ledger.undo(ids, "taken back on request")
        self.ledger.requeue(again, f"placed again without {', '.join(ids[:3])}")
        self.forget([*ids, *again])
        self.finish_window()
        for at in range(0, len(again), TOGETHER):
            reports = self.write(EditBatch(tuple(self.ledger.edit(id) for id in again[at : at + TOGETHER])))
            self.ledger.written(reports)
            for report in reports:
                if report.error:
                    raise RepairError(f"edit {report.id!r} cannot be written again ({report.error}): nothing is undone")
        return again

    def _entangled(self, ids: Sequence[str]) -> list[str]:
        """The other edits of the entries that some edits are in, those of balls that these cut short, and so on, in the
        order in which they came: of one key the latest has its way."""
        balls, gone = self.balls, set(ids)
        found = [entry for entry, members in enumerate(balls.members) if gone.intersection(members)]
        for entry in found:  # it grows on the way
            distances = balls.distances(balls.keys[entry][None])[0].tolist()
            for other, pair in enumerate(zip(distances, balls.radii.tolist(), strict=True)):
                if was_cut(*pair, self.first) and other not in found:
                    found.append(other)
        again = {id for entry in found for id in balls.members[entry]} - gone
        return [id for id in self.ledger if id in again]

    def figures(self) -> dict[str, Any]:
        """How many entries there are, and how many edits each answers."""
        entries = len(self.balls.members)
        edits = sum(map(len, self.balls.members))
        return super().figures() | {"entries": entries, "edits_per_entry": edits / entries if entries else 0.0}
