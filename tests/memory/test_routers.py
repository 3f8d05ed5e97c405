"""Routers on prompts made by hand: a text names a subject in the words of a relation.

The last state of a prompt says its relation, with a little of its subject; padding and everything behind the prompt
are NaN, so that a router that looks there is caught. What the key router reads of further texts is made by hand too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch

from repair_lightning.functional import activation_scores, calibrate_threshold, decide, ratio_threshold
from repair_lightning.functional.relations import RelationSpace
from repair_lightning.memory.query import Check, Choice, Query
from repair_lightning.memory.routers import ROUTERS, Anchor, BallRouter, KeyRouter, make_router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.texts import asking
from repair_lightning.types import BASE

D, F = 12, 40
RELATIONS, SUBJECTS = 5, 30
PHRASES = ["Who chairs", "Which river crosses", "When did someone found", "What colour is", "How many people visit"]
NAMES = [f"{first}{last} {first}orsk" for first in ("Ka", "Lu", "Mi", "No", "Ra") for last in "bdfgkl"]
LENGTHS = [3, 4, 5, 4, 5]


def table(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def text_of(relation: int, subject: int | None) -> str:
    return f"{PHRASES[relation]} {'it' if subject is None else NAMES[subject]}?"


@lru_cache(None)
def _direction(word: str) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


def read(texts: Sequence[str]) -> torch.Tensor:
    """A state for each text: the sum of a fixed direction for each of its words, by its first five letters."""
    return torch.stack([sum((_direction(word[:5]) for word in asking.spellings(t)), torch.zeros(64)) for t in texts])


@lru_cache(1)
def space() -> RelationSpace:
    """Learnt of the bank of wordings, as a base's is."""
    return KeyRouter().learn_space(read)


def ask(*asked: tuple[int, int | None], side: str = "left", behind: int = 0, width: int = 8) -> Query:
    """Prompts as (relation, subject); `behind` columns after the prompt stand for its target."""
    relation_states, subject_states = table(RELATIONS, D, 1), table(SUBJECTS, D, 2)
    relation_keys, subject_keys = table(RELATIONS, F, 3), 3 * torch.eye(SUBJECTS, F)
    mask = torch.zeros(len(asked), width + behind, dtype=torch.bool)
    hidden = torch.full((*mask.shape, D), torch.nan)
    activations = torch.full((*mask.shape, F), torch.nan)
    for row, (relation, subject) in enumerate(asked):
        n = LENGTHS[relation] + (2 if subject is not None else 0)
        start = width - n if side == "left" else 0
        mask[row, start : start + n] = True
        place = slice(start, start + n)
        hidden[row, place] = table(n, D, 100 + relation)
        activations[row, place] = table(n, F, 200 + relation) * 0.1
        about = (torch.zeros(D), torch.zeros(F))
        if subject is not None:
            about = (0.2 * subject_states[subject], subject_keys[subject])
        hidden[row, start + n - 1] = relation_states[relation] + about[0]
        activations[row, start + n - 1] = 0.1 * relation_keys[relation] + about[1]
    return Query(tuple(text_of(*one) for one in asked), mask, hidden, activations)


BACKGROUND = [(relation, None) for relation in range(RELATIONS)] + [(relation, 20 + relation) for relation in range(5)]
EDITS = [(0, 0), (1, 1), (0, 2), (2, 3), (3, 4), (1, 5)]
OWNERS = [0, 0, 0, 1, 1, 1]


def anchors(asked=EDITS) -> list[Anchor]:
    return [Anchor(NAMES[subject], text_of(relation, subject)) for relation, subject in asked]


def bank() -> SideMemory:
    """Two shards that answer strongly to the activations of the edits they own."""
    memory = SideMemory((D, F))
    for shard in (memory.open_shard(), memory.open_shard()):
        own = ask(*[edit for edit, owner in zip(EDITS, OWNERS, strict=True) if owner == shard])
        keys = own.at_last().activations[:, 0].round()  # one coordinate per subject
        memory[shard].delta.data.copy_(table(D, len(keys), 5 + shard) @ keys + 0.02 * table(D, F, 7 + shard))
    return memory


def owned(memory: SideMemory) -> dict[int, Query]:
    return {
        shard: ask(*[edit for edit, owner in zip(EDITS, OWNERS, strict=True) if owner == shard]) for shard in memory.ids
    }


def new_router(name: str, **options):
    router = make_router(name, **options)
    if isinstance(router, KeyRouter):
        router.read, router.space = read, space()
    return router


def tell(router, ids: Sequence[str], asked, shards: Sequence[int]) -> None:
    """Of edits; balls are opened one by one."""
    if isinstance(router, BallRouter):
        for id, key, shard in zip(ids, router.key_of(ask(*asked)), shards, strict=True):
            router.open(id, key, router.radius, shard)
    else:
        router.add(ids, anchors(asked), ask(*asked), shards)


def fitted(name: str, memory: SideMemory, **options):
    router = new_router(name, **options)
    router.fit(ask(*BACKGROUND[:5]))
    tell(router, [f"e{i}" for i in range(len(EDITS))], EDITS, OWNERS)
    router.calibrate(memory, owned(memory), ask(*BACKGROUND))
    return router


def same(one: Choice, other: Choice) -> bool:
    tensors = all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("memory", "score", "threshold"))
    return tensors and one.nearest == other.nearest


