"""The bank of shards: identities, masks, storage, and the batched application against a loop over rows."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.errors import RepairError
from repair_lightning.memory.shards import Factors, LowRankShard
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

SHAPE = (6, 10)
RATIOS = [1.0, 0.3]


def bank(shards: int = 3, mask_ratio: float = 0.3, seed: int = 0) -> SideMemory:
    """A bank whose shards hold random deltas inside their masks."""
    memory = SideMemory(SHAPE, mask_ratio, seed)
    for _ in range(shards):
        shard = memory[memory.open_shard()]
        noise = torch.randn(SHAPE)
        shard.delta.data.copy_(noise if shard.open is None else noise.masked_fill(~shard.open, 0.0))
    return memory


@pytest.mark.parametrize("ratio", RATIOS)
def test_ids_are_never_used_twice(ratio):
    memory = bank(3, ratio)
    assert memory.ids == [0, 1, 2]
    delta = memory[0].delta.detach() + memory[2].delta.detach()
    assert memory.fuse([0, 2], delta) == 3
    assert torch.equal(memory[3].delta, delta)
    assert memory.ids == [1, 3]
    with pytest.raises(RepairError, match=r"there is no shard 0; known: \[1, 3\]"):
        memory[0]
    assert memory.open_shard() == 4
    memory.prune(1)
    assert not memory[1].delta.any()
    assert (memory[1].generation, memory[3].generation) == (1, 0)
    assert torch.equal(memory[3].delta, delta), "no other shard is touched"
    assert memory.fuse([1, 3, 4], torch.zeros(SHAPE)) == 5
    assert memory.open_shard() == 6
    assert memory.ids == [5, 6]
    assert len(memory) == 2


def test_masks_are_determined_by_seed_id_and_generation():
    """The order in which shards are opened and pruned, and the global generator, must not matter."""
    one, two = SideMemory(SHAPE, 0.3, seed=5), SideMemory(SHAPE, 0.3, seed=5)
    one.open_shard()
    one.prune(0)
    torch.manual_seed(99)
    one.open_shard()
    two.open_shard()
    two.open_shard()
    two.prune(0)
    assert torch.equal(one[0].mask, two[0].mask)
    assert torch.equal(one[1].mask, two[1].mask)
    masks = [bank(2, 0.3, seed)[shard].mask for seed in (0, 1, 5) for shard in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def slow_rows(memory, output, activations, choice):
    rows = []
    for y, a, shard in zip(output, activations, choice.tolist(), strict=True):
        if shard == BASE:
            rows.append(y)
        else:
            rows.append(y + (a.double() @ memory[shard].delta.detach().double().T).to(y.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("choice", [[0, 0], [0, BASE]])
def test_gradients_reach_the_shard_and_no_other(choice):
    memory = bank(2, 1.0)
    found = memory.select(torch.tensor(choice))(torch.zeros(2, 3, SHAPE[0]), torch.randn(2, 3, SHAPE[1]))
    found.square().sum().backward()
    assert memory[0].delta.grad.abs().sum() > 0
    assert memory[1].delta.grad is None


class TestStorage:
    @pytest.mark.parametrize("ratio", RATIOS)
    @pytest.mark.parametrize("there", [0.3, 1.0])
    def test_into_a_bank_with_other_shards_bit_by_bit(self, ratio, there, tmp_path):
        """Of another number, other masks or none; signs of zero and what is no number come along."""
        memory, other = bank(3, ratio, seed=1), bank(5, there, seed=2)
        mask = memory[1].mask if ratio < 1 else torch.ones(SHAPE, dtype=torch.bool)
        odd = torch.tensor([-0.0, torch.nan, torch.inf, 1e-42])
        memory[1].delta.data[mask.nonzero()[:4].unbind(1)] = odd
        memory.prune(2)
        torch.save(memory.state_dict(), tmp_path / "bank.pt")
        other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
        assert other.ids == memory.ids
        for shard in memory.ids:
            found, kept = other[shard], memory[shard]
            assert torch.equal(found.delta.view(torch.int32), kept.delta.view(torch.int32))
            assert torch.equal(found.mask, kept.mask)
            assert found.generation == kept.generation
            assert found.delta.requires_grad
        for either in (memory, other):
            either.prune(0)
            assert either.open_shard() == 3, "it goes on as the stored one would"

    def test_dense_masked_and_low_rank_shards_side_by_side(self):
        """As a bank is after a merge of what was masked, beside edits with shards of their own."""
        memory = bank(2, 0.3)
        memory.add(torch.randn(SHAPE[0], 2), torch.randn(2, SHAPE[1]))
        memory.shards["0"] = bank(1, 1.0)[0]
        memory.add(torch.randn(SHAPE[0], 1), torch.randn(1, SHAPE[1]))
        fresh = bank(4, 0.3)
        with pytest.raises(RepairError, match=r"lacks 2 low-rank shards; set `offered` to the `rows` beside it"):
            fresh.load_state_dict(memory.state_dict())
        fresh.offered = memory.rows()
        fresh.load_state_dict(memory.state_dict())
        assert fresh.ids == memory.ids == [0, 1, 2, 3]
        assert [type(fresh[i]) for i in fresh.ids] == [type(memory[i]) for i in memory.ids]
        assert all(torch.equal(fresh[i].delta, memory[i].delta) for i in memory.ids)
        assert (fresh[0].open is None, fresh[1].open is None) == (True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_low_rank_shards_of_several_ranks_row_by_row(dtype):
    """Grouped over the batch against each row with its shard's whole matrix; applied at several lengths."""
    memory = bank(2, 0.3)
    for rank in (1, 3, 2):
        memory.add(torch.randn(SHAPE[0], rank), torch.randn(rank, SHAPE[1]))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for choice in ([0, 3, BASE, 2, 3, 4, 1, BASE, 0], [4, 2, 4], [BASE, 3], [2, 2], [BASE, BASE], [1, 4]):
        selection = memory.select(torch.tensor(choice))
        assert bool(selection) == any(shard != BASE for shard in choice)
        for length in (5, 1):  # a prompt, then a token that is generated
            output = torch.randn(len(choice), length, SHAPE[0]).to(dtype)
            activations = torch.randn(len(choice), length, SHAPE[1]).to(dtype)
            with torch.no_grad():
                found = selection(output, activations)
            expected = slow_rows(memory, output, activations, torch.tensor(choice))
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            base = torch.tensor(choice) == BASE
            assert torch.equal(found[base], output[base])


