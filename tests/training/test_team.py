"""What ranks say to each other, between real processes; and that a team of one changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.errors import ConfigError
from repair_lightning.training.team import ALONE, LeftOutError, RankError, Team

pytestmark = pytest.mark.ddp

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


def _one(rank: int, size: int, folder: str, task) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(task(Team(rank, size)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(folder: Path, size: int, task) -> list:
    """What `task(team)`, a function of this module, returns on each of `size` ranks."""
    mp.start_processes(_one, (size, str(folder), task), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def speak(team: Team) -> dict:
    """Everything that a team can say, once."""
    rank = team.rank
    found: dict = {}
    found["types"] = [
        team.gather(torch.arange(rank * 2).to(kind), torch.full((1, rank, 3), 1).to(kind)) for kind in TYPES
    ]
    mine = team.mine(7, costs=[1, 5, 5, 2, 9, 1, 1])
    found["mine"] = mine
    found["rows"] = team.rows(mine, torch.tensor(mine)[:, None] * torch.ones(1, 2), torch.tensor(mine))
    found["items"] = team.items(mine, [(f"é\udc80{i}" * i, [i, 0.1 * i] * i) for i in mine])
    one = team.mine(1)  # ranks without anything to do
    found["one"] = team.rows(one, torch.ones(len(one), 2 if one else 5)), team.items(one, ["only"] * len(one))
    found["none"] = team.items([], []), team.rows([], torch.zeros(0, 3))[0].shape
    found["first"] = team.first(f"rank {rank}"), team.of_first(torch.full((2,), rank).bfloat16()).tolist()
    found["total"] = team.total(torch.tensor([float(rank), 1.0]))
    found["shape"] = [part[0].shape for part in team.gather(torch.tensor(rank))]
    return found


def disagree(team: Team) -> list[str]:
    """What each rank hears when one of them differs, and when one of them fails."""
    said = []

    def fails() -> str:
        if team.rank == 1:
            raise ConfigError("no such file on this host")
        return "done"

    team.same("the ledger", "equal")
    for task in (lambda: team.same("the ledger", str(team.rank == 1)), lambda: team.together(fails)):
        try:
            task()
        except RankError as error:
            said.append(f"{type(error).__name__}: {error}")
    said.append(team.together(lambda: f"ok {team.rank}"))
    return said


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> list[dict]:
    return on_ranks(tmp_path_factory.mktemp("spoken"), 3, speak)


def test_tensors_of_every_type_and_shape_arrive_as_they_were(spoken):
    for found in spoken:
        for kind, parts in zip(TYPES, found["types"], strict=True):
            for rank, (line, block) in enumerate(parts):
                assert line.dtype == block.dtype == kind
                assert torch.equal(line, torch.arange(rank * 2).to(kind))
                assert block.shape == (1, rank, 3)
                assert bool((block == 1).all())


def test_each_piece_of_work_is_done_once_and_known_to_all(spoken):
    assert sorted(i for found in spoken for i in found["mine"]) == list(range(7))
    assert max(len(found["mine"]) for found in spoken) == 3
    for found in spoken:
        wide, plain = found["rows"]
        assert torch.equal(plain, torch.arange(7))
        assert torch.equal(wide, torch.arange(7.0)[:, None].expand(7, 2))
        assert found["items"] == [(f"é\udc80{i}" * i, [i, 0.1 * i] * i) for i in range(7)]


def test_ranks_without_work_hear_of_the_others_and_all_agree(spoken):
    for found in spoken:
        (rows,), texts = found["one"]
        assert torch.equal(rows, torch.ones(1, 2))
        assert texts == ["only"]
        assert found["none"] == ([], (0, 3))
        assert found["shape"] == [(), (), ()]
        assert found["first"] == ("rank 0", [0.0, 0.0])
        assert found["total"].tolist() == [3.0, 3.0]


def test_a_rank_that_differs_or_fails_is_named_and_all_end(tmp_path):
    first, second = on_ranks(tmp_path, 2, disagree)
    assert first[0].startswith("RankError: rank 1 differs from rank 0 in the ledger")
    assert second[0].startswith("LeftOutError")
    assert first[1] == "RankError: rank 1: no such file on this host"
    assert second[1].startswith("LeftOutError")
    assert (first[2], second[2]) == ("ok 0", "ok 1")
    assert issubclass(LeftOutError, RankError)


@given(number=st.integers(0, 50), size=st.integers(1, 6), data=st.data())
def test_every_piece_has_one_owner_and_nobody_has_two_more_than_another(number, size, data):
    costs = data.draw(st.none() | st.lists(st.floats(0, 9), min_size=number, max_size=number))
    shares = [Team(rank, size).mine(number, costs) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_prompt_is_always_the_same_ranks():
    prompts = [f"Who wrote book {i}?" for i in range(300)]
    for size in (2, 3, 8):
        shares = [Team(rank, size).mine_of(prompts) for rank in range(size)]
        assert sorted(i for share in shares for i in share) == list(range(300))
        assert max(map(len, shares)) < 1.5 * 300 / size
        again = Team(1, size).mine_of(prompts[::-1])
        assert {prompts[::-1][i] for i in again} == {prompts[i] for i in shares[1]}
    assert Team(1, 2, deals=False).mine_of(prompts) == list(range(300))


def test_one_alone_passes_everything_through():
    tensor = torch.ones(2, 3)
    assert ALONE.rows([0, 1], tensor)[0] is tensor
    assert ALONE.total(tensor) is tensor
    assert ALONE.mine(3) == [0, 1, 2]
    assert ALONE.first(["a"]) == ALONE.items([0], ["a"]) == ["a"]
    ALONE.same("anything", "at all")
    with pytest.raises(ConfigError, match="mine"):
        ALONE.together(lambda: (_ for _ in ()).throw(ConfigError("mine")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_with_one_rank(tmp_path):
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1, device_id=device)
    try:
        sent = torch.arange(5, device=device)
        (found,) = Team(0, 1, device)._gather_one(sent, [sent.shape])
        assert torch.equal(found, sent)
    finally:
        dist.destroy_process_group()
