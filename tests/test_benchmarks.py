"""Every part of the benchmarks at its smallest: it runs, its figures make sense, its files are written. Never speed."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_runs import world_edits

from benchmarks import airports, editing, merging, report, roofline, stream100k, streams
from benchmarks.__main__ import main
from benchmarks.context import Context
from callbacks import LossAwareTiesMerge
from repair_lightning.editors.repair import Repair, Writing
from repair_lightning.texts import asking
from repair_lightning.texts.relations import STAND_IN, bank

BANK = [wording.replace(STAND_IN, "{}") for wording in bank()[0]]
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 2560, "max_position_embeddings": 128}


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(repeats=1, out=tmp_path / "world", work=tmp_path / "work")


def measured(part: str, context: Context, *args: Any, **settings: Any) -> Any:
    """A part's result, which can be shown and kept: every number of its rows is finite and not negative, ratios and
    speeds are positive."""
    result = report.module_of(part).run_part(replace(context, **settings), *args)
    json.dumps(result)
    assert report.tables(part, result).startswith(f"## {part.capitalize()}\n\n")
    for row in itertools.chain(*result.values()) if isinstance(result, dict) else result:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                assert 0 <= value < math.inf, name
                assert value > 0 or not re.search(r"ratio|/|share,", name), name
    return result


def test_cheap_parts(context):
    assert len(measured("roofline", context, batch=4)) == 1
    rows = measured("recursion", context, sizes=(5, 30))
    assert all(row["error"] < 1e-3 for row in rows)
    rows = measured("generation", context, batches=(1, 3), shards=(2,), tokens=3)
    assert [(row["batch"], row["memories in batch"], row["by shards"]) for row in rows] == [(1, 1, 100), (3, 2, 100)]
    result = measured("routing", context, banks=(4, 40), keyed=(600,))
    assert [row["recall"] > 90 for row in result["Activation router"]] == [True, True]
    assert (result["Key router"][0]["own"], result["Key router"][0]["base"] > 90) == (100, True)
    first, last = measured("checkpoints", context, checkpointed=(60, 200), window=20)
    assert last["whole MiB"] > 2 * max(first["whole MiB"], last["in journal MiB"])


@pytest.mark.slow
def test_parts_that_take_longer(context):
    result = measured("editing", context, editing.VARIANTS[:2], edits=4)  # by the real program
    ours, fixed = result["Against WISE"]
    assert fixed["ours is faster by"] == ours["edits/min"] / fixed["edits/min"]
    assert (ours["Rel (AR)"], ours["edits"]) == (100, 4)
    parts = {row["part"]: row["of editing, %"] for row in result["Where the time goes"]}
    assert parts["editing, in all"] == 100
    assert parts["inner steps"] > 0
    assert sum(share for part, share in parts.items() if share and "roof" not in part) == pytest.approx(200)
    first, last = measured("flat", context, sizes=(4, 8), window=4)
    assert (first["edits"], last["edits"], first["ratio"], last["invented"]) == (4, 8, 1, 0)
    (row,) = measured("memory", context, stream=12, cache_mib=(4,))
    assert row["peak"] > row["held"] > row["base"]
    rows = measured("merging", context, merged=(2,), per_shard=2, densities=(1.0, 0.2))
    assert len(rows) == len(merging.FORMS) * (1 + 2 * 2 * 2 + len(merging.OTHERS))
    assert all(row["Rel"] == 100 for row in rows if row["kind"] == "before")


@pytest.mark.slow
def test_a_server_under_a_short_load(context):
    result = measured("serving", context, served=3, load_minutes=0.05, kills=1)
    assert result["Answers and corrections"][0]["right after it"] == 1
    (row,) = result["Under load"]
    assert (row["kills"], row["lost"], row["wrong"], row["without an answer"]) == (1, 0, 0, 0)
    assert row["answered"] > 0


def test_real_subjects():
    """A short list begins a longer one; wordings are kept apart; no subject is named by another one's prompts."""
    edits = airports.airport_edits(400, seed=0)
    assert edits[:40] == airports.airport_edits(40, seed=0)
    assert len({edit.id for edit in edits}) == len({edit.prompt for edit in edits}) == 400
    subjects = {edit.subject for edit in edits}
    assert len(subjects) == 100
    for relation in airports.RELATIONS:
        assert len({relation.wording, *relation.rephrases, *relation.neighbours}) == 5
        assert not {relation.wording, *relation.rephrases, *relation.neighbours} & set(BANK)
    near = [probe.prompt for edit in edits for probe in edit.near]
    for edit in edits:
        words = asking.spellings(edit.subject)
        assert all(asking.places(prompt, words) for prompt in (edit.prompt, *edit.rephrases))
    assert not any(asking.places(prompt, asking.spellings(subject)) for subject in subjects for prompt in near[:50])
    with pytest.raises(ValueError, match="--airports must be at most"):
        airports.airport_edits(10**6, seed=0)


