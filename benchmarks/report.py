"""Results as JSON, and as tables in Markdown: in the terminal, and on one page per base.

A part is a module: its docstring says what is measured, and `run_part(context)` returns rows of plain values by the
title of their table, or of one without a title. Lists in a row are for the JSON file alone.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.context import PARTS, Context

WIDTH = 150
"""Columns that the widest table needs."""
MIB = 2**20
Rows = list[dict[str, Any]]
Result = Rows | dict[str, Rows] | str
"""A part's table, or several by their titles; or why there is none."""


def percent(share: float | None) -> float | None:
    """A share in per cent; nothing of nothing."""
    return None if share is None else 100 * share


def said(value: Any) -> str:
    """A cell: three significant digits, whole above a hundred; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


def tables(part: str, result: Result) -> str:
    """What a part measures, and its tables, in Markdown."""
    texts = [f"## {part.capitalize()}", inspect.getdoc(module_of(part)) or ""]
    if isinstance(result, dict):
        texts += [text for title, rows in result.items() for text in (f"### {title}", _table(rows))]
    else:
        texts.append(result if isinstance(result, str) else _table(result))
    return "\n\n".join(texts)


def _table(rows: Rows) -> str:
    """A line per row."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([said(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def module_of(part: str) -> Any:
    """The module of a part."""
    return importlib.import_module(f"benchmarks.{part}")


def save(context: Context, part: str, result: Result, machine: dict[str, Any], argv: Sequence[str]) -> None:
    """Write one part's JSON."""
    content = {
        "part": part,
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine,
        "settings": context.as_dict(),
        "result": result,
    }
    context.out.mkdir(parents=True, exist_ok=True)
    (context.out / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n")


def write_page(folder: Path) -> Path:
    """One page with every part that the folder holds, each with its command, machine and date."""
    files = [folder / f"{part}.json" for part in PARTS]
    measured = [json.loads(file.read_text()) for file in files if file.is_file()]
    bases = dict.fromkeys(Path(content["settings"]["base"]).name for content in measured)
    texts = [f"# Benchmarks: {', '.join(bases)}", "Written by `python -m benchmarks` ([benchmarks](../../README.md))."]
    for content in measured:
        texts += [tables(content["part"], content["result"]), f"```console\n{content['command']}\n```", where(content)]
    page = folder / "results.md"
    page.write_text("\n\n".join(texts) + "\n")
    return page


def where(content: dict[str, Any]) -> str:
    """Machine, versions, seed and date in a line."""
    machine = content["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{gpu}, {machine['threads']} thread(s), load "
        f"{machine['load_average'][0]}; torch {machine['torch']}, transformers {machine['transformers']}; commit "
        f"{machine['commit']}; seed {content['settings']['seed']}; {content['date']}."
    )
