"""Reading edit records: every record is checked, and named by file, number and field, before anything is written.

Files are parsed by the plain parsers of their format, so that a bad line is found under its own number and no column's
type is guessed.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

from repair_lightning.edits import fields, formats
from repair_lightning.errors import ConfigError, FieldError, RecordError, RepairError, counted, first_line, listed
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit, Further

if TYPE_CHECKING:
    from repair_lightning.models.forms import Forms

logger = logging.getLogger(__name__)

_CODE = re.compile(r"[\n\r(){}\[\]=<>_;`\\]")
_FILE = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet|txt|gz|zip|arrow|yaml|pt)$", re.IGNORECASE)
_FINAL = "?.？。｡؟"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class RecordSet:
    """The edits of one source, in its order, and what was not taken over from it.

    Attributes:
        bad: one message per record that was skipped.
        superseded: id of an edit that a later one with the same question and another target replaced -> id of that
            later one, which is always in `edits`.
        duplicates: ids of records that were dropped because question and target repeat an earlier record's.
        superseded_edits: the replaced edits themselves, for the ledger.
        format: in which they were read.
    """

    edits: tuple[Edit, ...]
    bad: tuple[str, ...] = ()
    superseded: Mapping[str, str] = field(default_factory=dict)
    duplicates: tuple[str, ...] = ()
    superseded_edits: tuple[Edit, ...] = ()
    format: str = "jsonl"

    def without(self, refused: Mapping[str, str]) -> RecordSet:
        """The rest, where some edits are refused, each with a message; what one had superseded goes with it."""
        orphans = {old: new for old, new in self.superseded.items() if new in refused}
        lost = [f"edit '{old}': its successor '{new}' is too long; give one that fits" for old, new in orphans.items()]
        return replace(
            self,
            edits=tuple(edit for edit in self.edits if edit.id not in refused),
            bad=(*self.bad, *refused.values(), *lost),
            superseded={old: new for old, new in self.superseded.items() if old not in orphans},
            superseded_edits=tuple(edit for edit in self.superseded_edits if edit.id not in orphans),
        )


def same_question_key(prompt: str) -> str:
    """What two prompts have in common if and only if they ask the same question.

    Case, the number and kind of blanks, and final question marks and full stops do not tell two questions apart. In
    code they may, so a prompt with a line break or one of the signs ``(){}[]=<>_;`\\`` is its own key. Every other
    sign counts: `C`, `C++` and `C#` are three. Of messages, the last turn is compared so, and those before it exactly.
    """
    messages = dialogue.parse(prompt)
    if messages is not None:
        return dialogue.with_question(prompt, same_question_key(messages[-1]["content"]))
    if _CODE.search(prompt):
        return prompt
    return " ".join(prompt.casefold().split()).rstrip(f"{_FINAL} ") or prompt


def load_records(
    path_or_hub_name: str | Path,
    format: str = "jsonl",
    max_edits: int | None = None,
    on_bad_record: Literal["stop", "skip"] = "stop",
    sample_seed: int | None = None,
) -> RecordSet:
    """Reads, checks and converts the edits of a local file or of a hub data set, also those past `max_edits`.

    Args:
        path_or_hub_name: a file (`.jsonl`, `.json` with a list or with one object per line, `.csv`, `.tsv`,
            `.parquet`), or a hub name (`org/name`) where no such file exists.
        format: its name, see :mod:`repair_lightning.edits.formats`, or `auto` for the one that the records look like.
        max_edits: stop after so many edits, not counting duplicates; None for all.
        on_bad_record: `stop` raises where a record is bad, `skip` lists bad records in `bad`; both name 20 of them.
        sample_seed: draw the `max_edits` edits at random with this seed and keep the source's order; what repeats a
            drawn edit, or was superseded by it, comes along. None takes the first.

    RecordError for a file or record that is bad (in mode `skip`: where nothing good is left), ConfigError for an
    unknown or unrecognised format or setting, RepairError where the source cannot be read at all.
    """
    if format != formats.AUTO:
        formats.get_format(format)
    if max_edits is not None and max_edits < 1:
        raise ConfigError(f"max_edits must be 1 or more, or null for all, got {max_edits}")
    if on_bad_record not in ("stop", "skip"):
        raise ConfigError(f"on_bad_record must be 'stop' or 'skip', got '{on_bad_record}'")
    source, rows = str(path_or_hub_name), read_rows(path_or_hub_name)
    return checked_records(source, rows, format, max_edits, on_bad_record, sample_seed)


def checked_records(
    source: str,
    rows: list[Any],
    format: str = "jsonl",
    max_edits: int | None = None,
    on_bad_record: Literal["stop", "skip"] = "stop",
    sample_seed: int | None = None,
) -> RecordSet:
    """Likewise of rows that were read already, from what messages call `source`."""
    if not rows:
        raise RecordError(source, None, None, "holds no records", 'give one such as {"prompt": "...", "target": "..."}')
    if format == formats.AUTO:
        format = formats.recognise(source, rows)
        logger.info("%s: read as format '%s'", source, format)
    chosen = formats.get_format(format)
    good, bad = _check_rows(source, rows, chosen)
    if bad and on_bad_record == "stop":
        raise RecordError.of(source, bad)
    errors = [RecordError.at(source, number, error) for number, error in bad]
    if not good:
        raise RecordError(source, None, None, "skipping bad records leaves none", "mend at least one", errors)
    edits = [edit for record in good for edit in record]
    if sample_seed is not None and max_edits is not None:
        edits = _draw(good, max_edits, sample_seed)
        max_edits = None  # all that is said of the drawn prompts counts, also after the last of them has come up
    found, alike = _settle(edits, max_edits)
    found = replace(_with_what_follows(source, found, good), bad=tuple(map(str, errors)), format=format)
    _log_summary(source, found, alike)
    return found


def load_irrelevant(path: str | Path, prefix: str = "") -> tuple[str, ...]:
    """Reads prompts that no edit should touch, in the file's order, for calibrating and training the router.

    Of `question`, `locality_prompt`, `loc`, `prompt` the first that a record has counts. The prefix, such as
    `nq question: `, is put before each, of messages before the last turn. RecordError for the first bad record,
    RepairError where the file cannot be read at all.
    """
    rows = read_rows(path)
    if not rows:
        raise RecordError(str(path), None, None, "holds no records", 'give records such as {"question": "..."}')
    prompts, bad = _attempt(rows, _irrelevant_prompt)
    if bad:
        raise RecordError.of(str(path), bad)
    return tuple(dialogue.with_question(prompt, prefix + dialogue.question_of(prompt)) for prompt in prompts)


def check_lengths(edits: Sequence[Edit], forms: Forms, max_tokens: int) -> dict[str, str]:
    """By id, a message for each edit with a text of more than `max_tokens` tokens (prompt and rephrases with target and
    EOS), or a dialogue that the base cannot be asked; it names the first such field."""
    messages: dict[str, str] = {}
    remedy = "shorten it or raise the limit, if the model reads that much"
    for edit in edits:
        asked = [("prompt and target", edit.prompt, edit.target)]
        asked += [(f"rephrases[{i}] and target", text, edit.target) for i, text in enumerate(edit.rephrases)]
        for name in ("locality", "near"):
            asked += [(f"{name}[{i}]", probe.prompt, probe.answer or "") for i, probe in enumerate(getattr(edit, name))]
        for name, prompt, target in asked:
            try:
                length = len(forms.encode(prompt, target).ids)
                problem = f"is {length} tokens long, at most {max_tokens} fit; {remedy}" if length > max_tokens else ""
            except ConfigError as error:
                problem = str(error)
            if problem:
                messages.setdefault(edit.id, f"edit '{edit.id}', field '{name}': {problem}")
    return messages


def read_rows(path_or_hub_name: str | Path) -> list[Any]:
    """The raw records of a file or a hub data set (`train`); what cannot be parsed stands there as its `FieldError`.

    RecordError where the file as a whole is no JSON, CSV or Parquet, RepairError where it is missing or unreadable.
    """
    path = Path(path_or_hub_name).expanduser()
    name = str(path_or_hub_name)
    looks_like_file = _FILE.search(name) or Path(name).parent.exists()
    if _HUB_NAME.fullmatch(name) and not looks_like_file and not path.exists():
        try:
            return list(load_dataset(name, split="train"))
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise RepairError(
                f"{name}: no such file here, and the hub data set (split 'train') could not be loaded: "
                f"{first_line(error)}; check the name and the network"
            ) from error
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise RepairError(f"{name}: {problem}; give a .jsonl, .json, .csv or .parquet file, or a hub name org/name")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    try:
        return readers.get(path.suffix.lower(), _read_json)(path)
    except FieldError as error:
        raise RecordError(name, None, None, error.problem, error.remedy) from None
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
        raise RecordError(name, None, None, problem, "save it as UTF-8 text") from None
    except OSError as error:
        raise RepairError(f"{name}: cannot be read ({error.strerror or error}); check the file") from error


def _read_json(path: Path) -> list[Any]:
    """A JSON list, or one JSON value per line; which of them it is, the content says."""
    text = path.read_bytes().decode("utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("[") and path.suffix.lower() == ".json":
            raise FieldError(None, _json_problem(error), "correct the file at that line") from None
        found: list[Any] = []
        for number, line in enumerate(text.split("\n"), start=1):  # U+2028 may stand inside a JSON string
            try:
                found += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                found.append(FieldError(None, _json_problem(error, number), "correct or remove that line"))
        return found
    return whole if isinstance(whole, list) else [whole]


def _json_problem(error: Exception, line: int | None = None) -> str:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"line {line or error.lineno}, column {error.colno}: {error.msg}"
    elif line:
        reason = f"line {line}: {reason}"
    return f"is not valid JSON ({reason})"


def _read_csv(path: Path) -> list[Any]:
    """CSV or TSV with a header line; every cell is a text, an empty one counts as missing."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
    try:
        header, *cells = [line for line in lines if line] or [[]]
    except csv.Error as error:
        raise FieldError(None, f"is not valid CSV (line {lines.line_num}: {error})", "correct that line") from None
    remedy = "put cells with commas in quotes"
    return [
        {name: cell or None for name, cell in zip_longest(header, row)}
        if len(row) <= len(header)
        else FieldError(None, f"has {len(row)} cells, the header has {len(header)}", remedy)
        for row in cells
    ]


