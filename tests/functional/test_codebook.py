"""GRACE's rules, one by one; epsilon is 1 in all of them."""

from __future__ import annotations

import pytest

from repair_lightning.functional.codebook import COVER, OUT_OF_REACH, Placement, placement


@pytest.mark.parametrize("same", [True, False])
def test_what_is_far_opens_an_entry(same):
    """A new ball of radius 1 at distance 3.01 does not touch one of radius 2: neither changes, whatever they say."""
    assert placement(3.01, 2.0, same, 1.0) == Placement(True, 1.0, 2.0)


def test_what_says_the_same_joins_and_the_ball_grows():
    assert placement(1.5, 1.0, True, 1.0) == Placement(False, 0.0, 1.5 * COVER)


def test_a_ball_that_holds_it_already_stays():
    assert placement(0.7, 1.0, True, 1.0) == Placement(False, 0.0, 1.0)


def test_a_conflict_splits_the_distance():
    """Balls that would overlap, 1 + 1 > 1.5, meet half-way."""
    assert placement(1.5, 1.0, False, 1.0) == Placement(True, 0.75, 0.75)


def test_a_conflict_lengthens_no_radius():
    """Half of 2.6 is more than the new ball's 1, and half of 1.1 more than the old ball's 0.2."""
    assert placement(2.6, 2.0, False, 1.0) == Placement(True, 1.0, 1.3)
    assert placement(1.1, 0.2, False, 1.0) == Placement(True, 0.55, 0.2)


def test_the_same_key_with_another_label_takes_over():
    assert placement(1e-5, 0.4, False, 1.0) == Placement(True, 1.0, OUT_OF_REACH)


@pytest.mark.parametrize("distance", [0.01, 0.5, 1.0, 1.99])
@pytest.mark.parametrize("radius", [0.0, 0.3, 1.0, 5.0])
def test_two_that_say_different_things_never_overlap(distance, radius):
    found = placement(distance, radius, False, 1.0)
    assert found.opens
    assert found.radius + max(found.nearest, 0.0) <= distance + 1e-12 or distance > radius + 1.0
