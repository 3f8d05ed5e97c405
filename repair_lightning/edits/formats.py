"""Record formats: how each data set names its fields, and what its records say as the project's `jsonl` records.

A `jsonl` record is `{id, subject, prompt, target, rephrases, locality, near}`: `rephrases` is a list of texts,
`locality` and `near` are lists of `{prompt, answer}`.

The project's own format keeps prompts, targets and answers as they were written: an indentation, a blank or a line
break at an end belongs to the text. Each of its prompts may be messages, carried as one text (see `dialogue`), and may
leave the place of the subject open (see `joint.fill`). The published sets have stray blanks at the ends of their fields
that mean nothing, so theirs are stripped.

To add a format: write one entry in `_ALL`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repair_lightning.errors import ConfigError, FieldError
from repair_lightning.texts import dialogue, joint

Record = Mapping[str, Any]

_PROMPT_REMEDY = "give the question or the beginning of the sentence that the model should complete"
_TARGET_REMEDY = "give the text the model should answer"
_TEXT_REMEDY = "write a text in quotes, or leave the field out"
_OPEN_REMEDY = "give 'subject', or write {{}} for the two signs themselves"
_LOC, _LOCALITY = ("loc", "loc_ans"), ("locality_prompt", "locality_ground_truth")
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Format:
    """How one data set writes its records.

    Attributes:
        required: alternative layouts, of one of which a record has all fields; the first begins with prompt and target.
        optional: further fields by which a record is recognised.
        rephrases: fields that hold one rephrase or a list of them.
        locality: the fields of the locality prompt and its answer.
        neighbours: locality prompts ask the same of another subject, and count as `near` too.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    locality: tuple[str, str] = _LOCALITY
    neighbours: bool = False

    @property
    def fields(self) -> frozenset[str]:
        """Every field of the format."""
        return frozenset(self.optional).union(*self.required)

    def fits(self, record: Record) -> bool:
        """True where the record has (not null) all fields of one layout."""
        return any(all(record.get(field) is not None for field in layout) for layout in self.required)


