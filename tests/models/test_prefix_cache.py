"""The prefix cache gives back what it took in, from memory and from disk; what it dropped is computed again, up to the
rounding that another batch brings."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from test_prefix import each_case

from repair_lightning.models.prefix import Capture, SplitModel
from repair_lightning.models.prefix_cache import PrefixCache, capture_rows

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROWS = ([5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15])
TOKEN = (32 + 64) * 4
"""Bytes of a token's states in a tiny base in float32."""


@pytest.fixture
def cache(tiny):
    """Makes a cache over a tiny base; its budget counts tokens in float32."""

    def make(tokens: int = 1 << 20, model_type: str = "llama", dtype=torch.float32, **options) -> PrefixCache:
        return PrefixCache(SplitModel(tiny(model_type).to(dtype), 1), tokens * TOKEN, **options)

    return make


def rows_of(lengths, vocabulary: int = 512, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(3, vocabulary) for _ in range(n)] for n in lengths]


def same(first: Capture, second: Capture) -> bool:
    return torch.equal(first.hidden, second.hidden) and torch.equal(first.activations, second.activations)


def all_same(first, second) -> bool:
    return all(same(a, b) for a, b in zip(first, second, strict=True))


ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""What another order of sums may cost in some layers, as a share of the largest state."""


def assert_close(first: Sequence[Capture], second: Sequence[Capture]) -> None:
    """Equal up to rounding."""
    for a, b in zip(first, second, strict=True):
        for one, other in ((a.hidden, b.hidden), (a.activations, b.activations)):
            assert one.dtype == other.dtype
            rounding = ROUNDING[one.dtype]
            torch.testing.assert_close(one, other, rtol=rounding, atol=rounding * float(one.abs().max()))


def on_disk(cache: PrefixCache) -> int:
    """Bytes in the scratch file."""
    return os.fstat(cache.disk._file.fileno()).st_size if cache.disk._file else 0


def passes(cache: PrefixCache) -> list[int]:
    """Grows by one with each pass of the model from now on."""
    seen: list[int] = []
    cache.split.layers[0].register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_what_was_seen_in_inference_mode_may_be_trained_upon(cache, tmp_path):
    """Lightning validates in inference mode, whose tensors autograd refuses; the entries outlive it."""
    cache = cache(tokens=5, spill=tmp_path)
    with torch.inference_mode():
        cache.get(ROWS)
        found = cache.get(ROWS)
    for one in (*found, *cache.get(ROWS)):
        assert not one.hidden.is_inference()
        assert not one.activations.is_inference()
        assert not one.hidden.requires_grad


class TestOtherBatches:
    """A row's states are its own in every batch, order and place; to the bit only where the same batch runs again."""

    lengths = (1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40)

    @each_case
    def test_the_batch_and_the_place_in_it_do_not_matter(self, tiny, model_type, more):
        """Each row alone against the same among thirty others, in random order and batches of several sizes."""
        split, rows = SplitModel(tiny(model_type, **more), 2), rows_of(self.lengths)
        alone = [capture_rows(split, [row])[0] for row in rows]
        for seed, batch_size in enumerate((64, 3)):
            dice = random.Random(seed)
            mixed = rows + rows_of(dice.choices(range(1, 41), k=30), seed=seed + 1)
            order = dice.sample(range(len(mixed)), len(mixed))
            found = capture_rows(split, [mixed[i] for i in order], batch_size=batch_size)
            assert_close(alone, [found[order.index(i)] for i in range(len(rows))])

    @each_dtype
    def test_the_same_batch_again_is_bitwise_identical(self, tiny, dtype):
        split, rows = SplitModel(tiny("llama").to(dtype), 2), rows_of(self.lengths)
        assert all_same(capture_rows(split, rows), capture_rows(split, rows))

    @pytest.mark.parametrize("spills", [False, True])
    def test_evictions_change_nothing(self, cache, tmp_path, spills):
        """Random requests to a cache that holds a few of them, and a disk that holds a few more, against all kept."""
        rows = rows_of(random.Random(1).choices(range(1, 40), k=40))
        every = cache().get(rows)
        small = cache(tokens=100, spill=tmp_path if spills else None, spill_budget=300 * TOKEN)
        seen = passes(small)
        for seed in range(30):
            wanted = random.Random(seed).choices(range(len(rows)), k=random.Random(seed).randint(1, 20))
            found = small.get([rows[i] for i in wanted])
            assert_close(found, [every[i] for i in wanted])
            assert small.used <= 100 * TOKEN
            assert on_disk(small) <= 300 * TOKEN
        assert len(seen) > 3, "some were computed again"
        assert bool(on_disk(small)) == spills


