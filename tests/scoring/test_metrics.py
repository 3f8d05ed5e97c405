"""Rel, Gen, Loc, Near and OP."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.scoring.metrics import KIND_OF_PROMPT, KINDS, EditScores, overall_performance


def scores_of(**kinds: list[float]) -> EditScores:
    metric = EditScores()
    for kind, values in kinds.items():
        metric.update(kind, torch.tensor(values))
    return metric


def test_means_and_op():
    """Rel 3/4, Gen 1/2, Loc 1: OP = (3/8)^(1/3) = 0.7211."""
    found = scores_of(rel=[1, 1, 0, 1], gen=[0.5, 0.5], loc=[1.0]).compute()
    assert found == pytest.approx({"rel": 0.75, "gen": 0.5, "loc": 1.0, "near": None, "op": 0.7211247851537042})


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_what_was_never_asked_is_none():
    assert EditScores().compute() == dict.fromkeys([*KINDS, "op"])
    assert scores_of(rel=[1.0], loc=[1.0]).compute()["op"] is None
    assert scores_of(rel=[0.0], gen=[1.0], loc=[1.0]).compute()["op"] == 0.0


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_op_needs_its_three_parts(missing):
    parts = [0.5, 0.5, 0.5]
    parts[missing] = None
    assert overall_performance(*parts) is None
    assert overall_performance(0.5, 0.5, 0.5) == pytest.approx(0.5)


def test_every_kind_of_prompt_has_its_score():
    assert [KIND_OF_PROMPT[kind] for kind in ("edit", "rephrase", "locality", "near")] == list(KINDS)
    with pytest.raises(ValueError, match="not in tuple"):
        EditScores().update("speed", torch.ones(1))


SHARES = st.lists(st.floats(0, 1), max_size=5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@given(SHARES, SHARES, SHARES, SHARES, SHARES, SHARES)
def test_states_of_two_processes_add_up(a, b, c, d, e, f):
    """Summed states give what one metric gives that saw all scores: this is what torchmetrics does across ranks."""
    one, two = scores_of(rel=a, gen=b, loc=c), scores_of(rel=d, gen=e, loc=f)
    merged = EditScores()
    merged.total, merged.count = one.total + two.total, one.count + two.count
    whole = scores_of(rel=[*a, *d], gen=[*b, *e], loc=[*c, *f]).compute()
    for kind, value in merged.compute().items():
        assert value == (None if whole[kind] is None else pytest.approx(whole[kind]))


def test_state_is_declared_for_summing():
    assert EditScores()._reductions.keys() == {"total", "count"}
    assert {reduce.__name__ for reduce in EditScores()._reductions.values()} == {"dim_zero_sum"}
