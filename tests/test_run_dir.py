"""A run's directory: one process at a time, resumed or refused, and checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repair_lightning.commands import run_dir
from repair_lightning.commands.run_dir import CHECKPOINT, DurableCheckpointIO, RunDirectory, plain
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.segments import Segments
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.models.base import files_hash
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


def stopped(path: Path, windows: int = 1) -> RunDirectory:
    """A run that ended behind so many windows, each with an arrival and a checkpoint, and one more arrival."""
    run = begin(path)
    ledger = Ledger()
    ledger.journal = run.journal
    for window in range(windows):
        ledger.arrive([Edit(f"e{window}", f"{window}?", "x")], window)
        io = run.checkpoint_io(lambda window=window: window + 1)
        io.save_checkpoint(ledger.state_dict(), path / CHECKPOINT)
    ledger.arrive([Edit("void", "?", "x")], windows)
    run.close()
    return run


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# -- one at a time -----------------------------------------------------------------------------------------------------


def test_another_process_cannot_have_it_and_a_dead_one_does_not_hold_it(path):
    script = (
        "import sys; from repair_lightning.commands.run_dir import RunDirectory; run = RunDirectory(sys.argv[1])\n"
        "run.open({'seed': 0}); run.begin(); print('held', flush=True); sys.stdin.read()\n"
    )
    call = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = content(path)
        with pytest.raises(ConfigError, match="is in use by another run"):
            begin(path, {"seed": 0})
        assert content(path) == before
        other.kill()
    run = begin(path, {"seed": 0})
    assert [event["kind"] for event in run.journal.events()] == ["resumed"]
    run.close()


# -- going on, or not --------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_behind_its_checkpoint(path):
    stopped(path, windows=2)
    before = content(path)
    with pytest.raises(ConfigError, match=r"holds an unfinished run; --resume auto goes on with it, --overwrite"):
        begin(path, resume="never")
    assert content(path) == before
    run = begin(path)
    assert run.checkpoint == path / CHECKPOINT
    saved = Ledger()
    saved.load_state_dict(torch.load(run.checkpoint, weights_only=True))
    assert run.journal.rebuild() == saved
    assert list(saved) == ["e0", "e1"]
    *_, void, resumed = run.journal.events()
    assert (void["id"], void["void"]) == ("void", 1)
    assert resumed["reason"] == "resumed behind window 2"
    run.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"lr": 0.5, "steps": 3}}, r"model\.lr 1\.0, now 0\.5"),
        ({"seed": 1}, r"seed 0, now 1"),
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


@pytest.mark.parametrize("damaged", ["", "[]", b"\xff\xfe"])
def test_damaged_settings_are_refused_in_one_line(path, damaged):
    stopped(path)
    (path / "run.json").write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
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
    assert set(content(path)) - set(own) == {".lock", "run.json", "journal.sqlite", *_beside("journal.sqlite")}
    assert list(run.journal.events()) == []
    run.close()


def _beside(name: str) -> set[str]:
    return {f"{name}-wal", f"{name}-shm"}


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


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_checkpoint_that_the_journal_does_not_know_is_refused(path, damage):
    stopped(path, windows=2)
    file = path / CHECKPOINT
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes({"flip": flipped, "cut": whole[:-1], "empty": b""}[damage])
    with pytest.raises(RepairError, match=r"is damaged: the journal knows no such content; restore it from a copy, or"):
        begin(path)
    file.write_bytes(whole)
    run = begin(path)
    assert run.checkpoint
    run.close()


# -- a directory that cannot be written --------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Told:
    """Takes down what it is told, and whether the file had its name by then."""

    def __init__(self, path: Path) -> None:
        self.path, self.hashes, self.there = path, [], []

    def __call__(self, sha256: str) -> None:
        self.hashes.append(sha256)
        self.there.append(self.path.exists() and files_hash([self.path]) == sha256)


@pytest.fixture
def saver(tmp_path) -> DurableCheckpointIO:
    return DurableCheckpointIO(Told(tmp_path / "deep" / "last.ckpt"), Segments(tmp_path / "deep" / "segments"))


STATE = {"tensor": torch.arange(5000.0), "text": "ü"}


def loaded(path: Path):
    return torch.load(path, weights_only=True)


def test_the_journal_knows_a_checkpoint_before_it_gets_its_name(saver):
    path = saver.tell.path
    saver.save_checkpoint(STATE, str(path))
    assert saver.tell.hashes == [files_hash([path])]
    assert saver.tell.there == [False]
    assert torch.equal(loaded(path)["tensor"], STATE["tensor"])
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    saver.save_checkpoint({"n": 2}, path)
    assert saver.tell.hashes[1] == files_hash([path]) != saver.tell.hashes[0]
    assert saver.tell.there == [False, False]


def keeps_the_previous(saver: DurableCheckpointIO, error: type[Exception], match: str) -> None:
    """A second save that is refused, behind a first that was good, and a third."""
    path = saver.tell.path
    previous = path.read_bytes()
    with pytest.raises(error, match=match) as caught:
        saver.save_checkpoint({"n": torch.ones(100_000)}, path)
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == previous
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]  # what failed takes no room


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "open"])
def test_a_failing_write_keeps_the_previous_one(saver, monkeypatch, where):
    saver.save_checkpoint(STATE, saver.tell.path)
    if where == "write":
        monkeypatch.setattr(run_dir._Hashed, "write", full)
    elif where == "open":
        monkeypatch.setattr(run_dir, "open", full, raising=False)
    else:
        monkeypatch.setattr(run_dir.os, where, full)
    keeps_the_previous(saver, RepairError, r"last\.ckpt' cannot be written \(No space left on device\); the previous")
    monkeypatch.undo()
    saver.save_checkpoint({"n": 3}, saver.tell.path)
    assert loaded(saver.tell.path) == {"n": 3}


def test_a_disk_that_gives_back_something_else_is_found_out(saver, monkeypatch):
    saver.save_checkpoint(STATE, saver.tell.path)
    real = run_dir.os.fsync

    def rot(handle: int) -> None:
        real(handle)
        os.pwrite(handle, b"\x00\x01\x02", 700)

    monkeypatch.setattr(run_dir.os, "fsync", rot)
    keeps_the_previous(saver, RepairError, "what is read back is not what was written; check the disk")
    assert len(saver.tell.hashes) == 1  # and the journal is not told


def test_a_told_checkpoint_that_never_got_its_name_is_void(path):
    """Killed between telling the journal and the rename: the run goes on from the checkpoint before."""
    stopped(path, windows=1)
    journal = Journal(path / "journal.sqlite")
    journal.checkpoint("0" * 64, 2)
    journal.close()
    run = begin(path)
    assert run.journal.seq_of("0" * 64) is None
    assert run.checkpoint
    run.close()


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
