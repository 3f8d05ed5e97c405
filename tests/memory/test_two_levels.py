"""The activation router where it looks for candidates first: against scoring all shards, whatever came and went."""

from __future__ import annotations

import pytest
import torch
from test_routers import D, F, same, table

from repair_lightning.memory.query import Query
from repair_lightning.memory.routers import ActivationRouter
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

MANY = 1 << 40
SHARDS = 60


def shards(low_rank: bool = False) -> tuple[SideMemory, dict[int, Query], Query]:
    """Shards that answer strongly to three activations each, those activations, and other words for them."""
    memory, owned = SideMemory((D, F)), {}
    every = table(SHARDS * 3, F, 1)
    for shard in range(SHARDS):
        own = every[3 * shard : 3 * shard + 3]
        left = table(D, 3, 100 + shard)
        if low_rank:
            memory.add(left, own)
        else:
            memory.open_shard()
            memory[shard].delta.data.copy_(left @ own + 0.1 * table(D, F, 300 + shard))
        owned[shard] = prompts_of(own)
    return memory, owned, prompts_of(every + 0.5 * table(len(every), F, 2))


def prompts_of(activations: torch.Tensor) -> Query:
    """Prompts of two tokens, the second of which counts."""
    mask = torch.tensor([[False, True]]).expand(len(activations), 2)
    states = torch.stack([torch.full_like(activations, torch.nan), activations], 1)
    return Query(("",) * len(activations), mask, states[..., :0], states)


def leveled(two_level_from: int, candidates: int = 32, **options) -> ActivationRouter:
    router = ActivationRouter(**options)
    router.two_level_from, router.candidates = two_level_from, candidates
    return router


def calibrated(memory: SideMemory, owned: dict[int, Query], **options) -> ActivationRouter:
    router = leveled(**options)
    router.calibrate(memory, owned, prompts_of(table(200, F, 9)))
    return router


class TestShards:
    @pytest.mark.parametrize(("pool", "low_rank"), [("last", True), ("mean", False), ("max", True)])
    def test_candidates_hold_the_best_shard(self, pool, low_rank):
        memory, owned, asked = shards(low_rank)
        exact = calibrated(memory, owned, pool=pool, two_level_from=MANY).route(asked, memory)
        found = calibrated(memory, owned, pool=pool, two_level_from=SHARDS, candidates=8).route(asked, memory)
        fires = exact.memory != BASE
        assert fires.float().mean() > 0.5
        assert (exact.memory == found.memory)[fires].float().mean() > 0.98
        agree = exact.memory == found.memory
        torch.testing.assert_close(found.score[fires & agree], exact.score[fires & agree])
        assert torch.equal(found.threshold[fires & agree], exact.threshold[fires & agree])

    def test_sketches_follow_the_bank(self):
        """Shards leave, are emptied, are fused, come back, and are written to: each time what is there is found."""
        memory, owned, asked = shards()
        router = calibrated(memory, owned, two_level_from=1, candidates=4)
        background = prompts_of(table(200, F, 9))

        def agrees(router=router) -> bool:
            exact = leveled(MANY)
            exact.load_state_dict(router.state_dict())
            return router.route(asked, memory).memory.tolist() == exact.route(asked, memory).memory.tolist()

        assert agrees()
        before = memory.snapshot(writable=True)
        memory.drop([3, 4])
        assert agrees()
        memory.prune(5)
        assert agrees()
        router.reassign([6, 7], memory.fuse([6, 7], memory[6].delta.detach() + memory[7].delta.detach()))
        assert agrees()
        memory[8].delta.data.mul_(5)
        router.calibrate(memory, {shard: owned[shard] for shard in memory.ids if shard in owned}, background)
        assert agrees()
        memory.restore(before)
        router.calibrate(memory, owned, background)
        assert agrees()
        fresh = leveled(1, 4, **router.options())
        fresh.load_state_dict(router.state_dict())
        assert same(fresh.route(asked, memory), router.route(asked, memory))
