"""WISE: masks and their overlaps, the order in which memories are filled, and the merge."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.editors import WISE, make_editor
from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.editors.wise import WRITING, fused
from repair_lightning.errors import ConfigError
from repair_lightning.functional import ties_merge

ROUTING = Routing(router="activation", weight=0.0)


def writing(**options) -> Writing:
    return Writing(**({"form": "dense", "mask_ratio": 0.2, "steps": 3, "capacity": 2, "replay": 0} | options))


@pytest.fixture
def make(editor_of):
    def made(**options):
        more = {name: options.pop(name) for name in ("mode", "subspaces", "density") if name in options}
        return editor_of("llama", "wise", routing=ROUTING, writing=writing(**options), **more)

    return made


class TestMasks:
    def test_a_share_of_rho_is_open_and_the_rest_stays_zero(self, make, write, edits):
        """2,048 coordinates at 0.2: within four standard deviations, 4 sqrt(0.16 / 2048) = 0.035."""
        editor = make()
        write(editor, edits[:4], 1)
        for shard in editor.memory.ids:
            module = editor.memory[shard]
            assert float(module.open.float().mean()) == pytest.approx(0.2, abs=0.035)
            assert module.delta.any()
            assert not module.delta[~module.open].any()

    def test_two_memories_share_rho_squared(self, make, write, edits):
        """Masks are drawn apart, so rho^2 of the coordinates are in both and 1 - (1 - rho)^2 in either."""
        editor = make()
        write(editor, edits[:4], 1)
        one, other = (editor.memory[shard].open for shard in editor.memory.ids)
        assert float((one & other).float().mean()) == pytest.approx(0.04, abs=0.018)
        assert float((one | other).float().mean()) == pytest.approx(0.36, abs=0.043)


class TestRetrieve:
    def test_memories_are_filled_one_after_the_other(self, make, write, edits):
        editor = make()
        write(editor, edits[:5], 1)
        assert [editor.ledger.owner_of(edit.id) for edit in edits[:5]] == [0, 0, 1, 1, 2]
        write(editor, edits[5:6], 1)
        assert editor.ledger.owner_of("e5") == 2

    def test_an_undo_fills_the_memory_anew_edit_by_edit(self, make, write, edits, monkeypatch):
        """As it was filled: what is left of it must not gain from being trained together."""
        editor = make(capacity=8)
        write(editor, edits[:4], 1)
        written, plain = [], WISE._write_dense
        monkeypatch.setattr(
            WISE, "_write_dense", lambda self, batch, shard: written.append(batch.ids) or plain(self, batch, shard)
        )
        assert editor.undo(["e1"]) == ["e0", "e2", "e3"]
        assert written == [("e0",), ("e2",), ("e3",)]


class TestMerge:
    def test_it_is_ties_of_the_masked_deltas(self, make, write, edits):
        """Against the memories of an editor that keeps them; density 0.53 trims nothing of 0.2."""
        apart, together = make(), make(mode="merge")
        for editor in (apart, together):
            write(editor, edits[:4], 1)
        deltas = apart.memory.stacked()
        (one,) = together.memory.ids
        torch.testing.assert_close(together.memory[one].delta, ties_merge(deltas, torch.tensor([0.5, 0.5])))
        assert {together.ledger.owner_of(edit.id) for edit in edits[:4]} == {one}
        assert [apart.ledger.owner_of(edit.id) for edit in edits[:4]] == [0, 0, 1, 1]

    def test_trimming_comes_first(self):
        """Half of four coordinates: -1 and 3 of the first, 2 and -4 of the second; they meet in the last: -4 wins."""
        deltas = torch.tensor([[[0.5, -1.0], [0.1, 3.0]], [[2.0, 0.3], [0.2, -4.0]]])
        assert fused(deltas, 0.5).tolist() == [[2.0, -1.0], [0.0, -4.0]]

    def test_what_follows_begins_a_subspace_of_its_own(self, make, write, edits, monkeypatch):
        """And is fused with what came of the first merge."""
        editor = make(mode="merge")
        write(editor, edits[:4], 1)
        (first,) = editor.memory.ids
        before = editor.memory[first].delta.detach().clone()
        write(editor, edits[4:7], 1)
        assert len(editor.memory) == 3  # one of two edits is full, the one after it is not
        assert torch.equal(editor.memory[first].delta, before)
        merged = []
        fuse = editor.fuse
        monkeypatch.setattr(editor, "fuse", lambda shards, delta: merged.append((shards, delta)) or fuse(shards, delta))
        stacked = editor.memory.stacked
        seen = []
        monkeypatch.setattr(editor.memory, "stacked", lambda *of: seen.append(stacked(*of)) or seen[-1])
        write(editor, edits[7:8], 1)
        ((shards, delta),) = merged
        assert shards[0] == first
        torch.testing.assert_close(delta, ties_merge(seen[0].detach(), torch.tensor([0.6, 0.2, 0.2])))
        (second,) = editor.memory.ids
        assert editor.merged == [second] != [first]
        kept = (editor.memory[second].delta == before).float().mean()
        assert 0.5 < float(kept) < 1.0
        assert editor.ledger.owned_by(second) == [f"e{i}" for i in range(8)]

    def test_fewer_than_the_subspaces_wait(self, make, write, edits):
        editor = make(mode="merge", subspaces=3)
        write(editor, edits[:4], 1)
        assert len(editor.memory) == 2
        assert editor.own_state() == {"merged": []}

    def test_a_rollback_gives_the_edits_back_to_their_memories(self, make, write, edits):
        editor = make(mode="merge", subspaces=3)
        write(editor, edits[:4], 1)
        before = editor.snapshot()
        write(editor, edits[4:6], 1)
        assert len(editor.memory) == 1
        editor.rollback(before)
        assert editor.memory.ids == [0, 1]
        assert [editor.ledger.owner_of(edit.id) for edit in edits[:4]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "both"}, "mode must be one of retrieve, merge, got 'both'"),
        ({"subspaces": 1}, "subspaces must be at least 2, got 1"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"writing": Writing(), "routing": ROUTING}, "writing.form must be dense"),
        ({"writing": writing(lr="auto")}, "writing.lr must be a number, got 'auto'"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ConfigError, match=words):
        WISE(**options)


def test_the_published_settings():
    options = make_editor("wise", {}).options()
    assert (options["mode"], options["density"], options["subspaces"]) == ("retrieve", 0.53, 2)
    assert (WRITING.lr, WRITING.steps, WRITING.mask_ratio, WRITING.capacity) == (1.0, 70, 0.2, 500)
    assert (options["routing"]["router"], options["routing"]["act_ratio"]) == ("activation", 0.88)