@each_dtype
def test_a_spill_gives_back_what_it_took(cache, tmp_path, dtype):
    cache = cache(tokens=3, dtype=dtype, spill=tmp_path)
    first = cache.get(ROWS)
    seen = passes(cache)
    for _ in range(3):
        again = cache.get(ROWS)
        assert all_same(again, first)
        assert {one.hidden.dtype for one in again} == {one.activations.dtype for one in again} == {dtype}
    assert not seen
    assert cache.used <= 3 * TOKEN


@pytest.mark.skipif(sys.platform == "win32", reason="a killed process's files stay on Windows")
def test_a_killed_process_leaves_nothing(tmp_path):
    code = f"""
import os, torch
from pathlib import Path
from repair_lightning.models.prefix import Capture
from repair_lightning.models.prefix_cache import Spill
spill = Spill(Path({str(tmp_path)!r}), 1 << 20)
spill.put((1,), Capture(torch.rand(2, 8), torch.rand(2, 8)))
assert os.fstat(spill._file.fileno()).st_size > 128
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not any(tmp_path.iterdir())


class TestFailingDisk:
    @staticmethod
    def check(cache, caplog) -> None:
        """All answers stay right, the warning comes once, and the disk is let go."""
        expected = PrefixCache(cache.split).get(ROWS)
        for _ in range(3):
            assert_close(cache.get(ROWS), expected)
        (record,) = caplog.records
        assert (record.levelname, "goes on without" in record.message) == ("WARNING", True)
        assert cache.disk.budget == 0
        assert cache.used <= cache.budget

    def test_a_file_that_may_not_grow(self, cache, tmp_path, caplog):
        """A real refusal, in the middle of an entry: the operating system lets no file grow beyond 1000 bytes."""
        resource = pytest.importorskip("resource")
        cache = cache(tokens=2, spill=tmp_path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            cache.get(ROWS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "File too large" in caplog.text
        self.check(cache, caplog)

    def test_a_file_that_was_cut(self, cache, tmp_path, caplog):
        cache = cache(tokens=2, spill=tmp_path)
        cache.get(ROWS)
        os.ftruncate(cache.disk._file.fileno(), 10)
        self.check(cache, caplog)


@each_case
def test_heads_are_read_once_and_change_nothing_but_rounding(tiny, model_type, more):
    """Rows with a long head, a short one, none, and one that is no more than a head."""
    split = SplitModel(tiny(model_type, **more), 1)
    heads = rows_of([12, 20, 5], seed=3)
    tails = rows_of([3, 7, 17, 4, 2], seed=4)
    rows = [heads[0] + tails[0], heads[1] + tails[1], tails[2], heads[0] + tails[3], heads[2] + tails[4], heads[1]]
    cache = PrefixCache(split, heads=heads)
    found = cache.get(rows)
    assert [tuple(heads[i]) if i is not None else () for i in (0, 1, None, 0, None, None)] == [
        cache.heads.of(row) for row in rows
    ]
    assert_close(found, capture_rows(split, rows))
    passes = []
    with split.model.register_forward_pre_hook(lambda *_: passes.append(1)):
        cache.get([heads[0] + tails[4], heads[1] + tails[4]])
    assert len(passes) == 1
    cache.close()
    with split.model.register_forward_pre_hook(lambda *_: passes.append(1)):
        cache.get([heads[0] + tails[4]])
    assert len(passes) == 3  # the head is read again


def test_a_beginning_may_be_read_once_for_some_rows_alone(tiny):
    split = SplitModel(tiny("llama"), 1)
    begin, *tails = rows_of([20, 3, 7], seed=5)
    rows = [begin + tail for tail in tails]
    cache = PrefixCache(split)
    with cache.heads.also(begin):
        assert [cache.heads.of(row) for row in rows] == [tuple(begin)] * 2
        found = cache.get(rows)
    assert_close(found, capture_rows(split, rows))
    assert cache.heads.of(rows[0]) == ()
    with cache.heads.also(begin[:3]):  # too short to be worth it
        assert cache.heads.of(rows[0]) == ()
