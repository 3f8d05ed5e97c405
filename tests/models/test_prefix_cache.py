"""The prefix cache gives back what it took in, from memory and from disk; what it dropped is computed again, up to the
rounding that another batch brings."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair_lightning.errors import RepairError
from repair_lightning.models import prefix_cache
from repair_lightning.models.architectures import ARCHITECTURES
from repair_lightning.models.prefix import Capture, SplitModel, pad_left, stack_left
from repair_lightning.models.prefix_cache import PrefixCache, Spill, canonical_width, capture_rows, nbytes

CASES = [(name, {}) for name in ARCHITECTURES]
CASES += [("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1})]
CASES += [("mistral", {"sliding_window": 3}), ("gemma2", {"sliding_window": 3}), ("gemma3_text", {"sliding_window": 3})]
NAMES = [name + ("-sliding" if more else "") for name, more in CASES]
each_case = pytest.mark.parametrize(("model_type", "more"), CASES, ids=NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROWS = ([5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15])
TOKEN = (32 + 64) * 4
"""Bytes of a token's states in a tiny base in float32."""


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


def passes(cache: PrefixCache) -> list[int]:
    """Grows by one with each pass of the model from now on."""
    seen: list[int] = []
    cache.split.layers[0].register_forward_hook(lambda *_: seen.append(1))
    return seen


