"""Whole runs on one, two and three real processes: the same edits, nothing lost, whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from lives import command, events, fingerprint, finish, plain_edits, start
from safetensors.torch import load_file

from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.world import edits_path

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

NUMBER, WINDOW = 27, 6
"""Four whole windows and one of three edits, which three ranks share unevenly after a cluster of odd size."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    plain_edits(found / "plain.jsonl", NUMBER)
    lines = edits_path().read_text().splitlines()[:NUMBER]
    (found / "scored.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return found


def arguments(folder: Path, name: str, ranks: int, *options: str, edits: str = "plain") -> list[str]:
    given = command(folder / f"{edits}.jsonl", folder / name, window=WINDOW)
    return [*given, "--trainer.devices", str(ranks), *options]


def run(folder: Path, name: str, ranks: int, *options: str, edits: str = "plain") -> Path:
    code, output = finish(arguments(folder, name, ranks, *options, edits=edits))
    assert code == 0, output
    return whole(folder / name)


def whole(run: Path) -> Path:
    """Every edit of a finished run is held by a shard, and the journal, written by one rank, says the same."""
    ledger = Ledger.from_parquet(run / "edits.parquet")
    assert len(ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)) == NUMBER, ledger.counts()
    with closing(Journal(run / "journal.sqlite", read_only=True)) as journal:
        assert journal.rebuild() == ledger
    return run


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """Two ranks, undisturbed."""
    return run(folder, "two", 2, edits="plain")


def test_the_same_edits_on_one_two_and_three_ranks(folder):
    """What they answer is the same within 0.02; all ranks have written; one of them has told of it. A window is three
    batches, the last one two: two ranks have unlike numbers of them."""
    scores = {}
    for ranks in (1, 2, 3):
        options = ("--data.batch_size", "2", "--trainer.logger", "lightning.pytorch.loggers.WandbLogger")
        found = metrics(run(folder, f"on-{ranks}", ranks, *options, edits="scored"))
        scores[ranks] = found["final"]
        paces = found.get("ranks", [])
        assert sum(pace["edits"] for pace in paces) == (NUMBER if ranks > 1 else 0)
        assert all(pace["edits"] for pace in paces)
        assert len(paces) == (ranks if ranks > 1 else 0)
        rows = (folder / f"on-{ranks}" / "generations.jsonl").read_text().splitlines()
        told = ("stage", "id", "kind", "prompt", "form")
        assert len(rows) == len({tuple(json.loads(row).get(key) for key in told) for row in rows})
    for protocol in ("autoregressive", "teacher_forced"):
        assert scores[1][protocol]["op"] > 0.9
        for ranks in (2, 3):
            assert scores[ranks][protocol]["op"] == pytest.approx(scores[1][protocol]["op"], abs=0.02)


def under_way(folder: Path, name: str, ranks: int, *options: str) -> subprocess.Popen[str]:
    """A run that has written two windows."""
    process = start(arguments(folder, name, ranks, *options))
    while events(folder / name) < 2 * WINDOW:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    return process


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The id of a rank's process, which the run's own has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def ended(process: subprocess.Popen[str]) -> str:
    """What a run has said that ended because a rank was lost."""
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    return output


def test_a_killed_rank_is_named_and_the_run_goes_on_with_any_number(folder, two):
    """Rank 1 is killed from outside; the same command ends as the undisturbed run, bit by bit; three ranks, which were
    not there before, lose nothing either."""
    process = under_way(folder, "killed", 2)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    assert "error: rank 1 is lost: its process ended with code -9; the same command goes on" in ended(process)
    shutil.copytree(folder / "killed", folder / "killed-3")
    run(folder, "killed", 2)
    assert fingerprint(folder / "killed") == fingerprint(two)
    run(folder, "killed-3", 3)


@pytest.mark.parametrize(("rank", "moment"), [(0, "before the third checkpoint's rename"), (1, "in the third window")])
def test_killed_at_a_moment(folder, two, rank, moment):
    """While the first rank saves or merges, or the second one writes; started by torchrun, which names the rank."""
    name = moment.replace(" ", "-").replace("'", "")
    code, output = finish(arguments(folder, name, 2), kill_at=f"rank {rank}: {moment}", ranks=2)
    assert code == 1, output
    assert f"rank      : {rank} (local_rank: {rank})" in output
    run(folder, name, 2)
    assert fingerprint(folder / name) == fingerprint(two)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_not_waited_for(folder, rank):
    strategy = ["--trainer.strategy", "repair_lightning.training.strategies.ShardParallelStrategy"]
    process = under_way(folder, f"still-{rank}", 2, *strategy, "--trainer.strategy.lost_after", "4")
    os.kill(rank_of(process, rank), signal.SIGSTOP)
    assert f"error: rank {1 - rank} does not hear the others any more (Timed out waiting 4000ms" in ended(process)


def test_killed_outright_a_run_leaves_no_rank(folder):
    process = under_way(folder, "all-killed", 2)
    ranks = [rank_of(process, rank) for rank in range(2)]
    process.kill()
    process.communicate(timeout=60)  # until the ranks have closed what it would print to
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in ranks)


