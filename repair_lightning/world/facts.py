"""The facts of the small world, drawn deterministically from a seed.

Three domains never share a subject: *people* are edited, *places* test locality, *minerals* are the irrelevant
prompts a router is trained or calibrated on. A fact is trained on with some phrasings of its relation; in the people
domain the other phrasings are held out for that subject, so that rephrased questions are truly unseen.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from repair_lightning.world import lexicon
from repair_lightning.world.lexicon import Relation

PEOPLE_COUNT = 1_000
HELD_OUT_PHRASINGS = 3


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
    names = [f"{first} {last}" for first in lexicon.FIRST_NAMES for last in lexicon.LAST_NAMES]
    people = rng.sample(names, PEOPLE_COUNT)
    return World(
        people=_draw_facts(people, lexicon.PEOPLE, HELD_OUT_PHRASINGS, rng),
        places=_draw_facts(lexicon.PLACE_NAMES, lexicon.PLACES, 0, rng),
        minerals=_draw_facts(lexicon.MINERAL_NAMES, lexicon.MINERALS, 0, rng),
    )


def _draw_facts(
    subjects: Sequence[str], relations: Sequence[Relation], held_out: int, rng: random.Random
) -> tuple[Fact, ...]:
    """One fact per subject and relation, with ``held_out`` of the phrasings kept from training."""
    return tuple(_draw_fact(subject, relation, held_out, rng) for subject in subjects for relation in relations)


def _draw_fact(subject: str, relation: Relation, held_out: int, rng: random.Random) -> Fact:
    """A fact with a random answer and a random split of the phrasings."""
    answer = rng.choice(relation.objects)
    phrasings = rng.sample(relation.phrasings, len(relation.phrasings))
    return Fact(subject, relation, answer, tuple(phrasings[held_out:]), tuple(phrasings[:held_out]))
