"""The ledger: its commands, the rules between states, and its stored forms."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from repair_lightning.edits import ledger as ledger_module
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import LedgerError, RepairError, UnknownEditError
from repair_lightning.types import Edit, EditReport, Probe


def edit(id: str, **more) -> Edit:
    return Edit(id, f"prompt {id}", f"target {id}", **more)


def report(id: str, shard: int = 0, **more) -> EditReport:
    return EditReport(id, shard, **{"loss": 0.5, "kd": 0.25, "steps": 3, **more})


@pytest.fixture
def ledger():
    """a..f: a, b written in shard 0, c in shard 1, d residual, e rolled back, f pending."""
    full = edit("a", subject="s", rephrases=("r",), locality=(Probe("p", "q"), Probe("p2")), near=(Probe("n", None),))
    found = Ledger()
    found.arrive([full, *map(edit, "bcde")], window=0)
    found.arrive([edit("f")], window=1)
    found.written(
        [report("a"), report("b"), report("c", 1), report("d", residual=True), report("e", error="loss is nan")]
    )
    return found


def snapshot(ledger: Ledger) -> dict:
    return ledger.state_dict()


# -- states ----------------------------------------------------------------------------------------------------------


def test_arrival(ledger):
    assert list(ledger) == list("abcdef")
    assert (len(ledger), "a" in ledger, "x" in ledger) == (6, True, False)
    entry = ledger.entry("f")
    assert (entry.arrival, entry.window, entry.status, entry.shard, entry.score) == (5, 1, "pending", None, None)
    assert ledger.edit("b") == edit("b")


def test_what_a_write_leaves(ledger):
    a, d, e = map(ledger.entry, "ade")
    assert (a.status, a.shard, a.attempts, a.regroups, a.loss, a.kd) == (EditStatus.WRITTEN, 0, 1, 0, 0.5, 0.25)
    assert (d.status, d.shard, d.attempts, d.regroups) == (EditStatus.RESIDUAL, None, 0, 1)
    assert "0.25 stayed high in shard 0" in d.reason
    assert (e.status, e.shard, e.attempts, e.reason) == (EditStatus.FAILED, None, 1, "loss is nan")


def test_a_loss_that_is_not_finite_is_none_and_numbers_become_plain(ledger):
    ledger.written([report("f", torch.tensor(2), loss=torch.tensor(0.5), kd=float("inf"))])
    entry = ledger.entry("f")
    assert (entry.shard, entry.loss, entry.kd) == (2, 0.5, None)
    assert (type(entry.shard), type(entry.loss)) == (int, float)


def test_scores_decide_between_written_and_failed(ledger):
    ledger.evaluated({"a": 0.85, "b": 0.84}, tau_correct=0.85)
    assert [ledger.entry(id).status for id in "ab"] == ["written", "failed"]
    assert ledger.entry("b").reason == "score 0.84 < 0.85"
    ledger.evaluated({"b": 1.0, "a": 0.0}, tau_correct=0.85)
    assert [ledger.entry(id).status for id in "ab"] == ["failed", "written"]
    assert ledger.entry("b").reason == ""


def test_scores_of_edits_without_an_owner_change_no_state(ledger):
    before = {id: ledger.entry(id).status for id in "def"}
    ledger.evaluated(dict.fromkeys("def", 1.0), tau_correct=0.5)
    assert {id: ledger.entry(id).status for id in "def"} == before
    assert ledger.entry("f").score == 1.0


def test_a_new_write_opens_the_score_again(ledger):
    ledger.evaluated({"a": 0.0}, 0.5)
    ledger.written([report("a", 3)])
    entry = ledger.entry("a")
    assert (entry.status, entry.shard, entry.score, entry.attempts) == ("written", 3, None, 2)


def test_a_rolled_back_rewrite_keeps_the_owner(ledger):
    ledger.written([report("a", 3, error="boom")])
    assert (ledger.owner_of("a"), ledger.entry("a").status) == (0, "failed")


def test_requeue_and_quarantine_take_the_owner_away(ledger):
    ledger.requeue(iter("ad"), "shard 0 pruned")
    ledger.quarantine(["b", "f"], "3 attempts")
    assert [ledger.owner_of(id) for id in "abdf"] == [None] * 4
    assert (ledger.entry("a").status, ledger.entry("a").reason) == ("requeued", "shard 0 pruned")
    assert ledger.with_status("quarantined") == ["b", "f"]
    assert ledger.with_status(EditStatus.REQUEUED, "quarantined") == ["a", "b", "d", "f"]


def test_supersede_is_final(ledger):
    ledger.supersede("a", "f")
    entry = ledger.entry("a")
    assert (entry.status, entry.shard, entry.reason) == ("superseded", None, "superseded by f")
    before = snapshot(ledger)
    for command in (
        lambda: ledger.written([report("a")]),
        lambda: ledger.requeue(["a"], "x"),
        lambda: ledger.quarantine(["a"], "x"),
        lambda: ledger.reassign(["a"], 1),
        lambda: ledger.supersede("a", "b"),
    ):
        with pytest.raises(LedgerError, match="edit 'a': it is superseded; it must be one of "):
            command()
    assert snapshot(ledger) == before


@pytest.mark.parametrize(("old", "new"), [("f", "a"), ("a", "a")])
def test_only_a_later_edit_supersedes(ledger, old, new):
    with pytest.raises(LedgerError, match=f"'{new}' cannot supersede '{old}': it did not arrive after it"):
        ledger.supersede(old, new)


def test_owners_counts_and_merges(ledger):
    assert (ledger.owned_by(0), ledger.owned_by(1), ledger.owned_by(9)) == (["a", "b"], ["c"], [])
    ledger.reassign(["c", "a"], 4)
    assert (ledger.owned_by(4), ledger.owned_by(0)) == (["a", "c"], ["b"])
    assert ledger.sizes() == {0: 1, 4: 2}
    counts = {"pending": 1, "written": 3, "failed": 1, "residual": 1, "requeued": 0, "quarantined": 0}
    assert ledger.counts() == counts | {"superseded": 0, "undone": 0}


def test_error_rates_by_hand(ledger):
    """Shard 0 owns a (failed), b (right): 1/2 of 2. Shard 1 owns c, not evaluated, then f, failed: 1/1 of 1."""
    assert ledger.error_rates() == {0: (0.0, 0), 1: (0.0, 0)}
    ledger.written([report("f", 1)])
    ledger.evaluated({"a": 0.2, "b": 0.9, "f": 0.0, "e": 0.0}, 0.85)
    assert ledger.error_rates() == {0: (0.5, 2), 1: (1.0, 1)}
    ledger.requeue(["a", "b"], "pruned")
    assert ledger.error_rates() == {1: (1.0, 1)}


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        (lambda x: x.entry("zz"), UnknownEditError, "the ledger knows no edit with the id 'zz'"),
        (lambda x: x.edit("zz"), KeyError, "id 'zz'"),
        (lambda x: x.owner_of("zz"), UnknownEditError, "id 'zz'"),
        (lambda x: x.written([report("f"), report("zz")]), UnknownEditError, "id 'zz'"),
        (lambda x: x.evaluated({"a": 1.0, "zz": 1.0}, 0.5), UnknownEditError, "id 'zz'"),
        (lambda x: x.requeue(["a", "zz"], ""), UnknownEditError, "id 'zz'"),
        (lambda x: x.quarantine(["a", "zz"], ""), UnknownEditError, "id 'zz'"),
        (lambda x: x.reassign(["a", "zz"], 1), UnknownEditError, "id 'zz'"),
        (lambda x: x.supersede("a", "zz"), UnknownEditError, "id 'zz'"),
        (lambda x: x.supersede("zz", "a"), UnknownEditError, "id 'zz'"),
        (lambda x: x.arrive([edit("g"), edit("a")], 2), LedgerError, "edit 'a' has arrived already"),
        (lambda x: x.arrive([edit("g"), edit("g")], 2), LedgerError, "edit 'g' has arrived already"),
        (lambda x: x.requeue(["a", "f"], ""), LedgerError, "cannot requeue edit 'f': it is pending; it must be one of"),
        (lambda x: x.reassign(["a", "d"], 1), LedgerError, "cannot reassign edit 'd': it is residual"),
        (lambda x: x.reassign(["a", "e"], 1), LedgerError, "cannot reassign edit 'e': no shard owns it"),
        (lambda x: x.evaluated({"a": 1.0, "b": 1.1}, 0.5), LedgerError, r"must be in \[0, 1\], got 1.1 for edit 'b'"),
        (lambda x: x.evaluated({"a": float("nan")}, 0.5), LedgerError, r"must be in \[0, 1\], got nan"),
        (lambda x: x.with_status("done"), LedgerError, "unknown status 'done'; known: pending, written"),
    ],
)
def test_a_refused_command_changes_nothing(ledger, command, error, message):
    before = snapshot(ledger)
    with pytest.raises(error, match=message) as caught:
        command(ledger)
    assert isinstance(caught.value, RepairError)
    assert snapshot(ledger) == before


def test_a_quarantined_edit_is_not_written(ledger):
    ledger.quarantine(["f"], "too long")
    with pytest.raises(LedgerError, match="cannot write edit 'f': it is quarantined"):
        ledger.written([report("a", 5), report("f")])
    assert ledger.owner_of("a") == 0


# -- storage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def used(ledger):
    ledger.evaluated({"a": 0.25, "b": 1.0}, 0.85)
    ledger.supersede("c", "f")
    ledger.requeue(["a"], "again")
    ledger.quarantine(["e"], "gave up")
    return ledger


def test_the_state_survives_torch_load_with_weights_only(used, tmp_path):
    torch.save(used.state_dict(), tmp_path / "state.pt")
    again = Ledger()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again == used
    assert (again.sizes(), again.counts()) == (used.sizes(), used.counts())
    assert again.entry("a").edit.locality == (Probe("p", "q"), Probe("p2"))
    again.arrive([edit("g")], 2)
    assert again != used
    assert again.entry("g").arrival == 6


def test_loading_replaces_what_was_there(ledger):
    other = Ledger()
    other.arrive([edit("z")], 0)
    ledger.load_state_dict(other.state_dict())
    assert ledger == other
    assert (list(ledger), ledger.sizes(), ledger.with_status("pending")) == (["z"], {}, ["z"])


def test_the_state_holds_plain_types_alone(used):
    def plain(value):
        if type(value) is dict:
            return all(map(plain, value)) and all(map(plain, value.values()))
        return all(map(plain, value)) if type(value) is list else type(value) in (str, int, float, type(None))

    assert plain(used.state_dict())


def test_the_state_is_a_copy(used):
    state = used.state_dict()
    state["entries"][0]["edit"]["rephrases"].append("x")
    state["entries"][0]["status"] = "failed"
    assert used.entry("a").edit.rephrases == ("r",)
    assert used.entry("a").status == "requeued"


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"version": 99, "entries": []},
        {"version": 1, "entries": [{}]},
        {"version": 1, "entries": [{"edit": None}]},
        {"version": 1, "entries": 3},
    ],
)
def test_a_foreign_state_is_refused_and_the_ledger_stays(used, state):
    before = snapshot(used)
    with pytest.raises(LedgerError, match="not the state of a ledger"):
        used.load_state_dict(state)
    assert snapshot(used) == before


def test_an_unknown_status_in_a_state_is_refused(used):
    state = used.state_dict()
    state["entries"][0]["status"] = "done"
    with pytest.raises(LedgerError, match="'done' is not a valid EditStatus"):
        Ledger().load_state_dict(state)


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

    def full_disk(table, file):
        file.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module.pq, "write_table", full_disk)
    with pytest.raises(RepairError, match=r"ledger\.parquet: the ledger cannot be written \(No space left on device\)"):
        used.to_parquet(path)
    assert len(Ledger.from_parquet(path)) == 0
    assert os.listdir(tmp_path) == ["ledger.parquet"]


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_path_that_cannot_be_written(used, tmp_path, parent):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RepairError, match="cannot be written"):
        used.to_parquet(tmp_path / parent / "ledger.parquet")


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


# -- any history -----------------------------------------------------------------------------------------------------

IDS = st.sampled_from([f"e{i}" for i in range(6)])


class Histories(RuleBasedStateMachine):
    """Commands in any order: refused ones change nothing, and the laws of the states hold after each."""

    def __init__(self):
        super().__init__()
        self.ledger = Ledger()

    def attempt(self, command):
        before = self.ledger.state_dict()
        try:
            command()
        except LedgerError:
            assert self.ledger.state_dict() == before

    @rule(id=IDS, window=st.integers(0, 3))
    def arrive(self, id, window):
        self.attempt(lambda: self.ledger.arrive([edit(id)], window))

    @rule(id=IDS, shard=st.integers(0, 2), residual=st.booleans(), error=st.none() | st.just("boom"))
    def write(self, id, shard, residual, error):
        self.attempt(lambda: self.ledger.written([report(id, shard, residual=residual, error=error)]))

    @rule(scores=st.dictionaries(IDS, st.floats(0, 1), max_size=3))
    def evaluate(self, scores):
        self.attempt(lambda: self.ledger.evaluated(scores, 0.5))

    @rule(ids=st.lists(IDS, max_size=2), verb=st.sampled_from(["requeue", "quarantine"]))
    def move(self, ids, verb):
        self.attempt(lambda: getattr(self.ledger, verb)(ids, "why"))

    @rule(old=IDS, new=IDS)
    def supersede(self, old, new):
        self.attempt(lambda: self.ledger.supersede(old, new))

    @rule(ids=st.lists(IDS, max_size=2), shard=st.integers(0, 2))
    def reassign(self, ids, shard):
        self.attempt(lambda: self.ledger.reassign(ids, shard))

    @invariant()
    def only_stored_edits_have_an_owner_and_written_ones_always(self):
        for entry in map(self.ledger.entry, self.ledger):
            assert entry.shard is None or entry.status in ("written", "failed")
            assert entry.status != "written" or entry.shard is not None

    @invariant()
    def indexes_match_a_scan(self):
        entries = [self.ledger.entry(id) for id in self.ledger]
        for status in EditStatus:
            assert self.ledger.with_status(status) == [e.edit.id for e in entries if e.status is status]
        for shard in range(3):
            owned = [e.edit.id for e in entries if e.shard == shard]
            assert self.ledger.owned_by(shard) == owned
            assert self.ledger.sizes().get(shard, 0) == len(owned)

    @invariant()
    def nothing_is_lost(self):
        assert sum(self.ledger.counts().values()) == len(self.ledger)
        assert [self.ledger.entry(id).arrival for id in self.ledger] == list(range(len(self.ledger)))

    @invariant()
    def rates_match_a_count_by_hand(self):
        for shard, (rate, evaluated) in self.ledger.error_rates().items():
            scored = [e for e in map(self.ledger.entry, self.ledger.owned_by(shard)) if e.score is not None]
            assert evaluated == len(scored)
            assert rate * max(evaluated, 1) == pytest.approx(sum(e.score < 0.5 for e in scored))

    @invariant()
    def the_state_round_trips(self):
        again = Ledger()
        again.load_state_dict(self.ledger.state_dict())
        assert again == self.ledger


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestHistories = Histories.TestCase
