"""`repair-lightning COMMAND`: edit a model, score it, and whatever else can be done with it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from repair_lightning.starting import uncollected

with uncollected():
    from repair_lightning.commands import cli, compare, evaluate
    from repair_lightning.commands import harness as harnessing
    from repair_lightning.commands import undo as undoing
    from repair_lightning.commands.ask import Pair, difference_lines, given_prompt, read_prompts
    from repair_lightning.commands.helping import layout
    from repair_lightning.commands.parsing import Parser, parse
    from repair_lightning.edits.journal import FILE, Journal
    from repair_lightning.errors import ConfigError, RepairError
    from repair_lightning.packs import export as exporting
    from repair_lightning.reports.charts import draw_figures
    from repair_lightning.reports.html_report import try_report, write_report
    from repair_lightning.reports.tracking import create
    from repair_lightning.storage.files import write_json, write_rows
    from repair_lightning.types import BASE

COMMANDS: dict[str, tuple[Callable[..., None], Sequence[tuple[str, dict[str, Any]]]]] = {}
"""Name -> what runs, with its docstring as the help, and what `add_argument` is given for each of its options."""


def command(*options: tuple[str, dict[str, Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command of its name, which is called with the options."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        COMMANDS[function.__name__] = function, options
        return function

    return add


def _option(name: str, help: str, **how: Any) -> tuple[str, dict[str, Any]]:
    return name, {"help": help, **how}


_BASE = _option("--base", "the base, where the pack's own name for it does not lead there")
_PRECISION = _option("--precision", "of the base: auto, float32, bfloat16, float16", default="auto")
_PACK = (_option("--pack", "the pack's folder, or its name on the hub", required=True), _BASE, _PRECISION)
_TOKENS = _option("--max_new_tokens", "most tokens of an answer", type=int, default=32)
_RUN = _option("--run", "the run's directory", required=True, type=Path)
_ID: dict[str, Any] = {"help": "of an edit; may be given repeatedly", "action": "extend", "nargs": "+", "default": []}


@command(
    *_PACK,
    _option("--to", "the new folder", required=True, type=Path),
    _option("--merged", "fuse the edits into W_v: loads without us, answers worse; says how much", action="store_true"),
    _option("--peft", "the shards as LoRA adapters, and which prompts take which", action="store_true"),
    _option("--overwrite", "replace an earlier export", action="store_true"),
    _option("--max_edits", "most edits that are asked to measure a merge; default all", type=int),
)
def export(to: Path, **given: Any) -> None:
    """Write an edited model for elsewhere: with its base, merged into a plain checkpoint, or as LoRA adapters."""
    print("\n".join(exporting.report_lines(exporting.export_pack(to=to, **given), to)))


@command(
    _RUN,
    ("--id", {**_ID, "required": True, "default": None}),
    _BASE,
    _option("--precision", "of the base, where it is not to be the one of the run"),
    _option("--import", "the module of an editor of your own, as Python imports it", dest="module"),
)
def undo(run: Path, id: list[str], module: str | None, **given: Any) -> None:
    """Take edits of a finished run back: the base answers their prompts again, the others stay."""
    if module:
        sys.path.insert(0, os.getcwd())  # a console script looks beside itself alone
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--import {module}: {error}; give a module that Python finds") from error
    print("\n".join(undoing.report_lines(undoing.undo(run, id, **given))))
    try_report(run)


@command(_RUN, ("--id", _ID))
def log(run: Path, id: list[str]) -> None:
    """What became of a run's edits, from its journal: all events, or those of some edits."""
    journal = Journal(run / FILE, read_only=True)
    events = chain(*map(journal.events, id)) if id else journal.events()
    for event in events:
        print(event_line(event))


def event_line(event: Mapping[str, Any]) -> str:
    """One event of a journal as a line of text."""
    when = datetime.fromtimestamp(event["time"]).isoformat(" ", "seconds")
    words = [when, f"{event['seq']:>6}", f"{event['kind']:<11}"]
    if event["id"] is not None:
        words += [event["id"], f"window {event['window'] + 1}", f"is {event['status']}"]
        shard = "base" if event["shard"] == BASE else event["shard"]
        known = {"in shard {}": shard, "attempt {}": event["attempts"] or None, "score {:g}": event["score"]}
        words += [text.format(value) for text, value in known.items() if value is not None]
    words += [f"({event['reason']})"] if event["reason"] else []
    return "  ".join([*words, "[void]"] if event["void"] else words)


@command(
    *_PACK,
    _option("--tasks", "names, with commas between", required=True),
    _option("--limit", "most documents of each task; default all", type=int),
    _option("--num_fewshot", "examples before each question; default the task's own", type=int),
    _option("--apply_chat_template", "ask through the base's chat template", action="store_true"),
    _option("--system_instruction", "a system message before each question"),
    _option("--include_path", "a folder with more tasks, in YAML"),
    _option("--batch_size", "requests at once", type=int, default=16),
    _option("--out", "write the figures to this JSON file", type=Path),
)
def harness(tasks: str, out: Path | None, **given: Any) -> None:
    """Score a pack's base and the edited model on benchmarks of lm-evaluation-harness (an extra: lm-eval)."""
    found = harnessing.harness(tasks=tasks.split(","), **given)
    print("\n".join(harnessing.report_lines(found)))
    if out:
        write_json(out, found)


@command(_RUN)
def report(run: Path) -> None:
    """Make a finished run's report.html again from what lies in its directory."""
    print(write_report(run))


