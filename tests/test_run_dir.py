"""A run's directory: one process at a time, resumed or refused, and checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from repair_lightning.commands import run_dir
from repair_lightning.commands.run_dir import CHECKPOINT, RunDirectory, plain
from repair_lightning.edits import checkpoints
from repair_lightning.edits.checkpoints import JournaledCheckpointIO
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.types import Edit

SETTINGS = {"model": {"lr": 1.0, "steps": 3}, "data": {"path": Path("edits.jsonl"), "sizes": (1, 2)}, "seed": 0}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run"


def begin(path: Path, settings=SETTINGS, **options) -> RunDirectory:
    run = RunDirectory(path)
    run.open(settings, **options)
    run.begin()
    return run


def io_of(run: RunDirectory, windows: int = 0) -> JournaledCheckpointIO:
    return run.checkpoint_io(lambda: windows, lambda: run.journal.tables())


def save(run: RunDirectory, state, windows: int = 0) -> None:
    io_of(run, windows).save_checkpoint(state, run.path / CHECKPOINT)


def rows_of(numbers) -> dict:
    return {"t": {number: {"what": torch.full((3,), float(number))} for number in numbers}}


def stopped(path: Path, windows: int = 1) -> RunDirectory:
    """A run that ended after so many windows, each with an arrival and a checkpoint, and one more arrival."""
    run = begin(path)
    ledger = Ledger()
    ledger.journal = run.journal
    for window in range(windows):
        ledger.arrive([Edit(f"e{window}", f"{window}?", "x")], window)
        save(run, ledger.state_dict() | {"rows": rows_of(range(window + 1))}, window + 1)
    ledger.arrive([Edit("void", "?", "x")], windows)
    run.close()
    return run


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_stopped_run_goes_on_after_its_checkpoint(path):
    stopped(path, windows=2)
    before = content(path)
    with pytest.raises(ConfigError, match=r"holds an unfinished run; --resume auto goes on with it, --overwrite"):
        begin(path, resume="never")
    assert content(path) == before
    run = begin(path)
    assert run.checkpoint == path / CHECKPOINT
    saved = Ledger()
    loaded = io_of(run).load_checkpoint(run.checkpoint, weights_only=True)
    assert sorted(loaded["rows"]["t"]) == [0, 1]
    saved.load_state_dict(loaded)
    assert run.journal.rebuild() == saved
    assert list(saved) == ["e0", "e1"]
    *_, void, resumed = run.journal.events()
    assert (void["id"], void["void"]) == ("void", 1)
    assert resumed["reason"] == "resumed after window 2"
    run.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"lr": 0.5, "steps": 3}}, r"model\.lr 1\.0, now 0\.5"),
        ({"data": {"path": "other.jsonl", "sizes": [1, 2]}}, r"data\.path 'edits\.jsonl', now 'other\.jsonl'"),
    ],
)
def test_other_settings_are_named_with_both_values(path, change, words):
    stopped(path)
    before = content(path)
    message = rf"holds an unfinished run with {words}; give the same, another --run_dir, or --overwrite"
    with pytest.raises(ConfigError, match=message):
        begin(path, SETTINGS | change)
    assert content(path) == before
    begin(path, SETTINGS | change, overwrite=True).close()
    assert json.loads((path / "run.json").read_text()) == plain(SETTINGS | change)


@pytest.mark.parametrize("damaged", [b"", b"[]", b"\xff\xfe"])
def test_damaged_settings_are_refused_in_one_line(path, damaged):
    stopped(path)
    (path / "run.json").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"run\.json is damaged .*; --overwrite starts it anew") as caught:
        begin(path)
    assert len(str(caught.value).splitlines()) == 1
    begin(path, overwrite=True).close()


def test_a_finished_run_stays_and_overwrite_leaves_what_is_not_a_runs(path):
    stopped(path)
    for name in run_dir._WRITTEN:
        if not (path / name).exists():
            (path / name).mkdir() if name in ("pack", "scratch") else (path / name).write_text("{}")
    for name in ("notes.txt", "wandb/log", "other/metrics.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("the user's own")
    (path / "pack" / "side_memory.safetensors").touch()
    before = content(path)
    for resume in ("auto", "never"):
        with pytest.raises(ConfigError, match=r"holds a finished run; give another --run_dir, or --overwrite"):
            begin(path, resume=resume)
        assert content(path) == before
    run = begin(path, overwrite=True)
    own = {name: text for name, text in content(path).items() if text == b"the user's own"}
    assert set(own) == {"notes.txt", "wandb/log", "other/metrics.json"}
    journal = {f"journal.sqlite{end}" for end in ("", "-wal", "-shm")}
    assert set(content(path)) - set(own) == {".lock", "run.json"} | journal
    assert list(run.journal.events()) == []
    run.close()


def test_overwrite_does_not_follow_links(path, tmp_path):
    """A pack that is a link to somewhere else: the link goes, what it leads to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    path.mkdir()
    (path / "metrics.json").write_text("{}")
    (path / "pack").symlink_to(tmp_path / "elsewhere")
    begin(path, overwrite=True).close()
    assert not (path / "pack").exists()
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_checkpoint_that_is_gone_or_cut_is_refused(path):
    stopped(path)
    file = path / CHECKPOINT
    whole = file.read_bytes()
    for damaged, words in ((None, "it is missing"), (whole[:-1], "knows no such content"), (b"", "knows no")):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(RepairError, match=f"is damaged: .*{words}.*; restore it from a copy, or --overwrite"):
            begin(path)
        file.write_bytes(whole)
    run = begin(path)
    assert run.checkpoint
    run.close()


