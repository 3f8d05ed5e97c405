"""Record formats: one pure converter per data set, from its own fields to the project's `jsonl` record.

A `jsonl` record is `{id, subject, prompt, target, rephrases, locality, near}`: `rephrases` is a list of texts,
`locality` and `near` are lists of `{prompt, answer}`. `id` is None where the source has none.

The project's own format keeps prompts, targets and answers as they were written: an indentation, a blank or a line
break at an end belongs to the text. Each of its prompts may be messages, carried as one text (see `dialogue`), and may
leave the place of the subject open (see `text.fill`). The published sets have stray blanks at the ends of their fields
that mean nothing, so theirs are stripped. What stands between prompt and target, `text.seam` says.

To add a format: write `<name>(record) -> dict` and one entry in `FORMATS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from repair_lightning.errors import ConfigError, FieldError
from repair_lightning.texts import dialogue
from repair_lightning.texts import joint as text

Record = Mapping[str, Any]

PROMPT_REMEDY = "give the question or the beginning of the sentence that the model should complete"
TARGET_REMEDY = "give the text the model should answer"
TEXT_REMEDY = "write a text in quotes, or leave the field out"
PROBE_REMEDY = "give the prompt that must keep its answer"
OPEN_PROBE_REMEDY = "write the subject that the probe asks about, or {{}} for the two signs themselves"
OPEN_REMEDY = "give 'subject', or write {{}} for the two signs themselves"
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Format:
    """How one data set writes its records.

    Attributes:
        name: What the user writes in `data.format`.
        convert: A source record to a `jsonl` record (id may be None). Raises `FieldError`.
        description: One line for the documentation.
        required: Alternative layouts; a record has this format if it has all fields of one of them.
        optional: Further fields that are read where present.
    """

    name: str
    convert: Callable[[Record], dict[str, Any]]
    description: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """Every field that the converter reads."""
        return frozenset(self.optional).union(*self.required)

    def fits(self, record: Record) -> bool:
        """True where the record has (not null) all fields of one layout."""
        return any(all(record.get(field) is not None for field in layout) for layout in self.required)


def kind_of(value: Any) -> str:
    """What a JSON value is, in the user's words: `a number`, `a list`, `null`."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def as_text(value: Any, field: str, remedy: str = TEXT_REMEDY) -> str:
    """The text of a field as it was written; may be empty.

    Raises:
        FieldError: if the value is no text, or holds half of a surrogate pair (it cannot be encoded as UTF-8).
    """
    if not isinstance(value, str):
        raise FieldError(field, f"is {kind_of(value)}, not a text", remedy)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"holds a broken character at position {error.start}", "write it as UTF-8") from None
    return value


def required_text(record: Record, field: str, remedy: str = TEXT_REMEDY) -> str:
    """The text of a field. Raises `FieldError` where it is missing, null, no text, or nothing but white space."""
    if record.get(field) is None:
        raise FieldError(field, "is missing", remedy)
    found = as_text(record[field], field, remedy)
    if not found.strip():
        raise FieldError(field, "is empty", remedy)
    return found


def optional_text(record: Record, field: str) -> str | None:
    """The text of a field, or None where it is missing, null or blank. Raises `FieldError` where it is no text."""
    value = record.get(field)
    found = "" if value is None else as_text(value, field)
    return found if found.strip() else None


def required_prompt(
    record: Record, field: str, remedy: str, subject: str | None, open_remedy: str = OPEN_REMEDY
) -> str:
    """The prompt of a field, a text or messages (in JSON too), with the subject where it was left open by `{}`.

    Of messages, the last turn is filled. Messages come back as one canonical text, see `dialogue.dump`.

    Raises:
        FieldError: it is missing, empty, or neither; or it is open and there is no subject.
    """
    messages = dialogue.given(record.get(field), field)
    if messages is None:
        return _filled(required_text(record, field, remedy), field, subject, open_remedy)
    *before, last = messages
    content = _filled(last["content"], f"{field}[{len(before)}].content", subject, open_remedy)
    return as_text(dialogue.dump([*before, {**last, "content": content}]), field)


