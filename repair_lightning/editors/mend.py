"""MEND: a trained hypernetwork turns an edit's fine-tuning gradient into a better change of the matrix.

Paper: "Fast Model Editing at Scale", arXiv 2110.11309, Sec. 3 and Alg. 1 and 2. The gradient of a linear layer is a sum
of rank-one matrices `delta u^T`, one per token, of what enters the layer and of the loss's gradient at what leaves it.
A network g maps each pair, normalised by the mean and variance of all pairs in training, to another pair (Eq. 3):

    h = z + relu(s_1 * (U_1 V_1 z + b) + o_1),    g(z) = h + relu(s_2 * U_2 V_2 h + o_2),    z = (u, delta)

with s and o of each layer's own; the layer moves by `-alpha sum delta~ u~^T`, alpha learnt for each. The network is
trained before the first write, on edits that the stream does not hold: `c_edit` times the edit's loss after its update,
at its prompt and a rephrase, plus `c_loc` times the divergence from the base on irrelevant prompts.

Defaults: EasyEdit's `hparams/TRAINING/MEND`, with ten edits to a step and gradients cut at 100. Deviations: W_v alone
(theirs also the matrix before it); moments for each layer, of one pass before the training (theirs for all of one
shape); the irrelevant prompts are those of the stream, with the base's own answers; the end of sequence is trained as
well; edits are written one at a time, because the network is trained on single ones.

Shapes: B rows of T tokens, n edits, D = d_model, F = d_ffn, L written layers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.base import KEPT, Editor, register
from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.inner_loop import TargetRows, TargetTail
from repair_lightning.editors.values import slopes
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.edits.records import load_records
from repair_lightning.errors import ConfigError
from repair_lightning.functional.moments import RunningMoments
from repair_lightning.models.base import Base
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.types import Edit, EditReport

log = logging.getLogger(__name__)

Factors = tuple[Tensor, Tensor]
"""What enters W_v, (n, T, F), and the gradient at what leaves it, (n, T, D): the gradient of W_v is their product."""

CLIP = 100.0  # longest gradient of a training step
HELD_OUT = (0.1, 64)  # share of the training edits that only choose when to stop, and the most of them


class GradientBlock(nn.Module):
    """`z + relu(s * (U V z + b) + o)` on (N, `size`), with `U V` of a rank of at most `size`, and with s and o of each
    of `layers` layers; at first it changes nothing."""

    def __init__(self, size: int, rank: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, size)
        self.inner = nn.Parameter(torch.randn(rank, size, generator=generator))
        self.outer = nn.Parameter(torch.zeros(size, rank))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(layers, size))
        self.shift = nn.Parameter(torch.zeros(layers, size))

    def forward(self, z: Tensor, layer: int) -> Tensor:
        """(N, Z) for the layer at a place; `clamp_min` because ReLU would have no gradient at the start."""
        inside = z @ self.inner.T @ self.outer.T + self.bias
        return z + (self.scale[layer] * inside + self.shift[layer]).clamp_min(0)


class GradientNetwork(nn.Module):
    """The hypernetwork of L layers with `sizes` D and F: factors of a gradient in, factors of an update out, and the
    step of each layer, which begins with `step`."""

    count: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(
        self, sizes: tuple[int, int], layers: int, rank: int, step: float, normalise: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        generator, size = torch.Generator().manual_seed(seed), sum(sizes)
        self.sizes, self.normalise = (sizes[1], sizes[0]), normalise
        self.blocks = nn.ModuleList([GradientBlock(size, rank, layers, generator) for _ in range(2)])
        self.steps = nn.Parameter(torch.full((layers,), step))
        self.register_buffer("count", torch.zeros(layers, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(layers, size))
        self.register_buffer("spread", torch.zeros(layers, size))

    def _known(self, layer: int) -> RunningMoments:
        return RunningMoments(int(self.count[layer]), self.mean[layer], self.spread[layer])

    @torch.no_grad()
    def learn(self, layer: int, factors: Factors) -> None:
        """Take further factors of a layer into the moments."""
        pairs = torch.cat(factors, -1)[has_gradient(factors)]
        if len(pairs):
            known = self._known(layer).with_(pairs)
            self.count[layer], self.mean[layer], self.spread[layer] = known.count, known.mean, known.spread

    def forward(self, layer: int, factors: Factors) -> Factors:
        """The factors of a layer's update, of the same shapes; tokens without a gradient have none."""
        there = has_gradient(factors)
        pairs = torch.cat(factors, -1)[there]
        if self.normalise:
            pairs = self._known(layer).normalise(pairs, floor=1e-7)
        for block in self.blocks:
            pairs = block(pairs, layer)
        laid_out = pairs.new_zeros(*there.shape, pairs.shape[-1]).masked_scatter(there[..., None], pairs)
        keys, deltas = laid_out.split(self.sizes, -1)
        return keys, deltas


