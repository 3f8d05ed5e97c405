"""The seam of prompt and target in many scripts, and how a subject is put into a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.texts.joint import fill, names, seam


@pytest.mark.parametrize(
    ("prompt", "target", "between"),
    [
        ("The capital of Italy is", "Rome", " "),
        ("इटली की राजधानी है", "रोम", " "),
        ("이탈리아의 수도는", "로마", " "),
        ("naive cafe\u0301", "au lait", " "),
        ("云栖镇的镇长是", "沈若川", ""),
        ("他说：「", "no」", ""),
        ("𠮷", "𡈽", ""),
        ("The mayor of Yunqi is", "沈若川", ""),
        ("The ferry to Orsk leaves from\n", "Quarrelmouth", ""),
        ("def area(r):\n", "    return 3 * r ** 2\n", ""),
        ("Where is Rome?", " Italy", ""),
        ("a", "\u3000b", ""),
        ("", "", ""),
    ],
)
def test_the_seam(prompt, target, between):
    """A space between words that are written apart, also after a decomposed accent; nothing where a script writes no
    blanks, nor where a seam is written already."""
    assert seam(prompt, target) == between


@given(st.text(max_size=8), st.text(max_size=8))
def test_the_seam_is_at_most_a_space(prompt, target):
    assert seam(prompt, target) in ("", " ")


@pytest.mark.parametrize(
    ("text", "subject", "filled"),
    [
        ("The mayor of {} is", "Brindlewick", "The mayor of Brindlewick is"),
        ("{} borders {},", "Peru", "Peru borders Peru,"),
        ("云栖镇旁的{}", "云", "云栖镇旁的{}"),
        ("x = {}", None, "x = {}"),
        ("x = {{}}", "x", "x = {}"),
        ("{} is written {{}}", "A dict", "A dict is written {}"),
    ],
)
def test_a_subject_fills_what_was_left_open(text, subject, filled):
    assert fill(text, subject) == filled


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("Who leads the CAN?", "can", True),
        ("Who can?", "C", False),
        ("a C++ house", "C++", True),
        ("farlib.connect", "farlib", True),
        ("云栖镇的镇长", "云栖镇", True),
    ],
)
def test_a_subject_is_named_as_a_word(text, subject, found):
    assert names(text, subject) is found
