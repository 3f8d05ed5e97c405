"""The bank of shards: identities, masks, storage, and the batched application against a loop over rows."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.errors import RepairError
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
        shard.delta.data.copy_(noise if shard.open is None else noise * shard.open)
    return memory


class TestIdentities:
    @pytest.mark.parametrize("ratio", RATIOS)
    def test_ids_are_never_used_twice(self, ratio):
        memory = bank(3, ratio)
        assert memory.ids == [0, 1, 2]
        assert memory.fuse([0, 2], torch.ones(SHAPE)) == 3
        assert memory.ids == [1, 3]
        assert memory.open_shard() == 4
        memory.prune(4)
        assert memory.fuse([1, 3, 4], torch.zeros(SHAPE)) == 5
        assert memory.open_shard() == 6
        assert memory.ids == [5, 6]
        assert len(memory) == 2

    def test_an_unknown_shard_is_named(self):
        with pytest.raises(RepairError, match=r"there is no shard 7; known: \[0, 1, 2\]"):
            bank()[7]

    @pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01])
    def test_a_mask_ratio_that_cannot_be(self, ratio):
        with pytest.raises(ValueError, match=r"mask_ratio must be in \(0, 1\]"):
            SideMemory(SHAPE, ratio)

    def test_a_fresh_shard_is_empty(self):
        memory = SideMemory(SHAPE, 0.3)
        shard = memory[memory.open_shard()]
        assert not shard.delta.any()
        assert shard.generation == 0
        assert shard.open.shape == SHAPE
        assert shard.delta.requires_grad
        assert not SideMemory(SHAPE, 1.0).stacked().numel()

    def test_a_dense_shard_stores_no_mask(self):
        memory = bank(1, 1.0)
        assert memory[0].open is None
        assert memory[0].mask.numel() == 0


class TestPrune:
    @pytest.mark.parametrize("ratio", RATIOS)
    def test_zero_delta_next_generation(self, ratio):
        memory = bank(2, ratio)
        other = memory[1].delta.detach().clone()
        memory.prune(0)
        assert not memory[0].delta.any()
        assert memory[0].delta.requires_grad
        assert [memory[i].generation for i in (0, 1)] == [1, 0]
        assert torch.equal(memory[1].delta, other)
        memory.prune(0)
        assert memory[0].generation == 2

    def test_each_generation_has_its_own_mask(self):
        memory = bank(1, 0.3)
        masks = [memory[0].mask]
        for _ in range(3):
            memory.prune(0)
            masks.append(memory[0].mask)
        assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])

    def test_masks_are_determined_by_seed_id_and_generation(self):
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
        masks = {
            (seed, shard): tuple(bank(2, 0.3, seed)[shard].mask.flatten().tolist())
            for seed in (0, 1, 5)
            for shard in (0, 1)
        }
        assert len(set(masks.values())) == len(masks)

    def test_the_mask_has_its_ratio(self):
        """40,000 coordinates at 0.2: a standard deviation of 0.002, so 0.01 is five of them."""
        memory = SideMemory((200, 200), 0.2)
        memory.open_shard()
        assert memory[0].mask.float().mean().item() == pytest.approx(0.2, abs=0.01)


class TestFuse:
    def test_holds_the_delta_and_replaces_the_shards(self):
        memory = bank(3, 0.3)
        delta = memory[0].delta.detach() + memory[2].delta.detach()
        fused = memory.fuse([0, 2], delta)
        assert torch.equal(memory[fused].delta, delta)
        assert torch.equal(memory[fused].open, delta != 0)
        with pytest.raises(RepairError, match="there is no shard 0"):
            memory[0]

    def test_dense_stays_dense(self):
        memory = bank(2, 1.0)
        fused = memory.fuse([0, 1], torch.eye(*SHAPE))
        assert memory[fused].open is None

    def test_the_given_delta_is_copied(self):
        memory = bank(2, 1.0)
        delta = torch.ones(SHAPE)
        fused = memory.fuse([0], delta)
        delta.zero_()
        assert bool((memory[fused].delta == 1).all())

    def test_an_unknown_shard_changes_nothing(self):
        memory = bank(2)
        with pytest.raises(RepairError, match="there is no shard 9"):
            memory.fuse([0, 9], torch.zeros(SHAPE))
        assert memory.ids == [0, 1]
        assert memory.next_id == 2


class TestSnapshot:
    @pytest.mark.parametrize("ratio", RATIOS)
    def test_restores_what_fusing_pruning_and_opening_did(self, ratio):
        memory = bank(3, ratio)
        before = {name: value.clone() for name, value in memory.state_dict().items() if isinstance(value, torch.Tensor)}
        extra = memory.get_extra_state()
        snapshot = memory.snapshot()
        memory.fuse([0, 1], torch.ones(SHAPE))
        memory.prune(2)
        memory.open_shard()
        memory.restore(snapshot)
        after = {name: value for name, value in memory.state_dict().items() if isinstance(value, torch.Tensor)}
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert memory.get_extra_state() == extra

    def test_can_be_restored_twice(self):
        memory = bank(2)
        snapshot = memory.snapshot()
        for _ in range(2):
            memory.fuse([0, 1], torch.ones(SHAPE))
            memory.restore(snapshot)
            assert memory.ids == [0, 1]
            memory.open_shard()
            memory.restore(snapshot)
            assert memory.ids == [0, 1]


def slow_rows(memory, output, activations, choice):
    rows = []
    for y, a, shard in zip(output, activations, choice.tolist(), strict=True):
        if shard == BASE:
            rows.append(y)
        else:
            rows.append(y + (a.double() @ memory[shard].delta.detach().double().T).to(y.dtype))
    return torch.stack(rows)


class TestApplyRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ratio", RATIOS)
    @pytest.mark.parametrize(
        "choice", [[0, 0, 0, 0], [BASE, 1, BASE, 1], [0, 1, 2, BASE], [2, 1, 0, 1], [BASE, BASE, BASE, 2], [1]]
    )
    def test_against_a_loop(self, choice, ratio, dtype):
        memory, choice = bank(3, ratio), torch.tensor(choice)
        output = torch.randn(len(choice), 5, SHAPE[0]).to(dtype)
        activations = torch.randn(len(choice), 5, SHAPE[1]).to(dtype)
        given = output.clone()
        with torch.no_grad():
            found = memory.select(choice)(output, activations)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        expected = slow_rows(memory, output, activations, choice)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(found[choice == BASE], output[choice == BASE])
        assert torch.equal(output, given), "the base's own output is not written to"

    def test_all_base_returns_the_same_tensor(self):
        memory = bank()
        output = torch.randn(3, 5, SHAPE[0])
        assert memory.select(torch.full((3,), BASE))(output, torch.randn(3, 5, SHAPE[1])) is output

    def test_a_row_does_not_feel_its_company(self):
        memory = bank(3)
        output, activations = torch.randn(3, 5, SHAPE[0]), torch.randn(3, 5, SHAPE[1])
        with torch.no_grad():
            mixed = memory.select(torch.tensor([0, 1, 2]))(output, activations)
            alone = [memory.select(torch.tensor([i]))(output[i : i + 1], activations[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(mixed, torch.cat(alone))

    def test_an_unknown_shard_is_named(self):
        with pytest.raises(RepairError, match="there is no shard 8"):
            bank().select(torch.tensor([8]))

    @pytest.mark.parametrize("choice", [[0, 0], [0, BASE]])
    def test_gradients_reach_the_shard_and_no_other(self, choice):
        memory = bank(2, 1.0)
        found = memory.select(torch.tensor(choice))(torch.zeros(2, 3, SHAPE[0]), torch.randn(2, 3, SHAPE[1]))
        found.square().sum().backward()
        assert memory[0].delta.grad.abs().sum() > 0
        assert memory[1].delta.grad is None


class TestStorage:
    @pytest.mark.parametrize("ratio", RATIOS)
    def test_a_fresh_bank_becomes_the_stored_one(self, ratio, tmp_path):
        memory = bank(3, ratio, seed=3)
        memory.fuse([0, 1], torch.randn(SHAPE).relu())
        memory.prune(2)
        memory.open_shard()
        torch.save({"memory": memory.state_dict()}, tmp_path / "bank.pt")
        fresh = SideMemory(SHAPE, ratio, seed=3)
        fresh.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True)["memory"])
        assert fresh.ids == memory.ids == [2, 3, 4]
        assert fresh.next_id == memory.next_id == 5
        assert [fresh[i].generation for i in fresh.ids] == [1, 0, 0]
        for shard in memory.ids:
            assert torch.equal(fresh[shard].delta, memory[shard].delta)
            assert torch.equal(fresh[shard].mask, memory[shard].mask)

    @pytest.mark.parametrize("ratio", RATIOS)
    def test_the_loaded_bank_goes_on_as_the_stored_one_would(self, ratio):
        memory = bank(2, ratio, seed=3)
        fresh = SideMemory(SHAPE, ratio, seed=3)
        fresh.load_state_dict(memory.state_dict())
        for either in (memory, fresh):
            either.prune(1)
            assert either.open_shard() == 2
        for shard in (1, 2):
            assert torch.equal(fresh[shard].mask, memory[shard].mask)
        assert fresh[0].delta.requires_grad

    def test_loading_replaces_what_was_there(self):
        memory = bank(1)
        other = bank(4)
        other.load_state_dict(memory.state_dict())
        assert other.ids == [0]
        assert torch.equal(other[0].delta, memory[0].delta)

    def test_more_than_ten_shards_keep_their_order(self):
        memory = bank(12)
        fresh = SideMemory(SHAPE, 0.3)
        fresh.load_state_dict(memory.state_dict())
        assert fresh.ids == list(range(12))

    def test_loaded_shards_are_copies(self):
        memory = bank(1)
        fresh = SideMemory(SHAPE, 0.3)
        fresh.load_state_dict(memory.state_dict())
        memory[0].delta.data.zero_()
        assert fresh[0].delta.any()