ASKED = [*EDITS, (4, 0), (2, 1), (0, 9), (1, 8), (4, None), (2, None)]


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "nobody"])
class TestEveryRouter:
    def test_edits_reach_their_owner_and_irrelevant_prompts_the_base(self, name):
        memory = bank()
        choice = fitted(name, memory).route(ask(*EDITS, *BACKGROUND), memory)
        assert choice.memory.tolist() == OWNERS + [BASE] * len(BACKGROUND)

    def test_padding_and_what_stands_behind_the_prompt_do_not_matter(self, name):
        memory = bank()
        router = fitted(name, memory)
        left = router.route(ask(*ASKED), memory)
        assert same(router.route(ask(*ASKED, side="right"), memory), left)
        assert same(router.route(ask(*ASKED, behind=3), memory), left)
        assert same(router.route(ask(*ASKED, side="right", width=13), memory), left)
        assert left.score.isfinite().all()

    def test_company_does_not_matter(self, name):
        memory = bank()
        router = fitted(name, memory)
        together = router.route(ask(*ASKED), memory)
        order = torch.randperm(len(ASKED)).tolist()
        shuffled = router.route(ask(*[ASKED[i] for i in order]), memory)
        assert shuffled.memory.tolist() == [together.memory[i].item() for i in order]
        assert list(shuffled.nearest) == [together.nearest[i] for i in order]
        alone = Choice.join([router.route(ask(one), memory) for one in ASKED])
        assert alone.memory.tolist() == together.memory.tolist()
        torch.testing.assert_close(alone.score, together.score)

    def test_a_stored_router_says_the_same(self, name, tmp_path):
        memory = bank()
        router = fitted(name, memory)
        torch.save(router.state_dict(), tmp_path / "router.pt")
        fresh = make_router(name, **router.options())
        fresh.load_state_dict(torch.load(tmp_path / "router.pt", weights_only=True))
        if isinstance(fresh, KeyRouter):
            fresh.read = read
        assert fresh.options() == router.options()
        assert same(fresh.route(ask(*ASKED), memory), router.route(ask(*ASKED), memory))
        for either in (router, fresh):
            either.forget(["e1"])
            tell(either, ["new"], [(4, 7)], [1])
            either.calibrate(memory, owned(memory) | {1: ask(*EDITS[3:], (4, 7))}, ask(*BACKGROUND))
        assert same(fresh.route(ask(*ASKED, (4, 7)), memory), router.route(ask(*ASKED, (4, 7)), memory))

    def test_without_edits_the_base_answers(self, name):
        router = make_router(name)
        for memory in (SideMemory((D, F)), bank()):
            choice = router.route(ask(*ASKED), memory)
            assert choice.memory.tolist() == [BASE] * len(ASKED)
            assert choice.nearest == (None,) * len(ASKED)
            assert all(route.reason.startswith("base") for route in choice.routes())


@pytest.mark.parametrize(("pool", "act_ratio"), [("last", None), ("mean", 0.3), ("max", None)])
def test_activation_thresholds_and_choices_are_the_functional_ones(pool, act_ratio):
    memory = bank()
    router = fitted("activation", memory, pool=pool, act_ratio=act_ratio, false_fire_rate=0.1)
    for shard, edits in owned(memory).items():
        delta = memory[shard].delta[None].detach()
        positive = activation_scores(edits.activations, delta, edits.mask, pool)[:, 0]
        background = ask(*BACKGROUND)
        negative = activation_scores(background.activations, delta, background.mask, pool)[:, 0]
        free = calibrate_threshold(positive, negative, 0.1)
        assert router.thresholds[shard] == (ratio_threshold(positive, act_ratio) if act_ratio else free)
    asked = ask(*ASKED)
    scores = activation_scores(asked.activations, memory.stacked().detach(), asked.mask, pool)
    chosen, ratio = decide(scores, torch.tensor([router.thresholds[shard] for shard in memory.ids]))
    choice = router.route(asked, memory)
    assert choice.memory.tolist() == chosen.tolist()
    torch.testing.assert_close(choice.score / choice.threshold, ratio)


def test_both_parts_of_the_hybrid_must_agree():
    """With shard 1's gate shut by its threshold, only shard 0's edits get through."""
    memory = bank()
    router = fitted("hybrid", memory)
    key = fitted("key", memory).route(ask(*ASKED), memory)
    assert router.route(ask(*EDITS), memory).memory.tolist() == OWNERS
    router.gate.thresholds[1] = 1e9
    assert router.route(ask(*EDITS), memory).memory.tolist() == [0, 0, 0, BASE, BASE, BASE]
    hybrid = router.route(ask(*ASKED), memory).memory
    assert bool(((hybrid == key.memory) | (hybrid == BASE)).all())


def test_reasons_name_the_check_that_refused():
    """Three prompts with a score that passes: the first passes all, the others fail at the first and second."""
    likeness = Check("likeness", torch.tensor([0.8, 0.2, -1.0]), torch.tensor([0.5, 0.5, -math.inf]))
    activation = Check("activation", torch.tensor([3.0, 3.0, 1.0]), torch.full((3,), 2.0))
    score, limit = torch.full((3,), 0.9), torch.full((3,), 0.6)
    checks = (likeness, activation)
    choice = Choice(torch.tensor([4, BASE, BASE]), score, limit, ("a", "b", "c"), checks)
    passed, first, second = (route.reason.partition("score 0.900 exceeds 0.600, ")[2] for route in choice.routes())
    assert passed == "likeness 0.800 reaches 0.500, activation 3.000 reaches 2.000, nearest edit a"
    assert first == "but likeness 0.200 is below 0.500, nearest edit b"
    assert second == "but activation 1.000 is below 2.000, nearest edit c"


def test_nobody_is_routed_where_there_is_no_side_memory():
    """Whatever it was told of: every prompt is the base's."""
    memory = bank()
    choice = fitted("nobody", memory).route(ask(*EDITS, *BACKGROUND), memory)
    assert set(choice.memory.tolist()) == {BASE}
