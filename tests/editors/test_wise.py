"""WISE: masks and their overlaps, the order in which memories are filled, and the merge."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.editors import WISE
from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.functional import ties_merge

ROUTING = Routing(router="activation", weight=0.0)


def writing(**options) -> Writing:
    return Writing(**({"mask_ratio": 0.2, "steps": 3, "capacity": 2, "replay": 0} | options))


@pytest.fixture
def make(editor_of):
    def made(**options):
        more = {name: options.pop(name) for name in ("mode", "subspaces", "density") if name in options}
        return editor_of("llama", "wise", routing=ROUTING, writing=writing(**options), **more)

    return made


def test_a_share_of_rho_is_open_and_the_rest_stays_zero(make, write, edits):
    """2,048 coordinates at 0.2: within four standard deviations, 4 sqrt(0.16 / 2048) = 0.035."""
    editor = make()
    write(editor, edits[:4], 1)
    for shard in editor.memory.ids:
        module = editor.memory[shard]
        assert float(module.open.float().mean()) == pytest.approx(0.2, abs=0.035)
        assert module.delta.any()
        assert not module.delta[~module.open].any()


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
        written, plain = [], WISE.rewrite
        monkeypatch.setattr(
            WISE, "rewrite", lambda self, batch, shard: written.append(batch.ids) or plain(self, batch, shard)
        )
        assert editor.undo(["e1"]) == ["e0", "e2", "e3"]
        assert written == [("e0",), ("e2",), ("e3",)]


def test_the_merge_is_ties_of_the_masked_deltas(make, write, edits):
    """Against the memories of an editor that keeps them; density 0.53 trims nothing of 0.2."""
    apart, together = make(), make(mode="merge")
    for editor in (apart, together):
        write(editor, edits[:4], 1)
    deltas = apart.memory.stacked()
    (one,) = together.memory.ids
    torch.testing.assert_close(together.memory[one].delta, ties_merge(deltas, torch.tensor([0.5, 0.5])))
    assert {together.ledger.owner_of(edit.id) for edit in edits[:4]} == {one}
    assert [apart.ledger.owner_of(edit.id) for edit in edits[:4]] == [0, 0, 1, 1]