def _filled(prompt: str, field: str, subject: str | None, open_remedy: str) -> str:
    if subject is None and text.is_open(prompt):
        raise FieldError(field, "holds {}, which nothing fills here", open_remedy)
    return text.fill(prompt, subject)


def texts(record: Record, *fields: str) -> list[str]:
    """All texts of fields that hold one text or a list of texts each; missing ones count as empty.

    A text that is the JSON of such a list, as in a cell of a CSV file, counts as the list.

    Raises:
        FieldError: if a field is neither, or an item of its list is no text or empty.
    """
    items = {name: item for field in fields for name, item in _items(record, field).items()}
    return [required_text(items, name) for name in items]


def prompts(record: Record, field: str, subject: str | None) -> list[str]:
    """All prompts of a field that holds one or a list of them, each a text or messages; see `required_prompt`.

    One list of messages is one prompt, a list of such lists is several.
    """
    items = _items(record, field)
    if items and all(isinstance(item, Mapping) for item in items.values()):
        items = {field: list(items.values())}
    return [required_prompt(items, name, TEXT_REMEDY, subject) for name in items]


def _items(record: Record, field: str) -> dict[str, Any]:
    """The items of a field that holds a text or a list, each under its own name."""
    value = record.get(field)
    if value is None or (isinstance(value, str) and not as_text(value, field).strip()):
        return {}
    found = _listed(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list of texts", 'write ["...", "..."] or leave it out')
    return {field: value} if found == [value] else {f"{field}[{i}]": item for i, item in enumerate(found)}


def _listed(value: str) -> list[Any]:
    """The list of texts, messages or dialogues whose JSON a text is, or the text as the only item of a list."""
    found = dialogue.as_list(value)
    meant = found is not None and (not found or any(isinstance(item, str | Mapping | list) for item in found))
    return found if found is not None and meant else [value]


def probe(record: Record, prompt_field: str, answer_field: str) -> list[dict[str, Any]]:
    """One probe from two fields as a list of one, or an empty list where there is no prompt."""
    prompt = optional_text(record, prompt_field)
    answer = optional_text(record, answer_field)
    return [] if prompt is None else [{"prompt": prompt, "answer": answer}]


def probes(record: Record, field: str) -> list[dict[str, Any]]:
    """The probes of a field that holds a list (or the JSON of one) of `{prompt, answer}` or of plain prompts.

    A prompt is a text or messages. It may not be left open by `{}`: another subject than the record's belongs there.

    Raises:
        FieldError: if the field holds something else.
    """
    value = record.get(field)
    if value is None or value == "":
        return []
    found = dialogue.as_list(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list", 'write [{"prompt": "...", "answer": "..."}]')
    return [_probe_of(item, f"{field}[{i}]") for i, item in enumerate(found)]


def _probe_of(item: Any, field: str) -> dict[str, Any]:
    named = item if isinstance(item, Mapping) else {"prompt": item}
    flat = {f"{field}.{key}": value for key, value in named.items()}
    return {
        "prompt": required_prompt(flat, f"{field}.prompt", PROBE_REMEDY, None, OPEN_PROBE_REMEDY),
        "answer": optional_text(flat, f"{field}.answer"),
    }


def record_id(record: Record, *fields: str) -> str | None:
    """The id in the first of `fields` that is there, as text; None where none is.

    Raises:
        FieldError: if the id is neither text nor a whole number, or empty.
    """
    for field in fields:
        value = record.get(field)
        if type(value) is int:
            return str(value)
        if value is not None:
            remedy = "give each record its own id, or leave the field out everywhere"
            return required_text(record, field, remedy).strip()
    return None


def subject_of(record: Record) -> str | None:
    """The subject, stripped; None where there is none."""
    found = optional_text(record, "subject")
    return None if found is None else found.strip()


def jsonl(record: Record) -> dict[str, Any]:
    """The project's own format. A field that is nearly one of its names is an error, other extra fields are ignored."""
    known = FORMATS["jsonl"].fields
    for field in record:
        close = difflib.get_close_matches(str(field).lower(), sorted(known - record.keys()), n=1, cutoff=0.85)
        if field not in known and close:
            raise FieldError(str(field), "is not a field of format 'jsonl'", f"did you mean '{close[0]}'?")
    subject = subject_of(record)
    return {
        "id": record_id(record, "id", "case_id"),
        "subject": subject,
        "prompt": required_prompt(record, "prompt", PROMPT_REMEDY, subject),
        "target": required_text(record, "target", TARGET_REMEDY),
        "rephrases": prompts(record, "rephrases", subject),
        "locality": probes(record, "locality"),
        "near": probes(record, "near"),
    }


def _published(
    record: Record,
    prompt: str,
    target: str,
    *,
    rephrases: list[str],
    locality: list[Any],
    near: list[Any] | None = None,
) -> dict[str, Any]:
    """The record of a published set, all texts stripped."""
    return {
        "id": record_id(record, "id", "case_id"),
        "subject": subject_of(record),
        "prompt": required_text(record, prompt, PROMPT_REMEDY).strip(),
        "target": required_text(record, target, TARGET_REMEDY).strip(),
        "rephrases": [rephrase.strip() for rephrase in rephrases],
        "locality": [_stripped(probe) for probe in locality],
        "near": [_stripped(probe) for probe in near or ()],
    }


def _stripped(probe: Mapping[str, str | None]) -> dict[str, str | None]:
    return {name: None if found is None else found.strip() for name, found in probe.items()}


def zsre(record: Record) -> dict[str, Any]:
    """ZsRE as prepared for MEND and WISE; the locality prompt is `loc` as it stands (`nq question: ...`)."""
    rephrases, locality = texts(record, "rephrase"), probe(record, "loc", "loc_ans")
    return _published(record, "src", "alt", rephrases=rephrases, locality=locality)


def counterfact(record: Record) -> dict[str, Any]:
    """CounterFact, flat or in ROME's nested layout; its locality prompts are neighbours and count as both."""
    if record.get("requested_rewrite") is not None:
        return _counterfact_nested(record)
    near = probe(record, "locality_prompt", "locality_ground_truth")
    rephrases = texts(record, "rephrase_prompt")
    return _published(record, "prompt", "target_new", rephrases=rephrases, locality=near, near=near)


def _counterfact_nested(record: Record) -> dict[str, Any]:
    name, rewrite = "requested_rewrite", record["requested_rewrite"]
    flat = {f"{name}.{key}": value for key, value in rewrite.items()} if isinstance(rewrite, Mapping) else {}
    for side in ("target_new", "target_true"):
        value = flat.get(f"{name}.{side}")
        flat[f"{name}.{side}.str"] = value.get("str") if isinstance(value, Mapping) else value
    subject = required_text(flat, f"{name}.subject").strip()
    answer = optional_text(flat, f"{name}.target_true.str")
    source = {
        **record,
        "subject": subject,
        "prompt": required_text(flat, f"{name}.prompt", PROMPT_REMEDY).replace("{}", subject),
        "target": required_text(flat, f"{name}.target_new.str", TARGET_REMEDY),
    }
    near = [{"prompt": prompt, "answer": answer} for prompt in texts(record, "neighborhood_prompts")]
    rephrases = texts(record, "paraphrase_prompts")
    return _published(source, "prompt", "target", rephrases=rephrases, locality=near, near=near)


def wikibigedit(record: Record) -> dict[str, Any]:
    """WikiBigEdit; the persona's way of asking counts as a rephrase, the multi-hop question is not read."""
    rephrases = texts(record, "rephrase", "personas")
    return _published(record, "update", "ans", rephrases=rephrases, locality=probe(record, "loc", "loc_ans"))


def hallucination(record: Record) -> dict[str, Any]:
    """SelfCheckGPT's WikiBio passages with the sentence that should follow; locality from RedPajama."""
    locality = probe(record, "locality_prompt", "locality_ground_truth")
    return _published(record, "prompt", "target_new", rephrases=[], locality=locality)


def temporal(record: Record) -> dict[str, Any]:
    """WISE's out-of-distribution set: recent facts, with a rephrase from the wild."""
    locality = probe(record, "locality_prompt", "locality_ground_truth")
    return _published(record, "prompt", "target_new", rephrases=texts(record, "ood_rephrase"), locality=locality)


_LOCALITY = ("locality_prompt", "locality_ground_truth")

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Format(
                "jsonl",
                jsonl,
                "the project's own: prompt, target and, where known, id, subject, rephrases, locality, near",
                (("prompt", "target"),),
                ("id", "subject", "rephrases", "locality", "near"),
            ),
            Format(
                "zsre",
                zsre,
                "ZsRE as prepared for MEND and WISE",
                (("src", "alt"),),
                ("subject", "rephrase", "loc", "loc_ans"),
            ),
            Format(
                "counterfact",
                counterfact,
                "CounterFact, flat (prompt, target_new, rephrase_prompt, ...) or ROME's own (requested_rewrite, ...)",
                (("prompt", "target_new", "rephrase_prompt"), ("requested_rewrite",)),
                ("case_id", "subject", "ground_truth", "paraphrase_prompts", "neighborhood_prompts", *_LOCALITY),
            ),
            Format(
                "wikibigedit",
                wikibigedit,
                "WikiBigEdit: changes of Wikidata over time",
                (("update", "ans"),),
                ("subject", "rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans", "tag"),
            ),
            Format(
                "hallucination",
                hallucination,
                "SelfCheckGPT WikiBio with RedPajama locality",
                (("prompt", "target_new", "locality_prompt"),),
                ("subject", "locality_ground_truth"),
            ),
            Format(
                "temporal",
                temporal,
                "WISE's out-of-distribution set of recent facts",
                (("prompt", "target_new", "ood_rephrase"),),
                ("subject", *_LOCALITY),
            ),
        )
    }
)


