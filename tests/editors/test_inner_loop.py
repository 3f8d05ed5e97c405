"""The parts of a write's inner steps: rows and their means, what an optimiser sees, and that nothing waits for the
device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from repair_lightning.editors.inner_loop import OpenCoordinates, TargetRows
from repair_lightning.editors.repair import Distillation, Routing, Writing
from repair_lightning.editors.shards import Steps
from repair_lightning.memory.query import Query
from repair_lightning.memory.shards import Shard
from repair_lightning.models.prefix import Capture
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.types import EditBatch

D, F, V = 3, 4, 5


@st.composite
def writes(draw: Any) -> dict[str, Any]:
    """The arguments of `TargetRows` as a write makes them: members, then contexts, then rehearsed rows."""
    members, contexts, rehearsed = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 4))
    owners = [*range(members), *(i for i in range(members) for _ in range(contexts))]
    owners += range(members, members + rehearsed)
    lengths = st.tuples(st.integers(1, 5), st.integers(1, 4))
    sizes = draw(st.lists(lengths, min_size=len(owners), max_size=len(owners)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    token = lambda n: tuple(torch.randint(0, V, (n,), generator=generator).tolist())  # noqa: E731
    encoded = [Encoded(token(prompt), token(target)) for prompt, target in sizes]
    states = [
        Capture(torch.randn(p + t, D, generator=generator), torch.randn(p + t, F, generator=generator))
        for p, t in sizes
    ]
    ones = torch.ones(members, 1)
    prompts = Query(tuple(map(str, range(members))), ones.bool(), ones[..., None], ones[..., None])
    return {"encoded": encoded, "captures": states, "owners": owners, "members": members, "prompts": prompts}


def targets_of(given: dict[str, Any]) -> list[tuple[int, int]]:
    """Row and position in the row, counted without padding, from which each target token is read."""
    return [
        (row, len(text.prompt) - 1 + place)
        for row, text in enumerate(given["encoded"])
        for place in range(len(text.target))
    ]


class TestTargetRows:
    @given(writes())
    def test_what_is_read_and_where(self, given):
        rows = TargetRows(**given)
        expected = targets_of(given)
        assert len(rows) == len(given["encoded"])
        assert rows.labels.tolist() == [token for text in given["encoded"] for token in text.target]
        assert rows.row.tolist() == [row for row, _ in expected]
        for name in ("hidden", "activations"):
            read = torch.stack([getattr(given["captures"][i], name)[t] for i, t in expected])
            assert torch.equal(rows.reading(getattr(rows, name)), read)
        assert torch.equal(rows.reading(rows.hidden[:, -rows.span :]), rows.reading(rows.hidden))
        firsts = [next(m for m, (row, _) in enumerate(expected) if row == i) for i in range(len(rows))]
        assert rows.firsts.tolist() == firsts
        for i, text in enumerate(given["encoded"]):
            width = rows.ids.shape[1]
            assert rows.ids[i].tolist() == [0] * (width - len(text.ids)) + list(text.ids)
            assert rows.mask[i].tolist() == [0] * (width - len(text.ids)) + [1] * len(text.ids)

    @given(writes(), st.integers(0, 1000))
    def test_means_against_a_loop(self, given, seed):
        rows = TargetRows(**given)
        tokens = torch.randn(len(rows.labels), generator=torch.Generator().manual_seed(seed))
        found = rows.per_row(tokens)
        by_row = [[] for _ in given["encoded"]]
        for value, (row, _) in zip(tokens.tolist(), targets_of(given), strict=True):
            by_row[row].append(value)
        assert found.tolist() == pytest.approx([sum(own) / len(own) for own in by_row], abs=1e-5)
        by_member = [
            [value for value, owner in zip(found.tolist(), given["owners"], strict=True) if owner == member]
            for member in range(given["members"])
        ]
        expected = [sum(own) / len(own) for own in by_member]
        assert rows.per_member(found).tolist() == pytest.approx(expected, abs=1e-5)

    @given(writes(), st.randoms(use_true_random=False))
    def test_a_part_is_what_its_members_own(self, given, random):
        """Some of the members, in any order of theirs: their own rows and those in contexts, and no rehearsed one."""
        rows = TargetRows(**given)
        some = random.sample(range(given["members"]), random.randint(1, given["members"]))
        part = rows.part(some)
        assert part.members == len(some)
        assert part.prompts.texts == tuple(str(i) for i in some)
        inside = [i for i, owner in enumerate(given["owners"]) if owner in some]
        assert [some[owner] for owner in part.owner.tolist()] == [given["owners"][i] for i in inside]
        assert part.labels.tolist() == [token for i in inside for token in given["encoded"][i].target]
        values = torch.arange(float(len(rows)))
        assert part.per_member(values[inside]).tolist() == pytest.approx(rows.per_member(values)[some].tolist())


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=20)
def test_the_open_ones_go_as_in_a_dense_step_and_the_closed_ones_stay(optimizer, seed, ratio):
    """Whatever starts at a closed coordinate and whatever its gradient says; the reference's is masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(D, F, generator=generator) < ratio
    start, gradients = torch.randn(D, F, generator=generator), torch.randn(6, D, F, generator=generator)
    gradients[:, 0, 0] = torch.where(mask[0, 0], gradients[:, 0, 0], torch.nan)
    gradients[3:] = 0.0  # what moves here moves by momentum and decay alone
    shard = Shard((D, F), mask)
    shard.delta.data.copy_(start)
    trained = OpenCoordinates(shard)
    found = OPTIMIZERS[optimizer]([trained.parameter])
    for gradient in gradients:
        shard.delta.grad = gradient.clone()
        trained.step(found)
        assert shard.delta.grad is None, "used up"
    dense = torch.nn.Parameter(start.clone())
    reference = OPTIMIZERS[optimizer]([dense])
    for gradient in gradients:
        dense.grad = gradient.masked_fill(~mask, 0.0)
        reference.step()
    assert torch.equal(shard.delta[~mask], start[~mask])
    torch.testing.assert_close(shard.delta[mask], dense[mask], rtol=1e-6, atol=1e-7)
    for state in found.state.values():
        for value in state.values():
            assert not isinstance(value, Tensor) or value.numel() in (1, int(mask.sum()))


