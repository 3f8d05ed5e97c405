"""The journal: on the disk before it counts, complete, and readable whatever happened to the writer."""

from __future__ import annotations

import random
import sqlite3

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repair_lightning.edits.journal import VERSION, Checkpoint, Journal, JournalError
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import RepairError, UnknownEditError
from repair_lightning.types import Edit, EditReport, Probe


def edit(name: str) -> Edit:
    return Edit(name, f"Who is {name}?", "nobody", "Zoë", (f"{name}?",), (Probe("a", "b"),), (Probe("c"),))


def report(name: str, shard: int = 0, **more) -> EditReport:
    return EditReport(name, shard, **({"loss": 0.25, "kd": 0.5, "steps": 3} | more))


@pytest.fixture
def journal(tmp_path):
    found = Journal(tmp_path / "journal.sqlite")
    yield found
    found.close()


@pytest.fixture
def ledger(journal) -> Ledger:
    found = Ledger()
    found.journal = journal
    return found


def reader(journal: Journal) -> Journal:
    return Journal(journal.path, read_only=True)


class Refuses:
    """A journal on a broken disk."""

    def append(self, kind, entries):
        raise JournalError("no room")


COMMANDS = {
    "arrived": lambda ledger: ledger.arrive([edit("d")], 1),
    "written": lambda ledger: ledger.written([report("a", 1)]),
    "evaluated": lambda ledger: ledger.evaluated({"b": 0.5}, 0.85),
    "requeued": lambda ledger: ledger.requeue(["b"], "again"),
    "quarantined": lambda ledger: ledger.quarantine(["b"], "hopeless"),
    "superseded": lambda ledger: ledger.supersede("a", "b"),
    "undone": lambda ledger: ledger.undo(["c"], "a mistake"),
    "merged": lambda ledger: ledger.reassign(["b"], 9),
    "adapted": lambda ledger: ledger.reassign(["b"], 9, "adapted"),
}


def fill(ledger: Ledger) -> None:
    """a pending, b and c written."""
    ledger.arrive([edit("a"), edit("b"), edit("c")], 0)
    ledger.written([report("b", 4), report("c", 5)])


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_an_event_with_the_state_behind_it(ledger, journal, command):
    fill(ledger)
    before, state = journal.last, {id: ledger.entry(id) for id in ledger}
    held = ledger.state_dict()
    ledger.journal = Refuses()
    with pytest.raises(JournalError, match="no room"):  # what the journal cannot take does not happen
        COMMANDS[command](ledger)
    assert ledger.state_dict() == held
    ledger.journal = journal
    COMMANDS[command](ledger)
    with_seq = [event for event in journal.events() if event["seq"] > before]
    changed = [id for id in ledger if ledger.entry(id) != state.get(id)]
    assert [(event["kind"], event["id"]) for event in with_seq] == [(command, id) for id in changed]
    (event,) = with_seq
    entry = ledger.entry(event["id"]).as_dict()
    entry.pop("edit")
    assert {name: event[name] for name in entry} == entry
    assert (event["edit"] is not None) is (command == "arrived")
    assert (event["void"], event["back_to"]) == (0, None)


def test_the_events_of_one_edit(ledger, journal):
    fill(ledger)
    journal.note("finished", "3 edits")
    told = [(event["kind"], event["status"]) for event in journal.events("b")]
    assert told == [("arrived", "pending"), ("written", "written")]
    with pytest.raises(UnknownEditError, match="knows no edit with the id 'z'; known: 'a', 'b', 'c'"):
        list(journal.events("z"))


NAMES = [f"e{i}" for i in range(5)]
FEW = st.lists(st.sampled_from(NAMES), max_size=3, unique=True)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
STEPS = st.one_of(
    st.tuples(st.just("arrive"), FEW, st.integers(0, 9)),
    st.tuples(st.just("written"), FEW, st.integers(-1, 3), NUMBERS, st.booleans(), st.none() | st.text(max_size=3)),
    st.tuples(st.just("evaluated"), st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1), max_size=3)),
    st.tuples(st.sampled_from(["requeue", "quarantine", "undo"]), FEW, st.text(max_size=5)),
    st.tuples(st.just("supersede"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("reassign"), FEW, st.integers(-1, 3)),
    st.tuples(st.just("note")),
    st.tuples(st.just("checkpoint")),
    st.tuples(st.just("rewind"), st.integers(0, 4)),
)