def test_shards_on_the_host_stay_there():
    """The bank goes to a device (here one without memory of its own); what each shard answers is the same."""
    here, there = SideMemory((4, 6)), SideMemory((4, 6), host=True)
    left, right = torch.randn(4, 2), torch.randn(2, 6)
    for bank in (here, there):
        bank.add(left, right)
        bank.open_shard()
        bank.add(2 * left, right)
    output, activations = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    chosen = torch.tensor([0, BASE, 2])
    assert torch.equal(here.select(chosen)(output, activations), there.select(chosen)(output, activations))
    there.to("meta")
    assert [there[0].left.device.type, there[1].delta.device.type, there[2].right.device.type] == ["cpu", "meta", "cpu"]
    loaded = SideMemory((4, 6), host=True)
    loaded.load_low_rank(there.low_rank_tensors())
    assert torch.equal(loaded[2].delta, here[2].delta)
    loaded.to("meta")
    assert loaded[2].left.device.type == "cpu"


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_byte_per_entry_holds_what_the_factors_gave(size):
    """An entry is off by half a step of 1/127 of its column's or row's largest, whichever of the two is large."""
    memory, left, right = SideMemory((40, 60), int8=True), size * torch.randn(40, 3), torch.randn(3, 60) / size
    memory.add(left, right)
    lost = (memory[0].delta - left @ right).abs()
    steps = left.abs().amax(0) / 254, right.abs().amax(1) / 254
    most = steps[0] @ right.abs() + left.abs() @ steps[1][:, None] + steps[0] @ steps[1]
    assert bool((lost <= 1.01 * most).all())
    assert memory.nbytes == 3 * (40 + 60) + 3 * 4
    again = SideMemory((40, 60), int8=True)
    again.load_low_rank(memory.low_rank_tensors())
    assert again[0].fingerprint() == memory[0].fingerprint(), "what is stored is not rounded again"
    assert memory.rows()[0].keys() == {"left", "right", "scale"}


def test_a_shard_that_does_nothing_in_a_byte_per_entry():
    memory = SideMemory((4, 6), int8=True)
    memory.add(torch.zeros(4, 2), torch.zeros(2, 6))
    assert torch.equal(memory[0].delta, torch.zeros(4, 6))


def test_shards_of_an_earlier_version_beside_new_ones():
    """They were in half precision; they are read as they are, and stored as the others are."""
    left, right = torch.randn(4, 1).half(), torch.randn(1, 6).half()
    old = {"ids": torch.tensor([0]), "ranks": torch.tensor([1]), "left": left.T, "right": right}
    memory = SideMemory((4, 6), int8=True)
    memory.load_low_rank(old)
    assert torch.equal(memory[0].delta, left.float() @ right.float())
    memory.next_id = 1
    memory.add(torch.ones(4, 2), torch.ones(2, 6))
    again = SideMemory((4, 6), int8=True)
    again.load_low_rank(memory.low_rank_tensors())
    for shard in (0, 1):
        assert torch.equal(again[shard].delta, memory[shard].delta), "bit by bit, in whatever they are stored"


def test_rows_of_a_checkpoint_without_a_journal(tmp_path):
    """They are made when they are looked at, and stored whole by who stores all."""
    memory = SideMemory((4, 6))
    memory.add(torch.ones(4, 1), torch.ones(1, 6))
    torch.save({"rows": memory.rows()}, tmp_path / "last.ckpt")
    (row,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["rows"].values()
    assert torch.equal(row["left"], torch.ones(4, 1))


def test_an_id_that_is_given_again_is_another_row():
    """What is stored once: low-rank shards by numbers that stand for one shard for ever."""
    memory = SideMemory((4, 6))
    memory.add(torch.ones(4, 1), torch.ones(1, 6))
    before = memory.snapshot()
    memory.add(torch.ones(4, 1), torch.ones(1, 6))
    memory.restore(before)
    memory.add(torch.zeros(4, 1), torch.ones(1, 6))
    assert memory.ids == [0, 1]
    assert list(memory.rows()) == [0, 2]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shards_of_two_precisions_answer_one_batch(order):
    """As those of an earlier version and new ones do: none is rounded to the other's."""
    half = LowRankShard(torch.ones(2, 1).half(), torch.ones(1, 3).half(), 0)
    single = LowRankShard(torch.ones(2, 2), torch.tensor([[1e-9, 1e6, 3.0], [0.0, 0.0, 1.0]]), 1)
    shards = [(half, single)[i] for i in order]
    found = Factors(shards, torch.device("cpu"))
    for i, shard in enumerate(shards):
        assert torch.equal(found.right[i, : len(shard.right)], shard.right.float())
        assert torch.equal(found.left[i, :, : len(shard.right)], shard.left.float())
