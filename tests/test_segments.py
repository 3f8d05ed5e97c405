"""Segments: whatever rows come and go, and wherever a process is killed, what a checkpoint names is there."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair_lightning.commands.run_dir import CHECKPOINT, ROWS, RunDirectory
from repair_lightning.edits import segments
from repair_lightning.edits.segments import FAN, Segments
from repair_lightning.errors import RepairError
from repair_lightning.memory.rows import Rows


def rows_of(numbers, width: int = 3) -> Rows:
    """A table whose rows say their own number."""
    numbers = torch.tensor(sorted(numbers), dtype=torch.long)

    def take(start: int, stop: int) -> dict[str, torch.Tensor]:
        return {"what": numbers[start:stop, None].expand(-1, width).float()}

    return Rows(numbers, take)


def held(found: Segments, said: dict) -> list[int]:
    """The numbers of the rows that a checkpoint names, read from the disk; every row says its own."""
    parts = found.read(said).get("t", [])
    for part in parts:
        assert bool((part.tensors["what"] == part.tensors["numbers"][:, None]).all())
    return [number for part in parts for number in part.tensors["numbers"][part.kept].tolist()]


def saved(found: Segments, numbers) -> dict:
    """A checkpoint that got its name."""
    said = found.write({"t": rows_of(numbers)} if numbers else {})
    found.accept()
    found.sweep()
    return said


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rows_come_and_go_and_come_back(tmp_path_factory, seed):
    """Also such as were gone when the last checkpoint was written: a rollback brings them back."""
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("s")
    found, live, gone, following = Segments(folder), set(), set(), 0
    for _ in range(30):
        coming = range(following, following + draw.randint(0, 12))
        following = coming.stop
        leaving = set(draw.sample(sorted(live), draw.choice([0, 0, 0, len(live) // 3, len(live)])))
        back = set(draw.sample(sorted(gone), min(len(gone), draw.choice([0, 0, 0, 3]))))
        live, gone = (live | set(coming) | back) - leaving, (gone | leaving) - back
        said = saved(found, live)
        assert held(found, said) == sorted(live)
        assert {file.name for file in folder.iterdir()} == {s.name for s in found._tables.get("t", ())}
        if draw.random() < 0.3:
            found = Segments(folder)
            found.adopt(said)


def test_a_row_is_written_a_few_times_and_files_stay_few(tmp_path):
    """Of 100 checkpoints: with eight to one, no row is written more than once per level, of which there are three."""
    found, written = Segments(tmp_path), 0
    real = found._stored

    def counted(table, rows, span):
        nonlocal written
        written += 0 if span.segment.name else span.stop - span.start
        return real(table, rows, span)

    found._stored = counted
    for checkpoint in range(1, 101):
        saved(found, range(2 * checkpoint))
        assert len(list(tmp_path.iterdir())) <= 3 * (FAN - 1)
    assert 200 <= written <= 3 * 200


# -- with the checkpoint that names them -------------------------------------------------------------------------------


class Run:
    """A run that saves tables of rows behind every window."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = RunDirectory(path)
        self.run.open({"seed": 0})
        self.run.begin()
        self.io = self.run.checkpoint_io(lambda: 0)

    def save(self, numbers) -> None:
        """A checkpoint of the table with these rows."""
        self.io.save_checkpoint({ROWS: {"t": rows_of(numbers)}, "last": max(numbers)}, self.path / CHECKPOINT)

    def load(self) -> list[int]:
        """The rows of the run's checkpoint."""
        found = self.io.load_checkpoint(self.run.checkpoint, weights_only=True)
        numbers = [n for part in found[ROWS]["t"] for n in part.tensors["numbers"][part.kept].tolist()]
        assert found["last"] == max(numbers)
        return numbers

    def close(self) -> None:
        self.run.close()


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in (path / "checkpoints").rglob("*") if file.is_file()}


def killed_everywhere(path: Path, monkeypatch, act) -> list[Path]:
    """Copies of the directory as it was before and after every call that changes the disk."""
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
            patch.setattr(segments.os, name, watched(getattr(segments.os, name)))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        act()
    return copies


