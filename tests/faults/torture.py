"""Everything that may go wrong, done to real runs: `python tests/faults/torture.py [--kills 50] [--out FILE]`.

Each fault is tried on runs of the embedded base in processes of their own. A fault is survived when the run ends, or
the same command given again ends it, with a side memory that is bit by bit the one of an undisturbed run, or when the
fault is refused in one line with exit code 2. Edits are lost when the ledger, or the journal, lacks one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lives import REPOSITORY, command, fingerprint, finish, kill_after, plain_edits, start
from malformed import BY_HAND, malformed, survives
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.records import load_records
from repair_lightning.world import base_dir

MOMENTS = (
    "before the first checkpoint's rename",
    "before the third checkpoint's rename",
    "behind the second checkpoint's rename",
    "while the second checkpoint is written",
    "before the third checkpoint's rows",
    "amid the second checkpoint's rows",
    "before the merge",
    "behind the merge",
    "during the final scoring",
    "before the pack is saved",
    "behind the pack, before the metrics",
)
MERGING = ("--model", "Repair", "--model.writing.capacity", "8")
"""Options of a run whose shards are merged, so that it can be killed meanwhile."""


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
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, number: int, window: int = 8, options: tuple[str, ...] = ()) -> Bench:
        """Run the edits undisturbed."""
        bench = cls(folder, plain_edits(folder / "edits.jsonl", number), number, window, "", options)
        code, output = finish(bench.command("whole"))
        assert code == 0, output
        bench.expected = fingerprint(folder / "whole")
        return bench

    def command(self, name: str, *options: str) -> list[str]:
        """The arguments of the run `name`."""
        return command(self.edits, self.folder / name, *self.options, *options, window=self.window)

    def verdict(self, name: str) -> tuple[bool, int]:
        """Whether a run ended as the undisturbed one, and how many edits it lost."""
        run = self.folder / name
        ledger = Ledger.from_parquet(run / "edits.parquet")
        held = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)
        with closing(Journal(run / "journal.sqlite", read_only=True)) as journal:
            same = fingerprint(run) == self.expected and journal.rebuild() == ledger
        return same, self.number - len(held)

    def ends(self, name: str, *options: str) -> tuple[bool, int]:
        """Give the same command again; whether the run then ended as the undisturbed one, and the edits it lost."""
        code, output = finish(self.command(name, *options))
        if code:
            print(output[-2000:], file=sys.stderr)
            return False, self.number
        return self.verdict(name)


def random_kills(bench: Bench, kills: int, *how: signal.Signals) -> Row:
    """One run after another, killed at random moments and resumed, until so many kills have struck; `how` in turn."""
    rng = random.Random(0)
    names = " and ".join(signal.name for signal in how)
    struck = runs = same = lost = 0
    while struck < kills:
        runs += 1
        name = f"{names.replace(' ', '-')}-{runs}"
        arguments = bench.command(name)
        while struck < kills and kill_after(
            arguments, bench.folder / name, rng.uniform(0, 0.6), how[struck % len(how)]
        ):
            struck += 1
        finished = (bench.folder / name / "metrics.json").exists()
        good, gone = bench.verdict(name) if finished else bench.ends(name)
        same, lost = same + good, lost + gone
    return Row(f"{names} at a random moment ({runs} runs)", struck, struck if same == runs else 0, lost)


def killed(bench: Bench, name: str, moment: str) -> None:
    """Begin a run, or go on with it, until a moment."""
    code, output = finish(bench.command(name), kill_at=moment)
    assert code == -signal.SIGKILL, f"the premise: killed {moment}; {output}"


def killed_at(bench: Bench, moment: str) -> Row:
    """A run that is killed at a moment, and resumed."""
    name = moment.replace(" ", "-").replace("'", "").replace(",", "")
    killed(bench, name, moment)
    good, lost = bench.ends(name)
    return Row(f"killed {moment}", 1, int(good), lost)


def damaged(bench: Bench, *damages: Damage, moments: Sequence[str] = ("before the merge",)) -> list[Row]:
    """A run that was killed, at each of some moments, is refused while one of its files is damaged, and then ends."""
    for moment in moments:
        killed(bench, "damaged", moment)
    with closing(Journal(bench.folder / "damaged" / "journal.sqlite")) as journal:
        journal.check_rows()  # and folds what the killed process left beside it
    said = []
    for file, damage, _ in damages:
        path = bench.folder / "damaged" / file
        whole = path.read_bytes()
        damage(path)
        said.append(refused(*finish(bench.command("damaged")), "is damaged"))
        path.write_bytes(whole)
    good, lost = bench.ends("damaged")
    return [Row(f"{file} {how}", 1, int(was and good), lost) for (file, _, how), was in zip(damages, said, strict=True)]


def flip_a_row(path: Path) -> None:
    """Change one bit of a row that a journal holds."""
    with closing(sqlite3.connect(path)) as database:
        (content,) = database.execute("SELECT content FROM rows WHERE name = 'router' LIMIT 1").fetchone()
    whole = bytearray(path.read_bytes())
    whole[whole.index(content[-64:]) + 63] ^= 1
    path.write_bytes(whole)


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
    said = set(codes) == {0, 2} and "in use by another run" in codes[2]
    return Row("two runs on one directory", 1, int(said and good), lost)


Damage = tuple[str, Callable[[Path], object], str]
DAMAGES: tuple[Damage, ...] = (
    ("checkpoints/last.ckpt", truncate, "truncated"),
    ("checkpoints/last.ckpt", flip_a_bit, "with a flipped bit"),
    ("checkpoints/last.ckpt", Path.unlink, "that is missing"),
    ("journal.sqlite", flip_a_row, "with a flipped bit in a row"),
)


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
        said = refused(code, output)
        with closing(Journal(run / "journal.sqlite")) as whole:
            whole.rebuild()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        code, output = finish(command(bench.edits, run, window=bench.window))
        shutil.copytree(run, bench.folder / "small-done") if code == 0 else print(output[-2000:], file=sys.stderr)
    good, lost = bench.verdict("small-done") if code == 0 else (False, bench.number)
    return Row("a full disk", 1, int(said and good), lost)


def refused(code: int, output: str, *words: str) -> bool:
    """Exit code 2 and one line that says why."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    one = len(errors) == 1 and output.rstrip().splitlines()[-1] == errors[0]
    good = code == 2 and one and "Traceback" not in output and all(word in errors[0] for word in words)
    if not good:
        print(output[-2000:], file=sys.stderr)
    return good


