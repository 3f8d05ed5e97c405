"""A base's chat template: what it puts around turns, and dialogues in which no content can be taken for that.

The template is not known by name: what stands around words of our own, once rendered, are its marks. Token ids are
compared as text in which every control token is one private character, so nothing that a user types looks like one.
Where a template marks its turns with ordinary text alone, a user can imitate it, for the base too.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from repair_lightning.errors import ConfigError, first_line
from repair_lightning.texts import dialogue

log = logging.getLogger(__name__)

OPENED, CLOSED = "<think>", "</think>"
"""What stands around a thought of the base."""
WORDS = ("Alpharede", "Betamond", "Gammelin")
"""Contents to render a template with; words that no template holds."""
_FAULTS = (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What a template may raise."""
_SIGN = re.compile("[\U000f0000-\U0010fffd]")
"""The private characters that stand for control tokens."""


class Spelling:
    """Texts as token ids and back, where control tokens are told apart from text that only looks like them.

    Control tokens are the special ones, and the added ones that the chat template writes; `signs` gives the private
    character of each one's id. Text that looks like one stays text where it `guards`; else the tokenizer decides.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.guards = tokenizer, False
        added = getattr(tokenizer, "added_tokens_decoder", {})
        template = str(getattr(tokenizer, "chat_template", None) or "")
        written = (
            id for id, token in added.items() if token.special or (str(token).strip() and str(token) in template)
        )
        known = sorted({*tokenizer.all_special_ids, *written})
        self.signs: dict[int, str] = {id: chr(0xF0000 + i) for i, id in enumerate(known)}
        self.controls: tuple[str, ...] = tuple(str(added[id]) for id in known if id in added)

    def read(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """The text that token ids spell, with one private character for each control token and no other such, and what
        each of its characters says: itself, or nothing."""
        spelled, plain = "", {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        said: list[str] = []
        for are_controls, run in groupby(map(int, ids), key=self.signs.__contains__):
            alike = list(run)
            text = "".join(self.signs[id] for id in alike) if are_controls else self.tokenizer.decode(alike, **plain)
            said += [""] * len(text) if are_controls else text
            spelled += text if are_controls else _SIGN.sub("\ufffd", text)
        return spelled, said

    def spelled(self, ids: Sequence[int]) -> str:
        """The first of :meth:`read`."""
        return self.read(ids)[0]

    def marked(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are meant as such."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def plain(self, text: str, first: bool = False) -> list[int]:
        """Token ids of a text, as a user wrote it, in which none is a control token; where it is the `first` of a row,
        with what the tokenizer puts around every text."""
        if not text and not first:
            return []
        guarded = self.guards and self.holds(text)
        if guarded and self._blind is not None:
            return list(self._blind.encode(text, add_special_tokens=first).ids)
        options = {"split_special_tokens": True} if guarded else {}
        return list(self.tokenizer(text, add_special_tokens=first, **options)["input_ids"])

    def holds(self, text: str) -> bool:
        """Whether a text holds what is written like a control token."""
        return any(token in text for token in self.controls)

    @cached_property
    def _blind(self) -> Tokenizer | None:
        """A copy of a fast tokenizer that sees no control token in a text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        raw = json.loads(backend.to_str())
        for token in raw["added_tokens"]:
            token["special"] = token["id"] in self.signs  # special ones alone can be split
        copy = Tokenizer.from_str(json.dumps(raw))
        copy.encode_special_tokens = True
        copy.no_truncation()
        copy.no_padding()
        return copy

    @cached_property
    def prefixes(self) -> bool:
        """Whether a text by itself gets a blank before it, as SentencePiece gives it."""
        return str(self.tokenizer.convert_ids_to_tokens(self.marked("a"))[0]).startswith("\u2581")


@dataclass(frozen=True)
class Marks:
    """What a chat template puts around turns, as :meth:`Spelling.read` spells it.

    Attributes:
        starts: what a rendered dialogue begins with, one of these.
        user: what opens a turn of the user, one of these.
        system: what stands before and after a system message in the user's turn; empty where nothing does.
        close: what ends a turn of the user.
        end: the token id that ends a turn of the base; None where it is none.
        answer: what stands between a turn of the user and the base's answer.
        blank: what stands between the generation prompt and the base's answer.
    """

    starts: tuple[str, ...]
    user: tuple[str, ...]
    system: tuple[str, str]
    close: str
    end: int | None
    answer: str
    blank: str

    def are_in(self, spelled: str) -> bool:
        """Whether a text is a rendered dialogue. One without control tokens must also close a turn."""
        starts = [start for start in self.starts if spelled.startswith(start)][:1]
        closed = any(_SIGN.match(start) or self.close in spelled for start in starts)
        return closed and any(mark in spelled for mark in self.user)

    def is_open(self, spelled: str) -> bool:
        """Whether a text ends before the base's answer to the last turn of the user begins."""
        turn = self.last_turn(spelled)
        return turn is not None and self.answer not in spelled[turn[0] :]

    def last_turn(self, spelled: str) -> tuple[int, int] | None:
        """Where the content of the last turn of the user begins and ends; None where there is none."""
        begin = max((at + len(mark) for mark in self.user if (at := spelled.rfind(mark)) >= 0), default=None)
        if begin is None:
            return None
        # Text that closes a turn may stand in its content too: then the last one counts.
        end = spelled.find(self.close, begin) if _SIGN.match(self.close) else spelled.rfind(self.close, begin)
        before, after = self.system
        if after and spelled.startswith(before, begin):
            system_end = spelled.find(after, begin, len(spelled) if end < 0 else end)
            begin = begin if system_end < 0 else system_end + len(after)
        return begin, len(spelled) if end < 0 else end


