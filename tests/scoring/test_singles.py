"""Single edits: each meets the base as it was, is scored, and leaves nothing behind."""

from __future__ import annotations

import pytest
from helpers_runs import fit, hard_edits, world_editor, world_edits, world_stream, write_edits
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import ErrorSampleMonitor, PruneAndRetrigger, Scoreboard
from repair_lightning.editors import REGISTRY
from repair_lightning.edits.ledger import EditStatus
from repair_lightning.scoring.scorer import Singles


@pytest.fixture(scope="module")
def singled(tmp_path_factory):
    """Two edits by themselves, the second of which can never be written."""
    folder = tmp_path_factory.mktemp("singles")
    path = write_edits(folder / "edits.jsonl", hard_edits(2))
    editor, stream, board = world_editor(), world_stream(path, singles=True), Scoreboard()
    board.max_new_tokens = 12
    seen: list[tuple[str, ...]] = []
    write = editor.write

    def watched(batch):
        assert len(editor.memory) == 0 or editor.ledger.entry(batch.ids[0]).attempts
        seen.append(batch.ids)
        return write(batch)

    editor.write = watched
    fit(editor, stream, [ErrorSampleMonitor(), PruneAndRetrigger(max_attempts=2), board], folder)
    return editor, stream, board, seen


def test_each_is_written_alone_and_given_all_its_attempts(singled):
    editor, stream, _, seen = singled
    first, second = (edit.id for edit in stream.edits)
    assert seen == [(first,), (second,), (second,)]
    assert len(editor.memory) == 0
    assert stream.ledger.entry(first).status == EditStatus.UNDONE
    assert stream.ledger.entry(second).status == EditStatus.QUARANTINED


def test_the_score_is_the_mean_over_single_edits(singled):
    _, stream, board, _ = singled
    final = board.results["final"]
    assert final.scores["autoregressive"]["rel"] == 0.5
    assert {row["id"] for row in final.rows} == {edit.id for edit in stream.edits}
    assert board.results["before_merge"].scores == final.scores
    assert final.routing["edit"] == {"base": 0.5, "right": 0.5, "wrong": 0.0}
    assert board.oracle["autoregressive"]["rel"] == 0.5
    figures = board.singles.figures()
    assert figures["number"] == 2
    assert max(board.singles.memory_bytes) > 0


def test_a_run_that_is_resumed_scores_the_rest_on_a_fresh_base(tmp_path):
    """One edit, a checkpoint, the other two: as if nothing had happened between them."""
    path = write_edits(tmp_path / "edits.jsonl", world_edits(3))

    def run(epochs: int, ckpt: str | None = None) -> Scoreboard:
        board = Scoreboard()
        board.max_new_tokens = 12
        saver = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1, enable_version_counter=False)
        options = {"max_epochs": epochs, "enable_checkpointing": True}
        fit(world_editor(), world_stream(path, singles=True), [board, saver], tmp_path, ckpt, **options)
        return board

    run(1)
    resumed, whole = run(-1, str(tmp_path / "last.ckpt")), run(-1)
    assert len({row["id"] for row in resumed.singles.rows}) == 3
    assert resumed.results["final"].scores == whole.results["final"].scores
    assert resumed.singles.memory_bytes == whole.singles.memory_bytes


def test_nothing_of_one_edit_is_left_for_the_next_in_the_base(tmp_path):
    """In the base's own weights and in what the method remembers: each edit goes as far as it does alone."""

    def run(edits) -> Singles:
        path = write_edits(tmp_path / "edits.jsonl", edits)
        editor = REGISTRY["ultraedit"](base="world", precision="float32", lr=0.01, layers=1)
        editor.load()
        board = Scoreboard()
        board.max_new_tokens = 4
        fit(editor, world_stream(path, singles=True), [board], tmp_path)
        assert not editor.base_changed
        return board.singles

    edits = world_edits(3)
    together, alone = run(edits), [run([edit]) for edit in edits]
    assert together.deviations == [one.deviations[0] for one in alone]
    assert together.rows == [row for one in alone for row in one.rows]
    assert len({str(one) for one in together.deviations}) == 3