def _read_parquet(path: Path) -> list[Any]:
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the file's, not its content's
            raise
        problem = f"is not a readable Parquet file ({first_line(error)})"
        raise FieldError(None, problem, "write it again") from None


def _attempt(rows: list[Any], convert: Callable[[int, Any], Any]) -> tuple[list[Any], list[tuple[int, FieldError]]]:
    """`convert(number, row)` for each row, numbered from 1: the results, and the errors with their numbers."""
    good, bad = [], []
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, FieldError):
                raise row
            good.append(convert(number, row))
        except FieldError as error:
            bad.append((number, error))
    return good, bad


def _irrelevant_prompt(_: int, row: Any) -> str:
    if not isinstance(row, Mapping):
        raise FieldError(None, f"is {fields.kind_of(row)}, not an object", 'write {"question": "..."}')
    names = ("question", "locality_prompt", "loc", "prompt")
    name = next((name for name in names if row.get(name) is not None), "question")
    remedy = "give a prompt that no edit should touch, as 'question' or 'prompt'"
    messages = dialogue.given(row.get(name), name)
    if messages is not None:
        return fields.as_text(dialogue.dump(messages), name)
    prompt = fields.required_text(row, name, remedy)
    return prompt if name == "prompt" else prompt.strip()  # the other names are those of published sets