def malformed_records(folder: Path, number: int = 300) -> Row:
    """Record files by hand and by chance, through the reader of every format."""
    folder.mkdir()
    tried = survived = 0
    for name, content in malformed(number):
        (folder / name).write_bytes(content)
        tried, survived = tried + 1, survived + survives(folder / name)
    return Row("a malformed file of records, read in every format", tried, survived, 0)


def malformed_from_command_line(bench: Bench, number: int = 12) -> Row:
    """Some of the files by hand through the real command: refused, and nothing is written."""
    survived = 0
    names = random.Random(0).sample(sorted(BY_HAND), number)
    for n, name in enumerate(names):
        path, run = bench.folder / name, bench.folder / f"malformed-{n}"
        path.write_bytes(BY_HAND[name])
        good = refused(*finish(command(path, run)), path.suffix)
        survived += good and {file.name for file in run.glob("**/*")} <= {".lock"}
    return Row("a malformed file of records, from the command line", len(names), survived, 0)


def with_a_nan(bench: Bench) -> tuple[Path, str]:
    """A base to which a word of one edit alone is infinite, and the edit's id: its loss cannot be finite."""
    folder = bench.folder / "base-with-a-nan"
    shutil.copytree(base_dir(), folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edits = load_records(bench.edits).edits
    asked = [(edit.prompt, f" {edit.prompt}", f" {edit.target}") for edit in edits]  # alone, and after other text
    words = [{id for text in texts for id in tokenizer(text)["input_ids"]} for texts in asked]
    at = len(edits) // 2
    own = words[at] - {word for i, others in enumerate(words) for word in others if i != at}
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][sorted(own)] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder, edits[at].id


def a_nan(bench: Bench) -> Row:
    """One edit's loss is not finite: it is reported, the others are written and nothing else suffers."""
    base, bad = with_a_nan(bench)
    code, output = finish(bench.command("nan", "--model.base", str(base)))
    if code:
        print(output[-2000:], file=sys.stderr)
        return Row("a loss that is not finite", 1, 0, bench.number)
    ledger = Ledger.from_parquet(bench.folder / "nan" / "edits.parquet")
    given_up = ledger.with_status(EditStatus.QUARANTINED)
    with closing(Journal(bench.folder / "nan" / "journal.sqlite", read_only=True)) as journal:
        said = given_up == [bad] and any("not finite" in event["reason"] for event in journal.events(bad))
    finite = all(tensor.isfinite().all() for tensor in load_file(bench.folder / "nan" / WEIGHTS).values())
    held = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)
    return Row("a loss that is not finite", 1, int(said and finite), bench.number - 1 - len(held))


WEIGHTS = Path("pack") / "side_memory.safetensors"


class Bomb:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def damaged_packs(bench: Bench) -> list[Row]:
    """A truncated, a bit-flipped and a foreign pack, and one that is a pickle: refused, and no code of theirs runs."""
    mark = bench.folder / "exploded"
    damages: dict[str, Callable[[Path], object]] = {
        "truncated": truncate,
        "with a flipped bit": flip_a_bit,
        "that is a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(mark))),
        "for another base": lambda path: None,
    }
    rows = []
    for n, (name, damage) in enumerate(damages.items()):
        pack = bench.folder / f"pack-{n}"
        shutil.copytree(bench.folder / "whole" / "pack", pack)
        damage(pack / WEIGHTS.name)
        foreign = name == "for another base"
        base, word = (with_a_nan(bench)[0], "the pack belongs to base") if foreign else ("world", "is damaged")
        call = [sys.executable, str(REPOSITORY / "evaluate.py"), "--pack", str(pack), "--base", str(base)]
        done = subprocess.run([*call, "--data.path", str(bench.edits)], capture_output=True, text=True)
        good = refused(done.returncode, done.stdout + done.stderr, word) and not mark.exists()
        rows.append(Row(f"a pack {name}", 1, int(good), 0))
    return rows


def main() -> None:
    """Try everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--records", type=int, default=300, help="malformed files that are made by chance")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "torture.json")
    options = parser.parse_args()
    if options.edits <= 3 * options.window:
        parser.error("give more edits than three windows hold: a run is killed at its third checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.of(Path(folder), options.edits, options.window)
        rows = [
            random_kills(bench, options.kills, signal.SIGKILL),
            random_kills(bench, max(1, options.kills // 10), signal.SIGTERM),
        ]
        rows += [killed_at(bench, moment) for moment in MOMENTS]
        rows += [*damaged(bench, *DAMAGES), two_runs(bench)]
        disk = full_disk(bench)
        rows += [disk] if disk else []
        rows += [a_nan(bench), *damaged_packs(bench)]
        rows += [malformed_from_command_line(bench), malformed_records(bench.folder / "records", options.records)]
    print(f"| fault, on runs of {options.edits} edits | tried | survived | lost edits |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row.fault} | {row.tried} | {row.survived} | {row.lost} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(any(row.survived < row.tried or row.lost for row in rows))


if __name__ == "__main__":
    main()