class Run:
    """A ledger and its journal under commands, with checkpoints to go back to."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.ledger = journal, Ledger()
        self.ledger.journal = journal
        self.kept = [(0, self.ledger.state_dict())]

    def step(self, name: str, *given) -> None:
        getattr(self if hasattr(self, name) else self.ledger, name)(*given)

    def arrive(self, names, window):
        self.ledger.arrive(map(edit, names), window)

    def written(self, names, shard, loss, residual, error):
        self.ledger.written([report(id, shard, loss=loss, residual=residual, error=error) for id in names])

    def evaluated(self, scores):
        self.ledger.evaluated(scores, 0.5)

    def note(self):
        self.journal.note("note", "nothing")

    def checkpoint(self):
        sha = f"{len(self.kept)}-{self.journal.last}"
        self.journal.save(sha, len(self.kept))
        assert self.journal.checkpoint == Checkpoint(sha, self.journal.last, len(self.kept))
        self.kept.append((self.journal.last, self.ledger.state_dict()))

    def rewind(self, back):
        del self.kept[max(1, len(self.kept) - back) :]
        seq, state = self.kept[-1]
        later = [event for event in self.journal.events() if event["seq"] > seq and not event["void"]]
        assert self.journal.rewind(seq, "killed") == len(later)
        self.ledger.load_state_dict(state)


def check_laws(ledger: Ledger) -> None:
    """What holds after any commands: owners, indexes, counts and error rates against a scan; the state comes back."""
    entries = [ledger.entry(id) for id in ledger]
    assert [entry.arrival for entry in entries] == list(range(len(ledger)))
    assert sum(ledger.counts().values()) == len(ledger)
    for entry in entries:
        assert entry.shard is None or entry.status in ("written", "failed")
        assert entry.status != "written" or entry.shard is not None
    for status in EditStatus:
        assert ledger.with_status(status) == [e.edit.id for e in entries if e.status is status]
    for shard in range(-1, 4):
        owned = [e for e in entries if e.shard == shard]
        assert ledger.owned_by(shard) == [e.edit.id for e in owned]
        assert ledger.sizes().get(shard, 0) == len(owned)
        scores = [e.score for e in owned if e.score is not None]
        rate, evaluated = ledger.error_rates().get(shard, (0.0, 0))
        assert (evaluated, rate * max(evaluated, 1)) == (len(scores), pytest.approx(sum(s < 0.5 for s in scores)))
    again = Ledger()
    again.load_state_dict(ledger.state_dict())
    assert again == ledger


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEPS, max_size=25))
def test_the_events_make_the_ledger_whatever_was_done(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("any") / "journal.sqlite"
    run = Run(Journal(path))
    run.journal._db.execute("PRAGMA synchronous = OFF")  # hundreds of transactions; the disk is not what is asked here
    for step in steps:
        before = run.ledger.state_dict()
        try:
            run.step(*step)
        except RepairError:
            assert run.ledger.state_dict() == before
        assert run.journal.rebuild() == run.ledger
        check_laws(run.ledger)
    run.journal.close()
    again = Journal(path, read_only=True)
    assert again.rebuild() == run.ledger
    assert list(again.rebuild()) == list(run.ledger)
    again.close()


def test_a_transaction_that_returned_is_on_the_disk(journal):
    """FULL (2) syncs the write-ahead log at every commit; NORMAL (1) would not."""
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_one_may_read_while_another_writes(ledger, journal):
    fill(ledger)
    other = reader(journal)
    assert other.rebuild() == ledger
    ledger.quarantine(["a"], "hopeless")
    assert other.rebuild() == ledger
    with pytest.raises(JournalError, match=r"cannot be written \(attempt to write a readonly database\)"):
        other.note("finished", "")
    other.close()


def broken(path, how: str) -> None:
    """What may lie where a journal is looked for."""
    if how == "garbage":
        path.write_bytes(b"no database at all" * 100)
    elif how == "truncated":
        Journal(path).close()
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "folder":
        path.mkdir()
    else:
        Journal(path).close()
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA user_version = {VERSION + 1}")
        db.close()


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("how", ["garbage", "truncated", "folder", "version"])
def test_what_is_no_journal_is_refused_in_one_line(tmp_path, how, read_only):
    path = tmp_path / "journal.sqlite"
    broken(path, how)
    with pytest.raises(JournalError) as caught:
        list(Journal(path, read_only).events())
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    if how == "version":
        assert f"has version {VERSION + 1}; this release reads {VERSION}" in message


@pytest.mark.parametrize("command", ["append", "save", "rewind", "note"])
def test_a_full_disk_takes_the_transaction_back(ledger, journal, command):
    """SQLite's own limit on pages answers as a full disk does: `database or disk is full`."""
    fill(ledger)
    state, events = ledger.state_dict(), list(journal.events())
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    many = [Edit(f"m{i}", "x" * 500, "y") for i in range(200)]
    calls = {
        "append": lambda: ledger.arrive(many, 1),
        "save": lambda: journal.save("0" * 64, 1, {"t": {i: {"what": torch.ones(1000)} for i in range(1000)}}),
        "rewind": lambda: journal.rewind(3, "x" * 100_000),
        "note": lambda: journal.note("note", "x" * 100_000),
    }
    with pytest.raises(JournalError, match=r"cannot be written \(database or disk is full\); free disk space"):
        calls[command]()
    assert ledger.state_dict() == state
    assert list(journal.events()) == events
    assert (journal.checkpoint, journal.tables()) == (None, {})
    other = reader(journal)
    assert other.rebuild() == ledger
    other.close()
    journal._db.execute("PRAGMA max_page_count = 1000000")
    ledger.arrive(many, 1)  # with room it goes on
    assert journal.rebuild() == ledger


