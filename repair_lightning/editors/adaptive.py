"""The inner steps' options, and editors whose options may be `auto`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from repair_lightning.editors.adapt import AUTO, Adapted, adapt
from repair_lightning.editors.base import Editor, make_editor
from repair_lightning.editors.checks import at_least
from repair_lightning.editors.low_rank import NormalizedGradient
from repair_lightning.errors import ConfigError

log = logging.getLogger(__name__)

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "normalized": NormalizedGradient,
}
Optimizer = Literal["adam", "adamw", "sgd", "normalized"]


@dataclass
class Steps:
    """The inner steps of a write.

    Attributes:
        optimizer: `adam`, `adamw`, `sgd`, or `normalized` (each position's gradient at a fixed length); None takes what
            the editor works best with.
        lr: its learning rate, relative to the base: at 1, one Adam step may move each coordinate of the layer's output
            by the root mean square of what enters the layer. `auto` finds it by probe edits.
        steps: most steps per batch (n_iter); as many again for each earlier attempt of its hardest edit.
        stop_margin: stop once every target token leads its best rival by this many nats; None takes all steps, `auto`
            finds it by probe edits.
    """

    batch_tokens: ClassVar[int] = 1024
    """Most target tokens of a batch: long targets make smaller batches."""

    optimizer: Optimizer | None = None
    lr: float | str = 1.0
    steps: int = 150
    stop_margin: float | str | None = 2.0

    @property
    def rate(self) -> float:
        """`lr`; while `auto` has not found it, the default."""
        return 1.0 if isinstance(self.lr, str) else self.lr

    @property
    def margin(self) -> float | None:
        """`stop_margin`; while `auto` has not found it, the default."""
        return 2.0 if isinstance(self.stop_margin, str) else self.stop_margin

    def check(self) -> None:
        """Refuse what cannot be."""
        for name in ("lr", "stop_margin"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(f"writing.{name} must be a number or 'auto', got '{value}'")
        at_least(1, self, "steps", at="writing.")
        if not self.rate > 0:
            raise ConfigError(f"writing.lr must be positive, got {self.lr}")


class AdaptiveEditor(Editor):
    """An editor that finds its layer, learning rate and margin by probe edits where they are `auto`."""

    can_adapt = True

    writing: Steps
    seed: int

    def choose_settings(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Find what is `auto`, on the first rank for all."""
        if AUTO not in (self.layer_option, self.writing.lr, self.writing.stop_margin):
            return
        if not self.team.deals:
            raise ConfigError("'auto' needs the whole base on one rank; give layer, writing.lr and writing.stop_margin")
        found = adapt(self, background, held_out) if self.team.rank == 0 else None
        self.adopt(self.team.first(found))  # type: ignore[arg-type]
        log.info("%s", self.adapted)

    @contextmanager
    def trial(self, layer: int) -> Iterator[Any]:
        """Another editor of the same base, with a ledger, a memory and a router of its own; afterwards it is gone."""
        assert self.base is not None
        other: Any = make_editor(self.editor_name, self.options() | {"base": "", "layer": layer})  # type: ignore[arg-type]
        other.writing = replace(self.writing, lr=self.writing.rate, stop_margin=self.writing.margin)
        other.build(self.base, layer)
        try:
            yield other
        finally:
            other.edited.release()

    def adopt(self, found: Adapted) -> None:
        """Go on with the layer, the learning rate and the margin that were found; another layer has an empty memory."""
        assert self.base is not None
        self.adapted, self.layer_option = found, found.layer
        if found.layer != self.layer:
            self.build(self.base, found.layer)
        self.writing = replace(self.writing, lr=found.lr, stop_margin=found.stop_margin)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Besides, what was found for the options that were `auto`."""
        super().on_save_checkpoint(checkpoint)
        if self.adapted is not None:
            checkpoint["adapted"] = asdict(self.adapted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings are not chosen again: the shards belong to those that were chosen."""
        self.load()
        assert self.base is not None
        if "adapted" in checkpoint and checkpoint["base"]["sha256"] == self.base.sha256:
            known = checkpoint["adapted"]
            self.adopt(Adapted(**known | {"candidates": tuple(known["candidates"])}))
        super().on_load_checkpoint(checkpoint)
