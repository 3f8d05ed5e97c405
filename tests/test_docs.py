"""The documents are true: every command in them runs, the site builds, the reference misses no option.

Commands of one document run in its order, in one folder and in this process; training is cut to a few edits. What
cannot run here says why: `# not tested: REASON` after the command, or a line of `NOT_HERE`.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_runs import REPOSITORY, main_here, world_edits, write_edits

from repair_lightning.editors import REGISTRY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
SMALL = ["--data.max_edits", "4", "--data.max_irrelevant", "60", "--overwrite"]
STAND_INS = {"path/or/hub-name": "world"}
NOT_HERE = {
    "make smollm2": "minutes, and a package of 90 MB: `make real` does as much",
    "--model.base DIR": "minutes each, and public data: the commands behind the tables",
    "RECORDS": "minutes each, and public data: the runs behind the pictures",
    "--out runs/world": "minutes: one of the runs behind the pictures",
    "figures --to docs/figures": "needs those runs",
    "python -m benchmarks": "minutes each, and public data: tests/test_benchmarks.py runs every part small",
}
"""Part of a command -> why it cannot run here."""
_FENCE = re.compile(r"^```(bash|console|python)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced code of a page that claims to run: language and text."""
    return _FENCE.findall(page.read_text())


def commands(text: str) -> Iterator[str]:
    """The commands of a block, each in one line; lines that are only options are none."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith(("#", "--")):
            yield " ".join(line.split())


def reason_not_to(command: str) -> str | None:
    marked = command.partition("# not tested: ")[2]
    return marked or next((why for part, why in NOT_HERE.items() if part in command), None)


def commands_of(page: Path) -> list[str]:
    return [command for language, text in blocks(page) if language != "python" for command in commands(text)]


COMMANDS = [
    pytest.param(page, number, command, id=f"{page.stem}-{number}-{command[:48]}")
    for page in PAGES
    for number, command in enumerate(commands_of(page))
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The folder in which the reader sits: with edits, prompts and the editor that a page asks to be saved."""
    folder = tmp_path_factory.mktemp("reader")
    edits = world_edits(12)
    write_edits(folder / "edits.jsonl", edits[:4])
    write_edits(folder / "more.jsonl", edits[8:])
    (folder / "direct.py").write_text(editor_of_the_page())
    return folder


def editor_of_the_page() -> str:
    (code,) = [text for language, text in blocks(REPOSITORY / "docs" / "adding-an-editor.md") if language == "python"]
    return code


