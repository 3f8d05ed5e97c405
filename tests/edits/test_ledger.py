"""The ledger: its commands, the rules between states, and its stored forms."""

from __future__ import annotations

import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import LedgerError, RepairError, UnknownEditError
from repair_lightning.storage import files
from repair_lightning.types import Edit, EditReport, Further, Probe


def edit(id: str, **more) -> Edit:
    return Edit(id, f"prompt {id}", f"target {id}", **more)


def report(id: str, shard: int = 0, **more) -> EditReport:
    return EditReport(id, shard, **{"loss": 0.5, "kd": 0.25, "steps": 3, **more})


@pytest.fixture
def ledger():
    """a..f: a, b written in shard 0, c in shard 1, d residual, e rolled back, f pending."""
    full = edit("a", subject="s", rephrases=("r",), locality=(Probe("p", "q"), Probe("p2")), near=(Probe("n", None),))
    full = replace(full, aliases=("A",), old_answer="o", further=(Further("persona", "f", ("g", "h")),))
    found = Ledger()
    found.arrive([full, *map(edit, "bcde")], window=0)
    found.arrive([edit("f")], window=1)
    found.written(
        [report("a"), report("b"), report("c", 1), report("d", residual=True), report("e", error="loss is nan")]
    )
    return found


def test_what_a_write_leaves(ledger):
    a, d, e = map(ledger.entry, "ade")
    assert (a.status, a.shard, a.attempts, a.regroups, a.loss, a.kd) == (EditStatus.WRITTEN, 0, 1, 0, 0.5, 0.25)
    assert (d.status, d.shard, d.attempts, d.regroups) == (EditStatus.RESIDUAL, None, 0, 1)
    assert "0.25 stayed high in shard 0" in d.reason
    assert (e.status, e.shard, e.attempts, e.reason) == (EditStatus.FAILED, None, 1, "loss is nan")


def test_scores_decide_between_written_and_failed(ledger):
    ledger.evaluated({"a": 0.85, "b": 0.84}, tau_correct=0.85)
    assert [ledger.entry(id).status for id in "ab"] == ["written", "failed"]
    ledger.evaluated({"b": 1.0, "a": 0.0}, tau_correct=0.85)
    assert [ledger.entry(id).status for id in "ab"] == ["failed", "written"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "'w0099', nor any other; let it arrive first"),
        (2, "'w0099'; did you mean 'w0001' or 'w0000'? known: 'w0000', 'w0001'"),
        (120, "'w0099-'; did you mean 'w0099' or 'w0109' or 'w0098'? `repair-lightning log --run DIR` lists all 120"),
        (1200, "'x'; `repair-lightning log --run DIR` lists all 1,200"),
    ],
)
def test_an_unknown_id_is_told_which_are_known(number, message):
    ledger = Ledger()
    ledger.arrive([edit(f"w{i:04}") for i in range(number)], 0)
    with pytest.raises(UnknownEditError) as caught:
        ledger.entry(message.split("'")[1])
    assert str(caught.value) == f"the ledger knows no edit with the id {message}"


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        (lambda x: x.entry("zz"), UnknownEditError, "the ledger knows no edit with the id 'zz'"),
        (lambda x: x.written([report("f"), report("zz")]), UnknownEditError, "id 'zz'"),
        (lambda x: x.arrive([edit("g"), edit("a")], 2), LedgerError, "edit 'a' has arrived already"),
        (lambda x: x.requeue(["a", "f"], ""), LedgerError, "cannot requeue edit 'f': it is pending; it must be one of"),
        (lambda x: x.evaluated({"a": 1.0, "b": 1.1}, 0.5), LedgerError, r"must be in \[0, 1\], got 1.1 for edit 'b'"),
        (lambda x: x.supersede("f", "a"), LedgerError, "'a' cannot supersede 'f': it did not arrive after it"),
        (lambda x: x.written([report("s")]), LedgerError, "edit 's': it is superseded; it must be one of "),
        (lambda x: x.reassign(["s"], 1), LedgerError, "edit 's': it is superseded; it must be one of "),
    ],
)
def test_a_refused_command_changes_nothing(ledger, command, error, message):
    """Among them: what is superseded stays so."""
    ledger.arrive([edit("s"), edit("t")], 1)
    ledger.supersede("s", "t")
    before = ledger.state_dict()
    with pytest.raises(error, match=message) as caught:
        command(ledger)
    assert isinstance(caught.value, RepairError)
    assert ledger.state_dict() == before


@pytest.fixture
def used(ledger):
    ledger.evaluated({"a": 0.25, "b": 1.0}, 0.85)
    ledger.supersede("c", "f")
    ledger.requeue(["a"], "again")
    ledger.quarantine(["e"], "gave up")
    return ledger


@pytest.mark.parametrize("state", [[], {"version": 99, "entries": []}, {"version": 1, "entries": [{}]}])
def test_a_foreign_state_is_refused_and_the_ledger_stays(used, state):
    before = used.state_dict()
    with pytest.raises(LedgerError, match="not the state of a ledger"):
        used.load_state_dict(state)
    assert used.state_dict() == before


def test_parquet_round_trip_overwrites_and_leaves_no_other_file(used, tmp_path):
    path = tmp_path / "ledger.parquet"
    Ledger().to_parquet(path)
    assert len(Ledger.from_parquet(path)) == 0
    used.to_parquet(str(path))
    assert Ledger.from_parquet(path) == used
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger.parquet"]
    table = pq.read_table(path)
    assert table["id"].to_pylist() == list("abcdef")
    assert table["reason"].to_pylist()[0] == "again"


def test_a_write_that_breaks_off_keeps_the_old_file(used, tmp_path, monkeypatch):
    path = tmp_path / "ledger.parquet"
    Ledger().to_parquet(path)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(RepairError, match=r"ledger\.parquet: the ledger cannot be written \(No space left on device\)"):
        used.to_parquet(path)
    assert len(Ledger.from_parquet(path)) == 0
    assert os.listdir(tmp_path) == ["ledger.parquet"]


def test_unreadable_parquet(used, tmp_path):
    path = tmp_path / "ledger.parquet"
    with pytest.raises(LedgerError, match="no readable ledger"):
        Ledger.from_parquet(path)
    used.to_parquet(path)
    whole = path.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(LedgerError, match="no readable ledger"):
            Ledger.from_parquet(path)
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(LedgerError, match=r"no readable ledger .*version 0, this program reads 1"):
        Ledger.from_parquet(path)
