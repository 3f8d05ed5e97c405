"""Calibration of the key router: renewed it is the dense definition, in between it never asks for less.

Edits are rows of tokens drawn from a small vocabulary, so that anchors overlap, repeat one another and stand in
irrelevant prompts; `always_renewed` is 0 unless a test is about it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair_lightning.functional.keys import coverage, inverse_document_frequency
from repair_lightning.memory.query import Query
from repair_lightning.memory.routers import Anchor, KeyRouter, Neighbours
from repair_lightning.memory.routers.key import _medians
from repair_lightning.memory.side_memory import SideMemory

V, E, D, WORDS = 30, 6, 5, 6
FULL = 0.95
MEMORY = SideMemory((D, 1))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def query(words: torch.Tensor, seed: int) -> Query:
    hidden = drawn(seed, len(words), 1, D)
    return Query(words, torch.ones(len(words), 1, dtype=torch.bool), hidden, torch.zeros(len(words), 1, 1))


def rows(seed: int, number: int) -> torch.Tensor:
    """Prompts of 1 to 6 tokens, small numbers being common."""
    generator = torch.Generator().manual_seed(seed)
    words = (V * torch.rand(number, WORDS, generator=generator) ** 2).long()
    length = torch.randint(1, WORDS + 1, (number, 1), generator=generator)
    return words.masked_fill(torch.arange(WORDS) >= length, -1)


HELD_OUT = query(rows(1, 12), 2)


class Driver:
    """Drives a router through a story; edit `i` always has the same words, anchor and states."""

    def __init__(self, always_renewed: int = 0, **options: Any) -> None:
        self.router = self.fresh(always_renewed, **options)
        self.router.fit(query(rows(3, 12), 4), drawn(5, V, E))

    @staticmethod
    def fresh(always_renewed: int = 0, **options: Any) -> KeyRouter:
        router = KeyRouter(**options)
        router.always_renewed = always_renewed  # type: ignore[misc]
        return router

    def add(self, numbers: list[int], neighbours: bool = True) -> None:
        words = torch.cat([rows(100 + i, 1) for i in numbers])
        states = torch.cat([drawn(100 + i, 1, 1, D) for i in numbers])
        prompts = Query(words, torch.ones(len(words), 1, dtype=torch.bool), states, torch.zeros(len(words), 1, 1))
        near = Neighbours(prompts, torch.arange(len(numbers)).roll(1)) if neighbours else None
        self.router.add([f"e{i}" for i in numbers], [anchor(i) for i in numbers], prompts, [0] * len(numbers), near)

    def forget(self, numbers: list[int]) -> None:
        self.router.forget([f"e{i}" for i in numbers])

    def calibrate(self, held_out: Query = HELD_OUT) -> None:
        self.router.calibrate(MEMORY, {}, held_out)

    def reload(self) -> None:
        """Go on with a router that was stored and loaded, as a resumed run does."""
        state = copy.deepcopy(self.router.state_dict())
        self.router = self.fresh(self.router.always_renewed, **self.router.options())
        self.router.load_state_dict(state)
        self.router.fit(query(rows(3, 12), 4), drawn(5, V, E))


def anchor(i: int) -> Anchor:
    tokens = list(dict.fromkeys(rows(100 + i, 1)[0].tolist()))
    tokens = [token for token in tokens if token >= 0]
    return Anchor(tuple(tokens[: 1 + i % 3]), True) if i % 2 else Anchor(tuple(tokens), False)


def dense(router: KeyRouter, held_out: Query, token_weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definition: every prompt against every anchor, as one matrix."""
    names = router.anchors[None]
    unrelated = coverage(held_out.words, names.expand(len(held_out), -1, -1), token_weights)
    others = coverage(router.prompts, names.expand(len(router.ids), -1, -1), token_weights)
    negatives = torch.maximum(unrelated.amax(0), others.masked_fill(others >= FULL, 0).amax(0))
    caution = torch.where(router.named, router.caution, router.caution_unnamed)
    radii = (negatives + caution * (1 - negatives)).clamp_max(FULL)
    alike = router._state_similarity(router.encoder(held_out)[:, None], router.keys[None])
    worst = alike.masked_fill(unrelated <= radii, -1.0).amax(0)
    above = worst + router.relation_caution * (1 - worst) * (worst > -1)
    return {"negatives": negatives, "radii": radii, "limits": torch.maximum(router.floors, above)}


def weights_of(router: KeyRouter) -> torch.Tensor:
    counts = router._background_counts.clone()
    for row in router.prompts.tolist():
        counts[sorted(set(row) - {-1})] += 1
    return inverse_document_frequency(counts, router._background_size + len(router.ids))