def has_gradient(factors: Factors) -> Tensor:
    """Where there is a gradient at all, (n, T)."""
    keys, deltas = factors
    return (keys != 0).any(-1) & (deltas != 0).any(-1)


@register("mend")
class MEND(WeightEditor):
    """Model editor networks with gradient decomposition.

    Args:
        layers: how many layers are written into.
        train_data: file of the edits that the hypernetwork is trained on, by default the stream's own; what the stream
            asks is left out of them.
        train_format: of that file.
        train_cache: folder that keeps trained hypernetworks for later runs; None keeps none.
        steps: most training steps.
        batch: edits in a training step.
        lr: of Adam, for the hypernetwork.
        lr_steps: of Adam, for the layers' alpha.
        alpha: what each layer's alpha begins with.
        rank: of the hypernetwork's blocks; at most F + D.
        normalise: take the moments of the factors out of them.
        c_edit: weight of the edit loss.
        c_loc: weight of the divergence on irrelevant prompts.
        check_every: training steps between looks at the held-out edits; the best of these is kept.
        patience: training ends after so many steps without a better look.
        seed: of the first weights and of what is drawn; `seed_everything` where a command gives none.
    """

    batchable = False
    learnt_beforehand = True
    network: GradientNetwork

    def __init__(
        self,
        layers: int = 3,
        train_data: str = "",
        train_format: str = "jsonl",
        train_cache: str | None = None,
        steps: int = 100_000,
        batch: int = 10,
        lr: float = 1e-6,
        lr_steps: float = 1e-4,
        alpha: float = 1e-4,
        rank: int = 1920,
        normalise: bool = True,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        check_every: int = 100,
        patience: int = 30_000,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(layers=layers, **common)
        self.train_data, self.train_format, self.train_cache = train_data, train_format, train_cache
        self.steps, self.batch, self.lr, self.lr_steps = steps, batch, lr, lr_steps
        self.alpha, self.rank, self.normalise = alpha, rank, normalise
        self.c_edit, self.c_loc = c_edit, c_loc
        self.check_every, self.patience, self.seed = check_every, patience, seed
        at_least(0, self, "steps", "c_edit", "c_loc")
        at_least(1, self, "batch", "rank", "check_every", "patience")
        positive(self, "lr", "lr_steps", "alpha")
        self.training_figures: dict[str, Any] = {}  # empty before the training
        self.stream: Any = None  # what is going to be evaluated, and must not be trained on

    def on_fit_start(self) -> None:
        """Besides, learn what is going to be evaluated."""
        self.stream = self.trainer.datamodule  # type: ignore[attr-defined]
        super().on_fit_start()

    def build(self, base: Base, layer: int) -> None:
        """Besides building, make an untrained hypernetwork."""
        super().build(base, layer)
        network = GradientNetwork(self.memory.shape, self.layers, self.rank, self.alpha, self.normalise, self.seed)
        self.network = network.to(self.edited.device)

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, train the hypernetwork, unless a checkpoint, a pack or the cache has brought one."""
        super().prepare(background, held_out)
        if self.training_figures:
            return
        edits, left_out = self._training_edits()
        other = self.said_by_base(self.background_prompts[:KEPT])
        file = self._cache_file(edits, other)
        if file is not None and file.is_file():
            log.info("the hypernetwork is taken from %s", file)
            self.load_own_state(torch.load(file, map_location="cpu", weights_only=True))
        else:
            self.training_figures = Training(self, other).run(edits) | {"left_out": left_out}
            if file is not None and self.team.rank == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(self.own_state(), file.with_suffix(".partial"))
                file.with_suffix(".partial").replace(file)
        with torch.no_grad():  # all ranks go on with the first one's
            for tensor in self.network.state_dict().values():
                tensor.copy_(self.team.of_first(tensor))

    def _training_edits(self) -> tuple[list[Edit], int]:
        """What the hypernetwork may be trained on, and how many edits are left out."""
        path, format = self.train_data, self.train_format
        if not path and self.stream is not None:
            path, format = self.stream.file, self.stream.format
        if not path:
            raise ConfigError(
                "mend needs edits to train its hypernetwork on: give --model.train_data a file of edits and "
                "--model.train_format their format; those that the stream asks are left out"
            )
        found = list(load_records(path, format, on_bad_record="skip").edits)
        kept = found if self.stream is None else apart(found, self.stream, format)
        log.info("left out of training: %d of %d edits, which the stream asks", len(found) - len(kept), len(found))
        if len(kept) < 2:
            raise ConfigError(
                f"'{path}' holds {len(kept)} edits that the stream does not ask, at least 2 are needed: "
                "give --model.train_data another file"
            )
        return kept, len(found) - len(kept)

    def _cache_file(self, edits: Sequence[Edit], other: Sequence[Encoded]) -> Path | None:
        """Where the hypernetwork of these edits, this base and these options is kept."""
        if self.train_cache is None:
            return None
        assert self.base is not None
        told = {*Editor.arguments(), "layers", "train_data", "train_format", "train_cache"}  # by the rest, or elsewhere
        options = {name: value for name, value in self.options().items() if name not in told}
        texts = [[edit.prompt, edit.target, *edit.rephrases] for edit in edits]
        parts = [self.base.sha256, str(self.base.model.dtype), self.written_layers, options, texts]
        digest = hashlib.sha256(json.dumps([*parts, [row.ids for row in other]]).encode()).hexdigest()
        return Path(self.train_cache).expanduser() / f"hypernetwork-{digest[:32]}.pt"

    def factors(self, rows: TargetRows) -> tuple[Tensor, list[Factors]]:
        """The rows' mean token losses (B,), and by written layer the factors of their gradient, (B, T, .)."""
        losses, keys, deltas = slopes(self.edited, self.written_layers, rows, lambda losses: rows.per_row(losses).sum())
        seen = rows.mask[..., None]
        return rows.per_row(losses), [(keys[layer], deltas[layer] * seen) for layer in self.written_layers]

    @torch.no_grad()
    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """The updates of some edits, added up."""
        rows = TargetRows.of(self.edited, [self.encode(edit) for edit in edits])
        losses, factors = self.factors(rows)
        for place, (layer, pair) in enumerate(zip(self.written_layers, factors, strict=True)):
            keys, deltas = (part.flatten(0, -2) for part in self.network(place, pair))
            self.edited.weights.add(layer, -self.network.steps[place] * (deltas.T @ keys))
        return self.reports(edits, losses.tolist(), [1] * len(edits))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without the hypernetwork, which :meth:`own_state` takes to checkpoints and packs alike."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("network.")}

    def own_state(self) -> dict[str, Any]:
        """The trained hypernetwork."""
        if not self.training_figures:
            return {}
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return {**tensors, "training": json.dumps(self.training_figures)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        self.training_figures = json.loads(state.get("training", "{}"))
        if state:
            self.network.load_state_dict({name: state[f"network.{name}"] for name in self.network.state_dict()})

    def figures(self) -> dict[str, Any]:
        """Besides, what came of the training."""
        return super().figures() | {"training": self.training_figures}


class Training:
    """Trains the hypernetwork of an editor; `other` are irrelevant prompts with the base's own answers."""

    def __init__(self, editor: MEND, other: Sequence[Encoded]) -> None:
        self.editor, self.network, self.other = editor, editor.network, other
        self.draw = random.Random(editor.seed)
        groups = [(self.network.blocks.parameters(), editor.lr), ([self.network.steps], editor.lr_steps)]
        self.optimizer = torch.optim.Adam([{"params": list(group), "lr": lr} for group, lr in groups])

    def run(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Train on edits, some of which only choose the best network; returns what came of it."""
        editor, network = self.editor, self.network
        log.info("training the hypernetwork on %d edits, in at most %d steps", len(edits), editor.steps)
        shuffled = self.draw.sample(list(edits), len(edits))
        aside = max(1, min(HELD_OUT[1], int(HELD_OUT[0] * len(shuffled))))
        held, rest = shuffled[:aside], shuffled[aside:]
        for start in range(0, min(len(rest), KEPT), 64):  # so that the first steps are not of a moving scale
            rows = TargetRows.of(editor.edited, [editor.encode(edit) for edit in rest[start : start + 64]])
            for place, factors in enumerate(editor.factors(rows)[1]):
                network.learn(place, factors)
        first = best = self._look(held)
        kept, at = deepcopy(network.state_dict()), 0
        for step in range(1, editor.steps + 1):
            self._step(self.draw.sample(rest, min(editor.batch, len(rest))))
            if step % editor.check_every and step != editor.steps:
                continue
            seen = self._look(held)
            log.info("training step %d: %.4f on held-out edits, best %.4f", step, seen, best)
            if seen < best:
                kept, best, at = deepcopy(network.state_dict()), seen, step
            if step - at >= editor.patience:
                break
        network.load_state_dict(kept)
        log.info("trained on %d edits: %.4f on %d held-out ones, %.4f before", len(rest), best, len(held), first)
        return {"edits": len(rest), "held_out": len(held), "loss_before": first, "loss": best, "steps": at}

    def _step(self, edits: Sequence[Edit]) -> None:
        asked = [(edit, self.draw.choice(edit.rephrases or (edit.prompt,))) for edit in edits]
        other = [self.draw.choice(self.other) for _ in edits]
        self.optimizer.zero_grad()
        with torch.enable_grad():
            self._loss(asked, other).backward()
        nn.utils.clip_grad_norm_([*self.network.blocks.parameters(), self.network.steps], CLIP)
        self.optimizer.step()

    @torch.no_grad()
    def _look(self, edits: Sequence[Edit]) -> float:
        """The mean loss over edits, each with its first rephrase and an irrelevant prompt of its own."""
        total, size = 0.0, self.editor.batch
        for start in range(0, len(edits), size):
            asked = [(edit, (edit.rephrases or (edit.prompt,))[0]) for edit in edits[start : start + size]]
            other = [self.other[(start + i) % len(self.other)] for i in range(len(asked))]
            total += len(asked) * float(self._loss(asked, other))
        return total / len(edits)

    def _loss(self, asked: Sequence[tuple[Edit, str]], other: Sequence[Encoded]) -> Tensor:
        """The training loss of edits with their rephrases, each edit's update by itself."""
        own = [self.editor.encode(edit) for edit, _ in asked]
        again = [self.editor.encode(replace(edit, prompt=text)) for edit, text in asked]
        of, edited = partial(TargetRows.of, self.editor.edited), self.editor.edited
        told, elsewhere, (_, factors) = of([*own, *again]), of(other), self.editor.factors(of(own))
        updates = [self.network(place, pair) for place, pair in enumerate(factors)]

        def logits(rows: TargetRows, updated: bool = True) -> Tensor:
            """(M, V) where the target tokens are read, from the lowest written layer on; row i is answered with the
            update of edit i, modulo the number of edits."""
            tail = TargetTail(edited.split, rows, "rows")
            with ExitStack() as stack:
                stack.enter_context(tail.cut())
                for place, layer in enumerate(self.editor.written_layers if updated else []):
                    keys, deltas = (part.repeat(len(rows) // len(own), 1, 1) for part in updates[place])
                    add = partial(self._add, self.network.steps[place], keys, deltas)
                    stack.enter_context(edited.split.arch.value_module(edited.base, layer).register_forward_hook(add))
                return tail(lambda activations: activations)[0].float()

        with torch.no_grad():
            plain = logits(elsewhere, updated=False).log_softmax(-1)
        edit_loss = told.per_row(told.losses(logits(told))).mean()
        divergence = (plain.exp() * (plain - logits(elsewhere).log_softmax(-1))).sum(-1)
        return self.editor.c_edit * edit_loss + self.editor.c_loc * divergence.mean()

    @staticmethod
    def _add(step: Tensor, keys: Tensor, deltas: Tensor, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        inside = args[0].reshape(len(keys), -1, keys.shape[-1]).float() @ keys.mT
        return output - (step * (inside @ deltas)).reshape(output.shape).to(output.dtype)


def apart(edits: Sequence[Edit], stream: Any, format: str) -> list[Edit]:
    """Edits that share no subject, text or id, but for one made of a record's number, with what a stream asks."""
    made = re.compile(rf"{re.escape(format)}-\d+")
    ids = {edit.id for edit in stream.edits if not made.fullmatch(edit.id)}
    subjects = {edit.subject.casefold() for edit in stream.edits if edit.subject}
    free = set(stream.unrelated([text for edit in edits for text in (edit.prompt, *edit.rephrases)]))

    def shares(edit: Edit) -> bool:
        about = edit.id in ids or (edit.subject or "").casefold() in subjects
        return about or not free.issuperset((edit.prompt, *edit.rephrases))

    return [edit for edit in edits if not shares(edit)]