def rows_of(numbers) -> dict[int, dict[str, torch.Tensor]]:
    """Rows that say their own number."""
    return {number: {"what": torch.full((3,), float(number))} for number in numbers}


def stored(journal: Journal) -> list[int]:
    """The numbers of the rows that are stored; every row says its own."""
    found = journal.tables().get("t", {})
    assert all(bool((row["what"] == number).all()) for number, row in found.items())
    return list(found)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rows_come_and_go_and_come_back(tmp_path_factory, seed):
    """Also such as were gone when the last checkpoint was written: a rollback brings them back."""
    draw, journal = random.Random(seed), Journal(tmp_path_factory.mktemp("s") / "journal.sqlite")
    live, gone, following = set(), set(), 0
    for window in range(20):
        coming = range(following, following + draw.randint(0, 12))
        following = coming.stop
        leaving = set(draw.sample(sorted(live), draw.choice([0, 0, 0, len(live) // 3, len(live)])))
        back = set(draw.sample(sorted(gone), min(len(gone), draw.choice([0, 0, 0, 3]))))
        live, gone = (live | set(coming) | back) - leaving, (gone | leaving) - back
        journal.save(f"{window}", window, {"t": rows_of(live)} if live else {})
        assert stored(journal) == sorted(live)
        if draw.random() < 0.3:
            journal.close()
            journal = Journal(journal.path)
            journal.check_rows()
    journal.close()


def test_a_row_is_written_once(journal):
    """A row that is stored is not looked at again."""

    class Unread(dict):
        def items(self):
            raise AssertionError("read again")

    journal.save("a", 1, {"t": rows_of(range(5))})
    journal.save("b", 2, {"t": {number: Unread() for number in range(5)} | rows_of([7])})
    assert stored(journal) == [0, 1, 2, 3, 4, 7]


def test_as_parquet(ledger, journal, tmp_path):
    fill(ledger)
    ledger.evaluated({"b": 0.2, "c": 1.0}, 0.85)
    journal.rewind(3, "killed")
    journal.note("finished", "")
    journal.to_parquet(tmp_path / "journal.parquet")
    assert pq.read_table(tmp_path / "journal.parquet").to_pylist() == list(journal.events())
