"""What a layer should put out so that edits are said: found by gradient, for the methods that then solve for a matrix.

As in ROME (arXiv 2202.05262, Sec. 3.1) and MEMIT (arXiv 2210.07229, Sec. 4.1): a shift of the value matrix's output is
trained until the target is likely, here from the cached prefix, for a whole batch side by side. Theirs is one vector at
the subject's last token; ours may also be one at each position from which a target token is read, because greedy
decoding must say every one of them, the end included.

Shapes: B rows of T tokens, P places where a shift acts, S shifts in all (several places may share one), M target
tokens, n batch members, D = d_model, F = d_ffn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from repair_lightning.editors.inner_loop import TargetRows, TargetTail
from repair_lightning.errors import ConfigError
from repair_lightning.functional import target_cross_entropy, target_margin
from repair_lightning.models.prefix import SplitModel
from repair_lightning.models.tokenizing import Encoded

At = Literal["targets", "subject"]
"""Where shifts act: wherever a target token is read, or at the subject's last token alone."""


@dataclass
class Values:
    """How the values of a write are found.

    Attributes:
        at: `targets` gives each position from which a target token is read a value of its own; `subject` one to the
            subject's last token (the prompt's last where it does not hold the subject), as ROME and MEMIT do.
        lr: learning rate of Adam.
        relative: the rate is relative to the root mean square of what enters the layer; else absolute, as published.
        steps: most steps.
        stop_margin: an edit is done once every target token leads its best rival by this many nats; None looks at
            `stop_loss`.
        stop_loss: an edit is done once its mean loss is below this, in nats; None takes all steps.
        check_every: steps between looks.
        decay: weight of `||shift|| / ||v||^2`, v being the value before.
        clamp: longest shift, in units of ||v||; None leaves it free.
        essence: weight of the divergence from the base at the subject's last token; 0 leaves it out.
        contexts: texts written by the base, put before each prompt as further rows of the same values.
    """

    at: At = "targets"
    lr: float = 1.0
    relative: bool = True
    steps: int = 60
    stop_margin: float | None = 4.0
    stop_loss: float | None = None
    check_every: int = 5
    decay: float = 0.0
    clamp: float | None = None
    essence: float = 0.0
    contexts: int = 0

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ConfigError: it names value and remedy.
        """
        if self.at not in get_args(At):
            raise ConfigError(f"values.at must be one of {', '.join(get_args(At))}, got '{self.at}'")
        for name, least in (("steps", 1), ("check_every", 1), ("contexts", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"values.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"values.lr must be positive and finite, got {self.lr}")
        if self.clamp is not None and not 0 < self.clamp < math.inf:
            raise ConfigError(f"values.clamp must be positive and finite, or null for none, got {self.clamp}")
        for name in ("decay", "essence"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"values.{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.essence and self.at != "subject":
            raise ConfigError(
                f"values.essence is the divergence at the subject's own value, which values.at {self.at} has not; got "
                f"{self.essence}: give --model.values.essence 0 or --model.values.at subject"
            )


@dataclass(frozen=True)
class Places:
    """Where shifts act in a set of rows.

    Attributes:
        row: (P,) the row of each place.
        back: (P,) how many positions it lies before the row's last one.
        shift: (P,) the shift that acts there.
        member: (S,) the batch member that each shift belongs to.
    """

    row: Tensor
    back: Tensor
    shift: Tensor
    member: Tensor

    @classmethod
    def of_targets(cls, encoded: Sequence[Encoded], owners: Sequence[int], members: int) -> Places:
        """One for each target token of a member, at the position from which it is read; rows of one member share."""
        lengths = [len(encoded[i].target) for i in range(members)]
        starts = [sum(lengths[:i]) for i in range(members)]
        found = [
            (i, len(row.target) - j, starts[owner] + min(j, lengths[owner] - 1))
            for i, (row, owner) in enumerate(zip(encoded, owners, strict=True))
            for j in range(len(row.target))
        ]
        member = [i for i, length in enumerate(lengths) for _ in range(length)]
        row, back, shift = torch.tensor(found).T
        return cls(row, back, shift, torch.tensor(member))

    @classmethod
    def of_subjects(cls, encoded: Sequence[Encoded], at: Sequence[int], owners: Sequence[int], members: int) -> Places:
        """One for each member, at a given token of its rows' prompts."""
        back = [len(row.ids) - 1 - place for row, place in zip(encoded, at, strict=True)]
        rows = torch.arange(len(encoded))
        return cls(rows, torch.tensor(back), torch.tensor(list(owners)), torch.arange(members))

    def to(self, device: Any) -> Places:
        """The same on a device."""
        return Places(*(value.to(device) for value in (self.row, self.back, self.shift, self.member)))

    def read(self, states: Tensor) -> Tensor:
        """States (B, T, X) at the shifts' places, the mean where several share one, (S, X) in float32."""
        found = states[self.row, states.shape[1] - 1 - self.back].float()
        sums = found.new_zeros(len(self.member), found.shape[-1]).index_add(0, self.shift, found)
        return sums / self.shift.bincount(minlength=len(self.member))[:, None]

    def spread(self, shifts: Tensor, rows: int, width: int) -> Tensor:
        """Shifts (S, D) laid out over the rows, (B, T, D)."""
        at = self.row * width + width - 1 - self.back
        flat = shifts.new_zeros(rows * width, shifts.shape[-1]).index_add(0, at, shifts[self.shift])
        return flat.view(rows, width, -1)

    def part(self, rows: Sequence[int], members: Sequence[int]) -> Places:
        """The places of some rows and members, both in ascending order."""
        row_at = {row: i for i, row in enumerate(rows)}
        kept = [i for i, member in enumerate(self.member.tolist()) if member in set(members)]
        shift_at = {shift: i for i, shift in enumerate(kept)}
        member_at = {member: i for i, member in enumerate(members)}
        triples = zip(self.row.tolist(), self.back.tolist(), self.shift.tolist(), strict=True)
        found = [(row_at[row], back, shift_at[shift]) for row, back, shift in triples if row in row_at]
        member = torch.tensor([member_at[int(self.member[i])] for i in kept])
        row, back, shift = torch.tensor(found).T
        return Places(row, back, shift, member).to(self.row.device)