def killed_everywhere(path: Path, monkeypatch, act) -> list[Path]:
    """Copies of the directory as it was before and after every step that changes the disk."""
    copies = []

    def copy() -> None:
        copies.append(path.with_name(f"killed-{len(copies)}"))
        shutil.copytree(path, copies[-1])

    def watched(real):
        def call(*args, **kwargs):
            copy()
            result = real(*args, **kwargs)
            copy()
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(checkpoints.os, name, watched(getattr(checkpoints.os, name)))
        patch.setattr(Journal, "save", watched(Journal.save))
        act()
    return copies


@pytest.mark.parametrize("first", [True, False])
def test_killed_anywhere_the_last_checkpoint_is_whole(path, monkeypatch, first):
    """A save that adds and drops rows, cut off at each of its steps: the run goes on from the checkpoint before or from
    this one, holds all of its rows, and nothing is left lying about."""
    run = begin(path)
    before = [] if first else [0, 1, 2]
    if not first:
        save(run, {"last": 2, "rows": rows_of(before)})
    after = [1, 2, 3, 4]
    copies = killed_everywhere(path, monkeypatch, lambda: save(run, {"last": 4, "rows": rows_of(after)}))
    run.close()
    assert len(copies) >= 8
    seen = []
    for copy in copies:
        resumed = begin(copy)
        seen.append(sorted(resumed.journal.tables().get("t", {})))
        assert seen[-1] in (before, after)
        if resumed.checkpoint:
            assert loaded(resumed.checkpoint)["last"] == max(seen[-1])
        assert [file.name for file in (copy / "checkpoints").glob("*")] == ["last.ckpt"] * bool(resumed.checkpoint)
        save(resumed, {"last": 99, "rows": rows_of([*seen[-1], 99])})
        resumed.close()
        again = begin(copy)
        assert sorted(again.journal.tables()["t"]) == [*seen[-1], 99]
        again.close()
    assert before in seen
    assert after in seen


