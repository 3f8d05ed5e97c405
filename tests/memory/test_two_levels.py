"""Routers that look for candidates first: against those that look at everything, whatever came and went before."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_routers import BACKGROUND, COMMON, D, E, F, V, ask, bank, fitted, same, table

from repair_lightning.memory.query import Query, pad_right
from repair_lightning.memory.routers import ActivationRouter, Anchor, HybridRouter, KeyRouter
from repair_lightning.memory.routers.inverted import InvertedFile, cells_of, centroids_of
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

MANY = 1 << 40
FROM = 40
NAMES = 400


class Thorough(KeyRouter):
    """Goes through every cell, so that two levels find all that one level finds."""

    probes = 1 << 20


def about(*people: int, wording: int = 0) -> Query:
    """Prompts about one of `NAMES` people (two rare words each), whose last state says the wording."""
    relations = [person % len(COMMON) for person in people]
    words = [
        COMMON[(relation + wording) % len(COMMON)] + rare(person)
        for relation, person in zip(relations, people, strict=True)
    ]
    states = table(len(COMMON), D, 1)[relations] + 0.3 * table(NAMES, D, 2)[list(people)] + 0.1 * wording
    one = torch.ones(len(people), 1, dtype=torch.bool)
    return Query(pad_right(words), one, states[:, None], states[:, None, :0])


def rare(person: int) -> list[int]:
    return [10 + person // 20, 40 + person % 20]


def add(router: KeyRouter, *people: int) -> None:
    router.add([f"p{i}" for i in people], [Anchor(tuple(rare(i)), True) for i in people], about(*people), people)


def new_router(kind: type[KeyRouter], two_level_from: int, **options) -> KeyRouter:
    router = kind(two_level_from=two_level_from, candidates=8, **options)
    router.fit(ask(*BACKGROUND), table(V, E, 0))
    return router


def reloaded(router: KeyRouter) -> KeyRouter:
    fresh = type(router)(**router.options())
    fresh.load_state_dict(router.state_dict())
    fresh.bind(table(V, E, 0))
    return fresh


NOWHERE = SideMemory((1, 1))
EVERYONE = about(*range(0, NAMES, 3), wording=1)


def history(router: KeyRouter, seed: int, between=lambda router: router) -> KeyRouter:
    """Edits come and go, some again, shards merge, and prompts are routed on the way."""
    draw = random.Random(seed)
    for _ in range(8):
        add(router, *draw.sample(range(NAMES), draw.randint(1, 45)))
        if draw.random() < 0.6:
            router.forget(draw.sample(router.ids, draw.randint(0, len(router.ids) // 2)))
        if draw.random() < 0.3:
            router.reassign(draw.sample(range(NAMES), 5), NAMES + draw.randint(0, 9))
        router.calibrate(NOWHERE, {}, ask(*BACKGROUND))
        router.route(about(*draw.sample(range(NAMES), 5)), NOWHERE)
        router = between(router)
    return router


def clear(router: KeyRouter) -> torch.Tensor:
    """The prompts of `EVERYONE` whose last candidate leads the next key by more than half precision may err."""
    found, _ = router._search_all(router.encoder(EVERYONE), router.candidates + 1)
    return (found[:, -2] - found[:, -1] > 1e-3).nonzero()[:, 0]


class TestKeys:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10_000))
    @example(9931)
    def test_all_cells_say_what_a_search_of_all_keys_says(self, seed):
        two, one = history(new_router(Thorough, FROM), seed), history(new_router(Thorough, MANY), seed)
        assert two.ids == one.ids
        assert not one.clustered
        asked = EVERYONE.rows(clear(one))
        assert len(asked) > 0.9 * len(EVERYONE)
        a, b = two.route(asked, NOWHERE), one.route(asked, NOWHERE)
        assert a.memory.tolist() == b.memory.tolist()
        assert a.nearest == b.nearest
        assert torch.equal(a.score, b.score)

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10_000))
    def test_stored_in_between_or_not_is_the_same_to_the_bit(self, seed):
        """With few probes, so that the result depends on cells, on their order, and on when they were learnt."""

        class Hasty(KeyRouter):
            probes = 2

        straight = history(new_router(Hasty, FROM), seed)
        stored = history(new_router(Hasty, FROM), seed, between=reloaded)
        assert same(straight.route(EVERYONE, NOWHERE), stored.route(EVERYONE, NOWHERE))
        assert torch.equal(straight.numbers, stored.numbers)
        assert torch.equal(straight.cells, stored.cells)

    def test_below_the_switch_nothing_is_learnt(self):
        router = new_router(KeyRouter, FROM)
        add(router, *range(FROM - 1))
        assert not router.clustered
        assert "cells" not in router.state_dict()
        add(router, FROM)
        assert router.clustered == FROM
        assert len(router.cells) == FROM

    def test_shrunk_below_the_switch_all_keys_are_searched(self, monkeypatch):
        router = new_router(KeyRouter, FROM)
        add(router, *range(FROM + 20))
        router.forget([f"p{i}" for i in range(25)])
        monkeypatch.setattr(InvertedFile, "search", None)
        assert router.route(about(30), NOWHERE).nearest == ("p30",)

    def test_cells_are_learnt_anew_when_the_edits_have_doubled(self):
        router = new_router(KeyRouter, FROM)
        learnt = []
        for person in range(0, 200, 5):
            add(router, *range(person, person + 5))
            learnt.append(router.clustered)
        assert sorted(set(learnt)) == [0, 40, 80, 160]
        assert len(router.cells) == 200

    def test_what_was_forgotten_is_not_found_and_the_cells_are_filled_anew_in_time(self):
        router = new_router(Thorough, FROM)
        add(router, *range(100))
        router.route(about(0), NOWHERE)
        filled = router._inverted
        router.forget([f"p{i}" for i in range(20)])
        assert "p3" not in router.route(about(3), NOWHERE).nearest
        assert router._inverted is filled
        router.forget([f"p{i}" for i in range(20, 40)])
        router.route(about(3), NOWHERE)
        assert router._inverted is not filled
        assert router._inverted.wasted == 0

    def test_cells_that_hold_too_few_are_no_limit(self):
        """One cell of one key: every other candidate comes from a search of all keys, for that prompt alone."""

        class Blind(KeyRouter):
            probes = 1

        router = new_router(Blind, FROM)
        add(router, *range(100))
        router.cells = torch.where(torch.arange(100) == 7, 1, 0)
        router.centroids = torch.stack([router.keys[50], router.keys[7]])
        choice = router.route(about(7, 51), NOWHERE)
        assert choice.nearest == ("p7", "p51")
        assert same(choice, reloaded(router).route(about(7, 51), NOWHERE))

    def test_company_does_not_matter(self):
        router = new_router(KeyRouter, FROM)
        add(router, *range(200))
        together = router.route(EVERYONE, NOWHERE)
        alone = [router.route(EVERYONE.rows(slice(i, i + 1)), NOWHERE) for i in range(len(EVERYONE))]
        assert [one.nearest[0] for one in alone] == list(together.nearest)
        assert [one.memory.item() for one in alone] == together.memory.tolist()

    def test_many_edits_of_an_earlier_release_are_put_into_cells(self):
        """Its state has neither cells nor numbers."""
        router = new_router(KeyRouter, MANY)
        add(router, *range(60))
        state = {key: value for key, value in router.state_dict().items() if key not in ("numbers", "next_number")}
        later = KeyRouter(**router.options() | {"two_level_from": FROM})
        later.load_state_dict(state)
        later.bind(table(V, E, 0))
        assert later.clustered == 60
        add(later, 60)
        assert later.numbers.tolist() == [*range(61)]
        assert later.route(about(60), NOWHERE).nearest == ("p60",)

    def test_numbers_are_never_given_twice(self):
        """Not even when the router goes back to what it was: what was stored under a number stays that."""
        router = new_router(KeyRouter, FROM)
        add(router, 1, 2)
        before = router.state_dict()
        add(router, 3)
        router.load_state_dict(before)
        add(router, 4)
        assert router.numbers.tolist() == [0, 1, 3]

    def test_the_same_keys_have_the_same_centroids(self):
        keys = torch.nn.functional.normalize(table(300, 16, 3), dim=-1)
        assert torch.equal(centroids_of(keys), centroids_of(keys.clone()))
        assert len(centroids_of(keys)) == 35  # 2 sqrt(300)
        assert torch.equal(cells_of(keys, keys), torch.arange(300))

    @pytest.mark.parametrize("two_level_from", [1, MANY])
    def test_hybrid_scores_only_what_the_key_chose(self, two_level_from):
        memory = bank()
        router = fitted("hybrid", memory, two_level_from=two_level_from)
        asked = ask((0, 0), (4, None))
        assert router.route(asked, memory).memory.tolist() == [0, BASE]
        router.gate.scores = lambda query, memory, shards: pytest.fail("asked") if 1 in shards else torch.ones(2, 1)
        assert router.route(asked, memory).memory.tolist()[1] == BASE
        assert HybridRouter(**router.options()).options() == router.options()


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
    return Query(torch.zeros(len(activations), 0, dtype=torch.long), mask, states[..., :0], states)


def calibrated(memory: SideMemory, owned: dict[int, Query], **options) -> ActivationRouter:
    router = ActivationRouter(**options)
    router.calibrate(memory, owned, prompts_of(table(200, F, 9)))
    return router


class TestShards:
    @pytest.mark.parametrize("pool", ["last", "mean", "max"])
    @pytest.mark.parametrize("low_rank", [True, False])
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

    def test_with_all_as_candidates_it_is_one_level(self):
        memory, owned, asked = shards()
        exact = calibrated(memory, owned, two_level_from=MANY).route(asked, memory)
        found = calibrated(memory, owned, two_level_from=1, candidates=1000).route(asked, memory)
        assert exact.memory.tolist() == found.memory.tolist()
        torch.testing.assert_close(found.score, exact.score)

    def test_only_candidates_are_scored(self, monkeypatch):
        memory, owned, asked = shards(low_rank=True)
        router = calibrated(memory, owned, two_level_from=1, candidates=2)
        router.route(asked, memory)
        looked = []
        kind = type(memory[0])
        whole = kind.delta.fget
        monkeypatch.setattr(kind, "delta", property(lambda shard: looked.append(shard) or whole(shard)))
        router.route(asked.rows(slice(0, 1)), memory)
        assert len(looked) == 2

    def test_below_the_switch_nothing_is_sketched(self, monkeypatch):
        memory, owned, asked = shards()
        monkeypatch.setattr("repair_lightning.memory.routers.activation.sketch", None)
        calibrated(memory, owned, two_level_from=SHARDS + 1).route(asked, memory)

    def test_sketches_follow_the_bank(self):
        """Shards leave, are emptied, are fused, come back, and are written to: each time what is there is found."""
        memory, owned, asked = shards()
        router = calibrated(memory, owned, two_level_from=1, candidates=4)
        background = prompts_of(table(200, F, 9))

        def agrees(router=router) -> bool:
            exact = ActivationRouter(two_level_from=MANY)
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
        fresh = ActivationRouter(**router.options())
        fresh.load_state_dict(router.state_dict())
        assert same(fresh.route(asked, memory), router.route(asked, memory))
