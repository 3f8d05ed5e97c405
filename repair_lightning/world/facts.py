"""The facts of the small world, its edits and the irrelevant questions, drawn deterministically from a seed.

Three domains never share a subject: *people* are edited, *places* test locality, *minerals* are the irrelevant
prompts a router is trained or calibrated on. A fact is trained on with some phrasings of its relation; in the people
domain the other phrasings are held out for that subject, so that rephrased questions are truly unseen.
"""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEOPLE_COUNT = 1_000
HELD_OUT_PHRASINGS = 3
EDIT_COUNT = 2_400
REPHRASE_COUNT = 2

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


def make_edits(world: World, seed: int = 0) -> list[dict[str, Any]]:
    """Counterfactual edits of people, each with its rephrases, a locality and a near prompt.

    A fact is edited at most once, and a near prompt only asks for facts that no edit touches.
    """
    rng = random.Random(f"edits-{seed}")
    people = rng.sample(world.people, len(world.people))
    neighbours: dict[str, list[Fact]] = defaultdict(list)  # by the phrasings that they were trained on with
    for fact in people[EDIT_COUNT:]:
        for phrasing in fact.trained:
            neighbours[phrasing].append(fact)
    asked = [{"prompt": fact.ask(text), "answer": fact.answer} for fact in world.places for text in fact.trained]
    locality = itertools.cycle(rng.sample(asked, len(asked)))
    edits = []
    for number, fact in enumerate(people[:EDIT_COUNT], start=1):
        phrasing = rng.choice(fact.trained)
        near = rng.choice(neighbours[phrasing])
        edits.append(
            {
                "id": f"w{number:04d}",
                "subject": fact.subject,
                "prompt": fact.ask(phrasing),
                "target": rng.choice([answer for answer in fact.relation.objects if answer != fact.answer]),
                "rephrases": [fact.ask(held_out) for held_out in rng.sample(fact.held_out, REPHRASE_COUNT)],
                "locality": [next(locality)],
                "near": [{"prompt": near.ask(phrasing), "answer": near.answer}],
            }
        )
    return edits


def make_irrelevant(world: World, seed: int = 0) -> list[dict[str, str]]:
    """One true question per fact about minerals, in a random phrasing and order."""
    rng = random.Random(f"irrelevant-{seed}")
    facts = rng.sample(world.minerals, len(world.minerals))
    return [{"question": fact.ask(rng.choice(fact.trained)), "answer": fact.answer} for fact in facts]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
