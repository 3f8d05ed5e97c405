"""GRACE's rules, one by one; epsilon is 1 in all of them."""

from __future__ import annotations

import pytest

from repair_lightning.editors.grace import COVER, OUT_OF_REACH, placement


@pytest.mark.parametrize(
    ("distance", "radius", "same", "expected"),
    [
        pytest.param(3.01, 2.0, True, (1.0, 2.0), id="what is far opens an entry"),
        pytest.param(3.01, 2.0, False, (1.0, 2.0), id="whatever it says"),
        pytest.param(1.5, 1.0, True, (None, 1.5 * COVER), id="the same joins and the ball grows"),
        pytest.param(0.7, 1.0, True, (None, 1.0), id="a ball that holds it stays"),
        pytest.param(1.5, 1.0, False, (0.75, 0.75), id="balls that would overlap meet half-way"),
        pytest.param(2.6, 2.0, False, (1.0, 1.3), id="a conflict does not lengthen the new ball"),
        pytest.param(1.1, 0.2, False, (0.55, 0.2), id="nor the old one"),
        pytest.param(1e-5, 0.4, False, (1.0, OUT_OF_REACH), id="the same key takes over"),
    ],
)
def test_placement(distance, radius, same, expected):
    assert placement(distance, radius, same, 1.0) == expected


@pytest.mark.parametrize("distance", [0.01, 0.5, 1.0, 1.99])
@pytest.mark.parametrize("radius", [0.0, 0.3, 1.0, 5.0])
def test_two_that_say_different_things_never_overlap(distance, radius):
    opened, nearest = placement(distance, radius, False, 1.0)
    assert opened is not None
    assert opened + max(nearest, 0.0) <= distance + 1e-12 or distance > radius + 1.0
