"""The lookup router: the key router's choice, and the edit's target is said as it stands."""

from __future__ import annotations

from typing import ClassVar

from repair_lightning.memory.routers.key import KeyRouter


class LookupRouter(KeyRouter):
    """Chooses as the key router does; see there."""

    name = "lookup"
    quotes: ClassVar[bool] = True

    def edit_of(self, shard: int) -> str:
        """The edit that owns a shard; each has one of its own."""
        return self.ids[int((self.shards == shard).nonzero()[0, 0])]

    def fingerprint(self, shard: int) -> str:
        """The edit: all its shards are empty."""
        return self.edit_of(shard)