def get_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        ConfigError: if there is none: `unknown data format 'zrse': did you mean 'zsre'? known: ...`.
    """
    if name in FORMATS:
        return FORMATS[name]
    close = difflib.get_close_matches(str(name), FORMATS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(f"unknown data format '{name}': {hint}known: {', '.join(FORMATS)}")


def guess_format(record: Record) -> str | None:
    """The format whose fields look most like the record's (largest share in common), or None where none fits."""
    fitting = [entry for entry in FORMATS.values() if entry.fits(record)]
    return max(fitting, key=lambda entry: _likeness(entry.fields, record)).name if fitting else None


def _likeness(fields: frozenset[str], record: Iterable[str]) -> float:
    present = set(record)
    return len(fields & present) / len(fields | present)


def convert(record: Any, name: str) -> dict[str, Any]:
    """One source record of format `name` as a `jsonl` record; its id is None where the source has none.

    Raises:
        FieldError: if it is no object, looks like another format, or one of its fields is wrong.
        ConfigError: if the format is unknown.
    """
    chosen = get_format(name)
    if not isinstance(record, Mapping):
        raise FieldError(None, f"is {kind_of(record)}, not an object", 'write each record as {"prompt": ..., ...}')
    if not chosen.fits(record):
        _explain_misfit(record, chosen)
    return chosen.convert(record)


def _explain_misfit(record: Record, chosen: Format) -> None:
    guess = guess_format(record)
    if guess:
        raise FieldError(
            None, f"is not in format '{chosen.name}'", f"its fields look like format '{guess}': choose that"
        )
    if not any(field in record for layout in chosen.required for field in layout):
        needed = " or ".join(", ".join(layout) for layout in chosen.required)
        found = ", ".join(map(str, record)) or "none"
        raise FieldError(None, f"is not in format '{chosen.name}'", f"it needs the fields {needed}; found: {found}")
