"""Ranks that wait for each other and one does not come: a process that stands in code that hears nothing."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

MEET = """
import signal, subprocess, sys
import torch.distributed as dist
from repair_lightning.training.watch import Meeting

port, rank, patience, *child = sys.argv[1:]
children = [subprocess.Popen(child)]
signal.signal(signal.SIGTERM, lambda *_: None)  # a handler, as the command line has one
with Meeting(int(rank), 16, children, float(patience)):
    print("waiting", flush=True)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=16)
"""


def meeting(rank: int, patience: float, *child: str) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-c", MEET, str(port), str(rank), str(patience), *child]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert "waiting" in process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("rank", "patience", "child", "said"),
    [
        (0, 60, ["false"], "error: rank 1 is lost: its process ended with code 1 before the ranks had met"),
        (8, 60, ["false"], "error: rank 9 is lost: its process ended with code 1 before the ranks had met"),
        (0, 0.5, ["sleep", "60"], "error: not all of 16 ranks have come within 0 s; start as many as devices x num"),
    ],
)
def test_who_does_not_come_is_not_waited_for(rank, patience, child, said):
    process = meeting(rank, patience, *child)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert said in output


def test_a_signal_is_heard_while_the_ranks_meet():
    process = meeting(0, 60, "sleep", "60")
    signal_at(process)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert output == "stopped by SIGTERM before the ranks had met\n"


def signal_at(process: subprocess.Popen) -> None:
    time.sleep(0.5)  # it stands in the meeting by now, or will hear of it when it does
    process.send_signal(signal.SIGTERM)