def test_machines_that_do_not_come_are_not_waited_for(folder, monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    strategy = ["--trainer.strategy", "repair_lightning.training.strategies.ShardParallelStrategy"]
    options = (*strategy, "--trainer.strategy.meet_within", "2", "--trainer.num_nodes", "2")
    code, output = finish(arguments(folder, "alone", 2, *options))
    assert code == 75, output
    assert "error: not all of 4 ranks have come within 2 s; start as many as devices x num_nodes says" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("editor", ["repair", "ultraedit"])
def test_a_window_without_a_batch_for_every_rank(folder, editor):
    """A rank without a batch, and a method without an optimiser, save with the others."""
    name = f"one-by-one-{editor}"
    options = ("--data.window", "1", "--data.max_edits", "5")
    options += () if editor == "repair" else ("--config", editor)
    code, output = finish([*arguments(folder, name, 2), *options])
    assert code == 0, output
    journal = sqlite3.connect(folder / name / "journal.sqlite")
    assert journal.execute("select windows from checkpoint").fetchone() == (4,)
    journal.close()


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [("max_time", "00:01:00:00", "give trainer.max_epochs"), ("strategy", "ddp_spawn", "give one of: auto, ddp")],
)
def test_what_ranks_cannot_run_is_refused(folder, option, value, remedy):
    """What would stop them at different places, and a strategy that cannot run a stream."""
    code, output = finish(arguments(folder, option, 2, f"--trainer.{option}", value))
    assert code == 2
    assert f"error: trainer.{option} " in output
    assert remedy in output


def test_a_mistake_is_said_once(folder):
    code, output = finish(arguments(folder, "mistake", 2, "--data.path", "nowhere.jsonl"), ranks=2)
    assert code == 1
    assert output.count("error: nowhere.jsonl: no such file") == 1
    assert not (folder / "mistake" / "journal.sqlite").exists()


def test_what_a_rank_alone_meets_is_said_by_the_first(folder):
    """A directory that another run holds: the first rank alone looks, and both end."""
    blocker = under_way(folder, "held", 1)
    blocker.send_signal(signal.SIGSTOP)
    code, output = finish(arguments(folder, "held", 2))
    blocker.kill()
    blocker.communicate()
    assert code == 2
    assert output.count("is in use by another run") == 1


def test_sigterm_ends_all_ranks_and_is_said_once(folder, two):
    process = under_way(folder, "term", 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.count("stopped by SIGTERM") == 1
    assert "Traceback" not in output
    run(folder, "term", 2)
    assert fingerprint(folder / "term") == fingerprint(two)


DENSE = ("--model", "Repair", "--merge.enabled", "false")


def test_as_slurm_starts_it(folder, two, monkeypatch):
    """Each process is told by the environment who it is; Lightning's own requeueing leaves the signals alone."""
    job = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODEID": 0, "JOB_ID": 17, "JOB_NAME": "edit"}
    for name, value in {**job, "JOB_NODELIST": "127.0.0.1", "NODELIST": "127.0.0.1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    processes = []
    for rank in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_LOCALID", str(rank))
        processes.append(start(arguments(folder, "slurm", 2)))
    while events(folder / "slurm") < WINDOW:
        time.sleep(0.05)
        assert processes[0].poll() is None, processes[0].communicate()[0]
    handled = Path(f"/proc/{processes[0].pid}/status").read_text().split("SigCgt:")[1].split()[0]
    assert not int(handled, 16) >> (signal.SIGUSR1 - 1) & 1
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert fingerprint(whole(folder / "slurm")) == fingerprint(two)


def test_the_rows_of_a_batch_on_two_ranks_are_one_batch(folder):
    """Data-parallel: the ranks' gradients add up to the gradient, of distillation and routing loss as well.

    Few steps: Adam divides by what may be rounding, so the way of a coordinate without gradient is not determined.
    """
    losses = ("--model.distillation.weight", "1", "--model.distillation.temperature", "2", "--feedback.enabled")
    losses += ("false", "--model.routing.weight", "1", "--model.writing.steps", "5")
    one = run(folder, "rows-1", 1, *DENSE, *losses)
    both = run(folder, "rows-2", 2, *DENSE, *losses, "--trainer.strategy", "ddp")
    deltas = [load_file(found / "pack/side_memory.safetensors") for found in (one, both)]
    names = [name for name in deltas[0] if name.startswith("shard.")]
    assert names
    for name in names:
        assert (deltas[0][name] - deltas[1][name]).norm() < 1e-3 * deltas[0][name].norm()


def test_dense_shards_of_two_ranks(folder):
    """Each rank writes shards of its own; both hold all of them at the end."""
    found = metrics(run(folder, "dense-2", 2, *DENSE))
    assert found["shards"] == 2
    assert found["edits"]["written"] == NUMBER


def test_a_base_laid_out_over_two_ranks(folder):
    """FSDP2: each rank holds half of every layer but the edited one, and what comes of it is what one process makes."""
    one = run(folder, "whole-base", 1, "--model.layer", "1")
    both = run(folder, "half-base", 2, "--model.layer", "1", "--trainer.strategy", "model_parallel")
    assert fingerprint(one) == fingerprint(both)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
def test_two_hosts(folder, two):
    """Two network namespaces that know each other by a virtual cable alone, one rank on each, started by torchrun."""
    script = Path(__file__).with_name("hosts.sh")
    options = arguments(folder, "hosts", 1)
    given = [
        word
        for i, word in enumerate(options)
        if not {"--run_dir", "--trainer.devices"} & set(options[max(i - 1, 0) : i + 1])
    ]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "", "HTTP_PROXY": ""}
    done = subprocess.run(
        ["bash", str(script), str(folder / "hosts"), *given], env=environment, capture_output=True, text=True
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("needs the right to make network namespaces")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fingerprint(whole(folder / "hosts")) == fingerprint(two)
