"""The interval of OP."""

from __future__ import annotations

import pytest

from repair_lightning.scoring.bootstrap import op_interval
from repair_lightning.scoring.protocols import overall_performance


def rows(edits: int, wrong: int = 0) -> list[dict]:
    """An edit, a rephrase and an unrelated question of each; the rephrases of the first are `wrong`."""
    found = []
    for kind in ("edit", "rephrase", "locality", "near"):
        found += [{"id": f"e{i}", "kind": kind, "correct": kind != "rephrase" or i >= wrong} for i in range(edits)]
    return found


def test_it_holds_op_and_narrows_with_the_edits():
    few, many = op_interval(rows(20, wrong=5)), op_interval(rows(2000, wrong=500))
    for found in (few, many):
        assert found["low"] < overall_performance(1.0, 0.75, 1.0) < found["high"]
    assert (few["high"] - few["low"]) / (many["high"] - many["low"]) == pytest.approx(10, rel=0.3)  # root of 100
    assert op_interval(rows(20, wrong=5)) == few  # the same each time


def test_edits_are_drawn_with_all_their_prompts():
    """Ten rephrases of one edit are no ten edits: where it alone is wrong, it is drawn or not."""
    repeated = [row for row in rows(4, wrong=1) for _ in range(10)]
    assert op_interval(repeated) == op_interval(rows(4, wrong=1))


def test_a_draw_without_rephrases_says_nothing_of_them():
    """One edit of twenty has a rephrase, which is right: a third of the draws miss it."""
    asked = [row for row in rows(20) if row["kind"] != "rephrase" or row["id"] == "e3"]
    assert op_interval(asked) == {"low": 1.0, "high": 1.0}


def test_without_an_op_there_is_none():
    assert op_interval([]) is None
    assert op_interval([row for row in rows(3) if row["kind"] != "locality"]) is None
    assert op_interval(rows(3)) == {"low": 1.0, "high": 1.0}
