"""Real processes that meet in a gloo group and do one thing each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from repair_lightning.training.team import Team


def _one(rank: int, size: int, folder: str, task: Callable[..., Any], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(task(Team(rank, size, **options)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, task: Callable[[Team], Any], **options: Any) -> list[Any]:
    """What `task(team)` returns on each of `size` ranks; `task` is a function of a module, `options` are the team's."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one, (size, folder, task, options), nprocs=size, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
