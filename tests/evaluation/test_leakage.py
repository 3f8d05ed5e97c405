"""Scoring data never reaches training, routing or thresholds: other rephrases and probes give the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_runs import fit, hard_edits, without_probes, world_editor, world_stream, write_edits

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger, Scoreboard
from repair_lightning.packs import save_pack
from repair_lightning.types import Edit, Probe


def other_probes(edit: Edit) -> Edit:
    """The same edit with scoring prompts that are nonsense, or the very prompts that would be worth cheating with."""
    return replace(
        edit,
        rephrases=("What colour is the moon?", edit.prompt + " now"),
        locality=(Probe("Completely different", "words"), Probe(edit.prompt.upper(), edit.target)),
        near=(Probe(edit.prompt.replace(str(edit.subject), "Somebody Else")),),
    )


def run(folder: Path, edits: list[Edit], router: str) -> tuple[bytes, str]:
    """A closed loop that prunes, a merge, live scores: everything that could leak."""
    editor = world_editor({"router": router}, capacity=4)
    stream = world_stream(write_edits(folder / "edits.jsonl", edits), window=4, batch_size=4)
    feedback = PruneAndRetrigger(max_attempts=2)
    loop = [ErrorSampleMonitor(), feedback, Scoreboard(live=4), LossAwareTiesMerge(max_op_drop=0.5)]
    fit(editor, stream, loop, folder)
    assert feedback.pruned, "the premise: the closed loop acted"
    pack = save_pack(editor, folder / "pack", {})
    config = json.loads((pack / "repair_config.json").read_text())
    del config["files"], config["config_sha256"]  # the ledger's hash, which holds the scoring prompts
    return (pack / "side_memory.safetensors").read_bytes(), json.dumps(config)


@pytest.mark.parametrize("router", ["key", "hybrid"])
def test_scoring_prompts_do_not_matter(tmp_path, router):
    edits = hard_edits(8)
    found = []
    for name, change in (("own", lambda edit: edit), ("other", other_probes), ("none", without_probes)):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, [change(edit) for edit in edits], router))
    weights, configs = zip(*found, strict=True)
    assert len(set(weights)) == 1  # shards, masks, keys, radii
    assert len(set(configs)) == 1  # thresholds, owners, generations


def test_what_is_written_does_matter(tmp_path):
    """The check above would pass if nothing reached the pack: another target must change it."""
    edits = hard_edits(4)
    packs = []
    for name, target in (("a", edits[0].target), ("b", "Something Else")):
        (tmp_path / name).mkdir()
        packs.append(run(tmp_path / name, [replace(edits[0], target=target), *edits[1:]], "key")[0])
    assert packs[0] != packs[1]
