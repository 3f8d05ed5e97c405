"""Results as JSON, as tables in the terminal, and as one Markdown page per base."""

from __future__ import annotations

import datetime
import importlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.context import PARTS, Context

_WIDTH = 150
"""Columns that the widest table needs."""


@dataclass(frozen=True)
class Table:
    """A table of strings with a sentence below it."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, whole above a hundred; `-` for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"


def percent(share: float | None) -> str:
    """A share in per cent, without the sign; `-` for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def mib(count: float | None) -> str:
    """Bytes in MiB; `-` for None."""
    return "-" if count is None else f"{count / 2**20:,.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.2f}"


def save(context: Context, part: str, result: dict[str, Any], machine: dict[str, Any], argv: Sequence[str]) -> Path:
    """Write one part's JSON; returns its path."""
    context.out.mkdir(parents=True, exist_ok=True)
    file = context.out / f"{part}.json"
    settings = {key: value for key, value in context.as_dict().items() if key not in ("out", "work")}
    content = {
        "part": part,
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": context.seed,
        "machine": machine,
        "settings": settings,
        "result": result,
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """What has been measured so far, by part in the usual order."""
    files = {part: folder / f"{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}


def tables_of(part: str, result: dict[str, Any]) -> list[Table]:
    """A part's own tables."""
    found: list[Table] = importlib.import_module(f"benchmarks.{part}").tables(result)
    return found


def show(tables: Sequence[Table], console: Console | None = None) -> None:
    """Print tables to the terminal."""
    console = console or Console(width=max(Console().width, _WIDTH))
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        for i, name in enumerate(table.header):
            shown.add_column(name, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        if table.note:
            console.print(table.note, style="dim", highlight=False)
        console.print()


def write_markdown(folder: Path) -> Path:
    """One page with every part that the folder holds, each with its command, machine and date."""
    measured = load(folder)
    bases = dict.fromkeys(Path(content["settings"]["base"]).name for content in measured.values())
    lines = [f"# Benchmarks: {', '.join(bases)}", ""]
    lines += ["Written by `python -m benchmarks`; what is measured, and how: [benchmarks](../../README.md).", ""]
    if (folder / "figure.png").is_file():
        lines += ["![all parts](figure.png)", ""]
    for part, content in measured.items():
        lines += [line for table in tables_of(part, content["result"]) for line in markdown(table)]
        lines += ["```console", content["command"], "```", "", provenance(content), ""]
    page = folder / "results.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def markdown(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    rule = "|" + "|".join(["---", *["---:"] * (len(table.header) - 1)]) + "|"
    rows = ["| " + " | ".join(row) + " |" for row in (table.header, *table.rows)]
    return [f"## {table.title}", "", rows[0], rule, *rows[1:], "", *([table.note, ""] if table.note else [])]


def provenance(content: dict[str, Any]) -> str:
    """Machine, versions, seed and date in a line."""
    machine = content["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{gpu}, {machine['threads']} thread(s), load "
        f"{machine['load_average'][0]}; torch {machine['torch']}, transformers {machine['transformers']}; commit "
        f"{machine['commit']}; seed {content['seed']}; {content['date']}."
    )
