"""The values of a record's fields, checked: a wrong one is a `FieldError` that names the field as the source does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from repair_lightning.errors import FieldError
from repair_lightning.texts import dialogue, joint
from repair_lightning.texts.dialogue import opened

Record = Mapping[str, Any]

PROMPT_REMEDY = "give the question or the beginning of the sentence that the model should complete"
TARGET_REMEDY = "give the text the model should answer"
TEXT_REMEDY = "write a text in quotes, or leave the field out"
_OPEN_REMEDY = "give 'subject', or write {{}} for the two signs themselves"
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def kind_of(value: Any) -> str:
    """What a JSON value is, in the user's words: `a number`, `a list`, `null`."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def present(record: Record) -> dict[str, Any]:
    """The fields that hold something: no null, and no NaN, as tables write what is missing."""
    return {
        name: value
        for name, value in record.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }


def as_text(value: Any, field: str, remedy: str = TEXT_REMEDY) -> str:
    """A text as it was written. Raises `FieldError` where it is none, or holds half of a surrogate pair."""
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
    """The text of a field, or None where there is none but white space."""
    value = record.get(field)
    return value if value is not None and as_text(value, field).strip() else None


def prompt_of(record: Record, field: str, remedy: str, subject: str | None, open_remedy: str = _OPEN_REMEDY) -> str:
    """A prompt, text or messages, with the subject where it was left open by `{}`; of messages, in the last turn."""

    messages = dialogue.given(record.get(field), field)
    text = messages[-1]["content"] if messages else required_text(record, field, remedy)
    if subject is None and joint.is_open(text):
        name = f"{field}[{len(messages) - 1}].content" if messages else field
        raise FieldError(name, "holds {}, which nothing fills here", open_remedy)
    filled = joint.fill(text, subject)
    return as_text(dialogue.with_question(dialogue.dump(messages), filled), field) if messages else filled


def items(record: Record, field: str) -> dict[str, Any]:
    """The items of a field that holds a text, a list, or a list written as a text, each under its own name."""
    found = value = record.get(field)
    if value is None or (isinstance(value, str) and not as_text(value, field).strip()):
        return {}
    if isinstance(value, str):  # of texts, messages or dialogues; another list's JSON is a text
        found = opened(value)
        if not isinstance(found, list) or (found and not any(isinstance(item, str | Mapping | list) for item in found)):
            found = [value]
    if not isinstance(found, list | tuple):
        raise FieldError(field, f"is {kind_of(value)}, not a list of texts", 'write ["...", "..."] or leave it out')
    return {field: value} if found == [value] else {f"{field}[{i}]": item for i, item in enumerate(found)}


def texts(record: Record, *fields: str) -> list[str]:
    """The texts of fields that hold one or a list of them each, as they were written."""
    found = {name: item for field in fields for name, item in items(record, field).items()}
    return [required_text(found, name) for name in found]


def objects(record: Record, field: str, remedy: str) -> Iterator[tuple[str, Any]]:
    """The items of a field that holds a list, or one written as a text, each with its place in the record."""
    value = record.get(field)
    if value is None or value == "":
        return
    found = opened(value)
    if not isinstance(found, list | tuple):
        raise FieldError(field, f"is {kind_of(value)}, not a list", f"write {remedy}")
    yield from ((f"{field}[{i}]", item) for i, item in enumerate(found))


def named(item: Any, place: str, remedy: str) -> dict[str, Any]:
    """The fields of an object inside a record, each under its full name. Raises `FieldError` where it is none."""
    if not isinstance(item, Mapping):
        raise FieldError(place, f"is {kind_of(item)}, not an object", f"write {remedy}")
    return {f"{place}.{key}": value for key, value in item.items()}


def spellings(value: Any, field: str) -> list[str]:
    """The texts of a text, or of lists of texts in any depth, stripped, once each; what is empty is left out."""
    value = opened(value)
    if isinstance(value, list | tuple):
        found = [text for i, item in enumerate(value) for text in spellings(item, f"{field}[{i}]")]
    else:
        value = str(value) if type(value) is int else value
        found = [] if value is None else [as_text(value, field).strip()]
    return [text for text in dict.fromkeys(found) if text]


def identity(record: Record) -> dict[str, str | None]:
    """The id, text or whole number, and the subject, both stripped; None where there is none."""
    name = "id" if record.get("id") is not None else "case_id"
    id, about = record.get(name), optional_text(record, "subject")
    if id is not None and type(id) is not int:
        id = required_text(record, name, "give each record its own id, or leave the field out everywhere").strip()
    return {"id": None if id is None else str(id), "subject": about and about.strip()}
