"""Prompts that are dialogues: messages in the usual conversational form, carried as one canonical JSON text.

A prompt is a text everywhere in the project. Where it was given as messages, that text is their JSON, so that ledger,
journal, records and reports need not know; only what turns a prompt into token ids or shows it to a person asks here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from repair_lightning.errors import FieldError

Messages: TypeAlias = list[dict[str, str]]
"""Turns of a dialogue in their order, each with `role` and `content`."""

ROLES = ("system", "developer", "user", "assistant", "tool")

MESSAGE_REMEDY = 'write each turn as {"role": "user", "content": "..."}'


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages that ends with a turn of the user."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(_is_message(item) for item in value)
        and value[-1]["role"] == "user"
    )


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, Mapping)
        and item.keys() == {"role", "content"}
        and item["role"] in ROLES
        and isinstance(item["content"], str)
    )


def given(value: Any, field: str) -> Messages | None:
    """The messages that a user gave as the value of a field, or None where it is no list and no JSON text of messages.

    Raises:
        FieldError: it is a list, or the JSON text of a list of objects with roles, and something of it is wrong.
    """
    if isinstance(value, str):
        value = as_list(value)
        if not value or not all(isinstance(item, Mapping) and "role" in item for item in value):
            return None
    return check(value, field) if isinstance(value, list) else None


def as_list(text: str) -> list[Any] | None:
    """The list whose JSON a text is, or None where it is none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def check(value: list[Any], field: str) -> Messages:
    """The messages that a list holds, in plain form.

    Raises:
        FieldError: the list is empty, a turn is no message, or the last is not the user's or asks nothing.
    """
    if not value:
        raise FieldError(field, "is an empty list", f"{MESSAGE_REMEDY}, the user's last, or give a text")
    messages = [_checked(item, f"{field}[{i}]") for i, item in enumerate(value)]
    last, name = messages[-1], f"{field}[{len(messages) - 1}]"
    if last["role"] != "user":
        problem = f"is '{last['role']}' in the last turn, where only 'user' may stand"
        raise FieldError(f"{name}.role", problem, "end the messages with the user's question; its answer is the target")
    if not last["content"].strip():
        raise FieldError(f"{name}.content", "is empty", "give the user's question")
    return messages


def _checked(item: Any, field: str) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise FieldError(field, f"is {_brief(item)}, not a message", MESSAGE_REMEDY)
    there = {str(key): value for key, value in item.items() if value is not None}
    for name in ("role", "content"):
        if name not in there:
            raise FieldError(f"{field}.{name}", "is missing", MESSAGE_REMEDY)
    if there["role"] not in ROLES:
        raise FieldError(f"{field}.role", f"is {_brief(there['role'])}, no known role", f"choose of {', '.join(ROLES)}")
    if not isinstance(there["content"], str):
        raise FieldError(f"{field}.content", f"is {_brief(there['content'])}, not a text", "write a text in quotes")
    for name in sorted(there.keys() - {"role", "content"}):
        remedy = "leave it out: a message has 'role' and 'content' alone"
        raise FieldError(f"{field}.{name}", f"is {_brief(there[name])}, which is not read", remedy)
    return {"role": there["role"], "content": there["content"]}


def _brief(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def dump(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as a prompt."""
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)


def parse(prompt: str) -> Messages | None:
    """The messages of a prompt, or None where it is a plain text."""
    if not prompt.startswith("["):
        return None
    found = as_list(prompt)
    return found if is_messages(found) else None


def question_of(prompt: str) -> str:
    """What a prompt asks, in the user's words: its last turn, or the whole of a plain text."""
    messages = parse(prompt)
    return prompt if messages is None else messages[-1]["content"]


def with_question(prompt: str, text: str) -> str:
    """The prompt with another text in place of what it asks."""
    messages = parse(prompt)
    return text if messages is None else dump([*messages[:-1], {**messages[-1], "content": text}])


def behind(context: str, prompt: str) -> str:
    """The prompt with a sentence before what it asks."""
    return with_question(prompt, f"{context}. {question_of(prompt)}")


def shown(prompt: str) -> str:
    """A prompt for a person."""
    messages = parse(prompt)
    if messages is None:
        return prompt
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
