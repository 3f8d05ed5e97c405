"""LoRA by the `peft` library: adapters on every linear layer, trained on the edits as one fine-tunes a model.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, Sec. 4.1: `W = W_0 + alpha / r B A`, A drawn at
random, B zero at first. As the library's users do it: all linear layers of attention and feed-forward network, alpha
twice the rank, AdamW, some epochs in small batches. Each batch of edits goes on training the adapters of the earlier
ones; its edits are seen in each form that edits are written in. Deviations: outside of a write the adapters are folded
into the base's matrices, and of these their factors alone are kept; the epochs end once the edits are said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.editors.base import register
from repair_lightning.editors.checks import at_least, positive
from repair_lightning.editors.inner_loop import TargetRows, TargetTail
from repair_lightning.editors.weights import WeightEditor
from repair_lightning.errors import ConfigError
from repair_lightning.models.base import Base
from repair_lightning.types import Edit, EditReport

NAME = "edits"  # of the adapters


@register("lora")
class Lora(WeightEditor):
    """LoRA adapters on all linear layers. Its `layer` is always the first.

    Args:
        rank: r, of each adapter.
        alpha: a change is `alpha / rank` times the product of an adapter's factors.
        lr: of AdamW, absolute.
        epochs: most passes over a batch.
        batch: edits per step, each in all of its forms.
        stop_loss: a batch is done once the mean loss of an epoch is below this, in nats; None takes all epochs.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        lr: float = 1e-3,
        epochs: int = 20,
        batch: int = 4,
        stop_loss: float | None = 0.05,
        **common: Any,
    ) -> None:
        super().__init__(layers=1, **common)
        self.rank, self.alpha, self.lr, self.epochs = rank, alpha, lr, epochs
        self.batch, self.stop_loss = batch, stop_loss
        at_least(1, self, "rank", "epochs", "batch")
        positive(self, "alpha", "lr")

    def load(self) -> None:
        """Besides, refuse at once where peft is missing."""
        _peft()
        super().load()

    def build(self, base: Base, layer: int) -> None:
        """Every layer is written into, so what enters the first is all that never changes."""
        if self.layer_option not in (None, 0):
            raise ConfigError(f"lora writes into every layer, got layer {self.layer_option}; leave --model.layer out")
        super().build(base, 0)

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Go on training the adapters until the edits are said."""
        weights, rows = self.edited.weights, self._rows(edits)
        before = {name: weights.factors(str(name)) for name in weights.state()}
        with self.edited.lock, weights.originals(), self._adapters() as layers, self.edited.forced(None):
            drawn = torch.Generator().manual_seed(0)
            for name, layer in layers.items():
                _start(layer, before.get(name), drawn)
            steps, losses = self._train(rows, layers)
            after = {name: _factors(layer) for name, layer in layers.items()}
        for name, factors in after.items():
            weights.put_factors(name, *factors)
        return self.reports(edits, losses, [steps] * len(edits))

    def _rows(self, edits: Sequence[Edit]) -> TargetRows:
        """The edits in each form, as they were given first."""
        pairs = [*enumerate(map(self.encode, edits)), *self.variants(edits)]
        captures = self.edited.captures([row.ids for _, row in pairs])
        return TargetRows([row for _, row in pairs], captures, [i for i, _ in pairs], len(edits))

    @contextmanager
    def _adapters(self) -> Iterator[dict[str, Any]]:
        """Inside, adapters stand in the base; gives them by the names of their modules."""
        peft, transposed = _peft(), hasattr(self.edited.split.value, "nf")
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules="all-linear", fan_in_fan_out=transposed
        )
        tuner = peft.LoraModel(self.edited.base, config, NAME)
        try:
            yield {name: part for name, part in self.edited.base.named_modules() if hasattr(part, "lora_A")}
        finally:
            tuner.unload()

    def _train(self, rows: TargetRows, layers: Mapping[str, Any]) -> tuple[int, list[float]]:
        """Train adapters in epochs; returns how many steps were taken, and each edit's loss in its last one."""
        trained = [part[NAME].weight for layer in layers.values() for part in (layer.lora_A, layer.lora_B)]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        order, losses, steps = torch.Generator().manual_seed(0), torch.zeros(rows.members), 0
        for _ in range(self.epochs):
            for part in torch.randperm(rows.members, generator=order).split(self.batch):
                members = sorted(part.tolist())
                found = self._losses(rows.part(members))
                losses[members] = found.detach().cpu()
                optimizer.zero_grad()
                found.mean().backward()
                optimizer.step()
                steps += 1
            if not losses.isfinite().all() or (self.stop_loss is not None and float(losses.mean()) < self.stop_loss):
                break
        return steps, losses.tolist()

    @torch.enable_grad()
    def _losses(self, rows: TargetRows) -> Tensor:
        """The mean loss (n,) of each edit in its forms, in nats."""
        tail = TargetTail(self.edited.split, rows, "rows" if self.cache_mib else "model")
        return rows.per_member(rows.per_row(rows.losses(tail(lambda activations: activations)[0])))


def _start(layer: Any, left: tuple[Tensor, Tensor] | None, drawn: torch.Generator) -> None:
    """Put an adapter where it was left, or where LoRA begins, in every process alike."""
    up, down, scale = layer.lora_B[NAME].weight.data, layer.lora_A[NAME].weight.data, layer.scaling[NAME]
    if left is not None:
        up.copy_(left[0] / scale)
        down.copy_(left[1])
    else:
        down.copy_(nn.init.kaiming_uniform_(torch.empty(down.shape), math.sqrt(5), generator=drawn))


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """What an adapter adds, as the factors of a matrix (D, F): (D, r) and (r, F)."""
    return layer.scaling[NAME] * layer.lora_B[NAME].weight.detach(), layer.lora_A[NAME].weight.detach()


def _peft() -> Any:
    """The library; a ConfigError where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora needs {error.name}; pip install 'repair-lightning[lora]'") from error
    return peft
