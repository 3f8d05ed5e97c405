"""What a layer should put out so that edits are said: found by gradient, for the methods that then solve for a matrix.

As in ROME (arXiv 2202.05262, Sec. 3.1) and MEMIT (arXiv 2210.07229, Sec. 4.1): a shift of the value matrix's output is
trained until the target is likely, here from the cached prefix and for a batch side by side. Theirs is one vector at
the subject's last token; ours may also be one at each position from which a target token is read.

Shapes: B rows of T tokens, P places where a shift acts, S shifts in all (several places may share one), M target
tokens, n batch members, D = d_model, F = d_ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.inner_loop import TargetRows, TargetTail, descend
from repair_lightning.errors import ConfigError
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix import SplitModel

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
        """Refuse what has no meaning."""
        if self.at not in get_args(At):
            raise ConfigError(f"values.at must be one of {', '.join(get_args(At))}, got '{self.at}'")
        at_least(1, self, "steps", "check_every", at="values.")
        at_least(0, self, "contexts", "decay", "essence", at="values.")
        positive(self, "lr", *(["clamp"] if self.clamp is not None else []), at="values.")
        if self.essence and self.at != "subject":
            raise ConfigError(
                f"values.essence is the divergence at the subject's own value, which values.at {self.at} has not; got "
                f"{self.essence}: give --model.values.essence 0 or --model.values.at subject"
            )


@dataclass(frozen=True)
class Places:
    """Where shifts act in a set of rows: the `row` (P,) of each place, how many positions it lies `back` (P,) from the
    row's last one, the `shift` (P,) that acts there, and the batch `member` (S,) that each shift belongs to."""

    row: Tensor
    back: Tensor
    shift: Tensor
    member: Tensor

    @classmethod
    def of_targets(cls, rows: TargetRows) -> Places:
        """One for each target token of a member, at the position from which it is read; rows of one member share."""
        number = torch.arange(len(rows.row), device=rows.row.device) - rows.firsts[rows.row]
        own = rows.edit
        shift = rows.firsts[own] + torch.minimum(number, rows.lengths[own] - 1)
        return cls(rows.row, rows.lengths[rows.row] - number, shift, rows.row[rows.row < rows.members])

    @classmethod
    def of_subjects(cls, rows: TargetRows, at: Sequence[int]) -> Places:
        """One for each member, at a given token of its rows' prompts."""
        members, device = torch.arange(rows.members, device=rows.row.device), rows.row.device
        back = rows.mask.sum(-1) - 1 - torch.tensor(at, device=device)
        return cls(torch.arange(len(rows), device=device), back, rows.owner, members)

    def read(self, states: Tensor) -> Tensor:
        """States (B, T, X) at the shifts' places, the mean where several share one, (S, X) in float32."""
        found = states[self.row, states.shape[1] - 1 - self.back].float()
        sums = found.new_zeros(len(self.member), found.shape[-1]).index_add(0, self.shift, found)
        return sums / self.shift.bincount(minlength=len(self.member))[:, None]

    def spread(self, shifts: Tensor, rows: TargetRows) -> Tensor:
        """Shifts (S, D) laid out over the rows, (B, T, D)."""
        size, width = rows.ids.shape
        at = self.row * width + width - 1 - self.back
        flat = shifts.new_zeros(size * width, shifts.shape[-1]).index_add(0, at, shifts[self.shift])
        return flat.view(size, width, -1)

    def part(self, rows: Tensor, members: Tensor) -> Places:
        """The places of some rows and members, both in ascending order."""
        kept, inside = torch.isin(self.member, members), torch.isin(self.row, rows)
        shift = (kept.cumsum(0) - 1)[self.shift[inside]]
        row, member = torch.searchsorted(rows, self.row[inside]), torch.searchsorted(members, self.member[kept])
        return Places(row, self.back[inside], shift, member)


def pushing(value: nn.Module, pushed: Tensor) -> RemovableHandle:
    """Until the handle (a context manager) is removed, `pushed` (B, T, D) is added to what a value matrix puts out."""
    return value.register_forward_hook(lambda _, __, output: output + pushed.reshape(output.shape).to(output.dtype))