def _check_rows(
    source: str, rows: list[Any], chosen: formats.Format
) -> tuple[list[list[Edit]], list[tuple[int, FieldError]]]:
    """The edits of each good record, also those that repeat an earlier one, id included; and the numbered errors."""
    guess = formats.guess_format(rows[0]) if isinstance(rows[0], Mapping) and chosen.fits(rows[0]) else None
    if guess and guess != chosen.name:
        logger.warning("%s: read as format '%s', though its fields look more like '%s'", source, chosen.name, guess)
    first_with_id: dict[str, tuple[int, Edit]] = {}
    latest_target: dict[str, str] = {}
    left: Counter[str] = Counter()

    def check(number: int, place: int, record: dict[str, Any]) -> Edit:
        id = record["id"] or f"{chosen.name}-{number}"
        edit = Edit.from_dict({**record, "id": f"{id}-{place}" if chosen.several else id})
        key = same_question_key(edit.prompt)
        first, known = first_with_id.setdefault(edit.id, (number, edit))
        if known is edit:
            latest_target[key] = edit.target
        elif same_question_key(known.prompt) != key or not known.target == edit.target == latest_target[key]:
            raise FieldError("id", f"'{edit.id}' already belongs to record {first}", "give each record its own id")
        return edit

    def check_all(number: int, row: Any) -> list[Edit]:
        found = formats.convert(row, chosen.name, left)
        return [check(number, place, record) for place, record in enumerate(found, start=1)]

    checked = _attempt(rows, check_all)
    if parts := [f"{what} ({number:,})" for what, number in (+left).most_common()]:
        logger.info("%s: format '%s' does not read: %s", source, chosen.name, ", ".join(parts))
    return checked


def named(names: Sequence[str]) -> str:
    """The first of many names, for a message, and how many there are beyond them."""
    more = len(names) - 10
    return ", ".join(names[:10]) + (f" and {more:,} more" if more > 0 else "")


