"""New records behind a pack's edits: what is known is dropped, what contradicts supersedes, ids never clash."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers_runs import attach, world_edits, world_stream, write_edits

from repair_lightning.edits.joining import Joined, apply, join
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.records import RecordSet, load_records
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


def test_the_same_is_dropped_and_another_target_supersedes(ledger):
    new = world_edits(1, 100)[0]
    records = RecordSet((replace(OLD[0], id="same"), replace(OLD[1], id="other", target="Mars"), new))
    found, plan = joined(records, ledger)
    assert [edit.id for edit in found.edits] == ["other", new.id]
    assert found.duplicates == ("same",)
    assert found.superseded == plan.replaced == {OLD[1].id: "other"}
    assert plan.renamed == {}
    assert (plan.inherited, plan.windows) == (4, 1)


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


class Forgetful:
    """An editor that is told what to forget."""

    shares = False

    def __init__(self) -> None:
        self.forgot: list[str] = []

    def forget(self, ids):
        self.forgot += ids

    def batch_limit(self, edits):
        return len(edits)


@pytest.fixture
def stream(ledger, tmp_path, caplog):
    rows = [replace(OLD[1], target="Mars"), OLD[0], *world_edits(2, 100)]
    found = world_stream(write_edits(tmp_path / "new.jsonl", rows), clustering=False, window=2)
    with caplog.at_level("INFO"):
        found.join(ledger)
    found.said = caplog.text
    found.inherit(ledger)
    return attach(found, Forgetful())


def test_the_stream_goes_on_behind_the_pack(stream):
    assert f"'{OLD[1].id}' is '{OLD[1].id}~2'" in stream.said
    assert "new records supersede 1 and repeat 1" in stream.said
    (batch,) = stream.next_window()
    assert batch.ids == (f"{OLD[1].id}~2", world_edits(1, 100)[0].id)
    assert stream._editor.forgot == [OLD[1].id]
    assert stream.ledger.entry(OLD[1].id).status is EditStatus.SUPERSEDED
    assert stream.ledger.entry(batch.ids[0]).window == 1
    assert stream.inherited == [edit.id for edit in OLD]
    assert stream.written() == []
    stream.ledger.written([EditReport(id, 7, 0.1, 0.0, 1) for id in batch.ids])
    assert stream.written() == list(batch.ids)


def test_a_resumed_stream_has_the_same_records(stream):
    """From the checkpoint alone: the pack is not looked at again."""
    stream.next_window()
    state = json.loads(json.dumps(stream.state_dict()))
    other = world_stream(stream.path, clustering=False, window=2)
    other.load_state_dict(state)
    assert (other.edits, other.records) == (stream.edits, stream.records)
    assert (other.inherited, other.windows, other.arrived) == (stream.inherited, 2, 2)
    assert other.ledger == stream.ledger
