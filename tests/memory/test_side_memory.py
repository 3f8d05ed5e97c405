"""The bank of shards: identities, masks, storage, and the batched application against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from repair_lightning.errors import RepairError
from repair_lightning.memory.rows import Part
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.packs.pack import shard_tensors
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

    def test_of_a_masked_shard_the_mask_in_bits_and_what_it_opens(self):
        shard = bank(1, 0.3)[0]
        state = shard.state_dict()
        assert list(state) == ["mask", "values"]
        flat = shard.mask.flatten().tolist()
        assert state["mask"].dtype == torch.uint8
        packed = [sum(bit << place for place, bit in enumerate(flat[at : at + 8])) for at in range(0, 60, 8)]
        assert state["mask"].tolist() == packed
        assert torch.equal(state["values"], shard.delta.detach().flatten()[shard.mask.flatten()])
        assert list(bank(1, 1.0)[0].state_dict()) == ["delta"]

    @pytest.mark.parametrize("ratio", RATIOS)
    @pytest.mark.parametrize("there", [0.3, 1.0])
    def test_into_a_bank_with_other_shards_bit_by_bit(self, ratio, there):
        """Of another number, other masks or none; signs of zero and what is no number come along."""
        memory, other = bank(3, ratio, seed=1), bank(5, there, seed=2)
        mask = memory[1].mask if ratio < 1 else torch.ones(SHAPE, dtype=torch.bool)
        odd = torch.tensor([-0.0, torch.nan, torch.inf, 1e-42])
        memory[1].delta.data[mask.nonzero()[:4].unbind(1)] = odd
        memory.prune(2)
        other.load_state_dict(memory.state_dict())
        assert other.ids == memory.ids
        for shard in memory.ids:
            found, kept = other[shard], memory[shard]
            assert torch.equal(found.delta.view(torch.int32), kept.delta.view(torch.int32))
            assert torch.equal(found.mask, kept.mask)
            assert found.generation == kept.generation
            assert found.delta.requires_grad
        again = {key: value for key, value in other.state_dict().items() if isinstance(value, torch.Tensor)}
        assert all(
            torch.equal(value.nan_to_num(), memory.state_dict()[key].nan_to_num()) for key, value in again.items()
        )

    def test_dense_masked_and_low_rank_shards_side_by_side(self):
        """As a bank is after a merge of what was masked, beside edits with shards of their own."""
        memory = bank(2, 0.3)
        memory.add(torch.randn(SHAPE[0], 2), torch.randn(2, SHAPE[1]))
        memory.shards["0"] = bank(1, 1.0)[0]
        memory.add(torch.randn(SHAPE[0], 1), torch.randn(1, SHAPE[1]))
        fresh = bank(4, 0.3)
        fresh.load_state_dict(memory.state_dict())
        assert fresh.ids == memory.ids == [0, 1, 2, 3]
        assert [type(fresh[i]) for i in fresh.ids] == [type(memory[i]) for i in memory.ids]
        assert all(torch.equal(fresh[i].delta, memory[i].delta) for i in memory.ids)
        assert (fresh[0].open is None, fresh[1].open is None) == (True, False)

    def test_a_masked_bank_takes_its_share_of_the_room(self, tmp_path):
        """At 0.2: a fifth of the values and a bit for each, so 0.231 of a dense bank; in the pack's tensors too.

        40,000 coordinates: the share's standard deviation is 0.002. A file's own overhead is below a hundredth.
        """
        sizes, tensors = {}, {}
        for ratio in (0.2, 1.0):
            memory = SideMemory((200, 200), ratio)
            for _ in range(3):
                memory[memory.open_shard()].delta.data.normal_()
            torch.save(memory.state_dict(), tmp_path / f"{ratio}.pt")
            sizes[ratio] = (tmp_path / f"{ratio}.pt").stat().st_size
            tensors[ratio] = sum(tensor.nbytes for tensor in shard_tensors(memory).values())
            save_file(shard_tensors(memory), tmp_path / f"{ratio}.safetensors")
            assert (tmp_path / f"{ratio}.safetensors").stat().st_size == pytest.approx(tensors[ratio], rel=0.01)
        assert tensors[1.0] == 3 * 200 * 200 * 4
        assert tensors[0.2] / tensors[1.0] == pytest.approx(0.2 + 1 / 32, abs=0.01)
        assert sizes[0.2] / sizes[1.0] == pytest.approx(0.2 + 1 / 32, abs=0.02)

    @pytest.mark.parametrize("ratio", RATIOS)
    def test_a_pack_holds_what_the_state_dict_holds(self, ratio):
        memory = bank(2, ratio)
        memory.add(torch.randn(SHAPE[0], 2), torch.randn(2, SHAPE[1]))
        state = {name: value for name, value in memory.state_dict().items() if isinstance(value, torch.Tensor)}
        found = shard_tensors(memory)
        assert {name.replace("shard.", "shards.") for name in found} == state.keys()
        assert all(torch.equal(value, state[name.replace("shard.", "shards.")]) for name, value in found.items())


class TestFingerprint:
    def test_is_of_the_content(self):
        memory = bank(2, 0.3)
        first = memory[0].fingerprint()
        assert memory[0].fingerprint() == first != memory[1].fingerprint()
        kept = memory[0].delta.detach().clone()
        memory[0].delta.data[memory[0].mask.nonzero()[0].unbind()] *= 2
        assert memory[0].fingerprint() != first
        memory[0].delta.data.copy_(kept)
        assert memory[0].fingerprint() == first

    def test_of_a_low_rank_shard_both_factors(self):
        left, right = torch.randn(SHAPE[0], 2), torch.randn(2, SHAPE[1])
        memory = SideMemory(SHAPE)
        ids = [memory.add(*pair) for pair in ((left, right), (left, right), (left, -right), (-left, right))]
        prints = [memory[id].fingerprint() for id in ids]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3


class TestSelection:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dense_and_low_rank_shards_of_several_ranks_row_by_row(self, dtype):
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


class TestRows:
    """What is stored once: low-rank shards by numbers that stand for one shard for ever."""

    @staticmethod
    def bank(ranks) -> SideMemory:
        memory = SideMemory((4, 6))
        for shard, rank in enumerate(ranks):
            memory.add(torch.full((4, rank), 1.0 + shard), torch.full((rank, 6), 2.0 + shard))
        return memory

    def test_stored_in_parts_and_put_together_again(self):
        memory = self.bank([1, 3, 2, 1, 2])
        rows = memory.rows()
        parts = [
            Part({**rows.take(start, stop), "numbers": rows.numbers[start:stop]}, torch.tensor(kept))
            for start, stop, kept in ((0, 2, [True, False]), (2, 5, [True, True, False]))
        ]
        memory.rows_apart = True
        state = memory.state_dict()
        assert not [name for name in state if name.startswith("low_rank")]
        fresh = SideMemory((4, 6))
        fresh.load_state_dict({**state, **SideMemory.state_of_rows(parts)})
        assert fresh.ids == [0, 2, 3]
        assert all(fresh[shard].fingerprint() == memory[shard].fingerprint() for shard in fresh.ids)
        assert fresh.rows().numbers.tolist() == [0, 2, 3]
        fresh.add(torch.ones(4, 1), torch.ones(1, 6))
        assert fresh.rows().numbers.tolist() == [0, 2, 3, 5]

    def test_an_id_that_is_given_again_is_another_row(self):
        memory = self.bank([1, 1])
        before = memory.snapshot()
        memory.add(torch.ones(4, 1), torch.ones(1, 6))
        memory.restore(before)
        memory.add(torch.zeros(4, 1), torch.ones(1, 6))
        assert memory.ids == [0, 1, 2]
        assert memory.rows().numbers.tolist() == [0, 1, 3]

    def test_numbers_go_on_behind_those_of_a_pack(self):
        memory = SideMemory((4, 6))
        pack = self.bank([1, 1, 1])
        memory.restore((dict(pack.shards.items()), pack.next_id))
        memory.add(torch.zeros(4, 1), torch.ones(1, 6))
        assert memory.rows().numbers.tolist() == [0, 1, 2, 3]

    def test_dense_shards_are_no_rows(self):
        memory = self.bank([1])
        memory.open_shard()
        assert memory.rows().numbers.tolist() == [0]
        memory.rows_apart = True
        assert "shards.1.delta" in memory.state_dict()
