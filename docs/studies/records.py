"""Record files of the comparison, and the share of target tokens that a base says without any edit.

    python docs/studies/records.py FILE FORMAT DIR

writes near.jsonl (120 edits with the question of an unedited record as neighbour) and no_subject.jsonl, and prints the
share for the base in DIR over the first 1,000 records, with the end of the answer and without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from repair_lightning.edits.records import load_records
from repair_lightning.models.base import load_base
from repair_lightning.types import Edit, Probe

EDITED = 120


def write(path: str, edits: Iterable[Edit]) -> None:
    """Write records as JSON lines, in the format `jsonl`."""
    Path(path).write_text("".join(json.dumps(edit.as_dict()) + "\n" for edit in edits))


@torch.no_grad()
def said_alone(base_dir: str, edits: list[Edit]) -> tuple[float, float]:
    """Mean share of target tokens that are the base's argmax: with the end of the answer, and without."""
    base, shares = load_base(base_dir), []
    for edit in edits:
        row = base.forms("none").encode(edit.prompt, edit.target)
        said = base.model(torch.tensor([row.ids])).logits[0].argmax(-1)[len(row.prompt) - 1 : -1].tolist()
        right = [one == other for one, other in zip(said, row.target, strict=True)]
        shares.append((sum(right) / len(right), sum(right[:-1]) / len(right[:-1])))
    with_end, without = (sum(each) / len(shares) for each in zip(*shares, strict=True))
    return with_end, without


def main(path: str, record_format: str, base_dir: str) -> None:
    """Write both files and print the share."""
    edits = load_records(path, record_format).edits
    edited = {edit.subject for edit in edits[:EDITED]}
    others = [edit for edit in edits[EDITED:] if edit.subject not in edited]
    write("near.jsonl", (replace(e, near=(Probe(o.prompt),)) for e, o in zip(edits[:EDITED], others, strict=False)))
    write("no_subject.jsonl", (replace(edit, subject=None) for edit in edits))
    print("with the end {:.3f}, without {:.3f}".format(*said_alone(base_dir, edits[:1000])))


if __name__ == "__main__":
    main(*sys.argv[1:])