@contextmanager
def pushing(split: SplitModel, pushed: Tensor) -> Iterator[None]:
    """Inside, `pushed` (B, T, D) is added to the value matrix's output, however the architecture lays out tokens."""
    handle = split.value.register_forward_hook(
        lambda _, __, output: output + pushed.reshape(output.shape).to(output.dtype)
    )
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Found:
    """The values of a batch: `shifts` (S, D), and of each member the last loss and the steps."""

    shifts: Tensor
    loss: list[float]
    steps: list[int]


class ValueSearch:
    """Trains the shifts of a batch.

    Args:
        split: the model, cut at the layer whose value matrix is shifted.
        options: how.
        positions: the layer is the last and its output is simply added: only what is read takes part.
        unit: the learning rate's unit.
    """

    def __init__(self, split: SplitModel, options: Values, positions: bool, unit: float) -> None:
        self.split, self.options, self.unit = split, options, unit
        self.positions = positions and options.at == "targets"

    def run(self, rows: TargetRows, places: Places, essence: tuple[TargetRows, Places] | None = None) -> Found:
        """Train until every member is done or the steps are used; what is done leaves, whenever that is half."""
        shifts = torch.zeros(len(places.member), rows.hidden.shape[-1], device=rows.hidden.device)
        loss, steps = [0.0] * rows.members, [0] * rows.members
        left, taken = list(range(rows.members)), 0
        part, part_places, part_essence = rows, places, essence
        while left:
            mine = torch.isin(places.member, torch.tensor(left, device=places.member.device))
            trained = nn.Parameter(shifts[mine].clone())
            took, done, losses = self._phase(part, part_places, trained, self.options.steps - taken, part_essence)
            taken += took
            shifts[mine] = trained.detach()
            for i, member in enumerate(left):
                loss[member], steps[member] = losses[i], taken
            if taken >= self.options.steps:
                break
            left = [member for i, member in enumerate(left) if not done[i]]
            if left:
                part, part_places = self._cut(rows, places, left)
                part_essence = None if essence is None else self._cut(*essence, left)
        return Found(shifts, loss, steps)

    @staticmethod
    def _cut(rows: TargetRows, places: Places, members: Sequence[int]) -> tuple[TargetRows, Places]:
        inside = [i for i, owner in enumerate(rows.owner.tolist()) if owner in set(members)]
        return rows.part(members), places.part(inside, members)

    def _phase(
        self,
        rows: TargetRows,
        places: Places,
        shifts: nn.Parameter,
        budget: int,
        essence: tuple[TargetRows, Places] | None,
    ) -> tuple[int, list[bool], list[float]]:
        """Steps until half of the members are done; returns how many, who is, and each one's loss."""
        options = self.options
        logits_of = self._tail(rows, places)
        before = self._values_before(rows, places)
        done = torch.zeros(rows.members, dtype=torch.bool)
        with torch.enable_grad(), self.split.skipping(whole=self.positions):
            plain = None if essence is None else self._essence_logits(*essence, torch.zeros_like(shifts)).detach()
            optimizer = torch.optim.Adam([shifts], lr=options.lr * self.unit)
            for step in range(budget + 1):
                logits = logits_of(shifts)
                token_losses = target_cross_entropy(logits[:, None], rows.labels[:, None])
                losses = rows.per_member(rows.per_row(token_losses))
                if step % options.check_every == 0:
                    done = self._done(rows, logits.detach(), losses.detach())
                    if 2 * int(done.sum()) >= len(done):
                        break
                if step == budget:
                    break
                total = losses.sum() + self._decay(shifts, before, places)
                if plain is not None and essence is not None:
                    total = total + options.essence * _divergence(self._essence_logits(*essence, shifts), plain)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                self._clamp(shifts, before)
        return step, done.tolist(), losses.detach().tolist()

    def _tail(self, rows: TargetRows, places: Places) -> Any:
        """The logits (M, V) of the target tokens as a function of the shifts."""
        tail = TargetTail(self.split, rows, "positions" if self.positions else "rows")
        if self.positions:
            return lambda shifts: tail(lambda _: shifts[places.shift])[0]
        size, width = rows.ids.shape

        def logits(shifts: Tensor) -> Tensor:
            with pushing(self.split, places.spread(shifts, size, width)):
                return tail(lambda activations: activations)[0]

        return logits

    def _essence_logits(self, rows: TargetRows, places: Places, shifts: Tensor) -> Tensor:
        size, width = rows.ids.shape
        with pushing(self.split, places.spread(shifts, size, width)):
            logits, _ = self.split.tail(rows.ids, rows.mask, rows.hidden, rows.span)
        return rows.reading(logits).float().log_softmax(-1)

    @torch.no_grad()
    def _values_before(self, rows: TargetRows, places: Places) -> Tensor:
        """What the value matrix puts out at the places, (S, D)."""
        activations = rows.activations
        return places.read(self.split.value(activations.reshape(-1, activations.shape[-1])).view(*rows.ids.shape, -1))

    def _done(self, rows: TargetRows, logits: Tensor, losses: Tensor) -> Tensor:
        """(n,) who needs no more steps; what is not finite is not helped by them."""
        options = self.options
        if options.stop_margin is not None:
            margins = target_margin(logits[:, None], rows.labels[:, None])
            start = margins.new_full((rows.members,), torch.inf)
            lowest = start.scatter_reduce(0, rows.owner[rows.row], margins, "amin")
            return (~(lowest < options.stop_margin)).cpu()
        if options.stop_loss is not None:
            return (~(losses >= options.stop_loss)).cpu()
        return torch.zeros(rows.members, dtype=torch.bool)

    def _decay(self, shifts: Tensor, before: Tensor, places: Places) -> Tensor:
        if not self.options.decay:
            return shifts.new_zeros(())
        return self.options.decay * (shifts.norm(dim=-1) / before.square().sum(-1).clamp_min(1e-12)).sum()

    @torch.no_grad()
    def _clamp(self, shifts: Tensor, before: Tensor) -> None:
        """Shorten what is longer than allowed."""
        if self.options.clamp is not None:
            longest = self.options.clamp * before.norm(dim=-1, keepdim=True)
            shifts.mul_((longest / shifts.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1))


def _divergence(found: Tensor, plain: Tensor) -> Tensor:
    """KL(found || plain) of log probabilities (E, V), summed over the rows."""
    return (found.exp() * (found - plain)).sum()
