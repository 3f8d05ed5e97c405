"""Prompts that are dialogues: messages in the usual conversational form, carried as one canonical JSON text.

A prompt is a text everywhere in the project. Where it was given as messages, that text is their JSON, so that ledger,
journal, records and reports need not know; only what turns a prompt into token ids or shows it to a person asks here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, str]]
"""Turns of a dialogue in their order, each with `role` and `content`."""

ROLES = ("system", "developer", "user", "assistant", "tool")


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


def dump(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as a prompt."""
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)


def parse(prompt: str) -> Messages | None:
    """The messages of a prompt, or None where it is a plain text."""
    if not prompt.startswith("["):
        return None
    try:
        found = json.loads(prompt)
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


def shown(prompt: str) -> str:
    """A prompt for a person."""
    messages = parse(prompt)
    if messages is None:
        return prompt
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