def kind_of(value: Any) -> str:
    """What a JSON value is, in the user's words: `a number`, `a list`, `null`."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def as_text(value: Any, field: str, remedy: str = _TEXT_REMEDY) -> str:
    """A text as it was written. Raises `FieldError` where it is none, or holds half of a surrogate pair."""
    if not isinstance(value, str):
        raise FieldError(field, f"is {kind_of(value)}, not a text", remedy)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"holds a broken character at position {error.start}", "write it as UTF-8") from None
    return value


def required_text(record: Record, field: str, remedy: str = _TEXT_REMEDY) -> str:
    """The text of a field. Raises `FieldError` where it is missing, null, no text, or nothing but white space."""
    if record.get(field) is None:
        raise FieldError(field, "is missing", remedy)
    found = as_text(record[field], field, remedy)
    if not found.strip():
        raise FieldError(field, "is empty", remedy)
    return found


def _optional_text(record: Record, field: str) -> str | None:
    value = record.get(field)
    return value if value is not None and as_text(value, field).strip() else None


def _prompt(record: Record, field: str, remedy: str, subject: str | None, open_remedy: str = _OPEN_REMEDY) -> str:
    """A prompt, text or messages, with the subject where it was left open by `{}`; of messages, in the last turn."""

    messages = dialogue.given(record.get(field), field)
    text = messages[-1]["content"] if messages else required_text(record, field, remedy)
    if subject is None and joint.is_open(text):
        name = f"{field}[{len(messages) - 1}].content" if messages else field
        raise FieldError(name, "holds {}, which nothing fills here", open_remedy)
    filled = joint.fill(text, subject)
    return as_text(dialogue.with_question(dialogue.dump(messages), filled), field) if messages else filled


def _items(record: Record, field: str) -> dict[str, Any]:
    """The items of a field that holds a text, a list or the JSON of one, each under its own name."""
    found = value = record.get(field)
    if value is None or (isinstance(value, str) and not as_text(value, field).strip()):
        return {}
    if isinstance(value, str):  # of texts, messages or dialogues; another list's JSON is a text
        found = dialogue.as_list(value)
        if found is None or (found and not any(isinstance(item, str | Mapping | list) for item in found)):
            found = [value]
    if not isinstance(found, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list of texts", 'write ["...", "..."] or leave it out')
    return {field: value} if found == [value] else {f"{field}[{i}]": item for i, item in enumerate(found)}


def _texts(record: Record, *fields: str) -> list[str]:
    """The texts of fields that hold one or a list of them each, stripped."""
    items = {name: item for field in fields for name, item in _items(record, field).items()}
    return [required_text(items, name).strip() for name in items]


def _probes(record: Record, field: str) -> list[dict[str, Any]]:
    """The probes of a field that holds a list (or the JSON of one) of `{prompt, answer}` or of plain prompts.

    They may not be left open by `{}`: another subject than the record's belongs there.
    """
    value = record.get(field)
    if value is None or value == "":
        return []
    found = dialogue.as_list(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list", 'write [{"prompt": "...", "answer": "..."}]')
    probes = []
    for i, item in enumerate(found):
        named, place = item if isinstance(item, Mapping) else {"prompt": item}, f"{field}[{i}]"
        flat = {f"{place}.{key}": value for key, value in named.items()}
        open_remedy = "write the subject that the probe asks about, or {{}} for the two signs themselves"
        prompt = _prompt(flat, f"{place}.prompt", "give the prompt that must keep its answer", None, open_remedy)
        probes.append({"prompt": prompt, "answer": _optional_text(flat, f"{place}.answer")})
    return probes


def _identity(record: Record) -> dict[str, str | None]:
    """The id, text or whole number, and the subject, both stripped; None where there is none."""
    name = "id" if record.get("id") is not None else "case_id"
    id, subject = record.get(name), _optional_text(record, "subject")
    if id is not None and type(id) is not int:
        id = required_text(record, name, "give each record its own id, or leave the field out everywhere").strip()
    return {"id": None if id is None else str(id), "subject": subject and subject.strip()}


def _own(record: Record) -> dict[str, Any]:
    """A record of the project's own format. A field that is nearly one of its names is an error, others are ignored."""
    known = FORMATS["jsonl"].fields
    for field in (field for field in record if field not in known):
        close = difflib.get_close_matches(str(field).lower(), sorted(known - record.keys()), n=1, cutoff=0.85)
        if close:
            raise FieldError(str(field), "is not a field of format 'jsonl'", f"did you mean '{close[0]}'?")
    found: dict[str, Any] = _identity(record)
    subject = found["subject"]
    found["prompt"] = _prompt(record, "prompt", _PROMPT_REMEDY, subject)
    found["target"] = required_text(record, "target", _TARGET_REMEDY)
    rephrases = _items(record, "rephrases")
    if rephrases and all(isinstance(item, Mapping) for item in rephrases.values()):  # one dialogue
        rephrases = {"rephrases": list(rephrases.values())}
    found["rephrases"] = [_prompt(rephrases, name, _TEXT_REMEDY, subject) for name in rephrases]
    return found | {name: _probes(record, name) for name in ("locality", "near")}


def _published(record: Record, chosen: Format, neighbours: list[Any] | None = None) -> dict[str, Any]:
    """A record of a published set, all its texts stripped; its probes are `neighbours`, where these are given."""
    rephrases, (prompt, target) = _texts(record, *chosen.rephrases), chosen.required[0][:2]
    question, answer = (_optional_text(record, field) for field in chosen.locality)
    own = [{"prompt": question.strip(), "answer": answer and answer.strip()}] if question else []
    probes = own if neighbours is None else neighbours
    return {
        **_identity(record),
        "prompt": required_text(record, prompt, _PROMPT_REMEDY).strip(),
        "target": required_text(record, target, _TARGET_REMEDY).strip(),
        "rephrases": rephrases,
        "locality": probes,
        "near": probes if chosen.neighbours else [],
    }