def loaded(path: Path):
    return torch.load(path, weights_only=True)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def keeps_the_previous(run: RunDirectory, error: type[Exception], match: str) -> None:
    """A second save that is refused, after a first that was good."""
    path, known = run.path / CHECKPOINT, run.journal.checkpoint
    previous = path.read_bytes()
    with pytest.raises(error, match=match) as caught:
        save(run, {"n": torch.ones(100_000), "rows": rows_of(range(9))})
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == previous
    assert (run.journal.checkpoint, sorted(run.journal.tables()["t"])) == (known, [0, 1])
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]  # what failed takes no room


@pytest.fixture
def saved(path) -> Iterator[RunDirectory]:
    run = begin(path)
    save(run, {"n": 1, "rows": rows_of([0, 1])})
    yield run
    run.close()


@pytest.mark.parametrize("where", ["fsync", "open"])
def test_a_failing_write_keeps_the_previous_one(saved, monkeypatch, where):
    if where == "open":
        monkeypatch.setattr(checkpoints, "open", full, raising=False)
    else:
        monkeypatch.setattr(checkpoints.os, where, full)
    keeps_the_previous(saved, RepairError, r"last\.ckpt' cannot be written \(No space left on device\); the previous")
    monkeypatch.undo()
    save(saved, {"n": 3})
    assert loaded(saved.path / CHECKPOINT) == {"n": 3}


def test_a_full_journal_keeps_the_previous_one(saved):
    """SQLite's own limit on pages answers as a full disk does."""
    pages = saved.journal._db.execute("PRAGMA page_count").fetchone()[0]
    saved.journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RepairError, match=r"database or disk is full"):
        save(saved, {"n": 2, "rows": rows_of(range(2000))})
    assert sorted(saved.journal.tables()["t"]) == [0, 1]
    assert loaded(saved.path / CHECKPOINT) == {"n": 1}


def test_a_disk_that_gives_back_something_else_is_found_out(saved, monkeypatch):
    real = checkpoints.os.fsync

    def rot(handle: int) -> None:
        real(handle)
        os.pwrite(handle, b"\x00\x01\x02", 700)

    monkeypatch.setattr(checkpoints.os, "fsync", rot)
    keeps_the_previous(saved, RepairError, "what is read back is not what was written; check the disk")


def test_another_checkpoint_of_the_same_run_stands_alone(saved, tmp_path):
    """One that a user's own callback saves, in the same folder or elsewhere, between those of the run."""
    io = io_of(saved)
    for other in (saved.path / "checkpoints" / "best.ckpt", tmp_path / "other.ckpt"):
        io.save_checkpoint({"n": 5, "rows": rows_of(range(5))}, other)
        found = io.load_checkpoint(other, weights_only=True)
        assert sorted(found["rows"]["t"]) == [*range(5)]
    assert sorted(io.load_checkpoint(saved.path / CHECKPOINT, weights_only=True)["rows"]["t"]) == [0, 1]


@pytest.mark.parametrize("name", ["pack/weights", "edits.parquet"])
def test_results_without_a_run_are_not_removed_unasked(tmp_path, name):
    """A copied pack, the file that the edits come from."""
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    with pytest.raises(ConfigError, match=r"holds .* and no run that could go on.*--overwrite"):
        RunDirectory(tmp_path).open(SETTINGS)
    assert own.read_text() == "mine"
    begin(tmp_path, overwrite=True).close()
    assert not own.exists()


def test_what_is_left_before_it_has_begun_is_as_it_was(path):
    """Folders that were made go; a run in which an edit was written, and one that another process has, stay."""
    run = RunDirectory(path / "deep")
    run.open(SETTINGS)
    with pytest.raises(ConfigError, match="is in use by another run"):
        (other := RunDirectory(path / "deep")).open(SETTINGS)
    other.leave()
    assert (path / "deep").is_dir()
    run.leave()
    assert not path.exists()
    stopped(path)
    before = sorted(path.iterdir())
    run = RunDirectory(path)
    with pytest.raises(ConfigError, match="an unfinished run with seed 0, now 1"):
        run.open(SETTINGS | {"seed": 1})
    run.leave()
    assert sorted(path.iterdir()) == before