WAITS = {
    "_local_scalar_dense",  # item, float, bool, if
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",  # a tensor from Python's numbers must travel to the device
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
HARMLESS = ("torch/optim/",)
"""An optimiser's step counter lives on the CPU."""


class Waits(TorchDispatchMode):
    """Counts the operations for which the CPU has to wait for a GPU, unless they come from a file that is excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITS or by_mask:
            self.count(name)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            if any(part in frame.f_code.co_filename.replace("\\", "/") for part in HARMLESS):
                return
            frame = frame.f_back  # type: ignore[assignment]
        self.seen[name] += 1


def _counted(tensor: Tensor, mode: Waits, name: str, real: Callable[..., Any], *args: Any) -> Any:
    mode.count(name)
    return real(tensor, *args)


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Inside, what the dispatcher sees is counted, and the ways to the CPU that it does not see."""
    with Waits() as mode, monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):
            patch.setattr(Tensor, name, partialmethod(_counted, mode, name, getattr(Tensor, name)))
        yield mode.seen


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"mask_ratio": 0.3, "optimizer": "sgd"},
    "adamw": {"mask_ratio": 0.3, "optimizer": "adamw", "pool": "mean", "contexts": 1},
    "low_rank": {},
}


def counted(editor_of: Any, edits: Any, monkeypatch: Any, steps: int, **options: Any) -> Counter[str]:
    """The waits of a write of four edits in so many steps."""
    if options:
        routing = Routing(pool=options.pop("pool", "last"), weight=1.0, sample=4)
        distillation = Distillation(weight=1.0, temperature=2.0)
        writing = Writing(steps=steps, stop_margin=1e9, **options)
        editor = editor_of("llama", routing=routing, writing=writing, distillation=distillation)
    else:
        editor = editor_of("llama", writing=Steps(steps=steps, stop_margin=1e9))
    editor._rows(edits[:4])  # the states are known
    with waits(monkeypatch) as seen:
        reports = editor.write(EditBatch(tuple(edits[:4])))
    assert [report.steps for report in reports] == [steps] * 4, "the premise: all steps were taken"
    return seen


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_waits_but_looks(editor_of, edits, monkeypatch, options):
    """A margin that nothing reaches. Before the steps 0, 10 and 20 there is a look, so five steps have one; that of
    low-rank shards travels to the CPU."""
    few, many = (counted(editor_of, edits, monkeypatch, n, **OPTIONS[options]) for n in (5, 25))
    assert few, "the premise: waits are counted"
    assert many - few == {"_local_scalar_dense": 2} | ({"cpu": 2} if options == "low_rank" else {})
