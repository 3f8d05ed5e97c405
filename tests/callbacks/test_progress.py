"""Progress: plain lines without a terminal, a bar in one, nothing when quiet."""

from __future__ import annotations

import io
import re

import lightning.pytorch as pl
import pytest
from helpers_runs import fit, world_editor, world_stream
from rich.console import Console

from callbacks import ErrorSampleMonitor, Scoreboard, StreamProgress, progress


def run(folder, progress: StreamProgress, *more, **options) -> None:
    editor, stream = world_editor(steps=3), world_stream(max_edits=6, window=3)
    fit(editor, stream, [*more, progress], folder, enable_progress_bar=True, **options)


def lines_of(captured) -> list[str]:
    return [line for line in captured.err.splitlines() if line.startswith("window")]


def test_one_plain_line_per_window_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, StreamProgress(), ErrorSampleMonitor(), Scoreboard(live=4))
    lines = lines_of(capsys.readouterr())
    assert len(lines) == 2
    scores = "  ".join(rf"{name} \d+\.\d" for name in ("Rel", "Gen", "Loc", "Near", "OP"))
    for window, (line, left) in enumerate(zip(lines, (r"  0:0\d:\d\d left", ""), strict=True), 1):
        assert re.fullmatch(rf"window {window}: {3 * window}/6 edits  {scores}  \d+ edits/min{left}", line), line
        assert "\x1b" not in line


def test_live_scores_read_as_the_report_prints_them(tmp_path, capsys):
    """In per cent: what is logged lies in [0, 1]."""
    editor, stream = world_editor(steps=3), world_stream(max_edits=6)
    trainer = fit(editor, stream, [Scoreboard(live=4), StreamProgress()], tmp_path, enable_progress_bar=True)
    shown = dict(re.findall(r"  (\w+) (\d+\.\d)", lines_of(capsys.readouterr())[-1]))
    logged = {name: f"{100 * trainer.callback_metrics[key]:.1f}" for key, name in progress._SHOWN.items()}
    assert shown == logged


def test_one_edit_is_not_edits(tmp_path, capsys):
    editor, stream = world_editor(steps=3), world_stream(max_edits=1)
    fit(editor, stream, [StreamProgress()], tmp_path, enable_progress_bar=True)
    assert lines_of(capsys.readouterr())[0].startswith("window 1: 1/1 edit  ")


def test_single_edits_are_counted_though_the_model_holds_one(tmp_path, capsys):
    editor, stream = world_editor(steps=3), world_stream(max_edits=3, singles=True)
    fit(editor, stream, [StreamProgress(), Scoreboard(live=0)], tmp_path, enable_progress_bar=True)
    assert [line.split(": ")[1].split("  ")[0] for line in lines_of(capsys.readouterr())] == [
        "1/3 edits",
        "2/3 edits",
        "3/3 edits",
    ]


def test_pace_counts_what_this_process_wrote(tmp_path, capsys, monkeypatch):
    """A resumed run: three of six edits were written before, three now, in a minute that the clock says has passed."""
    run(tmp_path, StreamProgress(quiet=True), max_epochs=1, enable_checkpointing=True)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    clock = iter([0.0, 60.0, 60.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    run(tmp_path, StreamProgress(), ckpt_path=str(checkpoint))
    assert lines_of(capsys.readouterr()) == ["window 2: 6/6 edits  3 edits/min"]


def test_quiet_says_nothing(tmp_path, capsys):
    run(tmp_path, StreamProgress(quiet=True))
    captured = capsys.readouterr()
    assert "window" not in captured.err + captured.out


def test_lightning_may_turn_it_off_and_on():
    progress = StreamProgress()
    progress.disable()
    assert progress.quiet
    progress.enable()
    assert not progress.quiet


def in_a_terminal(width: int = 120) -> tuple[StreamProgress, io.StringIO]:
    progress, screen = StreamProgress(), io.StringIO()
    progress._console = Console(file=screen, force_terminal=True, width=width)
    return progress, screen


@pytest.mark.parametrize("width", [79, 140])
def test_a_bar_in_a_terminal(tmp_path, width):
    """The words stand whole in a narrow terminal too, on two lines there; a wide one has room for a bar."""
    progress, screen = in_a_terminal(width)
    run(tmp_path, progress, Scoreboard(live=4))
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).split())
    assert "window 1: 0/6 edits" in shown
    assert re.search(r"window 2: 6/6 edits Rel \d+\.\d Gen \d+\.\d Loc .* OP \d+\.\d \d+ edits/min", shown), shown
    assert ("━" in shown) == (width > 100)
    assert progress._bar is None


def test_an_error_closes_the_bar(tmp_path):
    class Failing(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("on purpose")

    progress, screen = in_a_terminal()
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, progress, Failing())
    assert progress._bar is None
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
