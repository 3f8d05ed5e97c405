"""Every part of the benchmarks at its smallest: it runs, its figures make sense, its files are written. Never speed."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_runs import REPOSITORY, world_edits

from benchmarks import (
    checkpoints,
    clustering,
    editing,
    figure,
    flat,
    generation,
    gpu,
    memory,
    merging,
    recursion,
    report,
    roofline,
    routing,
    scaling,
    streams,
    timing,
)
from benchmarks.__main__ import main
from benchmarks.context import PARTS, Context, parse
from callbacks import LossAwareTiesMerge
from repair_lightning.editors.repair import Writing
from repair_lightning.types import BASE, EditBatch

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 2560, "max_position_embeddings": 128}


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(repeats=1, out=tmp_path / "world", work=tmp_path / "work")


def finite(value: Any, path: str = "") -> None:
    """Every number of a result is finite and none is negative; figures of speed and ratios are positive."""
    if isinstance(value, dict):
        for key, part in value.items():
            finite(part, f"{path}.{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            finite(part, f"{path}[{i}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        assert math.isfinite(value), path
        assert "cosine" in path or value >= 0, path
        if re.search(r"ratio|per_minute|per_second|share\b|rate$|seconds_per_edit", path):
            assert value > 0, path


def shown(part: str, result: dict[str, Any]) -> str:
    """The part's tables as Markdown; each row has as many cells as the header."""
    for table in report.tables_of(part, result):
        assert {len(row) for row in table.rows} == {len(table.header)}
    json.dumps(result)
    return "\n".join(line for table in report.tables_of(part, result) for line in report.markdown(table))


@pytest.mark.slow
def test_editing_runs_the_real_program(context):
    small = replace(context, edits=4)
    variants = (editing.VARIANTS[0], replace(editing.VARIANTS[1], options=("--model.writing.check_every", "5")))
    result = editing.run_part(small, variants)
    ours, fixed = result["variants"]
    finite(ours | {"ours_is_faster": 1.0})
    assert fixed["ours_is_faster"] == ours["edits_per_minute"] / fixed["edits_per_minute"]
    assert ours["scores"]["autoregressive"]["rel"] == 1.0
    assert result["ours_over_wise_whole_model"] is None
    assert "| ours, 70 steps |" in shown("editing", result)


def test_editing_compares_the_same_edits_and_runs_slow_variants_once(context):
    names = [variant.name for variant in editing.schedule(editing.VARIANTS, 3)]
    assert names.count("ours") == 3
    assert names.count(editing.WISE_WHOLE) == 1
    assert names.index("WISE, prefix cache") > names.index("ours")
    calls = [editing.command_of(context, variant, context.work) for variant in editing.VARIANTS]
    assert all("--data.max_edits 100" in " ".join(call) and "--merge.enabled false" in " ".join(call) for call in calls)
    assert "--config wise --model.cache_mib 0" in " ".join(calls[-1])
    overlay = next(word for word in calls[1] if word.endswith("overlay.yaml"))
    assert "steps: 70, stop_margin: null" in Path(overlay).read_text()


@pytest.mark.slow
def test_flatness(context):
    result = flat.run_part(replace(context, sizes=(4, 8), window=4, limit=8))
    finite({"sizes": result["sizes"], "windows": result["windows"]})
    assert [row["edits"] for row in result["sizes"]] == [4, 8]
    assert result["sizes"][0]["ratio"] == 1
    assert sum(result["sizes"][1]["parts"].values()) <= 1.01 * result["sizes"][1]["seconds_per_edit"]
    assert "all from the data" in shown("flat", result)


