"""A base's chat template. It is not known by name: what stands around words of our own, once rendered, are its marks.

In the dialogues that it renders, no content can be taken for a mark.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from repair_lightning.errors import ConfigError
from repair_lightning.models.marks import Marks, Spelling, marks_of, parts
from repair_lightning.texts import dialogue

log = logging.getLogger(__name__)

OPENED, CLOSED = "<think>", "</think>"
"""What stands around a thought of the base."""
WORDS = ("Alpharede", "Betamond", "Gammelin", "Deltory")
"""Contents to render a template with; words that no template holds."""
_FAULTS = (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What a template may raise."""


class ChatTemplate:
    """What a tokenizer's chat template puts around turns, and dialogues as it renders them.

    Attributes:
        source: the template; empty where there is none.
        marks: None where there is no template, or one whose turns cannot be told apart.
        takes_system: whether it has a place for a system message.
    """

    def __init__(self, tokenizer: Any, spelling: Spelling) -> None:
        self.tokenizer, self.spelling = tokenizer, spelling
        self.source = str(getattr(tokenizer, "chat_template", None) or "")
        self.marks: Marks | None = None
        self.takes_system = False
        if self.source:
            try:
                self.marks = self._find_marks()
            except _FAULTS as error:
                log.warning("the chat template cannot be read (%s): only bare prompts are understood", _one_line(error))
        self.render = lru_cache(1 << 14)(self._render)

    def _find_marks(self) -> Marks:
        a, b, c, d = WORDS
        once = parts(self._spelled(("user", a)), a)
        twice = parts(self._spelled(("user", a), ("assistant", b), ("user", c)), a, b, c)
        try:
            told = parts(self._spelled(("system", d), ("user", a)), d, a)
        except _FAULTS:  # it has no place for a system message
            told = None
        self.takes_system = told is not None
        return marks_of(once, twice, told, self.spelling.signs)

    def _spelled(self, *turns: tuple[str, str]) -> str:
        text = self._text([{"role": role, "content": content} for role, content in turns])
        return self.spelling.spelled(self.spelling.marked(text))

    def _text(self, messages: dialogue.Messages, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)

    def _render(self, prompt: str, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue as token ids, its contents as plain text whatever they look like.

        While the template renders, a word stands in for each text that looks like a control token. Thoughts of the
        base's own turns stay: templates leave them out of later ones.
        """
        word = WORDS[0]
        while word in prompt:
            word += "e"
        longest_first = sorted(self.spelling.controls, key=len, reverse=True)
        stand_ins = {f"{word}{i:06d}": token for i, token in enumerate(longest_first)}
        messages = dialogue.parse(prompt) or []
        for message in messages:
            for name, token in stand_ins.items():
                if message["role"] != "assistant" or token not in (OPENED, CLOSED):
                    message["content"] = message["content"].replace(token, name)
        try:
            text = self._text(messages, **({} if thinking is None else {"enable_thinking": thinking}))
        except _FAULTS as error:
            raise ConfigError(
                f"the base's chat template cannot put {dialogue.shown(prompt)[:60]!r} ({_one_line(error)}); "
                "give messages that it takes, or a text"
            ) from error
        ids: list[int] = []
        for part in re.split(f"({word}[0-9]{{6}})", text):
            ids += self.spelling.plain(stand_ins[part]) if part in stand_ins else self.spelling.marked(part)
        return tuple(ids)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