@command(
    _option("--runs", "run directories, or folders of runs", required=True, type=Path, nargs="+"),
    _option("--to", "the folder for the files", required=True, type=Path),
)
def figures(runs: list[Path], to: Path) -> None:
    """Draw the paper's figures from runs and comparisons: PNG, SVG, and the data as CSV."""
    files, missing = draw_figures(runs, to)
    print("\n".join([*map(str, files), *(f"left out: {words}" for words in missing)]))


@command(_option("question", "as many as you like, each a text or messages as JSON", nargs="*"), *_PACK, _TOKENS)
def ask(question: list[str], **given: Any) -> None:
    """Ask the base and the edited model the same: both answers, who answered, and why. Without a question it asks
    for them, until Ctrl-D."""
    pair = Pair(**given)
    if len(question) > 1 and not any(" " in part for part in question):
        question = [" ".join(question)]  # one without its quotes
    if question:
        for number, prompt in enumerate([given_prompt(one, "question") for one in question]):
            (reply,) = pair.ask([prompt])
            print("\n" * bool(number) + "\n".join(reply.lines()), flush=True)
        return
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401 - line editing and history for `input`
    with suppress(EOFError):
        while True:
            typed = input(prompt).strip()
            try:
                for reply in pair.ask([given_prompt(typed, "question")]) if typed else ():
                    print("\n".join(reply.lines()))
            except RepairError as error:
                print(f"error: {error}", file=sys.stderr)
    print(end="\n" if prompt else "")


@command(
    _option("--data", "prompts: plain text, one a line, or records with `prompt`, a text or messages", required=True),
    _option("--to", "write the differences as JSON lines into this file instead", type=Path),
    *_PACK,
    _TOKENS,
)
def diff(data: str, to: Path | None, **given: Any) -> None:
    """List the prompts of a file that the base and the edited model answer differently."""
    prompts = read_prompts(data)
    replies = Pair(**given).ask(prompts)
    if to:
        write_rows(to, (reply.as_dict() for reply in replies if reply.differs))
    print("\n".join(difference_lines(replies, to)))


@command(
    _option("--entity", "user or team", required=True),
    _option("--project", "the project; `repair-lightning` unless you chose another", required=True),
)
def dashboard(entity: str, project: str) -> None:
    """Lay out a project's workspace on Weights & Biases (an extra: wandb)."""
    print(create(entity, project))


@command(
    _option("--pack", "a pack to serve, with NAME= before it under that name; repeatable", action="append", default=[]),
    _option("--base", "a plain base to begin with, or the packs' own, where their name for it does not lead there"),
    _option("--run", "the folder where corrections are kept; of one pack by default PACK/live", type=Path),
    _PRECISION,
    _option("--host", "where to listen; beyond this machine only with both keys", default="127.0.0.1"),
    _option("--port", "where to listen, too", type=int, default=8000),
    _option("--ask_key_file", "a file with the key that may ask", type=Path),
    _option("--edit_key_file", "a file with the key that may correct, and ask", type=Path),
)
def serve(**given: Any) -> None:
    """Serve a base and its edited models behind OpenAI's interface, and correct them while they answer (an extra:
    serve)."""
    try:
        from repair_lightning.serving.run import serve as started
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}; pip install 'repair-lightning[serve]'") from error
    started(**given, say=lambda text: print(text, flush=True))


def train(argv: Sequence[str], prog: str) -> None:
    """Edit a model: load it, write a stream of edits, score them, and write everything to a run directory."""
    checkout = Path(__file__).parents[1]  # its callbacks lie beside this package, a wheel's in it
    here = (checkout / "train.py").is_file()
    if here:
        sys.path.insert(0, str(checkout))
    callbacks = importlib.import_module("callbacks" if here else "repair_lightning.callbacks")
    cli.train(callbacks.CALLBACKS, argv, prog)


PROGRAMS: dict[str, Callable[[Sequence[str], str], None]] = {
    "train": train,
    "evaluate": evaluate.main,
    "compare": compare.command,
}
"""Commands that parse their own options, for they are scripts too: given those options and the command's name."""


def main() -> None:
    """The console script."""
    cli.guarded(lambda: run(sys.argv[1:]), resumes=sys.argv[1:2] == ["train"])


def run(argv: Sequence[str]) -> None:
    """A command line, as far as errors that `guarded` explains."""
    name, *rest = argv or ["--help"]
    prog = f"repair-lightning {name}"
    if name in ("-h", "--help"):
        print(overview(), end="")
    elif name == "--version":
        print(f"repair-lightning {version('repair-lightning')}")
    elif name in PROGRAMS:
        PROGRAMS[name](rest, prog)
    elif name in COMMANDS:
        function, options = COMMANDS[name]
        parser = Parser(prog=prog, description=function.__doc__)
        for option, how in options:
            parser.add_argument(option, **how)
        function(**parse(parser, rest))
    else:
        close = get_close_matches(name, [*PROGRAMS, *COMMANDS], n=1)
        alike = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"no command '{name}'; {alike}repair-lightning --help lists all")


def overview() -> str:
    """All commands, and what they do."""
    functions = PROGRAMS | {name: COMMANDS[name][0] for name in sorted(COMMANDS)}
    rows = {name: " ".join((function.__doc__ or "").split(". ")[0].split()) for name, function in functions.items()}
    return layout("repair-lightning", "COMMAND [OPTION ...]", "COMMAND --help says more.", {"commands": rows})


if __name__ == "__main__":
    main()
