"""MEND: a trained hypernetwork turns an edit's fine-tuning gradient into a better change of the matrix.

Paper: "Fast Model Editing at Scale", arXiv 2110.11309, Sec. 3 and Alg. 1 and 2. The gradient of a linear layer is a sum
of rank-one matrices `delta u^T`, one per token, of what enters the layer and of the loss's gradient at what leaves it.
A network g maps each pair, normalised by the mean and variance of all pairs in training, to another pair (Eq. 3):

    h = z + relu(s_1 * (U_1 V_1 z + b) + o_1),    g(z) = h + relu(s_2 * U_2 V_2 h + o_2),    z = (u, delta)

with s and o of each layer's own, and the layer moves by `-alpha sum delta~ u~^T` with a learnt step alpha of its own.
The network is trained before the first write, on edits that the stream does not hold: `c_edit` times the edit's loss
after its update, at its prompt and a rephrase, plus `c_loc` times the divergence from the base on irrelevant prompts.

Defaults from the authors' configuration as EasyEdit has it (`hparams/TRAINING/MEND` of github.com/zjunlp/EasyEdit): the
upper three layers, rank 1,920, Adam at 1e-6 (steps alpha: 1e-4), alpha begins at 1e-4, c_edit 0.1, c_loc 1, ten edits
to a step, gradients cut at 100, at most 100,000 steps and the end 30,000 after the best one. Deviations: W_v alone
(theirs also the matrix before it); moments for each layer (theirs for all of one shape); the irrelevant prompts are
those of the stream, with the base's own answers; the end of sequence is trained as well; moments are of one pass before
the training. Edits are written one at a time, because the network is trained on single ones.

Shapes: B rows of T tokens, n edits, D = d_model, F = d_ffn, L written layers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repair_lightning.editors.base import KEPT, register
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.values import pushing
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.edits.records import load_records
from repair_lightning.errors import ConfigError
from repair_lightning.functional import target_cross_entropy
from repair_lightning.functional.moments import RunningMoments
from repair_lightning.models.prefix import SplitModel
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.types import BASE, Edit, EditReport

log = logging.getLogger(__name__)

Factors = tuple[Tensor, Tensor]
"""What enters W_v, (n, T, F), and the gradient at what leaves it, (n, T, D): the gradient of W_v is their product."""

CLIP = 100.0
"""Longest gradient of a training step."""
HELD_OUT = (0.1, 64)
"""Share of the training edits that only choose when to stop, and the most of them."""


def rank_one_sum(keys: Tensor, deltas: Tensor) -> Tensor:
    """The sum over all tokens of `delta u^T`, (D, F), of keys (..., F) and deltas (..., D)."""
    return deltas.flatten(0, -2).T @ keys.flatten(0, -2)


class GradientBlock(nn.Module):
    """`z + relu(s * (U V z + b) + o)` on (N, Z), with s and o of each of `layers` layers; at first it changes nothing.

    Args:
        size: Z.
        rank: of `U V`, at most Z.
        layers: how many share the block.
        generator: draws V.
    """

    def __init__(self, size: int, rank: int, layers: int, generator: torch.Generator | None = None) -> None:
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
    """The hypernetwork: factors of a gradient in, factors of an update out, and the step of each layer.

    Args:
        sizes: F and D.
        layers: L, how many layers share it.
        rank: of both blocks.
        step: what each layer's alpha begins with.
        normalise: take the moments of the factors so far out of them.
        seed: of the first weights.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(
        self, sizes: tuple[int, int], layers: int, rank: int, step: float, normalise: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = sum(sizes)
        self.count: Tensor
        self.mean: Tensor
        self.spread: Tensor
        self.sizes, self.normalise = sizes, normalise
        self.blocks = nn.ModuleList([GradientBlock(size, rank, layers, generator) for _ in range(2)])
        self.steps = nn.Parameter(torch.full((layers,), step))
        self.register_buffer("count", torch.zeros(layers, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(layers, size))
        self.register_buffer("spread", torch.zeros(layers, size))

    @staticmethod
    def _pairs(factors: Factors) -> tuple[Tensor, Tensor]:
        """Where there is a gradient at all, (n, T), and the pairs there, (N, F + D)."""
        keys, deltas = factors
        there = (keys != 0).any(-1) & (deltas != 0).any(-1)
        return there, torch.cat([keys[there], deltas[there]], -1)

    def _known(self, layer: int) -> RunningMoments:
        return RunningMoments(int(self.count[layer]), self.mean[layer], self.spread[layer])

    @torch.no_grad()
    def learn(self, layer: int, factors: Factors) -> None:
        """Take further factors of a layer into the moments."""
        _, pairs = self._pairs(factors)
        if not len(pairs):
            return
        known = self._known(layer).with_(pairs)
        self.count[layer], self.mean[layer], self.spread[layer] = known.count, known.mean, known.spread

    def forward(self, layer: int, factors: Factors) -> Factors:
        """The factors of a layer's update, of the same shapes; tokens without a gradient have none."""
        there, pairs = self._pairs(factors)
        if self.normalise:
            pairs = self._known(layer).normalise(pairs, floor=1e-7)
        for block in self.blocks:
            pairs = block(pairs, layer)
        keys, deltas = pairs.split(self.sizes, -1)
        return _laid_out(keys, there), _laid_out(deltas, there)

    def change(self, layer: int, factors: Factors) -> Tensor:
        """The change (D, F) of a layer's matrix."""
        keys, deltas = self(layer, factors)
        return -self.steps[layer] * rank_one_sum(keys, deltas)


@register("mend")
class MEND(WeightEditor):
    """Model editor networks with gradient decomposition; see the module's own docstring.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
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
        common: what every editor takes, see `Editor`.
    """

    batchable: ClassVar[bool] = False

    learnt_beforehand = True

    def __init__(
        self,
        base: str = "",
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
        super().__init__(base, layers=layers, **common)
        self.train_data, self.train_format, self.train_cache = train_data, train_format, train_cache
        self.steps, self.batch, self.lr, self.lr_steps = steps, batch, lr, lr_steps
        self.alpha, self.rank, self.normalise = alpha, rank, normalise
        self.c_edit, self.c_loc = c_edit, c_loc
        self.check_every, self.patience, self.seed = check_every, patience, seed
        for name, least in (("steps", 0), ("batch", 1), ("rank", 1), ("check_every", 1), ("patience", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "lr_steps", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("c_edit", "c_loc"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        self._trained: list[GradientNetwork] = []  # in a list: no module of the checkpoint, own_state carries it
        self.training_figures: dict[str, Any] = {}
        self.evaluated: tuple[Edit, ...] = ()
        """Edits that must not be trained on."""
        self.also_asked: tuple[str, ...] = ()
        """Further texts that must not."""
        self.beside = ("", "")
        """The file that they come from, and its format."""

    # -- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Besides, learn what is going to be evaluated, for it must not be trained on."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        self.evaluated, self.also_asked = stream.edits, stream.also_scored
        self.beside = (stream.file, stream.format)
        super().on_fit_start()

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, train the hypernetwork, unless a checkpoint, a pack or the cache has brought one."""
        super().prepare(background, held_out)
        if self._trained:
            return
        path, format = (self.train_data, self.train_format) if self.train_data else self.beside
        if not path:
            raise ConfigError(
                "mend needs edits to train its hypernetwork on: give --model.train_data a file of edits and "
                "--model.train_format their format; those that the stream asks are left out"
            )
        found = list(load_records(path, format, on_bad_record="skip").edits)
        kept, left_out = apart(found, self.evaluated, format, self.also_asked)
        if len(kept) < 2:
            raise ConfigError(
                f"'{path}' holds {len(kept)} edits that the stream does not ask, at least 2 are needed: "
                "give --model.train_data another file"
            )
        self.other = self.said_by_base(self.background_prompts[:KEPT])
        file = self._cache_file(kept)
        if file is None or not file.is_file():
            figures = self.train_on(kept) | {"left_out": left_out}
            if file is not None and self.team.rank == 0:
                _keep(file, self._trained[0], figures)
        else:
            log.info("the hypernetwork is taken from %s", file)
            self.load_own_state(_kept(file))
            figures = self.training_figures
        with torch.no_grad():  # all ranks go on with the first one's
            for tensor in self._trained[0].state_dict().values():
                tensor.copy_(self.team.of_first(tensor))
        self.training_figures = figures

    def _cache_file(self, edits: Sequence[Edit]) -> Path | None:
        """Where the hypernetwork of these edits, this base and these options is kept."""
        if self.train_cache is None:
            return None
        assert self.base is not None
        apart_from = {"base", "precision", "trust_remote_code", "cache_mib", "cache_disk_mib", "layer", "layers"}
        apart_from |= {"train_data", "train_format", "train_cache"}
        options = {name: value for name, value in self.options().items() if name not in apart_from}
        texts = [[edit.prompt, edit.target, *edit.rephrases] for edit in edits]
        parts = [self.base.sha256, str(self.base.model.dtype), self.written_layers, options, texts]
        digest = hashlib.sha256(json.dumps([*parts, [row.ids for row in self.other]]).encode()).hexdigest()
        return Path(self.train_cache).expanduser() / f"hypernetwork-{digest[:32]}.safetensors"

    def fresh_network(self) -> GradientNetwork:
        """An untrained hypernetwork."""
        depth, width = self.memory.shape
        network = GradientNetwork((width, depth), self.layers, self.rank, self.alpha, self.normalise, self.seed)
        return network.to(self.edited.device)

    def train_on(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Train a fresh hypernetwork on edits, some of which only choose the best; returns what came of it."""
        draw = random.Random(self.seed)
        log.info("training the hypernetwork on %d edits, in at most %d steps", len(edits), self.steps)
        shuffled = draw.sample(list(edits), len(edits))
        share, most = HELD_OUT
        aside = max(1, min(most, int(share * len(shuffled))))
        held, rest = shuffled[:aside], shuffled[aside:]
        network = self.fresh_network()
        groups = [
            {"params": list(network.blocks.parameters()), "lr": self.lr},
            {"params": [network.steps], "lr": self.lr_steps},
        ]
        optimizer = torch.optim.Adam(groups)
        self._learn_moments(network, rest)
        first = best = self.look(network, held)
        kept, at = _copied(network), 0
        for step in range(1, self.steps + 1):
            self._train_step(network, optimizer, draw.sample(rest, min(self.batch, len(rest))), draw)
            if step % self.check_every and step != self.steps:
                continue
            seen = self.look(network, held)
            log.info("training step %d: %.4f on held-out edits, best %.4f", step, seen, best)
            if seen < best:
                kept, best, at = _copied(network), seen, step
            if step - at >= self.patience:
                break
        network.load_state_dict(kept)
        self._trained = [network]
        log.info("trained on %d edits: %.4f on %d held-out ones, %.4f before", len(rest), best, len(held), first)
        return {"edits": len(rest), "held_out": len(held), "loss_before": first, "loss": best, "steps": at}

    def _learn_moments(self, network: GradientNetwork, edits: Sequence[Edit]) -> None:
        """The moments of one pass over (at most `KEPT`) edits, so that the first steps are not of a moving scale."""
        for start in range(0, min(len(edits), KEPT), 64):
            rows = self._rows([self.encode(edit) for edit in edits[start : start + 64]])
            for place, factors in enumerate(self.factors(rows)[1]):
                network.learn(place, factors)

    def _train_step(self, network: GradientNetwork, optimizer: Any, edits: Sequence[Edit], draw: random.Random) -> None:
        asked = [(edit, draw.choice(edit.rephrases) if edit.rephrases else edit.prompt) for edit in edits]
        other = [draw.choice(self.other) for _ in edits]
        optimizer.zero_grad()
        with torch.enable_grad():
            self._loss(network, asked, other).backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
        optimizer.step()

    @torch.no_grad()
    def look(self, network: GradientNetwork, edits: Sequence[Edit]) -> float:
        """The mean loss over edits, each with its first rephrase and an irrelevant prompt of its own."""
        total = 0.0
        for start in range(0, len(edits), self.batch):
            part = edits[start : start + self.batch]
            asked = [(edit, edit.rephrases[0] if edit.rephrases else edit.prompt) for edit in part]
            other = [self.other[(start + i) % len(self.other)] for i in range(len(part))]
            total += len(part) * float(self._loss(network, asked, other))
        return total / len(edits)

    def _loss(self, network: GradientNetwork, asked: Sequence[tuple[Edit, str]], other: Sequence[Encoded]) -> Tensor:
        """The training loss of edits with their rephrases, each edit's update by itself."""
        own = [self.encode(edit) for edit, _ in asked]
        again = [self._encode(text, edit.target) for edit, text in asked]
        _, factors = self.factors(self._rows(own))
        updates = [network(place, pair) for place, pair in enumerate(factors)]
        edited, elsewhere = self._rows([*own, *again]), self._rows(other)
        with torch.no_grad():
            plain = self._log_probabilities(elsewhere)
        with self._updated(network, updates, len(edited)):
            logits = self._log_probabilities(edited)
        with self._updated(network, updates, len(elsewhere)):
            moved = self._log_probabilities(elsewhere)
        edit_loss = target_cross_entropy(logits[:, None], edited.labels[:, None])
        divergence = (plain.exp() * (plain - moved)).sum(-1)
        return self.c_edit * edited.per_row(edit_loss).mean() + self.c_loc * divergence.mean()

    def _rows(self, encoded: Sequence[Encoded]) -> TargetRows:
        return TargetRows(
            encoded, self.edited.captures([row.ids for row in encoded]), range(len(encoded)), len(encoded)
        )

    def _log_probabilities(self, rows: TargetRows) -> Tensor:
        """(M, V) where the rows' target tokens are read, from the lowest written layer on."""
        with self.edited.split.skipping():
            logits, _ = self.edited.split.tail(rows.ids, rows.mask, rows.hidden, rows.span)
        return rows.reading(logits).float().log_softmax(-1)

    @contextmanager
    def _updated(self, network: GradientNetwork, updates: Sequence[Factors], rows: int) -> Iterator[None]:
        """Inside, the matrices answer each row with the update of its edit: that of the row's number, modulo their
        number."""

        def hook(place: int, keys: Tensor, deltas: Tensor) -> Any:
            repeats = rows // len(keys)
            keys, deltas = keys.repeat(repeats, 1, 1), deltas.repeat(repeats, 1, 1)

            def add(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
                inside = args[0].reshape(rows, -1, keys.shape[-1]).float() @ keys.transpose(1, 2)
                moved = network.steps[place] * (inside @ deltas)
                return output - moved.reshape(output.shape).to(output.dtype)

            return add

        values = [self.edited.split.arch.value_module(self.edited.base, layer) for layer in self.written_layers]
        with ExitStack() as stack:
            for place, (value, pair) in enumerate(zip(values, updates, strict=True)):
                stack.callback(value.register_forward_hook(hook(place, *pair)).remove)
            yield

    # -- writing ------------------------------------------------------------------------------------------------------

    def factors(self, rows: TargetRows) -> tuple[Tensor, list[Factors]]:
        """Each row's mean token loss (B,), and by written layer the factors of that loss's gradient, (B, T, .)."""
        size, width = rows.ids.shape
        seen: dict[int, Tensor] = {}
        shifts = []
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(self.edited.split.skipping())
            for layer in self.written_layers:
                split = SplitModel(self.edited.base, layer)
                shifts.append(rows.hidden.new_zeros(rows.hidden.shape, dtype=torch.float32).requires_grad_())
                stack.enter_context(pushing(split, shifts[-1]))
                stack.callback(split.value.register_forward_pre_hook(_noting(seen, layer)).remove)
            logits, _ = self.edited.split.tail(rows.ids, rows.mask, rows.hidden, rows.span)
            token_losses = target_cross_entropy(rows.reading(logits)[:, None], rows.labels[:, None])
            losses = rows.per_row(token_losses)
            gradients = torch.autograd.grad(losses.sum(), shifts)
        keys = [seen[layer].reshape(size, width, -1).float() for layer in self.written_layers]
        return losses.detach(), [(key, g * rows.mask[..., None]) for key, g in zip(keys, gradients, strict=True)]

    @torch.no_grad()
    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """The updates of some edits, added up."""
        losses, factors = self.factors(self._rows([self.encode(edit) for edit in edits]))
        for place, (layer, pair) in enumerate(zip(self.written_layers, factors, strict=True)):
            self.edited.weights.add(layer, self._trained[0].change(place, pair))
        return [EditReport(edit.id, BASE, value, 0.0, 1) for edit, value in zip(edits, losses.tolist(), strict=True)]

    def own_state(self) -> dict[str, Any]:
        """The trained hypernetwork."""
        if not self._trained:
            return {}
        tensors = {f"network.{name}": tensor for name, tensor in self._trained[0].state_dict().items()}
        return {**tensors, "training": json.dumps(self.training_figures)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        if not state:
            return
        network = self.fresh_network()
        tensors = {name: value for name, value in state.items() if name.startswith("network.")}
        network.load_state_dict({name.removeprefix("network."): value for name, value in tensors.items()})
        self._trained, self.training_figures = [network], json.loads(state["training"])

    def figures(self) -> dict[str, Any]:
        """Besides, what came of the training."""
        return super().figures() | {"training": self.training_figures}


def apart(
    edits: Sequence[Edit], evaluated: Sequence[Edit], format: str, also_asked: Sequence[str] = ()
) -> tuple[list[Edit], int]:
    """Edits that share no id, no subject and no text with those that are evaluated, and how many do.

    What is `also_asked` counts as their texts. An id that `load_records` made of a record's number says nothing.
    """
    made = re.compile(rf"{re.escape(format)}-\d+")
    ids = {edit.id for edit in evaluated}
    subjects = {edit.subject.casefold() for edit in evaluated if edit.subject}
    texts = {_folded(text) for edit in evaluated for text in _texts(edit)}
    texts |= {_folded(probe.prompt) for edit in evaluated for probe in (*edit.near, *edit.locality)}
    texts |= set(map(_folded, also_asked))

    def shared(edit: Edit) -> bool:
        same_id = edit.id in ids and not made.fullmatch(edit.id)
        same_subject = bool(edit.subject) and str(edit.subject).casefold() in subjects
        return same_id or same_subject or any(_folded(text) in texts for text in _texts(edit))

    kept = [edit for edit in edits if not shared(edit)]
    left_out = len(edits) - len(kept)
    log.info("left out of training: %d of %d edits, whose id, subject or text the stream asks", left_out, len(edits))
    return kept, left_out


def _laid_out(found: Tensor, there: Tensor) -> Tensor:
    """Rows (N, X) at the tokens (n, T) that are marked, zeros elsewhere, (n, T, X)."""
    return found.new_zeros(*there.shape, found.shape[-1]).masked_scatter(there[..., None], found)


def _texts(edit: Edit) -> tuple[str, ...]:
    return (edit.prompt, *edit.rephrases)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _noting(seen: dict[int, Tensor], layer: int) -> Any:
    """A hook that notes what enters a layer's value matrix."""
    return lambda _, args: seen.update({layer: args[0].detach()})


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _keep(file: Path, network: nn.Module, figures: Mapping[str, Any]) -> None:
    """Put a trained hypernetwork on the disk, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": tensor.cpu().contiguous() for name, tensor in _copied(network).items()}
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, {"training": json.dumps(dict(figures))})
    partial.replace(file)


def _kept(file: Path) -> dict[str, Any]:
    """The `own_state` of a hypernetwork on the disk."""
    with safe_open(file, "pt") as opened:
        training = opened.metadata()["training"]
    return {**load_file(file), "training": training}
