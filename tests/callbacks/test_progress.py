"""Progress: plain lines without a terminal, a bar in one, nothing when quiet."""

from __future__ import annotations

import io
import re

import pytest
from helpers_runs import fit, world_editor, world_stream
from rich.console import Console

from callbacks import ErrorSampleMonitor, Scoreboard, StreamProgress


def run(folder, progress: StreamProgress, *more) -> None:
    editor, stream = world_editor(steps=3), world_stream(max_edits=6, window=3)
    fit(editor, stream, [*more, progress], folder, enable_progress_bar=True)


def test_one_plain_line_per_window_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, StreamProgress(), ErrorSampleMonitor(), Scoreboard(live=4))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("window")]
    assert len(lines) == 2
    for window, line in enumerate(lines, 1):
        shape = rf"window {window}: {3 * window}/6 edits  Rel \d\.\d\d  Gen \d\.\d\d  Loc \d\.\d\d  \d+ edits/min"
        assert re.fullmatch(shape, line), line
        assert "\x1b" not in line


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


def in_a_terminal() -> tuple[StreamProgress, io.StringIO]:
    progress, screen = StreamProgress(), io.StringIO()
    progress._console = Console(file=screen, force_terminal=True, width=120)
    return progress, screen


def test_a_bar_in_a_terminal(tmp_path):
    progress, screen = in_a_terminal()
    run(tmp_path, progress)
    assert "6/6" in screen.getvalue()
    assert "window 2" in screen.getvalue()
    assert progress._bar is None


def test_an_error_closes_the_bar(tmp_path):
    class Failing(Scoreboard):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("on purpose")

    progress, screen = in_a_terminal()
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, progress, Failing())
    assert progress._bar is None
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