def test_what_an_edit_costs_is_the_median_of_the_last_windows():
    """Windows of 10 edits that take 1, 2, 3, 10 and 4 s, and half of that from the processor; the last three
    before 50 are 3, 10 and 4 s: 0.4 s per edit, 0.2 of the processor's, and 20 s over 50 edits."""
    seconds = [1.0, 2.0, 3.0, 10.0, 4.0]
    windows = [
        {"edits": 10 * i + 10, "seconds": s, "cpu": s / 2, "rss": 1, "shards": 1, "parts": {"write": s / 2}}
        for i, s in enumerate(seconds)
    ]
    windows.append(windows[-1] | {"seconds": 99.0})  # nothing arrived: what failed was written again
    row = flat.row_of(windows, 50)
    assert (row["seconds_per_edit"], row["cpu_per_edit"], row["cumulative"]) == (0.4, 0.2, 0.4)
    assert row["parts"] == {"write": 0.2}
    assert flat.row_of(windows, 10)["seconds_per_edit"] == 0.1


def test_invented_edits_are_new_and_named(context):
    known = world_edits(20)
    made = streams.invented(known, 300, seed=1)
    assert len({edit.prompt for edit in (*known, *made)}) == 320
    assert len({edit.id for edit in (*known, *made)}) == 320
    assert all(edit.subject in edit.prompt for edit in made)
    assert not {edit.subject for edit in known} & {edit.subject for edit in made}
    edits, number = streams.load_edits(context, 2_405)
    assert (len(edits), number) == (2_405, 5)
    with pytest.raises(ValueError, match="give fewer edits"):
        streams.invented([replace(edit, subject=None) for edit in known], 1)


def test_roofline(context):
    result = roofline.run_part(replace(context, batch=4))
    finite(result)
    low_rank, fresh, beside = result["batches"].values()
    assert beside["targets"] > fresh["targets"] == low_rank["targets"]  # the first batch is rehearsed
    assert fresh["needed_flops"] == fresh["steps"] * fresh["flops"]["step"] + fresh["flops"]["look"]
    assert low_rank["needed_flops"] > 0
    assert low_rank["flops"]["value_forward"] < fresh["flops"]["value_forward"]
    assert "dense, beside rehearsed" in shown("roofline", result)


@pytest.mark.parametrize("layer", [-1, 9])
def test_flops_of_a_step(context, layer):
    """Two products with the delta (192 x 576) and two with the head (2560 x 192) at M target tokens; where layers lie
    above, the delta meets all R tokens, and two layers of 192 x (192 + 64 + 64 + 192 + 3 x 576) entries cost R tokens
    2 FLOPs per entry forward and as many backward, beside attention: 2 x 192 x T^2 per row forward, twice that back."""
    edits = world_edits(3)
    editor = streams.prepared(context, edits, precision="float32", layer=layer, writing=Writing(form="dense"))
    seen: dict[str, Any] = {}
    train = editor._train
    editor._train = lambda *args: seen.update(rows=args[2]) or train(*args)  # type: ignore[func-returns-value,method-assign]
    editor.ledger.arrive(edits, 0)
    editor.write(EditBatch(tuple(edits)))
    lengths = torch.tensor([len(editor.encode(edit).ids) for edit in edits])
    targets, real = sum(len(editor.encode(edit).target) for edit in edits), int(lengths.sum())
    flops = roofline.step_flops(editor, seen["rows"])
    head = 4 * targets * 2560 * 192
    if layer == -1:
        assert flops["step"] == 4 * targets * 192 * 576 + head
    else:
        entries = 2 * 192 * (192 + 64 + 64 + 192 + 3 * 576)
        attention = 2 * 2 * 192 * int(lengths.square().sum())
        assert flops["step"] == 4 * real * 192 * 576 + head + 4 * real * entries + 3 * attention


def test_generation(context):
    result = generation.run_part(replace(context, batches=(1, 3), shards=(2,), tokens=3))
    finite(result)
    assert [(cell["form"], cell["batch"], cell["shards"]) for cell in result["cells"]] == [
        (form, batch, 2) for form in ("low_rank", "dense") for batch in (1, 3)
    ]
    assert result["cells"][1]["memories_in_batch"] == 2
    # So few steps leave shards that do not hold: those are silent.
    assert all(0 <= cell["answered_by_shards"] <= 1 and cell["routing_share"] < 1 for cell in result["cells"])
    assert " % by shards" in shown("generation", result)


