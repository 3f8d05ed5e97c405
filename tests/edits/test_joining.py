"""New records behind a pack's edits: what is known is dropped, what contradicts supersedes, ids never clash."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers_runs import world_edits, write_edits

from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.records import RecordSet, load_records
from repair_lightning.edits.stream import Joined, apply, join
from repair_lightning.types import EditReport

OLD = world_edits(4)


@pytest.fixture
def ledger() -> Ledger:
    """Four edits; the last is quarantined."""
    found = Ledger()
    found.arrive(OLD, 0)
    found.written([EditReport(edit.id, i, 0.1, 0.0, 5) for i, edit in enumerate(OLD)])
    found.quarantine([OLD[3].id], "too hard")
    return found


def joined(records, ledger) -> tuple[RecordSet, Joined]:
    plan = join(records, ledger)
    return apply(records, plan), plan


@pytest.mark.parametrize("command", ["undo", "supersede"])
def test_what_is_gone_is_new(ledger, command):
    """A record that says what was taken back is written, under a fresh id."""
    if command == "undo":
        ledger.undo([OLD[0].id], "asked for")
    else:
        ledger.arrive([replace(OLD[0], id="later", prompt="What else?")], 1)
        ledger.supersede(OLD[0].id, "later")
    found, plan = joined(RecordSet((OLD[0],)), ledger)
    assert [(edit.id, edit.target) for edit in found.edits] == [(f"{OLD[0].id}~2", OLD[0].target)]
    assert plan.replaced == {}


def test_supersessions_inside_the_new_records(ledger, tmp_path):
    """Two records for one prompt of the pack: the later one counts. Where it says what the pack says, both go."""
    rows = [replace(OLD[0], id="x", target="Mars"), replace(OLD[0], id="y")]
    rows += [replace(OLD[1], id=OLD[2].id, target="Mars"), replace(OLD[1], id="z", target="Venus")]
    found, _ = joined(load_records(write_edits(tmp_path / "new.jsonl", rows)), ledger)
    assert [edit.id for edit in found.edits] == ["z"]
    assert found.superseded == {"x": OLD[0].id, f"{OLD[2].id}~2": "z", OLD[1].id: "z"}
    assert [edit.id for edit in found.superseded_edits] == [f"{OLD[2].id}~2"]
