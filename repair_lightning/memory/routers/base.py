"""What every router is: it decides which memory answers a prompt, once per sequence, from the prompt's tokens alone."""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.side_memory import SideMemory

Read = Callable[[Sequence[str]], Tensor]
"""From texts the state (n, D) of each one's last token where it enters the edited layer, float32 on the CPU."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """What an edit is about: its subject, empty where the prompt does not name it, and what its prompt asks."""

    subject: str
    asked: str


class Router(ABC):
    """Decides which memory answers. The editor tells it of edits and shards; it never sees targets or scoring
    prompts."""

    name: ClassVar[str]
    remembered: ClassVar[tuple[str, ...]] = ()
    """The attributes that are its state: tensors, numbers, and lists and mappings that are never changed in place."""
    needs_owned: ClassVar[bool] = True
    """Whether calibration looks at the shards' own edits."""
    reads_all_tokens: bool = False
    """Whether the states of all the prompt's tokens matter, not the last one's alone."""
    reads_states: ClassVar[bool] = True
    """Whether the states of the prompts matter; else what they ask is enough, and no forward pass is needed."""
    vouches: ClassVar[bool] = False
    """Whether it names the very edit that is to answer, so that the edit's target may be asked of the shard."""
    needs_space: ClassVar[bool] = False
    """Whether it compares what is asked in a space of the base's states, its `space`."""
    read: Read | None = None
    """Gives the states of further texts, where a model holds the router."""
    quotes: ClassVar[bool] = False
    """Whether a memory is its edit's target as a text, which is said as it stands; see :meth:`edit_of`."""
    per_edit: ClassVar[tuple[str, ...]] = ()
    """The entries of its state that :meth:`rows` hold too."""
    prefaces: ClassVar[bool] = False
    """Whether the base reads edits as texts before a prompt that a memory answers, see :meth:`preface`."""

    in_text: bool = False
    """Whether the base reads edits before a text about their subject: what `READS` answers."""

    def fit(self, background: Query) -> None:  # noqa: B027 - nothing to learn by default
        """Learn what is common from irrelevant prompts, once, before the first edit."""

    def add(self, ids: Sequence[str], anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int]) -> None:
        """Take in edits that were written: their ids, anchors, prompts and shards; known ids are replaced."""
        self.insert(ids, self.describe(anchors, prompts, shards))

    def describe(self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int]) -> dict[str, Tensor]:
        """What is to be kept of n edits, as tensors with n rows each; nothing for a router without keys.

        It depends on the edits alone, so it may be computed where they are written and inserted elsewhere. Tables of
        bytes may differ in width; they are filled with -1.
        """
        return {}

    def insert(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take in edits as :meth:`describe` made them; known ids are replaced."""

    def forget(self, ids: Sequence[str]) -> None:  # noqa: B027
        """Drop edits by id; unknown ones are passed over."""

    def reassign(self, shards: Sequence[int], fused: int) -> None:  # noqa: B027
        """Follow a merge: what the given shards owned belongs to `fused` now."""

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:  # noqa: B027
        """Set the thresholds from the shards' own edits and from held-out irrelevant prompts, where there are any."""

    @abstractmethod
    def route(self, query: Query, memory: SideMemory) -> Choice:
        """Choose a memory for each prompt."""

    def preface(self, query: Query, memory: Sequence[int]) -> list[list[str]]:
        """The ids of the edits that the base reads before each prompt, given who answers it, the most important last;
        only asked where `prefaces` or `in_text`."""
        return [[] for _ in memory]

    def edit_of(self, shard: int) -> str | None:
        """Where a router `quotes`, the id of the edit whose target a memory is; None where it is none."""
        return None

    def fingerprint(self, shard: int) -> str:
        """Besides what the shard holds, what its answers depend on; empty where nothing is."""
        return ""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types; each is kept under its name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: tensors and plain types only."""
        return {name: getattr(self, name) for name in self.remembered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name in self.remembered:
            value = state[name]
            setattr(self, name, value.cpu() if isinstance(value, Tensor) else value)

    def common_state(self) -> dict[str, Any]:
        """The :meth:`state_dict` without its entries `per_edit`."""
        return {name: value for name, value in self.state_dict().items() if name not in self.per_edit}

    def remember(self) -> Any:
        """What :meth:`recall` goes back to, within this process; who remembers much gives references."""
        return self.state_dict()

    def recall(self, kept: Any) -> None:
        """Go back to what :meth:`remember` gave."""
        self.load_state_dict(kept)

    def rows(self) -> Mapping[int, Mapping[str, Tensor]]:
        """What of its state is said once per edit and never changes, as tensors under a number that no other edit ever
        has; nothing by default."""
        return {}

    @staticmethod
    def from_rows(rows: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Any]:
        """The entries `per_edit` of a :meth:`state_dict` whose :meth:`rows` these were."""
        return {}


class NobodyRouter(Router):
    """The router of editors without side memory: the base, with what was written into it, answers every prompt."""

    name = "nobody"
    needs_owned = False

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """Every prompt to the base."""
        return Choice.base(len(query))


def of_all(shard: int, ids: Sequence[str]) -> str:
    """A fingerprint of a memory whose answers depend on all edits."""
    return f"{shard} {hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()}"
