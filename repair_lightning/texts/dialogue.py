"""Prompts that are dialogues: messages in the usual conversational form, carried as one canonical JSON text.

Ledger, journal, records and reports need not know; only what turns a prompt into token ids or shows it asks here.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from repair_lightning.errors import FieldError

Messages: TypeAlias = list[dict[str, str]]
"""Turns of a dialogue in their order, each with `role` and `content`."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_REMEDY = 'write each turn as {"role": "user", "content": "..."}'


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages that ends with a turn of the user."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(item, Mapping) and item.keys() == {"role", "content"} for item in value)
        and all(item["role"] in ROLES and isinstance(item["content"], str) for item in value)
        and value[-1]["role"] == "user"
    )


def opened(value: Any) -> Any:
    """The list or object that a text is, in JSON or as Python prints it (as tables hold one); else the value itself."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")) and value.rstrip().endswith(("]", "}")):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value.strip())
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            return found if isinstance(found, list | dict) else value
    return value


def given(value: Any, field: str) -> Messages | None:
    """The messages that a user gave as the value of a field, or None where it is no list and no JSON text of messages.

    FieldError where it is one and empty, a turn is no message, or the last is not the user's or asks nothing.
    """
    if isinstance(value, str):
        value = opened(value)
        turns = value if isinstance(value, list) else []
        if not turns or not all(isinstance(item, Mapping) and "role" in item for item in turns):
            return None
    if not isinstance(value, list):
        return None
    if not value:
        raise FieldError(field, "is an empty list", f"{_REMEDY}, the user's last, or give a text")
    messages = [_checked(item, f"{field}[{i}]") for i, item in enumerate(value)]
    last, name = messages[-1], f"{field}[{len(messages) - 1}]"
    if last["role"] != "user":
        problem = f"is '{last['role']}' in the last turn, where only 'user' may stand"
        raise FieldError(f"{name}.role", problem, "end the messages with the user's question; its answer is the target")
    if not last["content"].strip():
        raise FieldError(f"{name}.content", "is empty", "give the user's question")
    return messages


def _checked(item: Any, field: str) -> dict[str, str]:
    def wrong(value: Any, problem: str, remedy: str, name: str = "") -> FieldError:
        said = "null" if value is None else repr(value)
        return FieldError(field + name, f"is {said if len(said) <= 40 else f'{said[:37]}...'}, {problem}", remedy)

    if not isinstance(item, Mapping):
        raise wrong(item, "not a message", _REMEDY)
    there = {str(key): value for key, value in item.items() if value is not None}
    for name in ("role", "content"):
        if name not in there:
            raise FieldError(f"{field}.{name}", "is missing", _REMEDY)
    role, content = there.pop("role"), there.pop("content")
    if role not in ROLES:
        raise wrong(role, "no known role", f"choose of {', '.join(ROLES)}", ".role")
    if not isinstance(content, str):
        raise wrong(content, "not a text", "write a text in quotes", ".content")
    if there:
        remedy = "leave it out: a message has 'role' and 'content' alone"
        raise wrong(there[min(there)], "which is not read", remedy, f".{min(there)}")
    return {"role": role, "content": content}


def dump(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as a prompt."""
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)


def parse(prompt: str) -> Messages | None:
    """The messages of a prompt, or None where it is a plain text."""
    try:
        found = json.loads(prompt) if prompt.startswith("[") else None
    except (ValueError, RecursionError):
        return None
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
    if messages is None or len(messages) == 1:
        return question_of(prompt)
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
