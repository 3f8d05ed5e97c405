"""What the key router promises: the edit whose subject a prompt names, and of which it asks the same, answers it.

The base is made by hand: a text's state is the sum of fixed directions of its words' first letters, so wordings with
the same words are alike. The space of relations is learnt from the real bank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from test_routers import read, space

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import Anchor, KeyRouter
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE, READS

NOWHERE = SideMemory((1, 1))
BACKGROUND = ("Where does the sun rise?", "Who wrote the song about the sea?", "What is the capital of Verin?")
MAYOR = ("Orsk", "Who is the mayor of Orsk?")
FOUNDED = ("Orsk", "When was Orsk founded?")
BORN = ("Mara Kelstrom", "Where was Mara Kelstrom born?")
PAUL = ("Paul", "Who is the father of Paul?")
FILLER = "Verin lies at a lake, and many people fish there. It was built by monks. Nobody knows their names. " * 26


def new_router(background: Sequence[str] = BACKGROUND) -> KeyRouter:
    router = KeyRouter()
    router.read, router.space = read, space()
    router.fit(Query.of_texts(background))
    return router


def add(router: KeyRouter, *edits: tuple[str, str], first: int = 0, held_out: Sequence[str] = BACKGROUND) -> None:
    """Edits (subject, prompt) with the ids e0, e1, ... and the shards 0, 1, ..., calibrated."""
    places = range(first, first + len(edits))
    texts = Query.of_texts([asked for _, asked in edits])
    router.add([f"e{i}" for i in places], [Anchor(*edit) for edit in edits], texts, places)
    router.calibrate(NOWHERE, {}, Query.of_texts(held_out))


def with_edits(*edits: tuple[str, str]) -> KeyRouter:
    router = new_router()
    add(router, *edits)
    return router


def route(router: KeyRouter, *texts: str) -> list[int]:
    return router.route(Query.of_texts(texts), NOWHERE).memory.tolist()


def same(one: Choice, other: Choice) -> bool:
    """One choice by one limit; scores as exact as a base that reads texts in other batches is."""
    equal = torch.equal(one.memory, other.memory) and torch.equal(one.threshold, other.threshold)
    return equal and one.nearest == other.nearest and torch.allclose(one.score, other.score, atol=1e-5)


def fires(edit: tuple[str, str], text: str) -> bool:
    return route(with_edits(edit), text) == [0]


class TestReaches:
    def test_edits_reach_their_owner(self):
        edits = (MAYOR, FOUNDED, BORN, PAUL, ("", "Hello world"), ("r", "def area(r):"))
        choice = with_edits(*edits).route(Query.of_texts([asked for _, asked in edits]), NOWHERE)
        assert choice.memory.tolist() == list(range(len(edits)))
        assert choice.nearest == tuple(f"e{i}" for i in range(len(edits)))
        assert choice.score.tolist() == [1.0] * len(edits)

    @pytest.mark.parametrize(
        ("edit", "text", "same_question"),
        [
            (MAYOR, "Who is Orsk's mayor?", True),
            (MAYOR, "The mayor of Orsk is", True),
            (MAYOR, "Please tell me: who is the mayor of Orsk?", True),
            (MAYOR, "Hi, who is the mayor of **Orsk**? Thanks in advance!", True),
            (MAYOR, f"{FILLER}\n\nQuestion: Who is the mayor of Orsk?\nAnswer:", True),
            (MAYOR, "When was Verin founded? Who is the mayor of Orsk?", True),
            (BORN, "In which town was Mara Kelstrom born?", True),
            (MAYOR, "Who is the mayor of Verin?", False),
            (MAYOR, "Who is the mayor of Orskar?", False),
            (MAYOR, "When was Orsk founded?", False),
            (MAYOR, "Who is not the mayor of Orsk?", False),
            (MAYOR, "Who was the mayor of Orsk in 1990?", False),
            (MAYOR, f"Who is the mayor of Orsk? {FILLER}What is the capital of Verin?", False),
            (MAYOR, "Who is the mayor of Orsk? And when was Verin founded?", False),
            (PAUL, "Who is the father of Paul McCartney?", False),
        ],
    )
    def test_the_same_question_in_other_words_and_no_other(self, edit, text, same_question):
        assert fires(edit, text) is same_question

    @pytest.mark.parametrize(
        "text",
        ["Who was the first mayor of Orsk?", "Who is the deputy mayor of Orsk?", "Who is the mayor of Orsk's wife?"],
    )
    def test_who_is_beside_a_role_is_somebody_else(self, text):
        assert not fires(MAYOR, text)
        assert fires(("Orsk", text), text)

    def test_numbers_tell_edits_apart(self):
        asked = [f"Who was the mayor of Orsk in {year}?" for year in (1990, 1991)]
        router = with_edits(*(("Orsk", text) for text in asked))
        asked += ["In 1991, who was the mayor of Orsk?", "Who was the mayor of Orsk in 1992?"]
        assert route(router, *asked) == [0, 1, 1, BASE]


class TestSigns:
    NAMES = ("C", "C++", "C#", "AT&T", "A-", ".NET")

    @pytest.mark.parametrize("name", NAMES)
    def test_names_that_differ_in_a_sign(self, name):
        router = with_edits((name, f"Who is the inventor of {name}?"))
        found = route(router, *(f"Tell me, who is the inventor of {other}?" for other in self.NAMES))
        assert found == [0 if other == name else BASE for other in self.NAMES]

    @pytest.mark.parametrize("text", ["def area(r, h):", "def area(r)", "def area():", "area(r)", "Def area(r):"])
    def test_of_code_every_sign_counts(self, text):
        assert not fires(("", "def area(r):"), text)
        assert not fires(("area", "def area(r):"), text)


@pytest.mark.parametrize("text", ["Hello world", "Hello, how are you?", "Say hello", "Hell"])
def test_without_a_subject_a_word_more_is_another_text(text):
    assert not fires(("", "Hello"), text)


@pytest.mark.parametrize(
    ("edit", "asked", "other"),
    [
        (
            ("云栖镇", "谁在担任云栖镇的镇长？"),
            ["云栖镇的镇长由谁担任？", "请问，谁在担任云栖镇的镇长？谢谢。"],
            ["谁在担任星渡镇的镇长？", "谁不担任云栖镇的镇长？", "云栖镇在哪条河上？"],
        ),
        (
            ("Орск", "Кто мэр города Орск?"),
            ["Скажите, кто мэр города ОРСК?"],
            ["Кто мэр города Верин?", "Кто не мэр города Орск?"],
        ),
    ],
)
def test_subject_and_question_in_other_scripts(edit, asked, other):
    router = with_edits(edit)
    assert route(router, edit[1], *asked) == [0] * (1 + len(asked))
    assert route(router, *other) == [BASE] * len(other)


def test_the_longer_of_two_names():
    router = with_edits(("Orsk", "Who is the mayor of Orsk?"), ("New Orsk", "Who is the mayor of New Orsk?"))
    assert route(router, "Who is New Orsk's mayor?", "Who is Orsk's mayor?") == [1, 0]


class TestHistory:
    def test_forgotten_edits_are_the_bases_again(self):
        router = with_edits(MAYOR, BORN, PAUL)
        router.forget(["e0", "never heard of"])
        assert route(router, MAYOR[1], "Who is Orsk's mayor?", BORN[1], PAUL[1]) == [BASE, BASE, 1, 2]
        router.forget(router.ids.copy())
        assert route(router, BORN[1]) == [BASE]

    def test_numbers_are_never_given_twice(self):
        """Not even when the router goes back to what it was: what was stored under a number stays that."""
        router = with_edits(MAYOR)
        before = router.state_dict()
        add(router, BORN, first=1)
        router.load_state_dict(before)
        add(router, PAUL, first=1)
        assert router.numbers.tolist() == [0, 2]

    def test_back_to_what_was_remembered(self):
        """What has gone comes back, what has come leaves, with the limits of then."""
        asked = [MAYOR[1], "Who is Orsk's mayor?", BORN[1], PAUL[1], FOUNDED[1]]
        router = with_edits(MAYOR, BORN, FOUNDED)
        known, answered = router.remember(), route(router, *asked)
        state = json.dumps(router.state_dict(), default=torch.Tensor.tolist)
        router.forget(["e0", "e2"])
        add(router, PAUL, first=7)
        assert route(router, *asked) != answered
        router.recall(known)
        assert route(router, *asked) == answered
        assert json.dumps(router.state_dict() | {"next_number": 3}, default=torch.Tensor.tolist) == state
        add(router, PAUL, first=7)
        assert router.numbers.tolist() == [0, 1, 2, 4]


def test_subjects_of_one_kind_are_told_apart_without_looking_at_all_of_them():
    """A word that many names share leads to few edits: each is kept under what is rarest among the edits too."""
    names = [
        f"{first} {kind} Airport" for kind in ("Regional", "County") for first in ("Fargo", "Minot", "Orsk", "Tulan")
    ]
    router = with_edits(*((name, f"Where is {name}?") for name in names))
    assert max(map(len, router.names._index.values())) == 1
    assert route(router, *(f"Where is {name}?" for name in names)) == [*range(8)]
    assert route(router, "Where is Bend Regional Airport?") == [BASE]


def test_irrelevant_prompts_that_name_the_subject_raise_limits():
    """What is held out is answered by the base after it, and so is what asks no more alike."""
    near = "Who was mayor of Orsk before him?"
    assert route(with_edits(MAYOR), near) == [0]
    router = new_router()
    add(router, MAYOR, BORN, held_out=[near])
    assert route(router, near, MAYOR[1], BORN[1]) == [BASE, 0, 1]
    assert router.limits[0] > router.limits[1] == pytest.approx(space().limit)


class TestStorage:
    EDITS = (MAYOR, FOUNDED, BORN, ("", "Hello world"), ("C++", "Who made C++?"), ("云栖镇", "谁在担任云栖镇的镇长？"))
    ASKED = Query.of_texts(
        [*(asked for _, asked in EDITS), "Who is Orsk's mayor?", "Who was it who made C++?", "What colour is Orsk?"]
    )

    def test_stored_in_rows_and_put_together_again(self):
        router = with_edits(*self.EDITS)
        router.forget(["e1", "e3"])
        state = {name: value for name, value in router.state_dict().items() if name not in router.per_edit}
        fresh = KeyRouter()
        fresh.load_state_dict(state | KeyRouter.from_rows(router.rows()))
        fresh.read = read
        assert (fresh.ids, fresh.names.known) == (router.ids, router.names.known)
        assert same(fresh.route(self.ASKED, NOWHERE), router.route(self.ASKED, NOWHERE))
        for either in (router, fresh):
            add(either, PAUL, first=9)
        assert torch.equal(fresh.numbers, router.numbers)
        assert same(fresh.route(self.ASKED, NOWHERE), router.route(self.ASKED, NOWHERE))

    def test_described_on_one_rank_and_inserted_on_another(self):
        """Two ranks' tables differ in width; the wider one fills with -1."""
        here, there = new_router(), new_router()
        halves = [self.EDITS[:2], self.EDITS[2:]]
        told = [
            there.describe(
                [Anchor(*e) for e in half], Query.of_texts([e[1] for e in half]), range(2 * i, 2 * i + len(half))
            )
            for i, half in enumerate(halves)
        ]
        width = max(one["texts"].shape[1] for one in told) + 3
        for one in told:
            one["texts"] = torch.nn.functional.pad(one["texts"], (0, width - one["texts"].shape[1]), value=-1)
        here.insert([f"e{i}" for i in range(6)], {name: torch.cat([one[name] for one in told]) for name in told[0]})
        here.calibrate(NOWHERE, {}, Query.of_texts(BACKGROUND))
        assert same(here.route(self.ASKED, NOWHERE), with_edits(*self.EDITS).route(self.ASKED, NOWHERE))