def assert_from_scratch(router: KeyRouter, held_out: Query = HELD_OUT) -> None:
    torch.testing.assert_close(router.token_weights, weights_of(router))
    for name, expected in dense(router, held_out, router.token_weights).items():
        torch.testing.assert_close(getattr(router, name), expected, rtol=0, atol=1e-6)


def assert_same(one: KeyRouter, other: KeyRouter) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name


numbers = st.lists(st.integers(0, 25), min_size=1, max_size=8, unique=True)
stories = st.lists(
    st.tuples(st.sampled_from(["add", "add", "forget", "calibrate", "calibrate"]), numbers), min_size=1, max_size=12
)


def tell(driver: Driver, story: list[tuple[str, list[int]]], stop: int | None = None) -> None:
    """Live through a story; store and load at one point of it."""
    for step, (what, which) in enumerate(story):
        if step == stop:
            driver.reload()
        if what == "calibrate":
            driver.calibrate()
        else:
            getattr(driver, what)(which)


class TestRenewal:
    @settings(deadline=None)
    @given(edits=st.lists(st.integers(0, 60), min_size=1, max_size=40, unique=True))
    def test_the_first_calibration_is_the_dense_definition(self, edits):
        driver = Driver()
        driver.add(edits)
        driver.calibrate()
        assert_from_scratch(driver.router)

    @settings(deadline=None)
    @given(story=stories)
    def test_few_edits_are_always_calibrated_from_scratch(self, story):
        driver = Driver(always_renewed=1000)
        tell(driver, story)
        driver.calibrate()
        if driver.router.ids:
            assert_from_scratch(driver.router)

    @settings(deadline=None)
    @given(story=stories)
    def test_whatever_went_before_a_renewal_does_not_matter(self, story):
        """After adding and forgetting: as if the edits that are left had been added and calibrated at once."""
        driver, plain = Driver(), Driver()
        tell(driver, [*story, ("add", [30, 31])])
        driver.router.renewed_at = 0  # the renewal is due
        driver.calibrate()
        plain.add([int(name[1:]) for name in driver.router.ids], neighbours=False)
        plain.router.floors = driver.router.floors
        plain.calibrate()
        for name in ("ids", "token_weights", "shards", "keys", "negatives", "radii", "limits"):
            a, b = getattr(driver.router, name), getattr(plain.router, name)
            assert a == b if name == "ids" else torch.allclose(a, b, rtol=0, atol=1e-6), name

    def test_due_when_a_quarter_changed(self):
        """20 edits: 4 new ones are no quarter, a fifth is; forgetting counts as much as adding."""
        driver = Driver()
        driver.add(list(range(20)))
        driver.calibrate()
        driver.add([20, 21])
        driver.forget([0, 1])
        driver.calibrate()
        assert driver.router.renewed_at == 20
        assert driver.router.changed == 4
        driver.forget([2])
        driver.calibrate()
        assert driver.router.renewed_at == 19
        assert driver.router.changed == 0
        assert_from_scratch(driver.router)

    def test_other_irrelevant_prompts_renew(self):
        driver, other = Driver(), query(rows(7, 9), 8)
        driver.add(list(range(20)))
        driver.calibrate()
        driver.calibrate(other)
        assert_from_scratch(driver.router, other)

    def test_nothing_new_changes_nothing(self):
        driver = Driver()
        driver.add(list(range(20)))
        driver.calibrate()
        before = copy.deepcopy(driver.router)
        driver.calibrate()
        assert_same(driver.router, before)


