"""What a text asks, in several scripts: words, sentences, the window with the question, where it names a subject."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.texts import asking


class TestWords:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("C, C++, C# and .NET", "c c++ c# and .net"),
            ("AT&T's A- is 3.5 or 1,000", "at&t s a- is 3.5 or 1,000"),
            ("O'Brien, O’Brien and Hawai\u02bbi", "o brien o brien and hawai i"),
            ("谁是C语言的作者", "谁 是 c 语 言 的 作 者"),
            ("오르스크의 시장은", "오르스크 의 시장 은"),
        ],
    )
    def test_folded_with_their_signs(self, text, expected):
        assert " ".join(asking.spellings(text)) == expected

    @given(st.text(max_size=80))
    def test_places_are_those_of_the_text(self, text):
        """Words stand in their order, do not overlap and are within the text, long or short."""
        for long in (text, text * 30):
            found = asking.words(long)
            assert all(0 <= word.start < word.end <= len(long) for word in found)
            assert all(one.end <= other.start for one, other in pairwise(found))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith and J. R. Miller met. They ate.", ["Mr. Smith and J. R. Miller met.", "They ate."]),
        ('He said "Go." She went.', ['He said "Go."', "She went."]),
        ("Who hosts Jeopardy! now?", ["Who hosts Jeopardy! now?"]),
        ("- one\n2. two\n> three\n# four\n* five", ["one", "two", "three", "four", "five"]),
        ("它很大。谁是镇长？谢谢", ["它很大。", "谁是镇长？", "谢谢"]),
        ("**Note this.** Who chairs Orsk?", ["Note this.", "Who chairs Orsk?"]),
    ],
)
def test_sentences_are_cut_where_they_end(text, expected):
    assert asking.sentences(text) == expected


CLOZE = "The mayor of Orsk is"
QUESTION = "Who chairs Orsk?"
PASSAGE = "Verin lies at a lake. It was founded in 1700. Many people fish there. "


class TestWindows:
    @pytest.mark.parametrize(
        "text",
        [
            CLOZE,
            f"{CLOZE} Please answer in one short sentence.",
            f"Who chairs Verin? Bob.\n{CLOZE}\nThanks!",
            f"**{CLOZE}**",
            f'Complete: "{CLOZE}"',
        ],
    )
    def test_a_cloze_is_found_without_what_is_around_it(self, text):
        assert CLOZE in asking.windows(text)

    @pytest.mark.parametrize(
        "text",
        [
            QUESTION,
            f"{PASSAGE}{QUESTION}",
            f"{QUESTION} Please answer in one short sentence.",
            f"{QUESTION}\nAnswer:",
            f"{QUESTION}\n\nBest,\nBob Miller",
            f"Who chairs Verin? {QUESTION}",
            f"Hello, how are you? {QUESTION} Thanks!",
        ],
    )
    def test_the_last_question_comes_first(self, text):
        assert asking.windows(text)[0] == QUESTION

    @pytest.mark.parametrize(
        "text",
        ["Hi, who chairs Orsk?", "Please tell me: who chairs Orsk?", "Thanks a lot! Do you know who chairs Orsk?"],
    )
    def test_courtesy_in_the_same_sentence_is_also_left_out(self, text):
        assert "who chairs Orsk?" in asking.windows(text)

    def test_another_question_before_it_is_left_out(self):
        assert asking.windows(f"Where is Verin? Bob lives there. {QUESTION} Thanks!") == (
            QUESTION,
            f"Bob lives there. {QUESTION}",
            f"{QUESTION} Thanks!",
            f"Bob lives there. {QUESTION} Thanks!",
        )

    @pytest.mark.parametrize(
        "text", [PASSAGE * 130, "word " * 1800, "云栖镇的镇长是谁" * 1100, "*a " * 3000, '"x ' * 3000]
    )
    def test_a_long_text_is_quick(self, text):
        start = time.process_time()
        for window in asking.windows(text + " Who chairs Orsk?"):
            asking.words(window)
            asking.negated(window)
            asking.is_code(window)
        assert time.process_time() - start < 1

    @given(st.text(max_size=200))
    def test_any_text_has_a_window(self, text):
        assert asking.windows(text)


@pytest.mark.parametrize(
    ("text", "denies"),
    [
        ("Who is not the mayor?", True),
        ("Кто не мэр?", True),
        ("谁不是镇长？", True),
        ("Who lives at no. 5?", False),
        ("他是不是镇长？", False),
        ("南非的首都是", False),
    ],
)
def test_denials(text, denies):
    assert asking.negated(text) is denies


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def area(r):", True),
        ("if x:\n    return", True),
        ("Who is the mayor(s) of Orsk (Russia)?", False),
        ("Verin lies at a lake.\nWho chairs it?", False),
    ],
)
def test_code(text, code):
    assert asking.is_code(text) is code


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("Who is Orsk's mayor?", "Orsk", True),
        ("Who is Orskar's mayor?", "Orsk", False),
        ("C++ is by", "C", False),
        ("Anne-Marie's town", "Marie", False),
        ("谁在担任云栖镇的镇长？", "云栖镇", True),
        ("谁在担任星渡镇的镇长？", "云栖镇", False),
        ("오르스크의 시장은?", "오르스크", True),
    ],
)
def test_places_of_a_subject(text, subject, found):
    assert bool(asking.places(text, asking.spellings(subject))) is found


@pytest.mark.parametrize(
    ("text", "name", "longer"),
    [
        ("Who is Paul McCartney?", "Paul", True),
        ("ポール・マッカートニーは誰", "ポール", True),
        ("Who is Paul's father?", "Paul", False),
        ("Who is Paul, McCartney?", "Paul", False),
        ("When I saw Paul I waved", "Paul", False),
        ("the Orsk-based firm", "Orsk", False),
    ],
)
def test_a_longer_name(text, name, longer):
    assert asking.longer_name(text, text.index(name) + len(name)) is longer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Who chairs Orsk?", "who chairs ORSK", True),
        ("Who chairs Orsk?", "Please tell me: who chairs Orsk?", True),
        ("Who chairs Orsk?", "Hi, who exactly chairs Orsk?", True),
        ("Who is the mayor?", "Who was the mayor?", False),
    ],
)
def test_says_the_same_but_for_courtesy(one, other, same):
    assert asking.says_the_same(one, other) is same
    assert asking.says_the_same(other, one) is same


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Give me a brief introduction to this.", False),  # `to` links nothing else: `Give this to me.`
        ("Give me a brief introduction of this.", True),
        ("Could you please write two short paragraphs about the life of this?", True),
        ("Describe this in 50 words.", True),
        ("What do you know about this?", True),
        ("What can you tell me about this?", True),
        ("Do you know of this?", False),
        ("Tell me about the mother of this.", False),
        ("Tell me who founded this.", False),
        ("What is this about?", False),
        ("What about this?", False),
        ("Who is this?", False),
        ("Tell me this.", False),
        ("Don't tell me about this.", False),
        ("Say nothing of this.", False),
        ("Let me tell you about this.", False),
        ("What would you like to know about this?", False),
        ("What does the story say about this?", False),
        ("I want you to say something about this.", True),
    ],
)
def test_a_text_about_something_is_asked_for(text, wanted):
    assert asking.wants_text(text, "this") is wanted


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Who is the mayor of this?", False),
        ("Who was the first mayor of this?", True),
        ("Who is the deputy mayor of this?", True),
        ("Who is the mayor of this's wife?", True),
        ("When was this mayor first?", False),
        ("Who rules this with a wife?", False),
    ],
)
def test_what_makes_another_person_of_a_role(text, found):
    assert asking.roles_of(text).other(asking.roles_of("Who is the mayor of this?")) is found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who was the former mayor of this?", "Who was the previous mayor of this?"),
        ("Who is the spouse of the mayor of this?", "Who is the wife of the mayor of this?"),
        ("Who is the mother of this?", "Who is the mother of author this?"),
    ],
)
def test_the_same_person_beside_a_role(one, other):
    assert not asking.roles_of(one).other(asking.roles_of(other))


def test_what_is_only_quoted():
    assert asking.only_quoted("Write about Orsk.", 'Translate into French: "Write about Orsk."')
    assert not asking.only_quoted("Write about Orsk.", 'Please: "Write about Orsk."')
    assert not asking.only_quoted("Write about Orsk.", "Hello! Write about Orsk.")