def _nested_counterfact(record: Record, chosen: Format) -> dict[str, Any]:
    """CounterFact in ROME's own layout; its neighbourhood prompts share the answer that is to be replaced."""
    name, rewrite = "requested_rewrite", record["requested_rewrite"]
    flat = {f"{name}.{key}": value for key, value in rewrite.items()} if isinstance(rewrite, Mapping) else {}
    for side in (f"{name}.target_new", f"{name}.target_true"):
        flat[f"{side}.str"] = flat[side].get("str") if isinstance(flat.get(side), Mapping) else flat.get(side)
    subject = required_text(flat, f"{name}.subject").strip()
    answer = _optional_text(flat, f"{name}.target_true.str")
    source = {
        **{name: record.get(name) for name in ("id", "case_id")},
        "subject": subject,
        "prompt": required_text(flat, f"{name}.prompt", _PROMPT_REMEDY).replace("{}", subject),
        "target_new": required_text(flat, f"{name}.target_new.str", _TARGET_REMEDY),
        "rephrase_prompt": _texts(record, "paraphrase_prompts"),
    }
    asked = _texts(record, "neighborhood_prompts")
    return _published(source, chosen, [{"prompt": prompt, "answer": answer and answer.strip()} for prompt in asked])


_ALL = (
    Format("jsonl", (("prompt", "target"),), ("id", "subject", "rephrases", "locality", "near")),
    # as prepared for MEND and WISE; the locality prompt is `loc` as it stands (`nq question: ...`)
    Format("zsre", (("src", "alt"),), ("subject", "rephrase", *_LOC), rephrases=("rephrase",), locality=_LOC),
    Format(  # flat, or in ROME's own layout
        "counterfact",
        (("prompt", "target_new", "rephrase_prompt"), ("requested_rewrite",)),
        ("case_id", "subject", "ground_truth", "paraphrase_prompts", "neighborhood_prompts", *_LOCALITY),
        rephrases=("rephrase_prompt",),
        neighbours=True,
    ),
    Format(  # changes of Wikidata over time; a persona's way of asking counts as a rephrase
        "wikibigedit",
        (("update", "ans"),),
        ("subject", "rephrase", "personas", "mhop", "mhop_ans", *_LOC, "tag"),
        rephrases=("rephrase", "personas"),
        locality=_LOC,
    ),
    # SelfCheckGPT's WikiBio passages with the sentence that should follow; locality from RedPajama
    Format("hallucination", (("prompt", "target_new", "locality_prompt"),), ("subject", "locality_ground_truth")),
    # WISE's out-of-distribution set: recent facts, with a rephrase from the wild
    Format("temporal", (("prompt", "target_new", "ood_rephrase"),), ("subject", *_LOCALITY), ("ood_rephrase",)),
)
FORMATS: Mapping[str, Format] = {entry.name: entry for entry in _ALL}


def get_format(name: str) -> Format:
    """The format called `name`. Raises `ConfigError` if there is none, naming the nearest."""
    if name in FORMATS:
        return FORMATS[name]
    close = difflib.get_close_matches(str(name), FORMATS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(f"unknown data format '{name}': {hint}known: {', '.join(FORMATS)}")


def guess_format(record: Record) -> str | None:
    """The format whose fields look most like the record's (largest share in common), or None where none fits."""
    fitting = [entry for entry in _ALL if entry.fits(record)]
    share = {entry.name: len(entry.fields & record.keys()) / len(entry.fields | record.keys()) for entry in fitting}
    return max(share, key=share.__getitem__, default=None)


def convert(record: Any, name: str) -> dict[str, Any]:
    """One source record of format `name` as a `jsonl` record; its id is None where the source has none.

    FieldError if it is no object, looks like another format, or one of its fields is wrong.
    """
    chosen = FORMATS[name]
    if not isinstance(record, Mapping):
        raise FieldError(None, f"is {kind_of(record)}, not an object", 'write each record as {"prompt": ..., ...}')
    if not chosen.fits(record):
        guess, problem = guess_format(record), f"is not in format '{name}'"
        if guess:
            raise FieldError(None, problem, f"its fields look like format '{guess}': choose that")
        if not any(field in record for layout in chosen.required for field in layout):
            needed = " or ".join(", ".join(layout) for layout in chosen.required)
            found = ", ".join(map(str, record)) or "none"
            raise FieldError(None, problem, f"it needs the fields {needed}; found: {found}")
    if name == "jsonl":
        return _own(record)
    if record.get("requested_rewrite") is not None and name == "counterfact":
        return _nested_counterfact(record, chosen)
    return _published(record, chosen)
