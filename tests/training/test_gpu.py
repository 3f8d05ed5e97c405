"""On a GPU, where there is one: a stream in bfloat16, and what ranks say over NCCL."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from lives import command, finish, plain_edits

from repair_lightning.training.team import Team

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_stream_in_bfloat16(tmp_path):
    given = command(plain_edits(tmp_path / "edits.jsonl", 24), tmp_path / "run", "--model.precision", "bfloat16")
    code, output = finish([*given, "--trainer.accelerator", "gpu", "--trainer.devices", "1"])
    assert code == 0, output
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["edits"]["written"] == 24
    assert found["final"]["autoregressive"]["rel"] == 1.0


def test_nccl_with_one_rank(tmp_path):
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1, device_id=device)
    try:
        sent = torch.arange(5, device=device)
        (found,) = Team(0, 1, device)._gather_one(sent, [sent.shape])
        assert torch.equal(found, sent)
        dist.all_reduce(sent)
        assert sent.tolist() == [0, 1, 2, 3, 4]
    finally:
        dist.destroy_process_group()
