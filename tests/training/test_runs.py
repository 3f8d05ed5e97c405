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
import torch
from helpers_runs import world_edits, write_edits
from lives import command, events, fingerprint, finish, plain_edits, start
from safetensors.torch import load_file

from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import EditStatus, Ledger

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

NUMBER, WINDOW, FEW = 21, 6, 12
"""Three whole windows and one of three edits, which three ranks share unevenly after a cluster of odd size."""
STRATEGY = ("--trainer.strategy", "repair_lightning.training.strategies.ShardParallelStrategy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    plain_edits(found / "plain.jsonl", NUMBER)
    write_edits(found / "scored.jsonl", world_edits(NUMBER))
    return found


def arguments(
    folder: Path, name: str, ranks: int, *options: str, edits: str = "plain", number: int = NUMBER
) -> list[str]:
    given = command(folder / f"{edits}.jsonl", folder / name, window=WINDOW)
    return [*given, "--data.max_edits", str(number), "--trainer.devices", str(ranks), *options]


def run(folder: Path, name: str, ranks: int, *options: str, edits: str = "plain", number: int = NUMBER) -> Path:
    """A run to its end: every edit is held by a shard, and the journal, written by one rank, says the same."""
    code, output = finish(arguments(folder, name, ranks, *options, edits=edits, number=number))
    assert code == 0, output
    return whole(folder / name, number)


def whole(run: Path, number: int = NUMBER) -> Path:
    ledger = Ledger.from_parquet(run / "edits.parquet")
    assert len(ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)) == number, ledger.counts()
    with closing(Journal(run / "journal.sqlite", read_only=True)) as journal:
        assert journal.rebuild() == ledger
    return run


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def two(folder) -> str:
    """What two ranks, undisturbed, make of the edits."""
    return fingerprint(run(folder, "two", 2))


def test_the_same_edits_on_one_and_three_ranks(folder):
    """What they answer is the same within 0.02; all ranks have written; one of them has told of it. A window is three
    batches, the last one two: three ranks have unlike numbers of them."""
    scores = {}
    for ranks in (1, 3):
        options = ("--data.batch_size", "2", "--trainer.logger", "lightning.pytorch.loggers.WandbLogger")
        found = metrics(run(folder, f"on-{ranks}", ranks, *options, edits="scored"))
        scores[ranks] = found["final"]
        paces = [pace["edits"] for pace in found.get("ranks", [])]
        assert all(paces)
        assert (len(paces), sum(paces)) == ((ranks, NUMBER) if ranks > 1 else (0, 0))
        rows = (folder / f"on-{ranks}" / "generations.jsonl").read_text().splitlines()
        told = ("stage", "id", "kind", "prompt", "form")
        assert len(rows) == len({tuple(json.loads(row).get(key) for key in told) for row in rows})
    for protocol in ("autoregressive", "teacher_forced"):
        assert scores[1][protocol]["op"] > 0.9
        assert scores[3][protocol]["op"] == pytest.approx(scores[1][protocol]["op"], abs=0.02)


def under_way(folder: Path, name: str, ranks: int, *options: str) -> subprocess.Popen[str]:
    """A run that is writing, from its start or from where it was."""
    known = events(folder / name)
    process = start(arguments(folder, name, ranks, *options))
    while events(folder / name) < known + WINDOW + 2:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    return process


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The id of a rank's process, which the run's own has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def ended(process: subprocess.Popen[str], code: int = 75) -> str:
    """What a run has said, once, that ended because a rank was lost or it was stopped."""
    output, _ = process.communicate(timeout=90)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert output.count("error: ") + output.count("stopped by SIGTERM") == 1, output
    return output


@pytest.fixture(scope="module")
def hurt(folder) -> Path:
    """A run whose rank 1 was killed from outside, and is named."""
    process = under_way(folder, "hurt", 2)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    assert "error: rank 1 is lost: its process ended with code -9; the same command goes on" in ended(process)
    shutil.copytree(folder / "hurt", folder / "hurt-3")
    return folder


def test_three_ranks_go_on_where_two_were(hurt):
    run(hurt, "hurt-3", 3)


def test_whoever_dies_the_same_command_goes_on(folder, two, hurt):
    """The first rank, which torchrun started and names, is killed while it saves; a SIGTERM ends all ranks. The run
    ends as the undisturbed one, bit by bit."""
    moment = "rank 0: before the first checkpoint's rename"
    code, output = finish(arguments(folder, "hurt", 2), kill_at=moment, ranks=2)
    assert code == 1, output
    assert "rank      : 0 (local_rank: 0)" in output
    process = under_way(folder, "hurt", 2)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in ended(process, 128 + signal.SIGTERM)
    assert fingerprint(run(folder, "hurt", 2)) == two