class TestGet:
    @each_case
    @pytest.mark.parametrize("batch_size", [1, 64])
    def test_equals_a_capture_of_each_sequence(self, tiny, model_type, more, batch_size):
        """Against a pass of the row alone, without padding: what lies to the right of a row must not leak into it."""
        cache = PrefixCache(SplitModel(tiny(model_type, **more), 1))
        for row, found in zip(ROWS, cache.get(ROWS, batch_size), strict=True):
            alone = cache.split.capture(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
            torch.testing.assert_close(found.hidden, alone.hidden[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.activations, alone.activations[0], rtol=1e-5, atol=1e-5)
            assert found.hidden.shape == (len(row), 32)
            assert found.activations.shape == (len(row), 64)

    @each_case
    def test_the_tail_takes_cached_states_padded_on_the_left(self, tiny, model_type, more):
        split = SplitModel(tiny(model_type, **more), 1)
        ids, mask = pad_left(ROWS)
        hidden = stack_left([found.hidden for found in PrefixCache(split).get(ROWS)])
        with torch.no_grad():
            expected = split.model(**split.inputs(ids, mask), logits_to_keep=1).logits
            with split.skipping():
                logits, _ = split.tail(ids, mask, hidden, 1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_a_known_sequence_is_not_run_again(self, cache):
        cache = cache()
        first = cache.get(ROWS)
        seen = passes(cache)
        again = cache.get([*ROWS, ROWS[0]])
        assert not seen
        assert [a.hidden is b.hidden for a, b in zip(again, first, strict=False)] == [True] * 4
        assert again[4].hidden is first[0].hidden
        cache.get([[1, 2], [1, 2]])
        assert len(seen) == 1
        assert len(cache) == 5

    def test_entries_do_not_hold_their_batch(self, cache):
        found = cache().get(ROWS)[0]
        assert found.hidden.untyped_storage().nbytes() == found.hidden.nbytes
        assert found.activations.untyped_storage().nbytes() == found.activations.nbytes

    def test_nothing_to_do(self, cache):
        assert cache().get([]) == []

    def test_an_empty_sequence_is_refused(self, cache):
        with pytest.raises(RepairError, match="at least one token"):
            cache().get([[1], []])

    def test_what_was_seen_in_inference_mode_may_be_trained_upon(self, cache, tmp_path):
        """Lightning validates in inference mode, whose tensors autograd refuses; the entries outlive it."""
        cache = cache(tokens=5, spill=tmp_path)
        with torch.inference_mode():
            cache.get(ROWS)
            found = cache.get(ROWS)
        for one in (*found, *cache.get(ROWS)):
            assert not one.hidden.is_inference()
            assert not one.activations.is_inference()
            assert not one.hidden.requires_grad

    def test_another_identity_finds_nothing(self, cache):
        cache = cache(identity="base-1-float32")
        cache.get(ROWS)
        seen = passes(cache)
        cache.identity = "base-2-float32"
        cache.get(ROWS)
        assert len(seen) == 1
        cache.identity = "base-1-float32"
        cache.get(ROWS)
        assert len(seen) == 1
        assert {identity for identity, _ in cache._entries} == {"base-1-float32", "base-2-float32"}

    def test_one_pass_per_width_and_batch(self, cache):
        cache = cache()
        seen = passes(cache)
        cache.get(rows_of([1, 5, 16, 17, 30, 3, 33]), batch_size=3)
        assert len(seen) == 4, "1, 3, 5 | 16 | 17, 30 | 33"


class TestOtherBatches:
    """A row's states are its own in every batch, order and place; to the bit only where the same batch runs again."""

    lengths = (1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40)

    @pytest.mark.parametrize(
        ("length", "limit", "width"),
        [(1, None, 16), (16, None, 16), (17, None, 32), (17, 20, 20), (17, 512, 32), (25, 20, 25)],
    )
    def test_width(self, length, limit, width):
        assert canonical_width(length, limit) == width

    def test_padding_stays_inside_the_positions_that_the_base_has(self, tiny):
        split = SplitModel(tiny("gpt2", n_positions=20), 1)
        [found] = capture_rows(split, rows_of([20]))
        assert found.hidden.shape == (20, 32)

    @each_case
    def test_the_batch_and_the_place_in_it_do_not_matter(self, tiny, model_type, more):
        self.check(SplitModel(tiny(model_type, **more), 2))

    @each_dtype
    @pytest.mark.parametrize("count", [1, 2])
    def test_in_every_dtype_with_one_thread_and_two(self, tiny, threads, dtype, count):
        threads(count)
        self.check(SplitModel(tiny("gptj").to(dtype), 2), draws=1)

    def check(self, split: SplitModel, draws: int = 2) -> None:
        """Each row alone against the same among thirty others, in random order and batches of several sizes."""
        rows = rows_of(self.lengths)
        alone = [capture_rows(split, [row])[0] for row in rows]
        for seed in range(draws):
            dice = random.Random(seed)
            mixed = rows + rows_of(dice.choices(range(1, 41), k=30), seed=seed + 1)
            order = dice.sample(range(len(mixed)), len(mixed))
            found = dict(enumerate(capture_rows(split, [mixed[i] for i in order], batch_size=(64, 3)[seed])))
            assert_close(alone, [found[order.index(i)] for i in range(len(rows))])

    @each_dtype
    def test_the_same_batch_again_is_bitwise_identical(self, tiny, dtype):
        split, rows = SplitModel(tiny("llama").to(dtype), 2), rows_of(self.lengths)
        assert all_same(capture_rows(split, rows), capture_rows(split, rows))

    @pytest.mark.parametrize("count", [1, 2])
    def test_of_a_trained_model(self, shared, threads, count):
        threads(count)
        folder = shared / "models" / "qa-llama"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        records = json.loads((shared / "data" / "zsre" / "zsre_mend_edit.json").read_text())[:24]
        rows = tokenizer([record[name] for record in records for name in ("src", "loc")])["input_ids"]
        split = SplitModel(model, 10)
        together = capture_rows(split, rows)
        order = random.Random(0).sample(range(len(rows)), 30)
        for start, size in ((0, 1), (1, 2), (3, 5), (8, 22)):
            part = order[start : start + size]
            found = dict(enumerate(capture_rows(split, [rows[i] for i in part])))
            assert_close([together[i] for i in part], [found[k] for k in range(size)])

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
            assert small.spilled <= 300 * TOKEN
        assert len(seen) > 3, "some were computed again"
        assert bool(small.spilled) == spills


class TestBudget:
    def test_the_least_recently_used_leave(self, cache):
        """A budget of 7 tokens holds 3 + 1 + 2, not another 3 as well."""
        cache = cache(tokens=7)
        for row in (ROWS[0], ROWS[2], ROWS[3]):
            cache.get([row])
        assert cache.used == 6 * TOKEN
        cache.get([ROWS[0]])
        cache.get([[20, 21, 22]])
        assert [ids for _, ids in cache._entries] == [(5, 6, 7), (20, 21, 22)]
        assert cache.used == 6 * TOKEN

    @pytest.mark.parametrize("tokens", [0, 1, 3, 7, 8, 1000])
    def test_is_never_passed(self, cache, monkeypatch, tokens):
        """Looked at behind each entry that is kept, not only at the end."""
        cache = cache(tokens=tokens)
        keep, peaks = cache._keep, []

        def watched(key, entry):
            keep(key, entry)
            peaks.append(cache.used)
            assert cache.used == sum(nbytes(one) for one in cache._entries.values())

        monkeypatch.setattr(cache, "_keep", watched)
        for _ in range(2):
            assert [len(one.hidden) for one in cache.get(ROWS)] == [3, 5, 1, 2]
        assert max(peaks) <= tokens * TOKEN

    def test_an_entry_larger_than_memory_goes_to_disk(self, cache, tmp_path):
        cache = cache(tokens=0, spill=tmp_path)
        first = cache.get(ROWS)
        assert (cache.used, cache.spilled) == (0, 11 * TOKEN)
        seen = passes(cache)
        assert all_same(cache.get(ROWS), first)
        assert not seen


class TestSpill:
    @each_dtype
    @pytest.mark.parametrize("model_type", ["llama", "gpt2"])
    def test_round_trip(self, cache, tmp_path, dtype, model_type):
        cache = cache(tokens=3, model_type=model_type, dtype=dtype, spill=tmp_path)
        first = cache.get(ROWS)
        seen = passes(cache)
        for _ in range(3):
            again = cache.get(ROWS)
            assert all_same(again, first)
            assert {one.hidden.dtype for one in again} == {one.activations.dtype for one in again} == {dtype}
        assert not seen
        assert cache.used <= 3 * TOKEN

    @each_dtype
    def test_every_bit_pattern_survives(self, tmp_path, dtype):
        """Infinities, not-a-numbers and negative zeros too: bytes are compared."""
        spill = Spill(tmp_path, 1 << 20, "x")
        raw = torch.randint(0, 256, (7, 24), dtype=torch.uint8)
        entry = Capture(raw.view(dtype), raw.flip(0).contiguous()[:, :16].contiguous().view(dtype))
        spill.put(("", (1,)), entry)
        found = spill.get(("", (1,)))
        assert torch.equal(found.hidden.view(torch.uint8), raw)
        assert torch.equal(found.activations.view(torch.uint8), entry.activations.view(torch.uint8))
        assert (found.hidden.shape, found.activations.shape) == (entry.hidden.shape, entry.activations.shape)

    def test_an_entry_is_written_once(self, cache, tmp_path):
        cache = cache(tokens=5, spill=tmp_path)
        for _ in range(4):
            cache.get(ROWS)
        assert cache.spilled == 11 * TOKEN

    def test_the_oldest_file_leaves(self, tmp_path):
        """There is room for 16 entries, so a file holds one, and the 17th costs the first."""
        entry = Capture(torch.rand(4, 8), torch.rand(4, 24))
        spill = Spill(tmp_path, 16 * nbytes(entry), "x")
        for i in range(40):
            spill.put(("", (i,)), entry)
            assert spill.used <= spill.budget
        known = [i for i in range(40) if spill.get(("", (i,))) is not None]
        assert known == list(range(24, 40))
        assert len(spill._segments) == 16

    def test_entries_share_files(self, tmp_path):
        spill = Spill(tmp_path, 1 << 20, "x")
        for i in range(50):
            spill.put(("", (i,)), Capture(torch.rand(1, 8), torch.rand(1, 24)))
        assert len(spill._segments) == 1
        assert os.fstat(spill._segments[0].file.fileno()).st_size == spill.used == 50 * 32 * 4

    def test_an_entry_larger_than_the_disk_s_budget_is_left_out(self, tmp_path):
        spill = Spill(tmp_path, 100, "x")
        spill.put(("", (1,)), Capture(torch.rand(1, 8), torch.rand(1, 24)))
        assert spill.used == 0
        assert spill.get(("", (1,))) is None

    def test_what_was_returned_outlives_its_file(self, cache, tmp_path):
        cache = cache(tokens=0, spill=tmp_path)
        first = cache.get(ROWS)
        kept = cache.get(ROWS)
        cache.close()
        gc.collect()
        assert all_same(first, kept)

    def test_two_caches_in_one_folder(self, cache, tmp_path, tiny):
        """Of one identity, but over different bases: a collision would show at once."""
        one, two = (cache(tokens=2, model_type=name, spill=tmp_path, identity="same") for name in ("llama", "qwen2"))
        first, second = one.get(ROWS), two.get(ROWS)
        for _ in range(2):
            assert all_same(one.get(ROWS), first)
            assert all_same(two.get(ROWS), second)
        assert not all_same(first, second)
        one.close()
        assert all_same(two.get(ROWS), second)
        assert two.spilled

    def test_no_folder_is_made_before_it_is_needed(self, cache, tmp_path):
        cache = cache(spill=tmp_path / "deep" / "scratch", identity="a/b c")
        cache.get(ROWS)
        assert not any(tmp_path.iterdir())
        cache.budget = 0
        cache.get(rows_of([2, 2]))
        assert (tmp_path / "deep" / "scratch").is_dir()
        assert cache.spilled


class TestRemoval:
    @staticmethod
    def files(cache: PrefixCache) -> list:
        return [segment.file for segment in cache._disk._segments]

    def test_close(self, cache, tmp_path):
        cache = cache(tokens=2, spill=tmp_path)
        first = cache.get(ROWS)
        files = self.files(cache)
        cache.close()
        assert files
        assert all(file.closed for file in files)
        assert not any(tmp_path.iterdir())
        assert (len(cache), cache.used, cache.spilled) == (0, 0, 0)
        cache.close()
        torch.testing.assert_close([a.hidden for a in cache.get(ROWS)], [a.hidden for a in first])

    def test_the_end_of_the_cache(self, cache, tmp_path):
        cache = cache(tokens=2, spill=tmp_path)
        cache.get(ROWS)
        files = self.files(cache)
        del cache
        gc.collect()
        assert all(file.closed for file in files)
        assert not any(tmp_path.iterdir())

    @pytest.mark.skipif(sys.platform == "win32", reason="a killed process's files stay on Windows")
    @pytest.mark.parametrize("end", ["pass", f"os.kill(os.getpid(), {int(getattr(signal, 'SIGKILL', 9))})"])
    def test_the_end_of_the_process(self, tmp_path, end):
        code = f"""
import os, torch
from pathlib import Path
from repair_lightning.models.prefix import Capture
from repair_lightning.models.prefix_cache import Spill
spill = Spill(Path({str(tmp_path)!r}), 1 << 20, "x")
spill.put(("", (1,)), Capture(torch.rand(2, 8), torch.rand(2, 8)))
assert spill.used == 128
{end}
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == (0 if end == "pass" else -signal.SIGKILL), done.stderr
        assert not any(tmp_path.iterdir())


class TestFailingDisk:
    @staticmethod
    def check(cache, caplog) -> None:
        """All answers stay right, the warning comes once, and the disk is let go."""
        expected = PrefixCache(cache.split).get(ROWS)
        for _ in range(3):
            for found, right in zip(cache.get(ROWS), expected, strict=True):
                torch.testing.assert_close(found.hidden, right.hidden, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found.activations, right.activations, rtol=1e-5, atol=1e-5)
        assert [(record.levelname, "goes on without" in record.message) for record in caplog.records] == [
            ("WARNING", True)
        ]
        assert cache.spilled == 0
        assert cache.used <= cache.budget

    @pytest.mark.parametrize("writes", [0, 1, 2, 3])
    def test_full(self, cache, tmp_path, monkeypatch, caplog, writes):
        """The disk is full behind some writes; what it had taken is asked for again and computed anew."""
        cache = cache(tokens=2, spill=tmp_path)
        write, left = prefix_cache._write_all, [writes]

        def full(file, data):
            left[0] -= 1
            if left[0] < 0:
                file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, data)

        monkeypatch.setattr(prefix_cache, "_write_all", full)
        self.check(cache, caplog)

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

    def test_no_folder_can_be_made(self, cache, tmp_path, caplog):
        (tmp_path / "file").write_text("in the way")
        self.check(cache(tokens=2, spill=tmp_path / "file" / "scratch"), caplog)

    def test_a_file_that_was_cut(self, cache, tmp_path, caplog):
        cache = cache(tokens=2, spill=tmp_path)
        cache.get(ROWS)
        os.ftruncate(cache._disk._segments[0].file.fileno(), 10)
        self.check(cache, caplog)
