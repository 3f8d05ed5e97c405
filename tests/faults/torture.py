"""Everything that may go wrong, done to real runs: `python tests/faults/torture.py [--kills 50] [--out FILE]`.

Each fault is tried on runs of the embedded base in processes of their own. A fault is survived when the run ends, or the
same command given again ends it, with a side memory that is bit by bit the one of an undisturbed run, or when the fault
is refused in one line with exit code 2. Edits are lost when the ledger, or the journal, lacks one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lives import REPOSITORY, command, fingerprint, finish, kill_after, plain_edits, start

from repair_lightning.data.journal import Journal
from repair_lightning.data.ledger import EditStatus, Ledger

MOMENTS = (
    "before the first checkpoint's rename",
    "before the third checkpoint's rename",
    "behind the second checkpoint's rename",
    "while the second checkpoint is written",
    "before the merge",
    "during the merge",
    "behind the merge",
    "during the final scoring",
    "before the pack is saved",
    "behind the pack, before the metrics",
)


@dataclass
class Row:
    """One line of the table: a fault, how often it was tried and survived, and the edits that were lost."""

    fault: str
    tried: int
    survived: int
    lost: int


@dataclass
class Bench:
    """Where the runs lie, their edits, and what an undisturbed run makes of them."""

    folder: Path
    edits: Path
    number: int
    window: int
    expected: str

    @classmethod
    def of(cls, folder: Path, number: int, window: int = 8) -> Bench:
        """Run the edits undisturbed."""
        bench = cls(folder, plain_edits(folder / "edits.jsonl", number), number, window, "")
        code, output = finish(bench.command("whole"))
        assert code == 0, output
        bench.expected = fingerprint(folder / "whole")
        return bench

    def command(self, name: str, *options: str) -> list[str]:
        """The arguments of the run `name`."""
        return command(self.edits, self.folder / name, *options, window=self.window)

    def verdict(self, name: str) -> tuple[bool, int]:
        """Whether a run ended as the undisturbed one, and how many edits it lost."""
        run = self.folder / name
        ledger = Ledger.from_parquet(run / "edits.parquet")
        journal = Journal(run / "journal.sqlite", read_only=True)
        held = set(ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED))
        same = fingerprint(run) == self.expected and journal.rebuild() == ledger
        journal.close()
        return same, self.number - len(held)

    def ends(self, name: str, *options: str) -> tuple[bool, int]:
        """Give the same command again; whether the run then ended as the undisturbed one, and the edits it lost."""
        code, output = finish(self.command(name, *options))
        if code:
            print(output[-2000:], file=sys.stderr)
            return False, self.number
        return self.verdict(name)


def random_kills(bench: Bench, kills: int, seed: int = 0, how: int = signal.SIGKILL) -> Row:
    """One run after another, killed at random moments and resumed, until so many kills have struck."""
    rng = random.Random(seed)
    struck = runs = same = lost = 0
    while struck < kills:
        runs += 1
        name = f"killed{how}-{runs}"
        arguments = bench.command(name)
        while struck < kills and kill_after(arguments, bench.folder / name, rng.uniform(0, 0.6), how):
            struck += 1
        finished = (bench.folder / name / "metrics.json").exists()
        good, gone = bench.verdict(name) if finished else bench.ends(name)
        same, lost = same + good, lost + gone
    return Row(
        f"{signal.Signals(how).name} at a random moment ({runs} runs)", struck, struck if same == runs else 0, lost
    )


def killed_at(bench: Bench, moment: str) -> Row:
    """A run that is killed at a moment, and resumed."""
    name = moment.replace(" ", "-").replace("'", "").replace(",", "")
    code, output = finish(bench.command(name), kill_at=moment)
    assert code == -signal.SIGKILL, f"the premise: killed {moment}; {output}"
    good, lost = bench.ends(name)
    return Row(f"killed {moment}", 1, int(good), lost)


def damaged_checkpoint(bench: Bench, damage: Callable[[Path], None], how: str) -> Row:
    """A stopped run whose checkpoint was damaged is refused; with the checkpoint restored it goes on."""
    name = f"checkpoint-{how}"
    code, output = finish(bench.command(name), kill_at="before the merge")
    assert code == -signal.SIGKILL, output
    path = bench.folder / name / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    damage(path)
    code, output = finish(bench.command(name))
    refused = code == 2 and "is damaged" in output and "Traceback" not in output
    path.write_bytes(whole)
    good, lost = bench.ends(name)
    return Row(f"checkpoint {how}", 1, int(refused and good), lost)


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def two_runs(bench: Bench) -> Row:
    """Of two runs that start on the same directory one is refused, and the other ends undisturbed."""
    both = [start(bench.command("shared")) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    codes = {process.returncode: output for process, output in zip(both, outputs, strict=True)}
    good, lost = bench.verdict("shared")
    refused = set(codes) == {0, 2} and "in use by another run" in codes[2]
    return Row("two runs on one directory", 1, int(refused and good), lost)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A tmpfs of a few megabytes; None where mounting is not allowed."""
    folder.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(bench: Bench, size: str = "700k") -> Row | None:
    """The disk fills during a run: one line, the journal is whole, and with more room the run ends. None: no mount."""
    with small_disk(bench.folder / "small", size) as disk:
        if disk is None:
            return None
        run = disk / "run"
        code, output = finish(command(bench.edits, run, window=bench.window))
        said = code == 2 and output.rstrip().splitlines()[-1].startswith("error: ") and "Traceback" not in output
        if not said:
            print(output[-2000:], file=sys.stderr)
        whole = Journal(run / "journal.sqlite")
        whole.rebuild()
        whole.close()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        code, output = finish(command(bench.edits, run, window=bench.window))
        shutil.copytree(run, bench.folder / "small-done") if code == 0 else print(output[-2000:], file=sys.stderr)
    good, lost = bench.verdict("small-done") if code == 0 else (False, bench.number)
    return Row("a full disk", 1, int(said and good), lost)


def main() -> None:
    """Try everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "torture.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.of(Path(folder), options.edits)
        rows = [
            random_kills(bench, options.kills),
            random_kills(bench, max(1, options.kills // 10), how=signal.SIGTERM),
        ]
        rows += [killed_at(bench, moment) for moment in MOMENTS]
        rows += [
            damaged_checkpoint(bench, truncate, "truncated"),
            damaged_checkpoint(bench, flip_a_bit, "with a flipped bit"),
        ]
        rows += [two_runs(bench)]
        disk = full_disk(bench)
        rows += [disk] if disk else []
    print(f"| fault, on runs of {options.edits} edits | tried | survived | lost edits |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row.fault} | {row.tried} | {row.survived} | {row.lost} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(any(row.survived < row.tried or row.lost for row in rows))


if __name__ == "__main__":
    main()
