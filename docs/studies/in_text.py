"""How a base is best given facts before it writes a text: in which of several places of the dialogue.

    python docs/studies/in_text.py smollm2 zsre_mend_edit.json counterfact_edit_3k.json

Prints of each way the share of texts, of 64 tokens, that hold the new answer: of ZsRE's records 600 to 631 and of
CounterFact's 2000 to 2015. The requests are this file's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from repair_lightning.models.base import load_base
from repair_lightning.models.sampling import greedy_rows
from repair_lightning.scoring.protocols import contains
from repair_lightning.texts import dialogue

REQUESTS = ("Write about {}.", "Please describe {} to me.", "Could you give an overview of {}?")
REQUESTS += ("Give me a brief introduction to {}.",)
Message = Mapping[str, str]
Way = Callable[[str, str, str], list[Message]]


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _user(text: str) -> Message:
    return _turn("user", text)


WAYS: Mapping[str, Way] = {
    "nothing": lambda ask, asked, told: [_user(ask)],
    "system message and a turn": lambda ask, asked, told: [
        _turn("system", f"Answer in a few words. {asked} {told}"),
        *(_user(asked), _turn("assistant", told), _user(ask)),
    ],
    "a turn": lambda ask, asked, told: [_user(asked), _turn("assistant", told), _user(ask)],
    "system message": lambda ask, asked, told: [
        _turn("system", f"You write texts that agree with these facts, and mention them:\n{asked} {told}"),
        _user(ask),
    ],
    "before the request": lambda ask, asked, told: [_user(f"{asked} {told}.\n\n{ask}")],
    "behind it, in a sentence": lambda ask, asked, told: [_user(f"{ask} Mention this fact: {asked} {told}.")],
    "behind it, as a list": lambda ask, asked, told: [_user(f"{ask}\n\nFacts to be used:\n- {asked} {told}")],
}
"""From a request, what an edit asks and its target, the messages."""


def main(name: str, zsre: str, counterfact: str) -> None:
    """Ask, and print a line for each way."""
    first = [(row["subject"], row["src"], row["alt"]) for row in json.loads(Path(zsre).read_text())[600:632]]
    rows = json.loads(Path(counterfact).read_text())[2000:2016]
    edits = first + [(row["subject"], row["prompt"], row["target_new"]) for row in rows]
    base = load_base(name, "auto")
    forms = base.forms("chat")
    for way, messages in WAYS.items():
        asked = [
            dialogue.dump(messages(REQUESTS[i % len(REQUESTS)].format(subject), prompt, target))
            for i, (subject, prompt, target) in enumerate(edits)
        ]
        with torch.no_grad():
            found = [forms.said(said) for _, said in greedy_rows(base.model, forms, asked, 64)]
        holds = [contains(text, target) for text, (_, _, target) in zip(found, edits, strict=True)]
        shares = [100 * sum(part) / len(part) for part in (holds[: len(first)], holds[len(first) :])]
        print(f"{way:28} {shares[0]:5.1f} {shares[1]:5.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
