"""The edits of the small world and the irrelevant questions, drawn deterministically from a seed."""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repair_lightning.world.facts import Fact, World

EDIT_COUNT = 2_400
REPHRASE_COUNT = 2


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


def write_jsonl(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