@pytest.mark.slow
def test_a_stream_about_real_subjects_is_killed_and_goes_on(context):
    result = measured("stream100k", context, airports=24, airports_window=8, sampled=4, killed=16)
    (row,) = result["Growth"]
    assert (row["edits"], row["ratio"]) == (24, 1)
    assert len(result["Ages"]) == 10
    (use,) = result["Use"]
    assert 12 <= use["killed at"] <= 24
    assert use["pack kB/edit"] > use["journal kB/edit"] / 3 > 0
    (killed,) = result["Killed"]
    assert (killed["edits"], killed["statuses that differ"], killed["rows that differ"]) == (16, 0, 0)
    stopped = stream100k.written(replace(context, airports_window=8), context.work / "airports", 24, kill=12)
    assert stopped["killed at"] == use["killed at"]  # a run that was stopped while it was asked finds all there


def test_invented_edits_are_new_and_named():
    known = world_edits(20)
    made = list(itertools.islice(streams.inventing(known, seed=1), 300))
    assert len({edit.prompt for edit in (*known, *made)}) == len({edit.id for edit in (*known, *made)}) == 320
    assert all(edit.subject in edit.prompt for edit in made)
    assert not {edit.subject for edit in known} & {edit.subject for edit in made}


@pytest.mark.parametrize("layer", [-1, 9])
def test_flops_of_a_step(context, layer):
    """Two products with the shards, r^2 x 192 for an edit's r target tokens in all forms, and two with the head
    (2560 x 192) at M; two layers of 192 x (192 + 64 + 64 + 192 + 3 x 576) entries above cost R tokens 2 FLOPs per
    entry forward and as many backward, beside attention: 2 x 192 x T^2 per row forward, twice that back."""
    edits = world_edits(3)
    editor = streams.prepared(context, edits, layer=layer)
    forms = [editor.edited.forms.variants(edit.prompt, edit.target) for edit in edits]
    targets = [sum(len(one.target) for one in encoded) for encoded in forms]
    step = 4 * sum(targets) * 2560 * 192 + 4 * 192 * sum(count**2 for count in targets)
    if layer == 9:
        lengths = [len(one.ids) for encoded in forms for one in encoded]
        entries = 2 * 192 * (192 + 64 + 64 + 192 + 3 * 576)
        step += 4 * sum(lengths) * entries + 3 * 2 * 2 * 192 * sum(length**2 for length in lengths)
    assert roofline.step_flops(editor, editor._rows(edits))["step"] == step


@pytest.mark.slow
@pytest.mark.ddp
def test_scaling_runs_the_real_program_on_two_ranks(context):
    one, two = measured("scaling", context, edits=4, ranks_window=4)
    assert (one["ranks"], two["ranks"], one["lost"], two["lost"]) == (1, 2, 0, 0)
    assert two["faster by"] == two["edits/min"] / one["edits/min"]
    assert {name: two[name] for name in two if "(" in name} == {name: one[name] for name in one if "(" in name}


def test_a_merge_of_the_study_is_the_callbacks_and_is_undone(context):
    """The rule gives the callback's own delta, bit by bit; then shards, router and ledger are as before."""
    edits = world_edits(4)
    editor = streams.prepared(context, edits, Repair, writing=Writing(capacity=2, mask_ratio=0.4))
    shards = [streams.write(editor, part)[0].shard for part in (edits[:2], edits[2:])]
    expected = LossAwareTiesMerge(rule="ties").fused_delta(shards, editor)
    parts = (editor.memory.ids, editor.memory.stacked().tolist(), editor.ledger.state_dict())
    before = (*parts, editor.choose_for(edits).memory.tolist())
    with merging.undone(editor):
        merging.fuse(editor, shards, merging.Rule())
        (fused,) = editor.memory.ids
        assert torch.equal(editor.memory[fused].delta, expected)
        assert editor.ledger.sizes() == {fused: 4}
    parts = (editor.memory.ids, editor.memory.stacked().tolist(), editor.ledger.state_dict())
    assert before == (*parts, editor.choose_for(edits).memory.tolist())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gpu_part_on_a_tiny_base(context, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = measured("gpu", context, device, TINY, gpu_edits=6)
    rows = found["Editing"]
    assert [(row["layer"], row["edits"], bool(row["peak MiB"])) for row in rows] == [(2, 6, device == "cuda")] * 3
    assert all(row["shards MiB"] > 0 and row["cache MiB"] > 0 for row in rows)
    assert all((row["waits"] or 0) > 0 < (row["in the steps"] or 0) for row in rows) is (device == "cuda")
    assert {row["editor"] for row in found["Generation"]} == {"keyed", "repair"}
    assert all(row["ratio"] > 0 for row in found["Generation"])


def test_the_command_writes_json_and_a_page_and_a_part_that_fails_does_not_stop_the_others(tmp_path, capsys):
    options = ["--quick", "--merged", "1", "--sizes", "3", "--out", str(tmp_path), "--threads"]
    assert main(["merging", "recursion", *options, str(torch.get_num_threads())]) == 1
    assert not (tmp_path / "merging.json").exists()
    content = json.loads((tmp_path / "recursion.json").read_text())
    assert content["command"].startswith("python -m benchmarks merging recursion --quick --merged 1 --sizes 3")
    assert {"cpu", "cores", "torch", "threads", "commit", "took_seconds"} <= set(content["machine"])
    assert "## Recursion\n" in (tmp_path / "results.md").read_text()
    assert "needs 2 shards or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["flatt"])
    assert "known: editing, flat" in capsys.readouterr().err
