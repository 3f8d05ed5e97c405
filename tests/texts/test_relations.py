"""The bank of wordings: well formed, and each relation told apart by its words."""

from __future__ import annotations

from collections import Counter

import pytest

from repair_lightning.texts import asking, lines_of
from repair_lightning.texts.relations import STAND_IN, bank

WORDINGS, RELATION = bank()


def test_seven_wordings_of_each_relation():
    assert set(Counter(RELATION).values()) == {7}
    assert sorted(set(RELATION)) == list(range(max(RELATION) + 1))
    assert max(RELATION) > 100


@pytest.mark.parametrize("line", lines_of("relations.txt"))
def test_each_wording_has_one_place_for_its_subject_and_is_plain(line):
    for wording in line.split(" | "):
        assert wording.count("{}") == 1
        assert not set("{}|") & set(wording.replace("{}", ""))
        assert wording.strip() == " ".join(wording.split())
        said = wording.strip().replace("{}", STAND_IN)
        assert asking.places(said, (STAND_IN,))
        assert not asking.is_code(said)
        assert len(asking.sentences(said)) == 1


def test_four_questions_and_three_sentences_to_complete():
    for relation in set(RELATION):
        own = [wording for wording, its in zip(WORDINGS, RELATION, strict=True) if its == relation]
        assert [asking.is_question(wording) for wording in own] == [True] * 4 + [False] * 3