@pytest.mark.slow
def test_memory(context):
    result = memory.run_part(replace(context, stream=12, cache_mib=(4,)))
    (row,) = result["streams"]
    finite(result)
    assert row["base_bytes"] == 4 * 5_657_280
    tokens = row["shard_bytes"] / (4 * (192 + 576))  # low-rank shards: a column and a row per target token
    assert tokens == int(tokens) >= 2 * 12
    assert row["cache_used"] <= row["cache_budget"] == 4 << 20
    assert row["peak"] >= row["rss"] > row["base_bytes"]
    assert "MiB" in shown("memory", result)


def test_clustering(context):
    result = clustering.run_part(replace(context, points=(300, 11_000, 1 << 30), limit=20_000))
    finite(result)
    assert [row["points"] for row in result["sizes"]] == [300, 11_000]
    for row in result["sizes"]:
        assert row["batches"] == math.ceil(row["points"] / clustering.BATCH)
        assert row["cosine"] > row["random_cosine"]
        assert 0.5 < row["recall"] <= 1
    assert "11,000" in shown("clustering", result)


def test_routing(context):
    result = routing.run_part(replace(context, banks=(4, 40, 1 << 30), keyed=(600,), limit=1_000))
    finite(result)
    assert [row["shards"] for row in result["banks"]] == [4, 40]
    assert [row["edits"] for row in result["keyed"]] == [600]
    for row in result["banks"]:
        assert 0.3 < row["fires"] < 1
        assert row["recall"] > 0.9
        assert set(row["batch_1"]) == {"one", "two", "ratio", "all"}
    for row in result["keyed"]:
        assert row["own"] == 1
        assert row["recall"] > 0.5
        assert row["base"] > 0.9
        assert row["rephrased"]["batch_1"]["median"] > row["unrelated"]["batch_1"]["median"]
    assert result["banks"][0]["recall"] == 1  # all of 4 shards are candidates
    assert "key router" in shown("routing", result)
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    figure.routing(axes, result)
    assert len(axes.lines) == 4


def test_recursion(context):
    result = recursion.run_part(replace(context, sizes=(5, 30)))
    finite(result)
    assert [row["steps"] for row in result["sizes"]] == [5, 30]
    assert all(row["error"] < 1e-3 for row in result["sizes"])
    assert result["undo"]["steps"] == recursion.UNDONE
    assert result["undo"]["error"] < 1e-3
    assert "rebuilt" in shown("recursion", result)


def test_checkpoints(context):
    result = checkpoints.run_part(replace(context, checkpointed=(60, 200), window=20))
    finite(result)
    first, last = result["sizes"]
    assert last["whole"]["bytes"] > 2 * first["whole"]["bytes"]
    assert last["apart"]["bytes"] < last["whole"]["bytes"] / 2
    assert last["apart"]["held"] < last["whole"]["bytes"]
    assert last["apart"]["checkpoints"] == 10
    assert not (context.work / "checkpoints").exists()
    assert "200" in shown("checkpoints", result)


@pytest.mark.slow
@pytest.mark.ddp
def test_scaling_runs_the_real_program_on_two_ranks(context):
    result = scaling.run_part(replace(context, edits=4, ranks_window=4))
    finite(result)
    one, two = result["rows"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert len(two["written_per_minute"]) == 2
    assert two["speedup"] == two["edits_per_minute"] / one["edits_per_minute"]
    assert two["scores"] == one["scores"]
    assert "| 2 |" in shown("scaling", result)


def test_mean_cosine_by_hand():
    """Two pairs: equal (1) and at right angles (0); a batch of one has no pair."""
    units = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).numpy()
    assert clustering.mean_cosine(units, [[0, 1], [0, 2], [1]]) == pytest.approx(0.5)


