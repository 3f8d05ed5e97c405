"""The facts of the small world, drawn deterministically from a seed.

Three domains never share a subject: *people* are edited, *places* test locality, *minerals* are the irrelevant
prompts a router is trained or calibrated on. A fact is trained on with some phrasings of its relation; in the people
domain the other phrasings are held out for that subject, so that rephrased questions are truly unseen.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEOPLE_COUNT = 1_000
HELD_OUT_PHRASINGS = 3

# Subjects are glued together from heads and tails, so that they share tokens with one another.
FIRST_NAMES = ("Al Bren Cor Del Ev Fen Gal Hal Is Jor", "ara en ina on is wyn etta")
LAST_NAMES = (
    "Ash Bram Cald Dun Elm Farn Hawk Kest Lang Mor Thorn Wex",
    "burn croft den ford gate holm ley mere stone wick",
)
PLACES = (
    "Quo Vel Zar Ost Nym Pra Tul Umb Xan Yor Bel Dro Fio Gri Kha Lue Mir Rho Sko Tre",
    "vane dora keth lund maris nesse polis rika saya thal vik",
)
MINERALS = (
    "ab brax cyr dol eph fur glau hexa iri jas kol lith mond nov oph pyr quel rhod sel tark",
    "anite ocite urite elspar omine idium axite osine ulite enspar ophane",
)


@dataclass(frozen=True)
class Relation:
    """The ways to ask for one relation, with `{}` for the subject, and the closed list of its possible answers."""

    domain: str
    name: str
    phrasings: Sequence[str]
    objects: Sequence[str]


@dataclass(frozen=True)
class Fact:
    """What is true of one subject under one relation, with the prompts that ask for it."""

    subject: str
    relation: Relation
    answer: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """The pair (subject, relation name), unique in the world."""
        return self.subject, self.relation.name

    def ask(self, phrasing: str) -> str:
        """One phrasing of the relation as a prompt about this subject."""
        return phrasing.format(self.subject)


@dataclass(frozen=True)
class World:
    """All facts, by domain."""

    people: tuple[Fact, ...]
    places: tuple[Fact, ...]
    minerals: tuple[Fact, ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts of all three domains."""
        return self.people + self.places + self.minerals

    def texts(self) -> Iterator[str]:
        """Every sentence the base model is trained on: prompt, space, answer."""
        return (f"{prompt} {fact.answer}" for fact in self.facts for prompt in map(fact.ask, fact.trained))


def build_world(seed: int = 0) -> World:
    """The world that belongs to ``seed``: the same seed always yields the same facts."""
    rng = random.Random(f"world-{seed}")
    relations = [Relation(**row) for row in read_jsonl(Path(__file__).with_name("relations.jsonl"))]

    def draw(domain: str, subjects: Sequence[str], held_out: int) -> tuple[Fact, ...]:
        found = []
        for subject in subjects:
            for relation in (relation for relation in relations if relation.domain == domain):
                answer = rng.choice(relation.objects)
                phrasings = rng.sample(relation.phrasings, len(relation.phrasings))
                found.append(Fact(subject, relation, answer, tuple(phrasings[held_out:]), tuple(phrasings[:held_out])))
        return tuple(found)

    names = [f"{first} {last}" for first in _glue(*FIRST_NAMES) for last in _glue(*LAST_NAMES)]
    people = rng.sample(names, PEOPLE_COUNT)
    return World(
        people=draw("people", people, HELD_OUT_PHRASINGS),
        places=draw("places", _glue(*PLACES), 0),
        minerals=draw("minerals", _glue(*MINERALS), 0),
    )


def _glue(heads: str, tails: str) -> list[str]:
    return [head + tail for head in heads.split() for tail in tails.split()]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
