"""What can go wrong, said in one line to the user; the command line prints it and exits with the error's code."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

LISTED = 20
"""So many bad records of a file are named, then how many more there are."""
IDS_LISTED, IDS_COMPARED = 10, 1000
"""So many ids are all named; of up to so many, those that are like what was given: to compare more takes seconds."""


def _one_line(message: str) -> str:
    """The message with line breaks and other control characters, which come from the user's data, made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def counted(number: int, noun: str) -> str:
    """How many, as messages say it: `1 edit`, `2 edits`, `1,000 edits`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: Exception) -> str:
    """What an error says, without its further lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RepairError(Exception):
    """A problem the user can solve: its message names the value, what is allowed and the remedy."""

    exit_code = 2
    """Of a command that ends with it."""


class ConfigError(RepairError):
    """A setting has a value that cannot work."""


class NothingWritten(RepairError):
    """A run went to its end, and none of its edits is written."""

    exit_code = 1


class FieldError(RepairError):
    """One field of one record is wrong, or for None the whole; see :class:`RecordError` for where the record stands.

    `problem` ends a sentence that starts with the field (`is empty`), `remedy` is an order (`give the text ...`).
    """

    def __init__(self, field: str | None, problem: str, remedy: str) -> None:
        self.field, self.problem, self.remedy = field, problem, remedy
        super().__init__(_one_line((f"field '{field}': " if field else "") + f"{problem}; {remedy}"))


class RecordError(RepairError):
    """A file or some of its records are bad: `edits.jsonl, record 3, field 'target': is empty; give the text ...`.

    Args:
        record: its number, counted from 1, or None where the file as a whole is wrong.
        field: None where the record as a whole is wrong.
        others: what is wrong with more records of the same file, a line each.
    """

    def __init__(
        self,
        file: str,
        record: int | None,
        field: str | None,
        problem: str,
        remedy: str,
        others: Sequence[RecordError] = (),
    ) -> None:
        self.file, self.record, self.field = file, record, field
        self.problem, self.remedy, self.more = problem, remedy, len(others)
        place = file + (f", record {record}" if record is not None else "") + (f", field '{field}'" if field else "")
        lines = [
            _one_line(f"{place}: {problem}; {remedy}"),
            *(str(other).removeprefix(f"{file}, ") for other in others),
        ]
        super().__init__("\n".join(listed(lines)))

    @classmethod
    def at(cls, file: str, record: int, error: FieldError) -> RecordError:
        """The field error `error` with the place where it was found."""
        return cls(file, record, error.field, error.problem, error.remedy)

    @classmethod
    def of(cls, file: str, bad: Sequence[tuple[int, FieldError]]) -> RecordError:
        """The numbered errors of a file, the first of them as this one's own."""
        (record, error), *others = bad
        more = [cls.at(file, *other) for other in others]
        return cls(file, record, error.field, error.problem, error.remedy, more)


def listed(bad: Sequence[str]) -> list[str]:
    """The first lines about the bad records of a file, and how many more there are."""
    more = len(bad) - LISTED
    return [*bad[:LISTED], *([f"(and {counted(more, 'more bad record')} in this file)"] if more > 0 else [])]


class LedgerError(RepairError):
    """The ledger was asked for a step that its rules forbid, or its stored form cannot be read."""


class UnknownEditError(LedgerError, KeyError):
    """The ledger does not know this edit; `known` are the ids that it knows, which its message names."""

    def __init__(self, id: str, known: Collection[str] = ()) -> None:
        self.id, self.known = id, known
        super().__init__(id)

    def __str__(self) -> str:
        words, known = f"the ledger knows no edit with the id {self.id!r}", list(self.known)
        if not known:
            return f"{words}, nor any other; let it arrive first"
        close = get_close_matches(str(self.id), known, n=3) if len(known) <= IDS_COMPARED else []
        alike = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        if len(known) <= IDS_LISTED:
            return f"{words}; {alike}known: {', '.join(map(repr, known))}"
        return f"{words}; {alike}`repair-lightning log --run DIR` lists all {len(known):,}"
