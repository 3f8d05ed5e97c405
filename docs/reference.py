"""The configuration reference, from the parser of `train.py`: `python docs/reference.py`. And the hooks of MkDocs."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lightning.pytorch.cli import LightningArgumentParser  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from nbconvert import MarkdownExporter  # noqa: E402

from callbacks import CALLBACKS  # noqa: E402
from repair_lightning.commands.cli import EditCLI  # noqa: E402
from repair_lightning.commands.parsing import Parser  # noqa: E402
from repair_lightning.editors import REGISTRY  # noqa: E402

MARK = "<!-- options -->"
NOTEBOOK = ".ipynb"
_ELSEWHERE = ("trainer", "config", "print_config")


class _Parsed(Exception):
    """Carries the parser out of the command line before it parses."""


class _ParserOnly(EditCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Parsed(parser)


def parser() -> LightningArgumentParser:
    """The parser of `train.py`."""
    try:
        _ParserOnly(CALLBACKS, [])
    except _Parsed as found:
        return found.args[0]
    raise AssertionError("the command line parses nothing")


def actions() -> dict[str, Any]:
    """Every option but the trainer's own: name -> the parser's action. Those of each editor count as the model's."""
    found = {action.dest: action for action in parser()._actions if action.option_strings}
    for kind in REGISTRY.values():
        inner = Parser()
        inner.add_class_arguments(kind, "model", fail_untyped=False)
        found |= {action.dest: action for action in inner._actions if action.option_strings}
    kept = {name: action for name, action in found.items() if name.split(".")[0] not in _ELSEWHERE}
    kept = {name: action for name, action in kept.items() if action.default != SUPPRESS}  # what only prints
    groups = {name.rpartition(".")[0] for name in kept}
    return {name: action for name, action in kept.items() if name not in groups}


def reference() -> str:
    """The options as Markdown: a section and a table per part of the command line."""
    sections: dict[str, list[str]] = {}
    for name, action in actions().items():
        section = name.rpartition(".")[0]
        row = f"| `--{name}` | {_default(action.default)} | {_words(action.help)} |"
        sections.setdefault(section, []).append(row)
    parts = []
    for section in sorted(sections, key=lambda name: (name != "", name)):
        title = f"`--{section}.*`" if section else "The run"
        kind = CALLBACKS.get(section)
        intro = f"{(inspect.getdoc(kind) or '').splitlines()[0]}\n\n" if kind else ""
        rows = "\n".join(sections[section])
        parts.append(f"## {title}\n\n{intro}| option | default | meaning |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _default(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text and len(text) < 60 else ""


def _words(text: str | None) -> str:
    words = re.sub(r"\s*\(type: .*\)$|%\(default\)s|\(required.*?\)", "", " ".join((text or "").split()))
    return words.replace("|", "\\|").replace("%%", "%").replace("<", "&lt;")


def on_files(files: Files, config: Any) -> Files:
    """A hook: each notebook is a page too."""
    for file in [file for file in files if file.src_uri.endswith(NOTEBOOK)]:
        text, _ = MarkdownExporter().from_filename(str(file.abs_src_path))
        files.append(File.generated(config, f"{file.src_uri.removesuffix(NOTEBOOK)}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A hook: the reference takes the place of its mark, a link to a notebook leads to its page, and what lies outside
    the site is named, not linked."""
    found = markdown.replace(MARK, reference()) if MARK in markdown else markdown
    found = re.sub(rf"(\]\([\w/-]+){re.escape(NOTEBOOK)}\)", r"\1.md)", found)
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}([^)]+)\)", r"\1 (`\2`)", found)


def on_page_content(html: str, **_: Any) -> str:
    """A hook: docstrings name code with its role, `:meth:` and so on; a reader wants the name alone."""
    return re.sub(r":(?:meth|func|class):(?=<code>)", "", html)


if __name__ == "__main__":
    sys.stdout.write(reference())