class TestInBetween:
    @settings(deadline=None)
    @given(story=stories)
    def test_negatives_are_never_lower_than_from_scratch_with_the_same_weights(self, story):
        """Equal where nothing was forgotten since the renewal; a forgotten edit's prompt may hold others back."""
        driver = Driver()
        driver.add(list(range(40, 80)))
        driver.calibrate()
        tell(driver, story)
        driver.calibrate()
        expected = dense(driver.router, HELD_OUT, driver.router.token_weights)
        assert bool((driver.router.negatives >= expected["negatives"] - 1e-6).all())
        assert bool((driver.router.radii >= expected["radii"] - 1e-6).all())
        torch.testing.assert_close(driver.router.limits, expected["limits"], rtol=0, atol=1e-6)

    def test_without_forgetting_only_the_weights_are_older(self):
        driver = Driver()
        driver.add(list(range(40)))
        driver.calibrate()
        weights = driver.router.token_weights
        for at in (40, 43, 46):
            driver.add(list(range(at, at + 3)))
            driver.calibrate()
            assert driver.router.renewed_at == 40
            assert torch.equal(driver.router.token_weights, weights)
            expected = dense(driver.router, HELD_OUT, weights)
            for name in ("negatives", "radii", "limits"):
                torch.testing.assert_close(getattr(driver.router, name), expected[name], rtol=0, atol=1e-6)

    def test_uncalibrated_edits_ask_for_full_coverage(self):
        driver = Driver()
        driver.add(list(range(40)))
        driver.calibrate()
        driver.add([41, 43])
        assert driver.router.radii[-2:].tolist() == pytest.approx([FULL, FULL])
        driver.calibrate()
        assert bool((driver.router.negatives >= 0).all())

    def test_a_forgotten_edit_holds_others_back_until_the_renewal(self):
        """Of the anchor (20, 21) the prompt (20, 5) is the nearest negative; it goes, and the renewal lets go of it."""
        driver = Driver()
        driver.add(list(range(40)))
        driver.router.add(
            ["a", "b"],
            [Anchor((20, 21), True), Anchor((5,), True)],
            query(torch.tensor([[20, 21], [20, 5]]), 9),
            [0, 0],
        )
        driver.calibrate()
        place = driver.router.ids.index("a")
        held_back = driver.router.negatives[place].item()
        driver.router.forget(["b"])
        driver.calibrate()
        assert driver.router.negatives[place].item() == held_back
        driver.router.renewed_at = 0
        driver.calibrate()
        assert driver.router.negatives[place].item() < held_back
        assert_from_scratch(driver.router)


class TestResume:
    @settings(deadline=None, max_examples=60)
    @given(story=stories, stop=st.integers(0, 11), always_renewed=st.sampled_from([0, 12]))
    def test_a_resumed_router_goes_on_bit_by_bit(self, story, stop, always_renewed):
        through, resumed = Driver(always_renewed), Driver(always_renewed)
        for driver in (through, resumed):
            driver.add(list(range(40, 60)))
            driver.calibrate()
        tell(through, story)
        tell(resumed, story, stop)
        assert_same(through.router, resumed.router)

    def test_a_stored_state_stays_as_it_was(self):
        """Rows that come later grow into the table behind the stored keys, not over them."""
        driver = Driver()
        driver.add(list(range(8)))
        driver.calibrate()
        state = driver.router.state_dict()
        before = copy.deepcopy(state)
        driver.add([8])
        driver.forget([0])
        driver.calibrate()
        for name, value in before.items():
            assert torch.equal(value, state[name]) if isinstance(value, torch.Tensor) else value == state[name], name
        assert state["keys"].untyped_storage().nbytes() == state["keys"].nbytes

    def test_fitting_again_keeps_what_the_keys_were_made_with(self):
        driver = Driver()
        driver.add([0, 1])
        before = driver.router.state_dict()
        driver.router.fit(query(rows(77, 5), 78), drawn(5, V, E))
        after = driver.router.state_dict()
        assert torch.equal(before["encoder_weights"], after["encoder_weights"])
        assert torch.equal(before["state_centre"], after["state_centre"])


class TestEdges:
    def test_a_single_edit(self):
        driver = Driver()
        driver.add([1], neighbours=False)
        driver.calibrate()
        assert_from_scratch(driver.router)

    def test_all_forgotten_and_written_again(self):
        driver = Driver()
        driver.add(list(range(10)))
        driver.calibrate()
        first = copy.deepcopy(driver.router)
        driver.forget(list(range(10)))
        driver.calibrate()
        assert len(driver.router.keys) == 0
        driver.add(list(range(10)))
        driver.calibrate()
        for name in ("token_weights", "negatives", "radii", "limits", "keys"):
            assert torch.equal(getattr(driver.router, name), getattr(first, name))

    def test_keys_without_states(self):
        driver = Driver(state_weight=0.0)
        driver.add(list(range(10)))
        driver.calibrate()
        assert driver.router.limits.tolist() == [-1.0] * 10

    @pytest.mark.parametrize("size", [1, 3, 30])
    def test_search_is_exact(self, size):
        driver = Driver()
        for at in range(size):  # one by one: the table of keys grows many times
            driver.add([at])
        asked = drawn(11, 4, E + D)
        similarity, found = driver.router._search(asked)
        expected = (asked @ driver.router.keys.T).sort(-1, descending=True)
        torch.testing.assert_close(similarity, expected.values[:, :64])
        assert torch.equal(found, expected.indices[:, :64])


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.floats(-1, 1, width=32)), min_size=1, max_size=20))
def test_medians_are_those_of_each_group(pairs):
    groups, values = torch.tensor([group for group, _ in pairs]), torch.tensor([value for _, value in pairs])
    found, medians = _medians(values, groups)
    assert found.tolist() == sorted(set(groups.tolist()))
    assert medians.tolist() == [values[groups == group].median().item() for group in found]
