"""What the scoreboard reports; that it does nothing else is held beside the dashboard's tests."""

from __future__ import annotations

import json

from helpers_runs import fit, hard_edits, world_editor, world_edits, world_stream, write_edits

from callbacks import ErrorSampleMonitor, LossAwareTiesMerge, PruneAndRetrigger, Scoreboard


def run(folder, board: Scoreboard, **options):
    """Two windows with a closed loop that has something to do."""
    stream = world_stream(**({"window": 4, "batch_size": 4} | options))
    loop = [ErrorSampleMonitor(), PruneAndRetrigger(max_attempts=2), board, LossAwareTiesMerge(max_op_drop=1.0)]
    fit(world_editor(capacity=4), stream, loop, folder)
    return stream


def test_all_stages_in_both_protocols(tmp_path):
    board = Scoreboard(live=16)
    stream = run(tmp_path, board, path=write_edits(tmp_path / "edits.jsonl", hard_edits(8)))
    assert list(board.results) == ["pre_edit", "before_merge", "final"]
    questions = sum(1 + len(e.rephrases) + len(e.locality) + len(e.near) for e in stream.edits)
    for stage, result in board.results.items():
        assert result.stage == stage
        assert set(result.scores) == {"autoregressive", "teacher_forced"}
        assert len(result.rows) == questions
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