def slopes(
    edited: EditedModel, layers: Sequence[int], rows: TargetRows, total: Callable[[Tensor], Tensor] = torch.sum
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """The losses (M,) of the target tokens, and where their `total` goes: by layer, from the edited one on, what enters
    the value matrix, (B, T, F), and the gradient at what leaves it, (B, T, D)."""
    keys: dict[int, Tensor] = {}
    like = rows.hidden.new_zeros(rows.hidden.shape, dtype=torch.float32)
    pushed = [torch.zeros_like(like, requires_grad=True) for _ in layers]

    def note(layer: int) -> Any:
        return lambda _, args: keys.update({layer: args[0].detach().reshape(*rows.ids.shape, -1).float()})

    with torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(edited.forced(None))
        stack.enter_context(edited.split.skipping())
        for layer, shift in zip(layers, pushed, strict=True):
            value = edited.split.arch.value_module(edited.base, layer)
            stack.enter_context(pushing(value, shift))
            stack.enter_context(value.register_forward_pre_hook(note(layer)))
        losses = rows.losses(TargetTail(edited.split, rows, "rows")(lambda activations: activations)[0])
        deltas = torch.autograd.grad(total(losses), pushed)
    return losses.detach(), keys, dict(zip(layers, deltas, strict=True))


Asked = tuple[TargetRows, Places]  # rows, and where shifts act in them


def part_of(asked: Asked, members: Sequence[int]) -> Asked:
    """What some members own, in ascending order."""
    rows, places = asked
    some = torch.tensor(members, device=rows.owner.device)
    return rows.part(members), places.part(torch.isin(rows.owner, some).nonzero()[:, 0], some)


class ValueSearch:
    """Trains the shifts of a batch, at the layer where a model is `split`; where `positions`, that layer is the last,
    its output is simply added, and only what is read takes part; the learning rate is in units of `unit`."""

    def __init__(self, split: SplitModel, options: Values, positions: bool, unit: float) -> None:
        self.split, self.options, self.unit = split, options, unit
        self.positions = positions and options.at == "targets"

    def run(self, asked: Asked, essence: Asked | None = None) -> tuple[Tensor, list[float], list[int]]:
        """Train until every member is done or the steps are used; what is done leaves, whenever that is half. Returns
        the shifts (S, D), and of each member the last loss and the steps."""
        rows, places = asked
        shifts = torch.zeros(len(places.member), rows.hidden.shape[-1], device=rows.hidden.device)
        loss, steps = [0.0] * rows.members, [0] * rows.members
        left, taken, part, beside = list(range(rows.members)), 0, asked, essence
        while True:
            mine = torch.isin(places.member, torch.tensor(left, device=places.member.device))
            trained = nn.Parameter(shifts[mine].clone())
            took, done, losses = self._phase(*part, trained, self.options.steps - taken, beside)
            taken += took
            shifts[mine] = trained.detach()
            for member, value in zip(left, losses, strict=True):
                loss[member], steps[member] = value, taken
            left = [member for member, is_done in zip(left, done, strict=True) if not is_done]
            if not left or taken >= self.options.steps:
                return shifts, loss, steps
            part, beside = part_of(asked, left), essence and part_of(essence, left)

    def _phase(
        self, rows: TargetRows, places: Places, shifts: nn.Parameter, budget: int, essence: Asked | None
    ) -> tuple[int, list[bool], list[float]]:
        """Steps until half of the members are done; returns how many, who is, and each one's loss."""
        options, tail = self.options, TargetTail(self.split, rows, "positions" if self.positions else "rows")
        with torch.no_grad():
            activations = rows.activations.flatten(0, 1)
            before = places.read(self.split.value(activations).view(*rows.ids.shape, -1))
        ready = torch.zeros(rows.members, dtype=torch.bool)

        def logits() -> Tensor:
            return tail(lambda _: shifts[places.shift])[0] if self.positions else self._pushed(tail, places, shifts)

        def done(step: int, logits: Tensor, losses: Tensor) -> bool:
            nonlocal ready
            if step % options.check_every:
                return False
            ready = rows.lead(logits, options.stop_margin).cpu()
            if options.stop_margin is None and options.stop_loss is not None:  # not finite: no step helps it
                ready = ~(rows.per_member(losses) >= options.stop_loss).cpu()
            return 2 * int(ready.sum()) >= len(ready)

        def total(losses: Tensor) -> Tensor:
            found = rows.per_member(losses).sum()
            if options.decay:
                found = found + options.decay * (shifts.norm(dim=-1) / before.square().sum(-1).clamp_min(1e-12)).sum()
            if essence is not None:
                now = self._essence(*essence, shifts)
                found = found + options.essence * (now.exp() * (now - plain)).sum()
            return found

        def clamp() -> None:
            if options.clamp is not None:
                longest = options.clamp * before.norm(dim=-1, keepdim=True)
                shifts.mul_((longest / shifts.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1))

        with tail.cut():
            plain = torch.zeros(0) if essence is None else self._essence(*essence, torch.zeros_like(shifts)).detach()
            optimizer = torch.optim.Adam([shifts], lr=options.lr * self.unit)
            step, losses = descend(rows, logits, optimizer, budget, done, total, clamp)
        return step, ready.tolist(), losses

    def _pushed(self, tail: TargetTail, places: Places, shifts: Tensor) -> Tensor:
        with pushing(self.split.value, places.spread(shifts, tail.rows)):
            return tail(lambda activations: activations)[0]

    def _essence(self, rows: TargetRows, places: Places, shifts: Tensor) -> Tensor:
        """The log probabilities (n, V) behind each subject."""
        return self._pushed(TargetTail(self.split, rows, "rows"), places, shifts).float().log_softmax(-1)
