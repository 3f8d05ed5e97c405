"""What every router is: it decides which memory answers a prompt, once per sequence, from the prompt's tokens alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.rows import Part, Rows
from repair_lightning.memory.side_memory import SideMemory


@dataclass(frozen=True, slots=True)
class Anchor:
    """The tokens that name what an edit is about, in canonical spelling; `named` where they are its subject's."""

    tokens: tuple[int, ...]
    named: bool


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Prompts made up as neighbours of edits: the edit's subject in other edits' words, so another relation of it.

    `of` (N,) is the index of the edit that each prompt is a neighbour of.
    """

    prompts: Query
    of: Tensor


class Router(ABC):
    """Decides which memory answers. The editor tells it of edits and shards; it never sees targets or scoring
    prompts."""

    name: ClassVar[str]
    needs_owned: ClassVar[bool] = True
    """Whether calibration looks at the shards' own edits."""
    reads_all_tokens: bool = False
    """Whether the states of all the prompt's tokens matter, not the last one's alone."""
    needs_neighbours: ClassVar[bool] = False
    """Whether made-up neighbours are of use when edits are added."""

    prefaces: ClassVar[bool] = False
    """Whether the base reads something before a prompt that a memory answers, see :meth:`preface`."""

    def fit(self, background: Query, embeddings: Tensor) -> None:  # noqa: B027 - nothing to learn by default
        """Learn what is common from irrelevant prompts, once, before the first edit. `embeddings` is (V, E)."""

    def add(
        self,
        ids: Sequence[str],
        anchors: Sequence[Anchor],
        prompts: Query,
        shards: Sequence[int],
        neighbours: Neighbours | None = None,
    ) -> None:
        """Take in edits that were written: their ids, anchors, prompts and shards; known ids are replaced."""
        self.insert(ids, self.describe(anchors, prompts, shards, neighbours))

    def describe(
        self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int], neighbours: Neighbours | None = None
    ) -> dict[str, Tensor]:
        """What is to be kept of n edits, as tensors with n rows each; nothing for a router without keys.

        It depends on the edits alone, so it may be computed where they are written and inserted elsewhere. Tables of
        token ids may differ in width; they are filled with -1.
        """
        return {}

    def insert(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take in edits as :meth:`describe` made them; known ids are replaced."""

    def forget(self, ids: Sequence[str]) -> None:  # noqa: B027
        """Drop edits by id; unknown ones are passed over."""

    def reassign(self, shards: Sequence[int], fused: int) -> None:  # noqa: B027
        """Follow a merge: what the given shards owned belongs to `fused` now."""

    def bind(self, embeddings: Tensor) -> None:  # noqa: B027
        """Give a loaded router the base's input embeddings (V, E); they are not stored with it."""

    @abstractmethod
    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Set the thresholds from the shards' own edits and from held-out irrelevant prompts."""

    @abstractmethod
    def route(self, query: Query, memory: SideMemory) -> Choice:
        """Choose a memory for each prompt."""

    def preface(self, query: Query, memory: Sequence[int]) -> list[list[int]]:
        """Token ids that the base reads before each prompt, given who answers it; only asked where `prefaces`."""
        return [[] for _ in memory]

    def fingerprint(self, shard: int) -> str:
        """Besides what the shard holds, what its answers depend on; empty where nothing is."""
        return ""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""

    def rows(self) -> Rows | None:
        """What of its state is said once per edit and never changed; None where nothing is."""
        return None

    def state_beside_rows(self) -> dict[str, Any]:
        """:meth:`state_dict` without what :meth:`rows` hold."""
        return self.state_dict()

    @staticmethod
    def state_of_rows(state: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
        """The whole :meth:`state_dict` from :meth:`state_beside_rows` and stored :meth:`rows`."""
        return dict(state)
