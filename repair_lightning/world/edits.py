"""The edits of the small world and the irrelevant questions, drawn deterministically from a seed."""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from repair_lightning.world.facts import Fact, World

EDIT_COUNT = 2_400
REPHRASE_COUNT = 2


def make_edits(world: World, seed: int = 0, count: int = EDIT_COUNT) -> list[dict[str, Any]]:
    """``count`` counterfactual edits of people, each with its rephrases, a locality and a near prompt.

    A fact is edited at most once, and a near prompt only asks for facts that no edit touches.
    """
    if not 0 < count <= len(world.people) // 2:
        raise ValueError(
            f"count={count}: must be between 1 and {len(world.people) // 2} so that at least as many facts stay "
            "unedited; ask for fewer edits or build a larger world"
        )
    rng = random.Random(f"edits-{seed}")
    people = rng.sample(world.people, len(world.people))
    edited, untouched = people[:count], people[count:]
    neighbours = _by_phrasing(untouched)
    locality = itertools.cycle(_questions(world.places, rng))
    return [
        _make_edit(f"w{number:04d}", fact, next(locality), neighbours, rng)
        for number, fact in enumerate(edited, start=1)
    ]


def make_irrelevant(world: World, seed: int = 0) -> list[dict[str, str]]:
    """One true question per fact about minerals, in a random phrasing and order."""
    rng = random.Random(f"irrelevant-{seed}")
    facts = rng.sample(world.minerals, len(world.minerals))
    return [{"question": fact.ask(rng.choice(fact.trained)), "answer": fact.answer} for fact in facts]


def write_jsonl(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _make_edit(
    name: str, fact: Fact, locality: dict[str, str], neighbours: dict[str, list[Fact]], rng: random.Random
) -> dict[str, Any]:
    """The record that changes ``fact`` to another answer."""
    phrasing = rng.choice(fact.trained)
    near = rng.choice(neighbours[phrasing])
    return {
        "id": name,
        "subject": fact.subject,
        "prompt": fact.ask(phrasing),
        "target": rng.choice([answer for answer in fact.relation.objects if answer != fact.answer]),
        "rephrases": [fact.ask(held_out) for held_out in rng.sample(fact.held_out, REPHRASE_COUNT)],
        "locality": [locality],
        "near": [{"prompt": near.ask(phrasing), "answer": near.answer}],
    }


def _by_phrasing(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    """The facts that were trained on with each phrasing."""
    groups = defaultdict(list)
    for fact in facts:
        for phrasing in fact.trained:
            groups[phrasing].append(fact)
    return groups


def _questions(facts: Sequence[Fact], rng: random.Random) -> list[dict[str, str]]:
    """Every trained prompt of ``facts`` with its answer, shuffled."""
    questions = [{"prompt": fact.ask(phrasing), "answer": fact.answer} for fact in facts for phrasing in fact.trained]
    return rng.sample(questions, len(questions))
