"""The router of editors without side memory: the base, with what was written into it, answers every prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Router
from repair_lightning.memory.side_memory import SideMemory


class NobodyRouter(Router):
    """Routes nothing to a shard; it has nothing to learn, to calibrate or to store."""

    name = "nobody"
    needs_owned = False

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """There is no threshold."""

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """Every prompt to the base."""
        return Choice.base(len(query))

    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take in."""