@pytest.mark.slow
def test_merging(context):
    small = replace(context, merged=(2,), per_shard=2, densities=(1.0, 0.2), alphas=(0.0, 10.0))
    result = merging.run_part(small)
    finite(result)
    assert [bank["form"] for bank in result["banks"]] == list(merging.FORMS)
    for bank in result["banks"]:
        rules = [tuple(after["rule"].values())[1:] for after in bank["after"]]
        settings = itertools.product((0.0, 1.0), ("contributors", "global"), (1.0, 0.2))
        assert rules == [*settings, *[(1.0, "contributors", 1.0)] * 2]
        assert bank["before"]["scores"]["autoregressive"]["rel"] == 1.0
        assert [len(after["weights"] or ()) for after in bank["after"]] == [2] * 8 + [0] * 2
    assert [(case["form"], case["kind"]) for case in result["odd"]] == list(
        itertools.product(merging.FORMS, merging.ODD)
    )
    for case in result["odd"]:
        lies = case["kind"] == "wrong targets"
        assert case["before"]["own"]["autoregressive"]["rel"] == 0.0 or not lies
        assert case["before"]["others"]["autoregressive"]["rel"] == 1.0
        assert case["loss"] < case["loss_of_others"] or case["kind"] not in ("overfitted", "wrong targets")
        assert case["after"][0]["weights"] == [0.5, 0.5]
    text = shown("merging", result)
    assert "| dense, mask 0.2 | (before) |" in text
    assert "| low rank | wrong targets |" in text


def test_a_merge_of_the_study_is_the_callbacks_and_is_undone(context):
    """The default rule gives the callback's own delta, bit by bit; then shards, router and ledger are as before."""
    edits = world_edits(4)
    writing = Writing(form="dense", capacity=2, mask_ratio=0.4)
    editor = streams.prepared(context, edits, precision="float32", writing=writing)
    shards = [merging.write_shard(editor, edits[:2]), merging.write_shard(editor, edits[2:], wrong=True, steps=3)]
    assert editor.writing is writing
    assert [editor.ledger.entry(edit.id).edit for edit in edits] == edits  # the ledger holds the right targets
    expected = LossAwareTiesMerge().fused_delta(shards, editor)
    ledger = editor.ledger.state_dict()
    deltas = editor.memory.stacked().detach().clone()
    with merging.undone(editor):
        weights = merging.fuse(editor, shards, merging.Rule())
        assert weights is not None
        assert sum(weights) == pytest.approx(1)
        (fused,) = editor.memory.ids
        assert torch.equal(editor.memory[fused].delta, expected)
        assert editor.ledger.sizes() == {fused: 4}
    assert editor.memory.ids == shards
    assert torch.equal(editor.memory.stacked(), deltas)
    assert editor.ledger.state_dict() == ledger
    assert editor.choose_for(edits).memory.tolist() == [0, 0, BASE, BASE]  # what learnt wrong targets is silent


def test_least_squares_keeps_what_each_shard_adds_at_its_own_edits(context):
    """Four edits excite fewer directions than d_ffn: one delta can say all that two shards say, unlike their mean."""
    edits = world_edits(4)
    editor = streams.prepared(context, edits, precision="float32", writing=Writing(capacity=2))
    shards = [merging.write_shard(editor, edits[:2]), merging.write_shard(editor, edits[2:])]
    fused, _ = merging.Rule(kind="least squares").delta(editor, shards)
    mean = editor.memory.stacked(shards).mean(0)
    for shard, part in zip(shards, (edits[:2], edits[2:]), strict=True):
        rows = editor._rows(part, ())
        keys = rows.reading(rows.activations).float()
        said = keys @ editor.memory[shard].delta.T
        assert (keys @ fused.T - said).norm() < 0.05 * said.norm() < (keys @ mean.T - said).norm()


