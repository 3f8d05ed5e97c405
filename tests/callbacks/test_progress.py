"""Progress: plain lines without a terminal, a bar in one, nothing when quiet."""

from __future__ import annotations

import re

from helpers_runs import fit, world_editor, world_stream

from callbacks import ErrorSampleMonitor, Scoreboard, StreamProgress


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


def test_quiet_says_nothing(tmp_path, capsys):
    progress = StreamProgress()
    progress.disable()
    run(tmp_path, progress)
    captured = capsys.readouterr()
    assert "window" not in captured.err + captured.out
