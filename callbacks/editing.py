"""What callbacks meet: an editor, as far as they use one, and the stream that it is fed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from repair_lightning.editors.held import Snapshot
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.stream import EditStream
from repair_lightning.memory.query import Choice
from repair_lightning.memory.routers import Anchor
from repair_lightning.models.edited import EditedModel
from repair_lightning.training.team import Team
from repair_lightning.types import Edit


class Editing(Protocol):
    """An editor as callbacks see it; `Editor` and its bases say more of each member. `fuse`, `fold`, `unfold` and
    `calibrate` are those of an editor that `can_merge`, `prune` of one that `can_prune`."""

    ledger: Ledger
    team: Team
    guard_prompts: Sequence[str]
    can_merge: ClassVar[bool]
    can_prune: ClassVar[bool]

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def edited(self) -> EditedModel:
        """The model with its memory and router."""

    @property
    def base_changed(self) -> bool:
        """Whether the base has a W_v that is not its own."""

    def choose(self, prompts: Sequence[str]) -> Choice:
        """The router's choice for prompts."""

    def choose_for(self, edits: Sequence[Edit]) -> Choice:
        """The router's choice for the edits' own prompts."""

    def owner_choice(self, ids: Sequence[str]) -> Tensor:
        """The shard that owns each edit."""

    def anchors_of(self, edits: Sequence[Edit]) -> list[Anchor]:
        """What the edits are about, and what they ask."""

    def in_context(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits, asked after other words."""

    def forget(self, ids: Iterable[str]) -> None:
        """Stop answering for edits."""

    def prune(self, shard: int) -> None:
        """Remove a shard."""

    def fuse(self, shards: Sequence[int], delta: Tensor) -> int:
        """Put one shard, whose id is returned, in the place of several."""

    def least_squares(self, shards: Sequence[int], weights: Sequence[float]) -> Tensor:
        """One delta (D, F) that adds what weighted shards add at their own edits' positions."""

    def fold(self, shard: int) -> None:
        """Write a shard into the base."""

    def unfold(self) -> None:
        """Take that back."""

    def calibrate(self) -> None:
        """Set the router's thresholds."""

    def finish_window(self) -> None:
        """What follows the last write of a window."""

    def snapshot(self) -> Snapshot:
        """What was learnt so far."""

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""

    def log_now(self, values: Mapping[str, float]) -> None:
        """Values to the loggers, at once."""


def stream_of(trainer: pl.Trainer) -> EditStream:
    """The stream of a run."""
    return trainer.datamodule  # type: ignore[attr-defined]


class Remembering(pl.Callback):
    """A callback of which the attributes in `kept` travel with checkpoints."""

    kept: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name in self.kept:
            setattr(self, name, state_dict[name])