def test_killed_anywhere_the_last_named_checkpoint_is_whole(tmp_path, monkeypatch):
    """A save that joins eight segments and drops rows, cut off at every one of its steps: the run goes on from the
    checkpoint before or from this one, holds all of its rows, and nothing is left lying about."""
    run = Run(tmp_path / "run")
    for window in range(1, FAN):
        run.save(range(3 * window))
    before = [*range(3 * (FAN - 1))]
    after = [*range(1, 3 * FAN)]
    copies = killed_everywhere(run.path, monkeypatch, lambda: run.save(after))
    run.close()
    assert len(copies) > 20
    seen = []
    for copy in copies:
        resumed = Run(copy)
        seen.append(resumed.load())
        assert seen[-1] in (before, after)
        named = {f"checkpoints/segments/{s.name}" for s in resumed.run.segments._tables["t"]}
        assert files(copy) == {str(CHECKPOINT)} | named
        resumed.save([*seen[-1], 99])
        resumed.close()
        again = Run(copy)
        assert again.load() == [*seen[-1], 99]
        again.close()
    assert before in seen
    assert after in seen


@pytest.mark.parametrize("damage", ["missing", "cut", "flip"])
def test_a_damaged_segment_is_refused_in_one_line_and_nothing_changes(tmp_path, damage):
    run = Run(tmp_path / "run")
    run.save(range(3))
    run.save(range(6))
    run.close()
    journal = run.path / "journal.sqlite"
    file = next((run.path / "checkpoints" / "segments").iterdir())
    whole, known = file.read_bytes(), journal.read_bytes()
    flipped = bytes([*whole[:-1], whole[-1] ^ 1])
    file.unlink()
    if damage != "missing":
        file.write_bytes({"cut": whole[:-1], "flip": flipped}[damage])
    problem = "is missing" if damage == "missing" else "is not as it was written"
    with pytest.raises(RepairError, match=rf"is damaged: segment .* {problem}; restore it from a copy, or") as caught:
        Run(run.path)
    assert len(str(caught.value).splitlines()) == 1
    del caught  # its frames hold the directory
    assert journal.read_bytes() == known
    file.write_bytes(whole)
    again = Run(run.path)
    assert again.load() == [*range(6)]
    again.close()


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_save_takes_no_room_and_the_next_one_is_whole(tmp_path, monkeypatch, where):
    run = Run(tmp_path / "run")
    run.save(range(3))
    before = files(run.path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, where, full)
        with pytest.raises(RepairError, match=r"cannot be written \(No space left on device\); the previous one"):
            run.save(range(6))
    assert files(run.path) == before
    run.save(range(9))
    run.close()
    again = Run(run.path)
    assert again.load() == [*range(9)]
    again.close()


def test_a_segment_that_reads_back_otherwise_is_found_out(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    real = segments.os.fsync

    def rot(handle: int) -> None:
        real(handle)
        segments.os.pwrite(handle, b"\x00\x01", 20)

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "fsync", rot)
        with pytest.raises(RepairError, match=r"segment .* what is read back is not what was written; check the disk"):
            run.save(range(3))
    assert files(run.path) == set()
    run.close()


def test_another_checkpoint_of_the_same_run_needs_no_segment(tmp_path):
    """One that a user's own callback saves, in the same folder or elsewhere, between those of the run."""
    run = Run(tmp_path / "run")
    run.save(range(3))
    before = files(run.path)
    others = [run.path / "checkpoints" / "best.ckpt", tmp_path / "other" / "last.ckpt"]
    for other in others:
        run.io.save_checkpoint({ROWS: {"t": rows_of(range(5))}}, other)
    assert files(run.path) - before == {"checkpoints/best.ckpt"}
    run.save(range(4))
    run.close()
    again = Run(run.path)
    assert again.load() == [*range(4)]
    for other in others:
        (part,) = again.io.load_checkpoint(other, weights_only=True)[ROWS]["t"]
        assert part.tensors["what"][part.kept][:, 0].tolist() == [*range(5)]
    assert again.load() == [*range(4)]
    again.close()
