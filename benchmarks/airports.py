"""Edits about real subjects: the airports of the package `airportsdata`, and what they are said to be from now on.

A subject is an airport whose name no other one has, and no other one's name holds. Each gets four edits. A target is
another airport's true value, drawn at random: it is plausible, and no base can know it. An edit's own wording, its
rephrases and the questions about its neighbours are different templates; neighbours are airports that no edit is about.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from repair_lightning.texts.asking import spellings
from repair_lightning.types import Edit, Probe

NEIGHBOURS = 200
"""Airports that are asked and never edited."""


@dataclass(frozen=True)
class Relation:
    """What is asked of an airport: the name of the value, and the edit's wording, its rephrases, the neighbours'."""

    name: str
    wording: str
    rephrases: tuple[str, ...]
    neighbours: tuple[str, ...]


RELATIONS = (
    Relation(
        "city",
        "Which city does {} serve?",
        ("What city is served by {}?", "{} is the airport of which city?"),
        ("What city do passengers of {} travel to?", "In what city do flights to {} end?"),
    ),
    Relation(
        "subd",
        "In which state or province is {}?",
        ("What state or province is {} situated in?", "Which state or province does {} lie in?"),
        ("To which state or province does {} belong?", "What is the state or province of {}?"),
    ),
    Relation(
        "tz",
        "Which time zone applies at {}?",
        ("In what time zone does {} operate?", "What time zone does {} keep?"),
        ("What time zone is in force at {}?", "In which time zone are flights to {} listed?"),
    ),
    Relation(
        "elevation",
        "What is the elevation of {} above sea level?",
        ("At what elevation above sea level is {}?", "How far above sea level does {} lie?"),
        ("What elevation does {} have?", "How high above the sea is {} built?"),
    ),
)


def airports(seed: int) -> list[dict[str, Any]]:
    """All airports that can be subjects, in an order that the seed draws."""
    import airportsdata

    known: list[Any] = [*airportsdata.load("ICAO").values()]
    names = [spellings(airport["name"]) for airport in known]
    whole, within = Counter(names), {part for name in set(names) for part in _parts(name)}
    alone = [a for a, name in zip(known, names, strict=True) if whole[name] == 1 and name not in within]
    return random.Random(f"airports-{seed}").sample(alone, len(alone))


def _parts(name: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The runs of words within a name, but for all of it."""
    for start in range(len(name)):
        for end in range(start + 1, len(name) + 1):
            if end - start < len(name):
                yield tuple(name[start:end])


def most_edits(found: Sequence[dict[str, Any]]) -> int:
    """How many edits there are about some airports, when neighbours are kept apart."""
    return len(RELATIONS) * (len(found) - NEIGHBOURS)


def airport_edits(number: int, seed: int) -> list[Edit]:
    """The first `number` edits, subject by subject; a shorter list is the beginning of a longer one.

    Raises:
        ValueError: the data holds fewer.
    """
    found = airports(seed)
    if number > most_edits(found):
        raise ValueError(f"--airports must be at most {most_edits(found)}, got {number}: so many the names allow")
    neighbours, subjects = found[:NEIGHBOURS], found[NEIGHBOURS:]
    values = {relation.name: [said(airport, relation) for airport in found] for relation in RELATIONS}
    edits = (_edit(a, relation, values[relation.name], neighbours, seed) for a in subjects for relation in RELATIONS)
    return list(islice(edits, number))


def _edit(
    airport: dict[str, Any], relation: Relation, values: Sequence[str], neighbours: Sequence[dict[str, Any]], seed: int
) -> Edit:
    id, subject = f"{airport['icao']}-{relation.name}", airport["name"]
    generator = random.Random(f"{id}-{seed}")
    target = generator.choice(values)
    while target in ("", said(airport, relation)):
        target = generator.choice(values)
    near = [wording.format(generator.choice(neighbours)["name"]) for wording in relation.neighbours]
    rephrases = tuple(wording.format(subject) for wording in relation.rephrases)
    return Edit(id, relation.wording.format(subject), target, subject, rephrases, near=tuple(map(Probe, near)))


def said(airport: dict[str, Any], relation: Relation) -> str:
    """An airport's true value, as an answer; empty where it is not known."""
    value = airport[relation.name]
    return f"{value:.0f} feet" if relation.name == "elevation" and value else str(value or "")