def marks_of(once: Sequence[str], twice: Sequence[str], told: Sequence[str] | None, signs: Mapping[int, str]) -> Marks:
    """The marks in what stands around contents; ValueError where turns cannot be told apart.

    That is: around `once` one turn of the user, `twice` turns of the user, of the base and of the user, and `told` a
    system message and a turn of the user, where a template has one. `signs` says how control tokens are spelled.
    """
    (before, after), (head, first, second, _) = once, twice
    opens = [before, head, second]
    user = _user_marks(opens, others=[first, *(told or ())[:1]])
    answer = commonprefix([after, first])  # noqa: RUF071 (of characters)
    closing = _SIGN.search(answer)
    close = closing.group() if closing else answer.strip()
    if not user or not close:
        raise ValueError("its turns cannot be told apart")
    system, starts = ("", ""), [_start_of(before, user)]
    if told is not None:
        prefix, between, _ = told
        starts.append(_start_of(prefix, user))
        mark = next((m for m in user if m in prefix), None)
        if not between.endswith(user) and mark is not None:
            system = (prefix.split(mark, 1)[1], between) if between.strip() else ("", "")
        elif not between.endswith(user):
            user = _user_marks([*opens, between], others=[first, prefix]) or user
    said = second.lstrip()
    ending = "" if not said or said.startswith(user) else said[0]
    end = next((id for id, sign in signs.items() if sign == ending), None)
    blank = first[len(after) :] if first.startswith(after) and not first[len(after) :].strip() else ""
    return Marks(tuple(dict.fromkeys(filter(None, starts))), user, system, close, end, answer, blank)


def _user_marks(opens: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """What opens a turn of the user: the shortest end of what stands before several such turns that begins with a
    control token and ends none of the others; or shared text, with a control token before it if there always is one."""
    shared = commonprefix([text[::-1] for text in opens])[::-1]  # noqa: RUF071 (of characters)
    for found in reversed(list(_SIGN.finditer(shared))):
        if not any(other.endswith(shared[found.start() :]) for other in others):
            return (shared[found.start() :],)
    if not shared.strip():
        return ()
    longer = {text[-len(shared) - 1 :] for text in opens}
    return tuple(sorted(longer)) if all(_SIGN.match(mark) for mark in longer) else (shared,)


def _start_of(before: str, user: Sequence[str]) -> str:
    """How a rendered dialogue begins: a control token, or the mark of the user's turn; else nothing that says so."""
    found = _SIGN.match(before)
    return found.group() if found else before if before in user else ""


def parts(text: str, *words: str) -> list[str]:
    """What stands before, between and after words; ValueError unless each is in the text once and in this order."""
    either = "|".join(words)
    if re.findall(either, text) != list(words):
        raise ValueError("it changes what is said")
    return re.split(either, text)


class ChatTemplate:
    """What a tokenizer's chat template puts around turns, and dialogues as it renders them.

    `source` is empty where there is none; `marks` is None there too, and where turns cannot be told apart.
    """

    def __init__(self, tokenizer: Any, spelling: Spelling) -> None:
        self.tokenizer, self.spelling = tokenizer, spelling
        self.source = str(getattr(tokenizer, "chat_template", None) or "")
        self.marks: Marks | None = None
        self.takes_system = False  # whether there is a place for a system message
        if self.source:
            try:
                self.marks = self._find_marks()
            except _FAULTS as error:
                log.warning(
                    "the chat template cannot be read (%s): only bare prompts are understood", first_line(error)
                )
        self.render = lru_cache(1 << 14)(self._render)

    def _find_marks(self) -> Marks:
        def around(*roles: str) -> list[str]:
            said = dict(zip(WORDS, roles, strict=False))
            text = self._text([{"role": role, "content": content} for content, role in said.items()])
            return parts(self.spelling.spelled(self.spelling.marked(text)), *said)

        once, twice = around("user"), around("user", "assistant", "user")
        try:
            told = around("system", "user")
        except _FAULTS:  # it has no place for a system message
            told = None
        self.takes_system = told is not None
        return marks_of(once, twice, told, self.spelling.signs)

    def _text(self, messages: dialogue.Messages, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)

    def _render(self, prompt: str, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue as token ids, its contents as plain text: while the template renders, a word stands in for each
        text that looks like a control token. Thoughts of the base's own turns stay: templates leave them out later."""
        word, messages = WORDS[0], dialogue.parse(prompt) or []
        runs = [len(run) for run in re.findall(f"{word}(e*)", prompt)]
        word += "e" * (max(runs, default=-1) + 1)  # so that it does not stand there
        longest_first = sorted(self.spelling.controls, key=len, reverse=True)
        stand_ins = {f"{word}{i:06d}": token for i, token in enumerate(longest_first)}
        for message in messages:
            for name, token in stand_ins.items():
                if message["role"] != "assistant" or token not in (OPENED, CLOSED):
                    message["content"] = message["content"].replace(token, name)
        try:
            text = self._text(messages, **({} if thinking is None else {"enable_thinking": thinking}))
        except _FAULTS as error:
            raise ConfigError(
                f"the base's chat template cannot put {dialogue.shown(prompt)[:60]!r} ({first_line(error)}); "
                "give messages that it takes, or a text"
            ) from error
        ids: list[int] = []
        for part in re.split(f"({word}[0-9]{{6}})", text):
            ids += self.spelling.plain(stand_ins[part]) if part in stand_ins else self.spelling.marked(part)
        return tuple(ids)
