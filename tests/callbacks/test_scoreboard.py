"""The scoreboard reports and does nothing else."""

from __future__ import annotations

import json

import pytest
from helpers_runs import fit, hard_edits, world_editor, world_edits, world_stream, write_edits

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger, Scoreboard
from repair_lightning.packs.pack import save_pack
from repair_lightning.scoring import protocols


def run(folder, board: Scoreboard, **stream):
    """Two windows with a closed loop that has something to do."""
    editor = world_editor(capacity=4)
    path = write_edits(folder / "edits.jsonl", hard_edits(8))
    edits = world_stream(**({"path": path, "window": 4, "batch_size": 4} | stream))
    feedback, merge = PruneAndRetrigger(max_attempts=2), LossAwareTiesMerge(max_op_drop=1.0)
    trainer = fit(editor, edits, [ErrorSampleMonitor(), feedback, board, merge], folder)
    trainer.acted = (feedback.retriggered, bool(merge.outcome))
    save_pack(editor, folder / "pack", {})
    return editor, edits, trainer


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    board = Scoreboard(live=16)
    return board, *run(tmp_path_factory.mktemp("scored"), board)


def test_it_only_reports(tmp_path, monkeypatch, scored):
    """Live scores or none, other batches, other seed: the pack and the ledger are the same to the bit."""
    _, editor, stream, trainer = scored
    assert trainer.acted[0] > 0, "the premise: the closed loop acted"
    save_pack(editor, tmp_path / "with", {})
    board = Scoreboard(live=0)
    board.seed = 5
    monkeypatch.setattr(protocols, "BATCH", 7)
    _, silent, _ = run(tmp_path, board)
    for name in ("side_memory.safetensors", "repair_config.json"):
        assert (tmp_path / "pack" / name).read_bytes() == (tmp_path / "with" / name).read_bytes(), name
    assert silent.ledger == stream.ledger


def test_all_stages_in_both_protocols(scored):
    board, _, stream, _ = scored
    assert list(board.results) == ["pre_edit", "before_merge", "final"]
    questions = sum(1 + len(e.rephrases) + len(e.locality) + len(e.near) for e in stream.edits)
    for stage, result in board.results.items():
        assert result.stage == stage
        assert set(result.scores) == {"autoregressive", "teacher_forced"}
        assert len(result.rows) == questions
        assert {row["stage"] for row in result.rows} == {stage}
        json.dumps(result.rows, allow_nan=False)
    pre = board.results["pre_edit"]
    assert pre.scores["autoregressive"]["loc"] == pre.scores["autoregressive"]["near"] == 1.0  # the base against itself
    assert pre.routing["edit"] == {"base": 1.0, "right": 0.0, "wrong": 0.0}
    assert board.results["final"].scores["autoregressive"]["rel"] > pre.scores["autoregressive"]["rel"]
    assert board.perplexity is None


def test_hallucination_records_get_perplexities(tmp_path):
    """Perplexity of the target falls when the target is written."""
    records = [{"type": "wiki_bio", "prompt": e.prompt, "target_new": e.target} for e in world_edits(3)]
    lines = [{**r, "locality_prompt": "Where is it?", "locality_ground_truth": "There."} for r in records]
    path = tmp_path / "h.json"
    path.write_text(json.dumps(lines))
    board = Scoreboard(live=0)
    run(tmp_path, board, path=str(path), format="hallucination")
    assert board.perplexity is not None
    assert 1 <= board.perplexity["final"] < board.perplexity["pre"]