@pytest.fixture
def reader(here, monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Sits in that folder."""
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    yield monkeypatch
    REGISTRY.pop("direct", None)
    sys.modules.pop("direct", None)


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    """A command of a document, as far as this process can be the shell."""
    program, *rest = (STAND_INS.get(word, word) for word in shlex.split(command, comments=True))
    if program == "printf":
        text, _, file = rest
        Path(file).write_text(text.replace("\\n", "\n"))
        return
    if program == "make":
        call = [program, "-n", *rest]
        steps = subprocess.run(call, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
        for step in steps:  # what it installs is here already
            if " train.py " in step:
                run(f"python {step.partition('python ')[2]}", patch)
        return
    script = rest.pop(0) if program == "python" else program
    path = REPOSITORY / ("repair_lightning/__main__.py" if script == "repair-lightning" else script)
    assert path.is_file(), f"this test knows no '{script}'"
    training = "train" in (script.removesuffix(".py"), *rest[:1]) and not any("help" in option for option in rest)
    assert main_here(patch, path.relative_to(REPOSITORY), *rest, *(SMALL if training else ())) == 0


@pytest.mark.parametrize(("page", "number", "command"), COMMANDS)
def test_a_command_runs(page, number, command, here, reader, capsys):
    why = reason_not_to(command)
    if why:
        pytest.skip(why)
    run(command, reader)
    if command.startswith("repair-lightning ask --pack runs/tour/pack"):
        (here / "asked.txt").write_text(capsys.readouterr().out)


def test_the_tour_shows_what_it_says(here, reader, capsys):
    """The numbers of the tour are those of its 200 edits; what does not depend on their number must be as printed.

    Its last command takes that edit back: no edit is about the question any more.
    """
    page = (REPOSITORY / "docs" / "index.md").read_text()
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert (here / "asked.txt").is_file(), "the commands of the tour come first"
    said = (here / "asked.txt").read_text()
    assert [line.split()[0] for line in said.splitlines()[1:]] == [line.split()[0] for line in shown.splitlines()[1:]]
    for i in (0, 1, 2, 4):  # the question, the base's answer, the edited model's, and the edit
        assert said.splitlines()[i] == shown.splitlines()[i]
    run(shlex.join(["repair-lightning", "ask", "--pack", "runs/tour/pack", shown.splitlines()[0]]), reader)
    undone = capsys.readouterr().out.splitlines()
    assert undone[1] == said.splitlines()[1]
    assert undone[2].split()[1:] == undone[1].split()[1:]
    assert undone[-1] == "  reason   base: no edit is about what it names"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/serving.md"])
def test_the_python_runs(here, reader, capsys, page):
    codes = [text for language, text in blocks(REPOSITORY / page) if language == "python" and not reason_not_to(text)]
    assert codes
    for code in codes:
        exec(compile(code, page, "exec"), {})
    assert "base: " in capsys.readouterr().out


def test_the_editor_of_the_page_edits(here, reader):
    """It ran as a command of its page; its report says that it works."""
    metrics = json.loads((here / "runs" / "direct" / "metrics.json").read_text())
    assert metrics["editor"] == "direct"
    scores = metrics["final"]["autoregressive"]
    assert scores["rel"] == scores["loc"] == scores["near"] == 1.0
    assert scores["gen"] > 0.8  # the router's part: which other words it takes for the same question
    assert metrics["edits"]["written"] == metrics["n_edits"] == 4


def test_the_sizes_are_those_of_the_shapes():
    """The bases' parameters as their makers count them, and the page's table as the script prints it."""
    script = runpy.run_path(str(DOCS / "studies" / "sizes.py"))
    counted = {name: script["parameters"](shape) for name, shape in script["SHAPES"].items()}
    published = {"SmolLM2-135M": 134_515_008, "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304}
    published |= {"Qwen2.5-7B": 7_615_616_512, "LLaMA-3-8B": 8_030_261_248, "LLaMA-3-70B": 70_553_706_496}
    assert counted == {"`qa-llama`": 15_637_536, **published}
    assert script["low_rank_bytes"]({"hidden_size": 4096, "intermediate_size": 14336}, 5) == 92_180
    assert script["table"]() in (DOCS / "sizes.md").read_text()


needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra: docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


@needs_mkdocs
def test_the_site_builds_and_fetches_nothing(site):
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert {"index.html", "configuration.html", "adding-an-editor.html", "studies/comparison.html"} <= set(pages)
    for page in pages:
        fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\"> ]+)", (site / page).read_text())
        assert fetched == [], page


@needs_mkdocs
def test_the_reference_misses_no_option(site, here):
    """Of what a run wrote down as its complete configuration, every leaf but the trainer's stands in the page."""
    text = (site / "configuration.html").read_text()
    content = yaml.safe_load((here / "runs" / "tour" / "config.yaml").read_text())
    del content["trainer"]
    model = content.pop("model")["init_args"]
    found = list(leaves(content | {"model": model}))
    assert len(found) > 40
    assert len(list(leaves(content))) <= 40, "an option exists because two users would set it differently"
    assert [name for name in found if f"--{name}<" not in text] == []
    assert "&lt;!-- options" not in text
    assert "<!-- options" not in text


def leaves(content: dict[str, Any], start: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{start}{name}.")
        else:
            yield f"{start}{name}"