def _settle(edits: Sequence[Edit], max_edits: int | None) -> tuple[RecordSet, list[str]]:
    """Drops duplicates and lets later edits supersede earlier ones, over the first records that yield `max_edits`; also
    says which pairs ask the same question in prompts that differ."""
    asked: dict[str, list[int]] = {}
    duplicates, alike = [], []
    for i, edit in enumerate(edits):
        if len(asked) == max_edits:
            break
        same = asked.setdefault(same_question_key(edit.prompt), [])
        last = edits[same[-1]] if same else None
        if last and last.prompt != edit.prompt:
            alike.append(f"'{last.id}' and '{edit.id}'")
        if last and last.target == edit.target:
            duplicates.append(edit.id)
        else:
            same.append(i)
    newest = {i: same[-1] for same in asked.values() for i in same}
    older = sorted(i for i, last in newest.items() if i != last)
    kept = tuple(edits[i] for i in sorted(newest.keys() - older))
    superseded = {edits[i].id: edits[newest[i]].id for i in older}
    return RecordSet(kept, (), superseded, tuple(duplicates), tuple(edits[i] for i in older)), alike


def _with_what_follows(source: str, found: RecordSet, records: Sequence[Sequence[Edit]]) -> RecordSet:
    """What follows from a duplicate is asked of the edit that stays. Multi-hop questions follow from all edits of their
    record: where one of these is superseded or not taken, they are left out."""
    keys = {edit.id: _said(edit) for record in records for edit in record}
    stays: dict[tuple[str, str], list[Further]] = {keys[edit.id]: [] for edit in found.edits}
    seen, broken = {*found.superseded, *(edit.id for edit in found.edits)}, []
    for record in records:
        whole = all(keys[edit.id] in stays for edit in record)
        if not whole and any(edit.id in seen for edit in record):
            broken += [
                f"'{edit.id}'" for edit in record if any(one.kind.startswith("multi_hop") for one in edit.further)
            ]
        for edit in record:
            if keys[edit.id] in stays:
                stays[keys[edit.id]] += [one for one in edit.further if whole or not one.kind.startswith("multi_hop")]
    if broken:
        logger.warning(
            "%s: the multi-hop questions of %s are left out, because an edit that they follow from is superseded or "
            "not taken: %s",
            *(source, counted(len(broken), "edit"), named(broken)),
        )
    edits = tuple(replace(edit, further=tuple(dict.fromkeys(stays[keys[edit.id]]))) for edit in found.edits)
    return replace(found, edits=edits)


def _said(edit: Edit) -> tuple[str, str]:
    """What an edit says: edits that agree in it are one."""
    return same_question_key(edit.prompt), edit.target


def _draw(records: Sequence[Sequence[Edit]], number: int, seed: int) -> list[Edit]:
    """The records of `number` questions, drawn at random: those of one question stay together, a question brings the
    others of its first record, and a larger draw holds the smaller ones."""
    beside: dict[str, list[str]] = {}
    for record in records:
        keys = [same_question_key(edit.prompt) for edit in record]
        for key in keys:
            beside.setdefault(key, keys)
    questions = list(beside)
    random.Random(seed).shuffle(questions)
    drawn = set(list(dict.fromkeys(key for question in questions for key in [question, *beside[question]]))[:number])
    return [edit for record in records for edit in record if same_question_key(edit.prompt) in drawn]


def _log_summary(source: str, found: RecordSet, alike: Sequence[str]) -> None:
    if alike:
        logger.warning(
            "%s: %s with the same question but for case, blanks or the final mark: %s; the later of two is dropped "
            "where its target is the same, and supersedes the earlier where it is another",
            *(source, counted(len(alike), "pair"), named(alike)),
        )
    named_in = {edit.id: dialogue.shown(edit.prompt).casefold() for edit in found.edits}
    absent = [f"'{edit.id}'" for edit in found.edits if (edit.subject or "").casefold() not in named_in[edit.id]]
    if absent:
        logger.warning(
            "%s: the subject does not stand in the prompt of %s: %s; such an edit is found by its whole prompt alone; "
            "write the subject as the prompt does, or leave it out",
            *(source, counted(len(absent), "edit"), named(absent)),
        )
    if pairs := [f"'{old}' by '{new}'" for old, new in found.superseded.items()]:
        logger.warning(
            "%s: %s by a later one with the same question and another target: %s",
            *(source, f"{counted(len(pairs), 'edit')} superseded", named(pairs)),
        )
    if found.bad:
        logger.warning(
            "%s: %s skipped:\n%s", source, counted(len(found.bad), "bad record"), "\n".join(listed(found.bad))
        )
    parts = [counted(len(found.edits), "edit")]
    parts += [f"{counted(len(found.bad), 'bad record')} skipped"] * bool(found.bad)
    parts += [f"{counted(len(found.duplicates), 'duplicate')} dropped"] * bool(found.duplicates)
    parts += [f"{len(found.superseded):,} superseded"] * bool(found.superseded)
    logger.info("%s: %s", source, ", ".join(parts))
