"""The parser of every command, and its complaints in one line: which option, what it takes, and which look like it."""

from __future__ import annotations

import difflib
import json
import re
from argparse import Action, ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from repair_lightning.errors import ConfigError

_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)|Option '([^']+)' is not accepted")
_UNKNOWN_IN_GROUP = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_MISSING = re.compile(r"the following arguments are required: (.*)")
_KEY = re.compile(r'Parser key "([^"]+)"')
_EXPECTED = re.compile(r"Expected (?:a )?(?:<class '(\w+)'>|typing\.(Literal\[.*?\])|(one of .*?)\.? )")
_GOT = re.compile(r"(?:Got|Given) value: (.*)")
_WORDS = {"NoneType": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}

Editors = Mapping[str, type]
"""Name -> class: what `--model NAME` may be."""


class _Formatter(DefaultHelpFormatter):
    def _get_type_str(self, action: Action) -> str | None:
        found = super()._get_type_str(action)
        return "path" if found == str(Path) else found


class Parser(LightningArgumentParser):
    """Lightning's, which leaves mistakes to :func:`parse`, and takes no option for a longer one that begins with it. A
    class and not two arguments, because it makes the parsers of classes' own options of its kind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _Formatter}
        super().__init__(*args, **(given | kwargs))


def parse(parser: Parser, argv: Sequence[str], editors: Editors | None = None, defaults: bool = True) -> Any:
    """The options among some arguments; without `defaults` what nobody gave is left out. A ConfigError where an option
    is unknown, misses its value, or cannot take it."""
    known = editors or {}
    try:
        return parser.parse_args(with_nulls(_with_paths(argv, known)), defaults=defaults)
    except ArgumentError as error:
        raise ConfigError(_explained(str(error), parser, argv, known)) from error


def _with_paths(argv: Sequence[str], editors: Editors) -> list[str]:
    """The arguments, where an editor's name stands for its class's path."""
    found: list[str] = []
    for before, argument in zip(["", *argv], argv, strict=False):
        start = re.match(r"--model(\.help)?=|", argument)[0]  # type: ignore[index]
        kind = editors.get(argument.removeprefix(start)) if start or before in ("--model", "--model.help") else None
        found.append(argument if kind is None else f"{start}{kind.__module__}.{kind.__qualname__}")
    return found


def with_nulls(argv: Sequence[str]) -> list[str]:
    """The arguments, where an editor's option is to be `null` as a configuration in line: as an option it would be the
    text `None` by the time the class's own parser sees it."""
    found: list[str] = []
    rest = list(argv)
    while rest:
        name, given, value = rest.pop(0).partition("=")
        of_editor = name.startswith("--model.")
        if of_editor and not given and rest[:1] == ["null"]:
            given, value = "=", rest.pop(0)
        if of_editor and value == "null":
            nested: Any = None
            for part in reversed(["model", "init_args", *name.split(".")[1:]]):
                nested = {part: nested}
            name, value = "--config", json.dumps(nested)
        found.append(f"{name}{given}{value}")
    return found


def _explained(message: str, parser: Parser, argv: Sequence[str], editors: Editors) -> str:
    """The parser's message in one line, with a remedy."""
    parsers = [parser]
    for kind in editors.values():
        parsers.append(Parser())
        parsers[-1].add_class_arguments(kind, "model")
    names = [name for one in parsers for action in one._actions for name in action.option_strings]
    known = [name for name in dict.fromkeys(names) if name.startswith("--")]
    help = f"{parser.prog} --help"

    def lists_all(name: str) -> str:
        part = name.lstrip("-").partition(".")[0]
        return f"{parser.prog} --{part}.help lists all" if f"--{part}.help" in known else f"{help} lists all"

    if found := _UNKNOWN_IN_GROUP.search(message):
        name = ".".join(found.groups())
        return f"a configuration has the unknown option '{name}'{_alike(name, known)} {lists_all(name)}"
    if found := _UNKNOWN.search(message):
        name = (found[1] or found[2]).partition("=")[0].lstrip("-")
        given = (argument.partition("=")[0] for argument in argv)  # of a class's options we hear the end alone
        name = next((argument for argument in given if argument.endswith(name)), name)
        if name in known:
            own = f"{parser.prog} --model.help NAME"
            return f"the class that is chosen has no option '{name}'; `{own}` lists its own"
        return f"unknown option '{name}'{_alike(name, known)} {lists_all(name)}"
    if found := _MISSING.search(message):
        return f"give {' and '.join(f'--{name}' for name in found[1].split(', '))}; {help} explains the options"
    keys, got = _KEY.findall(message), _GOT.search(message)
    if not keys or not got:
        return f"{' '.join(message.split())}; {help} explains the options"
    if keys == ["model"] and editors and "NestedArg(" not in message:
        similar = _alike(got[1], editors)
        takes = f"{'It' if similar.endswith('?') else 'it'} takes one of: {', '.join(editors)}"
        return f"--model cannot be '{got[1]}'{similar} {takes}; or the path of a class that can be imported"
    return f"--{'.'.join(keys)} cannot be '{got[1]}': it takes {_expected(message) or 'something else'}; see {help}"


def _alike(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or `;` where nothing is alike."""
    bare = {option.lstrip("-"): option for option in known}
    ends = {".".join(option.split(".")[1:]): option for option in bare}  # a configuration's part knows no section
    candidates = {**{end: bare[option] for end, option in ends.items() if "." in end}, **bare}
    close = difflib.get_close_matches(name.lstrip("-"), candidates, n=2, cutoff=0.75)
    names = dict.fromkeys(candidates[option] for option in close)
    return f"; did you mean {' or '.join(repr(option) for option in names)}?" if names else ";"


def _expected(message: str) -> str:
    """What the innermost of the parser's complaints would take."""
    starts = [found.start() for found in _KEY.finditer(message)]
    inner = message[starts[-1] :]
    if len(starts) > 1:  # what would do in place of the class itself
        inner = inner.split("\n    - Expected a <class 'NoneType'>\n  Given value type")[0]
    found = [next(part for part in parts if part) for parts in _EXPECTED.findall(inner + " ")]
    plain = [re.sub(r"^Literal\[(.*)\]$", lambda match: match[1].replace(", ", " or "), name) for name in found]
    return " or ".join(dict.fromkeys(_WORDS.get(name, name) for name in plain))
