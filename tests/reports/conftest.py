"""A run in which some edits fail, and a copy to spoil."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_runs import hard_edits, main_here, write_edits

HOSTILE = " <script>document.title = 'taken'</script>"
"""What a data file may hold, and a report must show as text."""


@pytest.fixture(scope="session")
def hard_run(tmp_path_factory) -> Path:
    """A finished run of twelve edits, every second of which can never be answered right, some with markup in their ids
    and prompts. Tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("hard")
    edits = [
        replace(edit, id=f"<b>{edit.id}</b>", prompt=edit.prompt + HOSTILE) if i < 3 else edit
        for i, edit in enumerate(hard_edits(12))
    ]
    path = write_edits(folder / "edits.jsonl", edits)
    options = "--data.window 4 --merge.enabled false --data.max_irrelevant 60 --model.writing.steps 40 "
    options += "--feedback.max_attempts 2 --trainer.logger false --run_dir runs/hard"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main_here(patch, "train.py", "--config", "quickstart", "--data.path", path, *options.split()) == 0
    return folder / "runs" / "hard"


@pytest.fixture
def copied_run(hard_run, tmp_path) -> Path:
    """A copy of it that a test may change, without the checkpoints."""
    ignored = shutil.ignore_patterns("checkpoints", "scratch")
    return Path(shutil.copytree(hard_run, tmp_path / "hard", ignore=ignored))