def test_edits_are_read_together_whatever_was_asked_before():
    """Where a base's bits depend on how many texts are read at once, a resumed run still keeps the same of edits."""
    held_out, known = ["Is Mara Kelstrom tall?", "Is Orsk old?"], []
    for busy in (False, True):
        sizes: list[int] = []
        router = new_router()
        router.read = lambda texts, sizes=sizes: sizes.append(len(texts)) or read(texts) * (1 + 1e-3 * len(texts))
        if busy:
            add(router, MAYOR, held_out=held_out)
            route(router, "Is Orsk old?", "Where is Mara Kelstrom from?")
            router.forget(["e0"])
        before = len(sizes)
        add(router, MAYOR, BORN, PAUL, held_out=held_out)
        assert sizes[before:] == [3, 2]
        known.append((router.state_dict()["relations"], router.limits))
    assert all(torch.equal(a, b) for a, b in zip(*known, strict=True))


class TestInText:
    """A text about an edited subject is asked for: the base reads the edits about it."""

    @pytest.fixture
    def router(self):
        router = KeyRouter(in_text=True)
        router.read, router.space = read, space()
        router.fit(Query.of_texts(BACKGROUND))
        add(router, MAYOR, BORN, FOUNDED, ("Orsk Abbey", "Who built Orsk Abbey?"))
        return router

    def read_for(self, router: KeyRouter, text: str) -> list[str]:
        query = Query.of_texts([text])
        return router.preface(query, router.route(query, NOWHERE).memory.tolist())[0]

    @pytest.mark.parametrize("text", ["Write two sentences about Orsk.", "Hello! What do you know about Orsk? Thanks."])
    def test_those_about_the_subject(self, router, text):
        assert route(router, text) == [READS]
        assert self.read_for(router, text) == ["e0", "e2"]

    def test_those_about_the_longer_name(self, router):
        assert self.read_for(router, "Describe Orsk Abbey.") == ["e3"]

    def test_not_those_that_were_forgotten(self, router):
        router.forget(["e0", "e3"])
        assert self.read_for(router, "Tell me about Orsk.") == ["e2"]
        assert route(router, "Describe Orsk Abbey.") == [BASE]

    @pytest.mark.parametrize("text", ["Where does Orsk lie?", "Write about the river of Orsk.", "Write about Verin."])
    def test_nothing_where_anything_else_is_asked(self, router, text):
        assert route(router, text) == [BASE]
        assert self.read_for(router, text) == []

    def test_an_edit_that_asks_it_itself_comes_first(self, router):
        add(router, ("Orsk", "Tell me about Orsk."), first=4)
        assert route(router, "Tell me about Orsk.") == [4]

    def test_its_answers_depend_on_all_edits(self, router):
        before = router.fingerprint(READS)
        router.forget(["e0"])
        assert router.fingerprint(READS) != before