def test_the_gpu_part_on_a_tiny_base(context):
    result = gpu.run_part(replace(context, gpu_edits=6), device="cpu", shape=TINY)
    finite(result)
    assert [row["layer"] for row in result["layers"]] == [2, 2]
    assert all(row["edits"] == 6 and row["peak"] is None and row["cache_used"] > 0 for row in result["layers"])
    assert "random parameters" in shown("gpu", result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_the_gpu_part_is_skipped_without_one(context):
    assert shown("gpu", gpu.run_part(context)).count("skipped: no CUDA device") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_part_on_a_gpu(context):
    result = gpu.run_part(replace(context, gpu_edits=6), shape=TINY)
    finite(result)
    assert all(row["peak"] > row["base_bytes"] for row in result["layers"])


def test_the_command_writes_json_a_page_and_a_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    options = ["--quick", "--points", "300", "600", "--out", str(tmp_path), "--seed", "3"]
    try:
        assert main(["clustering", *options]) == 0
        assert main(["gpu", *options]) == 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "clustering.json").read_text())
    assert content["command"].startswith("python -m benchmarks clustering --quick --points 300 600")
    assert content["seed"] == content["settings"]["seed"] == 3
    assert {"cpu", "cores", "torch", "threads", "commit"} <= set(content["machine"])
    assert content["machine"]["threads"] == 1
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("# Benchmarks: world")
    assert "## Clustering" in page
    assert "## GPU" in page  # parts that were measured before stay on the page
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    assert "vectors/s" in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(context):
        raise RuntimeError("no luck")

    monkeypatch.setattr(clustering, "run_part", broken)
    threads = torch.get_num_threads()
    try:
        assert main(["clustering", "gpu", "--quick", "--out", str(tmp_path)]) == 1
    finally:
        torch.set_num_threads(threads)
    assert not (tmp_path / "clustering.json").exists()
    assert (tmp_path / "gpu.json").is_file()


def test_every_part_has_a_panel_and_a_place_in_the_readme():
    assert set(figure.PANELS) == set(PARTS)
    text = (REPOSITORY / "benchmarks" / "README.md").read_text()
    assert all(f"`{part}`" in text for part in PARTS)


def test_settings(tmp_path, capsys):
    parts, context = parse(
        ["flat", "gpu", "--sizes", "10", "20", "--base", "some/qa-llama", "--data", "x.json"], tmp_path
    )
    assert parts == ("flat", "gpu")
    assert (context.sizes, context.edits, context.name, context.irrelevant) == ((10, 20), 100, "qa-llama", "")
    assert context.out == REPOSITORY / "benchmarks" / "results" / "qa-llama"
    assert parse([], tmp_path)[0] == PARTS
    assert parse(["merging", "--alphas", "0", "2.5"], tmp_path)[1].alphas == (0.0, 2.5)
    quick = parse(["--quick"], tmp_path)[1]
    assert quick.edits < 100
    assert quick.out == REPOSITORY / "runs" / "benchmarks" / "world"
    assert Context.from_dict(json.loads(json.dumps(quick.as_dict()))) == quick
    with pytest.raises(SystemExit):
        parse(["flatt"], tmp_path)
    assert "known: editing, flat" in capsys.readouterr().err


def test_stopwatch_and_rounds():
    calls: list[str] = []
    found = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]  # warm-up, then rounds in turning order
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}

    class Clerk:
        def work(self, n: int) -> int:
            return n + 1

    clerk, watch = Clerk(), timing.Stopwatch()
    watch.wrap(clerk, "work", "hours")
    watch.wrap(clerk, "holiday")
    assert clerk.work(1) == 2
    assert watch.take()["hours"] > 0
    assert watch.take() == {"hours": 0.0}


def test_numbers_are_short():
    assert [report.number(x) for x in (1234.5, 12.345, 0.00123456, None)] == ["1,234", "12.3", "0.00123", "-"]
    assert report.number(31.0, "x") == "31x"
    assert (report.percent(0.4567), report.mib(3 << 20), report.mib(None)) == ("45.7", "3.00", "-")
