"""Record formats: one pure converter per data set, from its own fields to the project's `jsonl` record.

A `jsonl` record is `{id, subject, prompt, target, rephrases, locality, near}`: `rephrases` is a list of texts,
`locality` and `near` are lists of `{prompt, answer}`. All texts are stripped; the one space between prompt and target
is put in later. `id` is None where the source has none.

To add a format: write `<name>(record) -> dict` and one entry in `FORMATS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from repair_lightning.errors import ConfigError, FieldError

Record = Mapping[str, Any]

PROMPT_REMEDY = "give the question or the beginning of the sentence that the model should complete"
TARGET_REMEDY = "give the text the model should answer"
TEXT_REMEDY = "write a text in quotes, or leave the field out"
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
    """The stripped text of a field; may be empty.

    Raises:
        FieldError: if the value is no text, or holds half of a surrogate pair (it cannot be encoded as UTF-8).
    """
    if not isinstance(value, str):
        raise FieldError(field, f"is {kind_of(value)}, not a text", remedy)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"holds a broken character at position {error.start}", "write it as UTF-8") from None
    return value.strip()


def required_text(record: Record, field: str, remedy: str = TEXT_REMEDY) -> str:
    """The non-empty text of a field. Raises `FieldError` where it is missing, null, empty or no text."""
    if record.get(field) is None:
        raise FieldError(field, "is missing", remedy)
    text = as_text(record[field], field, remedy)
    if not text:
        raise FieldError(field, "is empty", remedy)
    return text


def optional_text(record: Record, field: str) -> str | None:
    """The text of a field, or None where it is missing, null or empty. Raises `FieldError` where it is no text."""
    value = record.get(field)
    return None if value is None else as_text(value, field) or None


def texts(record: Record, *fields: str) -> list[str]:
    """All texts of fields that hold one text or a list of texts each; missing ones count as empty.

    Raises:
        FieldError: if a field is neither, or an item of its list is no text or empty.
    """
    return [text for field in fields for text in _texts_of(record.get(field), field)]


def _texts_of(value: Any, field: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [text] if (text := as_text(value, field)) else []
    if not isinstance(value, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list of texts", 'write ["...", "..."] or leave it out')
    items = {f"{field}[{i}]": item for i, item in enumerate(value)}
    return [required_text(items, name) for name in items]


def probe(record: Record, prompt_field: str, answer_field: str) -> list[dict[str, Any]]:
    """One probe from two fields as a list of one, or an empty list where there is no prompt."""
    prompt = optional_text(record, prompt_field)
    answer = optional_text(record, answer_field)
    return [] if prompt is None else [{"prompt": prompt, "answer": answer}]


def probes(record: Record, field: str) -> list[dict[str, Any]]:
    """The probes of a field that holds a list of `{prompt, answer}` or of plain prompts.

    Raises:
        FieldError: if the field holds something else.
    """
    value = record.get(field)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list", 'write [{"prompt": "...", "answer": "..."}]')
    return [_probe_of(item, f"{field}[{i}]") for i, item in enumerate(value)]


def _probe_of(item: Any, field: str) -> dict[str, Any]:
    named = item if isinstance(item, Mapping) else {"prompt": item}
    flat = {f"{field}.{key}": value for key, value in named.items()}
    return {
        "prompt": required_text(flat, f"{field}.prompt", "give the prompt that must keep its answer"),
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
            return required_text(record, field, "give each record its own id, or leave the field out everywhere")
    return None


def _record(
    record: Record,
    prompt: str,
    target: str,
    *,
    rephrases: list[str],
    locality: list[Any],
    near: list[Any] | None = None,
) -> dict[str, Any]:
    return {
        "id": record_id(record, "id", "case_id"),
        "subject": optional_text(record, "subject"),
        "prompt": required_text(record, prompt, PROMPT_REMEDY),
        "target": required_text(record, target, TARGET_REMEDY),
        "rephrases": rephrases,
        "locality": locality,
        "near": near or [],
    }


def jsonl(record: Record) -> dict[str, Any]:
    """The project's own format. A field that is nearly one of its names is an error, other extra fields are ignored."""
    known = FORMATS["jsonl"].fields
    for field in record:
        close = difflib.get_close_matches(str(field).lower(), sorted(known - record.keys()), n=1, cutoff=0.85)
        if field not in known and close:
            raise FieldError(str(field), "is not a field of format 'jsonl'", f"did you mean '{close[0]}'?")
    return _record(
        record,
        "prompt",
        "target",
        rephrases=texts(record, "rephrases"),
        locality=probes(record, "locality"),
        near=probes(record, "near"),
    )


def zsre(record: Record) -> dict[str, Any]:
    """ZsRE as prepared for MEND and WISE; the locality prompt is `loc` as it stands (`nq question: ...`)."""
    return _record(record, "src", "alt", rephrases=texts(record, "rephrase"), locality=probe(record, "loc", "loc_ans"))


def counterfact(record: Record) -> dict[str, Any]:
    """CounterFact, flat or in ROME's nested layout; its locality prompts are neighbours and count as both."""
    if record.get("requested_rewrite") is not None:
        return _counterfact_nested(record)
    near = probe(record, "locality_prompt", "locality_ground_truth")
    rephrases = texts(record, "rephrase_prompt")
    return _record(record, "prompt", "target_new", rephrases=rephrases, locality=near, near=list(near))


def _counterfact_nested(record: Record) -> dict[str, Any]:
    name, rewrite = "requested_rewrite", record["requested_rewrite"]
    flat = {f"{name}.{key}": value for key, value in rewrite.items()} if isinstance(rewrite, Mapping) else {}
    for side in ("target_new", "target_true"):
        value = flat.get(f"{name}.{side}")
        flat[f"{name}.{side}.str"] = value.get("str") if isinstance(value, Mapping) else value
    subject = required_text(flat, f"{name}.subject")
    answer = optional_text(flat, f"{name}.target_true.str")
    source = {
        **record,
        "subject": subject,
        "prompt": required_text(flat, f"{name}.prompt", PROMPT_REMEDY).replace("{}", subject),
        "target": required_text(flat, f"{name}.target_new.str", TARGET_REMEDY),
    }
    near = [{"prompt": text, "answer": answer} for text in texts(record, "neighborhood_prompts")]
    rephrases = texts(record, "paraphrase_prompts")
    return _record(source, "prompt", "target", rephrases=rephrases, locality=near, near=list(near))


def wikibigedit(record: Record) -> dict[str, Any]:
    """WikiBigEdit; the persona's way of asking counts as a rephrase, the multi-hop question is not read."""
    rephrases = texts(record, "rephrase", "personas")
    return _record(record, "update", "ans", rephrases=rephrases, locality=probe(record, "loc", "loc_ans"))


def hallucination(record: Record) -> dict[str, Any]:
    """SelfCheckGPT's WikiBio passages with the sentence that should follow; locality from RedPajama."""
    locality = probe(record, "locality_prompt", "locality_ground_truth")
    return _record(record, "prompt", "target_new", rephrases=[], locality=locality)


def temporal(record: Record) -> dict[str, Any]:
    """WISE's out-of-distribution set: recent facts, with a rephrase from the wild."""
    locality = probe(record, "locality_prompt", "locality_ground_truth")
    return _record(record, "prompt", "target_new", rephrases=texts(record, "ood_rephrase"), locality=locality)


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
