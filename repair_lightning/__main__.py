"""`repair-lightning COMMAND`: what can be done with an edited model besides training and scoring it."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from repair_lightning.commands.cli import guarded
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.types import BASE


def export(parser: ArgumentParser) -> None:
    """Write an edited model as a folder that needs no other: with its base, or merged into a plain checkpoint."""
    parser.add_argument("--pack", required=True, help="the pack's folder")
    parser.add_argument("--to", required=True, type=Path, help="the new folder")
    parser.add_argument(
        "--merged", action="store_true", help="fuse the edits into W_v: loads without us, answers worse; says how much"
    )
    parser.add_argument("--base", help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", default="auto", help="of the base: auto, float32, bfloat16, float16")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--max_edits", type=int, help="most edits that are asked to measure a merge; default all")
    parser.set_defaults(run_command=_export)


def _export(options: Namespace) -> None:
    from repair_lightning.packs.export import export_pack, report_lines

    given = (options.pack, options.to, options.merged, options.base, options.precision, options.overwrite)
    print("\n".join(report_lines(export_pack(*given, max_edits=options.max_edits), options.to)))


def undo(parser: ArgumentParser) -> None:
    """Take edits of a finished run back: the base answers their prompts again, the others stay."""
    parser.add_argument("--run", required=True, help="the run's directory")
    parser.add_argument("--id", required=True, action="append", nargs="+", help="of an edit; may be given repeatedly")
    parser.add_argument("--base", help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", help="of the base, where it is not to be the one of the run")
    parser.add_argument("--import", dest="module", help="the module of an editor of your own, as Python imports it")
    parser.set_defaults(run_command=_undo)


def _undo(options: Namespace) -> None:
    from repair_lightning.commands.undo import report_lines, undo
    from repair_lightning.reports.html_report import try_report

    if options.module:
        sys.path.insert(0, os.getcwd())  # a console script looks beside itself alone
        try:
            importlib.import_module(options.module)
        except ImportError as error:
            raise ConfigError(f"--import {options.module}: {error}; give a module that Python finds") from error
    ids = [id for given in options.id for id in given]
    print("\n".join(report_lines(undo(options.run, ids, options.base, options.precision))))
    try_report(options.run)


def log(parser: ArgumentParser) -> None:
    """What became of a run's edits, from its journal: all events, or those of some edits."""
    parser.add_argument("--run", required=True, type=Path, help="the run's directory")
    parser.add_argument("--id", action="append", nargs="+", default=[], help="of an edit; may be given repeatedly")
    parser.set_defaults(run_command=_log)


def _log(options: Namespace) -> None:
    from repair_lightning.edits.journal import FILE, Journal

    journal = Journal(options.run / FILE, read_only=True)
    for id in [id for given in options.id for id in given] or [None]:
        for event in journal.events(id):
            print(event_line(event))


def event_line(event: Mapping[str, Any]) -> str:
    """One event of a journal as a line of text."""
    when = datetime.fromtimestamp(event["time"]).isoformat(" ", "seconds")
    words = [when, f"{event['seq']:>6}", f"{event['kind']:<11}"]
    if event["id"] is not None:
        shard = "base" if event["shard"] == BASE else event["shard"]
        words += [event["id"], f"window {event['window'] + 1}", f"is {event['status']}"]
        words += [f"in shard {shard}"] if shard is not None else []
        words += [f"attempt {event['attempts']}"] if event["attempts"] else []
        words += [f"score {event['score']:g}"] if event["score"] is not None else []
    words += [f"({event['reason']})"] if event["reason"] else []
    words += ["[void]"] if event["void"] else []
    return "  ".join(words)


