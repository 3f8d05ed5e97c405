"""Help in steps: what a run needs on one screen, and the options of one part where they are asked for."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_ABOUT = "Correct a model: read the edits, write them, score them, and save the edited model."
_GIVEN = {
    "--config NAME": "a file, or one of: {configs}; repeatable: the later wins, options beat all",
    "--model.base BASE": "a Hugging Face folder, a hub name, a GGUF file, `world` or `smollm2`",
    "--data.path FILE": "the edits: a file, a data set of the hub, or `world`",
    "--run_dir DIR": "where everything goes; default: runs/<names of the configurations>",
}
"""What to give, and what it is."""
_TRAINER = "Lightning's trainer: devices, precision, logger and all its other options"
_OTHERS = {
    "--print_config": "print the complete configuration instead",
    "--seed_everything": "of all random numbers; true draws one",
}
"""Shorter words for what Lightning brings along."""


class Help(Action):
    """Prints a text about the parser, and ends."""

    def __init__(self, option_strings: Sequence[str], text: Callable[[Any], str], help: str, **_: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=help)
        self.text = text

    def __call__(self, parser: Any, *_: Any) -> None:
        """What the parser does where it is given."""
        sys.stdout.write(self.text(parser))
        parser.exit()


def add_helps(parser: Any, editors: Iterable[str], configs: Iterable[str]) -> None:
    """Give a run's parser, whose other options are all there, a `--help` of one screen, which names the `editors` and
    the `configs`, and a `--PART.help` for each part."""
    for name, words in _OTHERS.items():
        parser._option_string_actions[name].help = words
    parser.groups["trainer"].title = _TRAINER
    parts = {"--model.help [NAME]": f"of the base and an editor: {', '.join(editors)}"}  # the parser has this one
    for name, group in parser.groups.items():
        if name != "model" and "." not in name and len(group._group_actions) > 1:
            parts[f"--{name}.help"] = group.title
            group.add_argument(f"--{name}.help", action=Help, text=_only(group), help="Show these options and exit.")
    own = [action for action in parser._optionals._group_actions if action.dest not in ("config", "run_dir")]

    def overview(parser: Any) -> str:
        given = {name: words.format(configs=", ".join(sorted(configs))) for name, words in _GIVEN.items()}
        of_run = {action.option_strings[-1]: action.help for action in own}
        sections = {"what to give": given, "the run": of_run, "more options": parts}
        return layout(parser.prog, "--config NAME [OPTION ...]", _ABOUT, sections)

    parser.add_argument("-h", "--help", action=Help, text=overview, help="Show what a run needs and exit.")


def _only(group: Any) -> Callable[[Any], str]:
    """What writes the help of a parser as if it had but one group of options."""

    def text(parser: Any) -> str:
        parser.usage, parser.description, parser._action_groups = SUPPRESS, None, [group]
        return parser.format_help()

    return text


def layout(prog: str, usage: str, about: str, sections: Mapping[str, Mapping[str, str]]) -> str:
    """Help as every parser writes it: for each section, what can be given and what it is."""
    formatter = HelpFormatter(prog, max_help_position=26)
    formatter.add_usage(f"%(prog)s {usage}", [], [])
    formatter.add_text(about)
    for title, rows in sections.items():
        formatter.start_section(title)
        for name, words in rows.items():
            formatter.add_argument(Action([name], SUPPRESS, nargs=0, help=words.replace("%", "%%")))
        formatter.end_section()
    return formatter.format_help()
