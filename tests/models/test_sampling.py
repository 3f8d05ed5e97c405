"""What the base says by itself, as token ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from repair_lightning.models import sampling
from repair_lightning.models.forms import Forms

ROWS = [[5, 2, 0, 0], [9, 0, 0, 0], [5, 5, 5, 5], [2, 0, 0, 0]]


@pytest.fixture
def base(monkeypatch):
    """A base that says `ROWS`, whatever it is asked."""

    monkeypatch.setattr(sampling, "_continued", lambda *_: ROWS)
    return SimpleNamespace()


def test_an_answer_ends_with_whatever_ends_it_and_holds_no_padding(base, tokenizer):
    """Of several ends each counts; an answer that is cut has none."""
    rows = sampling.greedy_rows(base, Forms(tokenizer, stops=[2, 9]), ["a"] * 4, length=4)
    asked = tuple(tokenizer("a")["input_ids"])
    assert rows == [(asked, (5, 2)), (asked, (9,)), (asked, (5, 5, 5, 5)), (asked, (2,))]