def test_a_rank_that_stands_still_is_not_waited_for(folder):
    process = under_way(folder, "still", 2, *STRATEGY, "--trainer.strategy.lost_after", "4")
    os.kill(rank_of(process, 0), signal.SIGSTOP)
    assert "error: rank 1 does not hear the others any more (Timed out waiting 4000ms" in ended(process)


def test_killed_outright_a_run_leaves_no_rank_and_a_directory_that_is_held_is_said_by_the_first(folder):
    """The first rank alone looks whether another run holds the directory, and both end."""
    process = under_way(folder, "held", 2)
    ranks = [rank_of(process, rank) for rank in range(2)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    code, output = finish(arguments(folder, "held", 2))
    assert code == 2
    assert output.count("is in use by another run") == 1
    process.kill()
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    process.communicate(timeout=60)  # until the ranks have closed what it would print to
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in ranks)


def test_machines_that_do_not_come_are_not_waited_for(folder, monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    options = (*STRATEGY, "--trainer.strategy.meet_within", "2", "--trainer.num_nodes", "2")
    code, output = finish(arguments(folder, "alone", 2, *options))
    assert code == 75, output
    assert "error: not all of 4 ranks have come within 2 s; start as many as devices x num_nodes says" in output
    assert "Traceback" not in output


def test_a_window_without_a_batch_for_every_rank(folder):
    """A rank without a batch, and a method without an optimiser, save with the others."""
    options = ("--data.window", "1", "--config", "ultraedit")
    code, output = finish(arguments(folder, "one-by-one", 2, *options, number=5))
    assert code == 0, output
    with closing(sqlite3.connect(folder / "one-by-one" / "journal.sqlite")) as journal:
        assert journal.execute("select windows from checkpoint").fetchone() == (4,)


def test_a_mistake_is_said_once(folder):
    code, output = finish(arguments(folder, "mistake", 2, "--data.path", "nowhere.jsonl"), ranks=2)
    assert code == 1
    assert output.count("error: nowhere.jsonl: no such file") == 1
    assert not (folder / "mistake" / "journal.sqlite").exists()


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
    assert fingerprint(whole(folder / "slurm")) == two


DENSE = ("--model", "Repair", "--merge.enabled", "false")


def test_dense_shards_on_two_ranks_each_its_own_or_the_rows_of_a_batch(folder):
    """Data-parallel: the ranks' gradients add up to the gradient, of distillation and routing loss as well.

    Few steps: Adam divides by what may be rounding, so the way of a coordinate without gradient is not determined.
    """
    losses = ("--model.distillation.weight", "1", "--model.distillation.temperature", "2", "--feedback.enabled")
    losses += ("false", "--model.routing.weight", "1", "--model.writing.steps", "5")
    one = run(folder, "rows-1", 1, *DENSE, *losses, number=FEW)
    both = run(folder, "rows-2", 2, *DENSE, *losses, "--trainer.strategy", "ddp", number=FEW)
    deltas = [load_file(found / "pack/side_memory.safetensors") for found in (one, both)]
    names = [name for name in deltas[0] if name.startswith("shard.")]
    assert names
    for name in names:
        assert (deltas[0][name] - deltas[1][name]).norm() < 1e-3 * deltas[0][name].norm()
    found = metrics(run(folder, "dense-2", 2, *DENSE, number=FEW))
    assert (found["shards"], found["edits"]["written"]) == (2, FEW), "each rank's own; both hold all at the end"


def test_a_base_laid_out_over_two_ranks(folder):
    """FSDP2: each rank holds half of every layer but the edited one, and what comes of it is what one process makes."""
    one = run(folder, "whole-base", 1, "--model.layer", "1", number=FEW)
    both = run(folder, "half-base", 2, "--model.layer", "1", "--trainer.strategy", "model_parallel", number=FEW)
    assert fingerprint(one) == fingerprint(both)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
def test_two_hosts(folder, two):
    """Two network namespaces that know each other by a virtual cable alone, one rank on each, started by torchrun."""
    given = arguments(folder, "hosts", 1)
    for option in ("--run_dir", "--trainer.devices"):  # the script's own
        del given[given.index(option) : given.index(option) + 2]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "", "HTTP_PROXY": ""}
    call = ["bash", str(Path(__file__).with_name("hosts.sh")), str(folder / "hosts"), *given]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        pytest.skip("needs the right to make network namespaces")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fingerprint(whole(folder / "hosts")) == two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_in_bfloat16_on_a_gpu(folder):
    options = ("--model.precision", "bfloat16", "--trainer.accelerator", "gpu")
    found = metrics(run(folder, "gpu", 1, *options))
    assert found["edits"]["written"] == NUMBER
    assert found["final"]["autoregressive"]["rel"] == 1.0