def harness(parser: ArgumentParser) -> None:
    """Score a pack's base and the edited model on benchmarks of lm-evaluation-harness (an extra: lm-eval)."""
    parser.add_argument("--pack", required=True, help="the pack's folder, or its name on the hub")
    parser.add_argument("--tasks", required=True, type=_names, help="names, with commas between")
    parser.add_argument("--base", help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", default="auto", help="of the base: auto, float32, bfloat16, float16")
    parser.add_argument("--limit", type=int, help="most documents of each task; default all")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question; default the task's own")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask through the base's chat template")
    parser.add_argument("--system_instruction", help="a system message before each question")
    parser.add_argument("--include_path", help="a folder with more tasks, in YAML")
    parser.add_argument("--batch_size", type=int, default=16, help="requests at once; default 16")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.set_defaults(run_command=_harness)


def _names(text: str) -> list[str]:
    return text.split(",")


def _harness(options: Namespace) -> None:
    from rich.console import Console

    from repair_lightning.commands.harness import comparison_table, harness, who_answered
    from repair_lightning.storage.files import write_json

    names = ("limit", "num_fewshot", "include_path", "batch_size", "apply_chat_template", "system_instruction")
    given = {name: getattr(options, name) for name in names}
    found = harness(options.pack, options.tasks, options.base, options.precision, **given)
    Console().print(comparison_table(found))
    print(who_answered(found))
    if options.out:
        write_json(options.out, found)


def report(parser: ArgumentParser) -> None:
    """Make a finished run's report.html anew from what lies in its directory."""
    parser.add_argument("--run", required=True, type=Path, help="the run's directory")
    parser.set_defaults(run_command=_report)


def _report(options: Namespace) -> None:
    from repair_lightning.reports.html_report import write_report

    print(write_report(options.run))


def figures(parser: ArgumentParser) -> None:
    """Draw the paper's figures from runs and comparisons: PNG, SVG, and the data as CSV."""
    parser.add_argument("--runs", required=True, type=Path, nargs="+", help="run directories, or folders of runs")
    parser.add_argument("--to", required=True, type=Path, help="the folder for the files")
    parser.set_defaults(run_command=_figures)


def _figures(options: Namespace) -> None:
    from repair_lightning.reports.figures import draw_figures

    files, missing = draw_figures(options.runs, options.to)
    print("\n".join([*map(str, files), *(f"left out: {words}" for words in missing)]))


def ask(parser: ArgumentParser) -> None:
    """Ask the base and the edited model the same: both answers, who answered, and why. Without a question, a prompt."""
    words = "as many as you like, each a text or messages as JSON; none opens a prompt that Ctrl-D leaves"
    parser.add_argument("question", nargs="*", help=words)
    _add_pack(parser)
    parser.set_defaults(run_command=_ask)


def _ask(options: Namespace) -> None:
    from repair_lightning.commands.ask import Pair, given_prompt

    pair = Pair.open(options.pack, options.base, options.precision, options.max_new_tokens)
    asked = options.question
    if len(asked) > 1 and not any(" " in part for part in asked):
        asked = [" ".join(asked)]  # a question without its quotes
    if asked:
        replies = pair.ask([given_prompt(question, "question") for question in asked])
        print("\n\n".join("\n".join(reply.lines()) for reply in replies))
        return
    for question in _questions():
        try:
            (reply,) = pair.ask([given_prompt(question, "question")])
            print("\n".join(reply.lines()))
        except RepairError as error:
            print(f"error: {error}", file=sys.stderr)


def _questions() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D; a prompt is shown where somebody sits there."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - line editing and history for `input`
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if question:
            yield question
    if sys.stdin.isatty():
        print()


def diff(parser: ArgumentParser) -> None:
    """List the prompts of a file that the base and the edited model answer differently."""
    parser.add_argument(
        "--data",
        required=True,
        help="prompts: plain text with one a line, or records (jsonl, CSV, ...) with `prompt`, a text or messages",
    )
    parser.add_argument("--to", type=Path, help="write the differences as JSON lines into this file instead")
    _add_pack(parser)
    parser.set_defaults(run_command=_diff)


def _diff(options: Namespace) -> None:
    from repair_lightning.commands.ask import Pair, difference_lines, read_prompts
    from repair_lightning.storage.files import write_rows

    prompts = read_prompts(options.data)
    pair = Pair.open(options.pack, options.base, options.precision, options.max_new_tokens)
    replies = pair.ask(prompts)
    if options.to:
        write_rows(options.to, (reply.as_dict() for reply in replies if reply.differs))
    print("\n".join(difference_lines(replies, options.to)))


def dashboard(parser: ArgumentParser) -> None:
    """Lay out a project's workspace on Weights & Biases (an extra: wandb)."""
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", required=True, help="the project; `repair-lightning` unless you chose another")
    parser.set_defaults(run_command=_dashboard)


def _dashboard(options: Namespace) -> None:
    from repair_lightning.reports.tracking import create

    print(create(options.entity, options.project))


def _add_pack(parser: ArgumentParser) -> None:
    parser.add_argument("--pack", required=True, help="the pack's folder, or its name on the hub")
    parser.add_argument("--base", help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", default="auto", help="of the base: auto, float32, bfloat16, float16")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="most tokens of an answer; default 32")


COMMANDS: Mapping[str, Callable[[ArgumentParser], None]] = {
    "ask": ask,
    "dashboard": dashboard,
    "diff": diff,
    "export": export,
    "figures": figures,
    "harness": harness,
    "log": log,
    "report": report,
    "undo": undo,
}
"""Each adds its options to a parser and sets `run_command`; its docstring is the help."""


def parser() -> ArgumentParser:
    """The command line."""
    main = ArgumentParser(prog="repair-lightning", description=__doc__)
    commands = main.add_subparsers(metavar="COMMAND", required=True)
    for name, add in COMMANDS.items():
        add(commands.add_parser(name, help=add.__doc__, description=add.__doc__))
    return main


def _run() -> None:
    options = parser().parse_args(sys.argv[1:] or ["--help"])
    options.run_command(options)


def main() -> None:
    """The console script."""
    guarded(_run)


if __name__ == "__main__":
    main()
