"""What the key router keeps of edits does not depend on what was asked before: a resumed run remembers nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repair_lightning.functional.relations import RelationSpace
from repair_lightning.memory.query import Query
from repair_lightning.memory.routers import Anchor, KeyRouter
from repair_lightning.memory.side_memory import SideMemory

ASKED = ["Where was Mara Quill born?", "What does Rufus Blum play?", "Who taught Ilse Finch?"]
ANCHORS = [Anchor(name, text) for name, text in zip(["Mara Quill", "Rufus Blum", "Ilse Finch"], ASKED, strict=True)]
NOWHERE = SideMemory((1, 1))


def router(read: list[list[str]]) -> KeyRouter:
    """Its base's bits depend on how many texts are read together."""

    def states(texts: Sequence[str]) -> Tensor:
        read.append(list(texts))
        rows = [[len(text), sum(map(ord, text)), 1.0] for text in texts]
        return torch.tensor(rows) * (1 + 1e-3 * len(texts))

    found = KeyRouter()
    found.read = states
    found.space = RelationSpace(torch.tensor([20.0, 2000.0, 0.5]), torch.eye(3), 0.5)
    return found


def kept(found: KeyRouter) -> list[Tensor]:
    found.add(["a", "b", "c"], ANCHORS, Query.of_texts(ASKED), [0, 1, 2])
    found.calibrate(NOWHERE, {}, Query.of_texts(["Is Mara Quill tall?", "Is Ilse Finch old?"]))
    return [found.relations, found.limits]


def test_edits_are_read_together_whatever_was_asked_before():
    read: list[list[str]] = []
    plain, busy = router([]), router(read)
    busy.add(["x"], ANCHORS[:1], Query.of_texts(ASKED[:1]), [9])
    busy.route(Query.of_texts(["Is Mara Quill tall?", "Where is Mara Quill from?"]), NOWHERE)
    busy.forget(["x"])
    before = len(read)
    expected, found = kept(plain), kept(busy)
    assert [len(texts) for texts in read[before:]] == [3, 2]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
