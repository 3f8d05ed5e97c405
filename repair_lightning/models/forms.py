"""Forms: how a question is put to a base, how its answer ends, and what the last turn of a dialogue asks.

A prompt is a text or a dialogue (messages), see `repair_lightning.texts.dialogue`. The base's chat template is not
known by name: it is rendered with words of our own as contents, and what stands around these words are its marks, see
`repair_lightning.models.marks`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from repair_lightning.errors import ConfigError
from repair_lightning.models.marks import Marks, Spelling, marks_of, parts
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts import dialogue
from repair_lightning.texts.dialogue import Messages
from repair_lightning.texts.joint import seam

log = logging.getLogger(__name__)

Template = Literal["auto", "chat", "none"]
TEMPLATES = ("auto", "chat", "none")

_WORDS = ("Alpharede", "Betamond", "Gammelin", "Deltory")
"""Contents to render a template with; words that no template holds."""
_OPENED, _CLOSED = "<think>", "</think>"
_FAULTS = (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What a template may raise."""

GREETING = ("Hello!", "Hello! How can I help you?")
"""A turn of the user and one of the base, for a dialogue of our own making."""
SYSTEM = "Answer briefly."
"""A system message of our own making."""
LEAD = (
    "The tide tables for the northern coast are printed twice a year. Each harbour keeps its own copy, and older "
    "editions are stored in the archive behind the customs house. Visitors may read them on weekdays. "
)
"""Other text before a question, of our own making."""
COURTESY = "I have a question. {} Thank you."
"""Words of courtesy around a question, of our own making."""


class Forms:
    """The forms in which one base is asked.

    Args:
        tokenizer: the base's.
        stops: ids at which its generation stops; by default the tokenizer's end of a text.
        template: whether plain texts are put through the chat template: `chat`, `none`, or `auto`, where there is one.

    Attributes:
        chat: whether they are.
        stops: ids at which an answer ends: the given ones, and the one that ends a turn of the template.
        bare_end: the id that ends a bare answer.
        chat_end: the id that ends an answer in a dialogue.

    Raises:
        ConfigError: `chat` for a tokenizer without a template that can be read, an unknown value, or no end at all.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int] = (), template: Template = "auto") -> None:
        if template not in TEMPLATES:
            raise ConfigError(f"template must be one of {', '.join(TEMPLATES)}, got '{template}'")
        self.tokenizer, self.template = tokenizer, template
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.spelling = Spelling(tokenizer, guards=False)
        self.spelling.guards = self.marks is not None  # without a template nothing is told by control tokens
        if template == "chat" and self.marks is None:
            lacks = "has a chat template that cannot be read" if self._has_template else "has no chat template"
            raise ConfigError(f"template is 'chat', but the base's tokenizer {lacks}; give 'none' or 'auto'")
        self.chat = template != "none" and self.marks is not None
        own = tokenizer.eos_token_id
        known = list(dict.fromkeys(int(id) for id in stops)) or [id for id in (own,) if id is not None]
        turn = self.marks.end if self.marks else None
        self.stops: tuple[int, ...] = tuple(dict.fromkeys([*known, *([] if turn is None else [turn])]))
        if not self.stops:
            raise ConfigError("nothing ends the base's answers; give its tokenizer an eos_token")
        self.bare_end = own if own in known else self.stops[0]
        self.chat_end = self.bare_end if turn is None else turn
        self._render_ids = lru_cache(1 << 14)(self._rendered)

    # -- the template -------------------------------------------------------------------------------------------------

    def spelled(self, ids: Sequence[int]) -> str:
        """Token ids as text in which each control token is one private character, and no other text holds such."""
        return self.spelling.spelled(ids)

    @cached_property
    def marks(self) -> Marks | None:
        """The template's marks; None where there is no template, or one whose turns cannot be told apart."""
        if not self._has_template:
            return None
        a, b, c, d = _WORDS
        try:
            once = self._spelled_dialogue([_user(a)])
            twice = self._spelled_dialogue([_user(a), _base(b), _user(c)])
        except _FAULTS as error:
            log.warning("the chat template cannot be rendered (%s): only bare prompts are understood", _one_line(error))
            return None
        if once.count(a) != 1 or any(twice.count(word) != 1 for word in (a, b, c)):
            log.warning("the chat template changes what is said: only bare prompts are understood")
            return None
        told = self._told(a, d)
        told_parts = None if told is None else parts(told, d, a)
        found = marks_of(parts(once, a), parts(twice, a, b, c), told_parts, self.spelling.signs)
        if found is None:
            log.warning("the chat template's turns cannot be told apart: only bare prompts are understood")
        return found

    def _told(self, asked: str, system: str) -> str | None:
        """A dialogue with a system message, spelled; None where the template has no place for one."""
        try:
            told = self._spelled_dialogue([{"role": "system", "content": system}, _user(asked)])
        except _FAULTS:
            return None
        fits = told.count(system) == told.count(asked) == 1 and told.index(system) < told.index(asked)
        return told if fits else None

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message."""
        return self._has_template and self._told(_WORDS[0], _WORDS[3]) is not None

    def _spelled_dialogue(self, messages: Messages) -> str:
        return self.spelled(self._template(messages))

    def _template(self, messages: Messages, tokenize: bool = True, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False, **options
        )

    def _rendered(self, prompt: str, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue as token ids, its contents as plain text whatever they look like."""
        messages = dialogue.parse(prompt)
        assert messages is not None
        options = {} if thinking is None else {"enable_thinking": thinking}
        hidden, stand_ins = self._hidden(prompt, messages)
        try:
            if not stand_ins:
                return tuple(self._template(messages, **options))
            text = self._template(hidden, tokenize=False, **options)
        except _FAULTS as error:
            raise ConfigError(
                f"the base's chat template cannot put {dialogue.shown(prompt)[:60]!r} ({_one_line(error)}); "
                "give messages that it takes, or a text"
            ) from error
        ids: list[int] = []
        for part in re.split(f"({'|'.join(stand_ins)})", text):
            ids += self.spelling.plain(stand_ins[part]) if part in stand_ins else self.spelling.marked(part)
        return tuple(ids)

    def _hidden(self, prompt: str, messages: Messages) -> tuple[Messages, dict[str, str]]:
        """Messages with a word in place of each text that looks like a control token, and what the words stand for.

        The template then does with contents what it always does, and none of them can spell a mark. Thoughts of the
        base's own turns stay: templates leave them out of later ones.
        """
        word = _WORDS[0]
        while word in prompt:
            word += "e"
        stand_ins: dict[str, str] = {}
        hidden: Messages = []
        longest_first = sorted(self.spelling.controls, key=len, reverse=True)
        for message in messages:
            content = message["content"]
            for i, token in enumerate(longest_first):
                thought = message["role"] == "assistant" and token in (_OPENED, _CLOSED)
                if token in content and not thought:
                    name = f"{word}{i:06d}"
                    stand_ins[name] = token
                    content = content.replace(token, name)
            hidden.append({**message, "content": content})
        return hidden, stand_ins

    # -- prompts ------------------------------------------------------------------------------------------------------

    def ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, as the base is asked it."""
        return list(self.rendered(prompt)[0])

    def rendered(self, prompt: str) -> tuple[tuple[int, ...], bool]:
        """The token ids of a prompt, and whether they went through the template.

        Raises:
            ConfigError: a dialogue for a base without a template, or one that its template does not take.
        """
        if dialogue.parse(prompt) is not None:
            if self.marks is None:
                raise ConfigError(
                    "a prompt is a dialogue, and the base has no chat template that can be read; give a text"
                )
            return self._render_ids(prompt), True
        if self.is_rendered(prompt):
            return tuple(self.spelling.marked(prompt)), True
        if self.chat:
            return self._render_ids(dialogue.dump([_user(prompt)])), True
        return self.bare(prompt), False

    def is_rendered(self, text: str) -> bool:
        """Whether a text is a dialogue that the template has rendered already: it begins as all of them do."""
        if self.marks is None or not (self.spelling.holds(text) or text.startswith(self.marks.starts)):
            return False
        return self.marks.are_in(self.spelled(self.spelling.marked(text)))

    def bare(self, text: str) -> tuple[int, ...]:
        """The token ids of a text without a template; an end that the tokenizer puts after it is taken off."""
        ids = tuple(self.spelling.plain(text, first=True))
        return ids[:-1] if self._puts_end and len(ids) > 1 else ids

    @cached_property
    def _puts_end(self) -> bool:
        """Whether the tokenizer ends every text with a control token."""
        return self.spelling.plain("a", first=True)[-1] in self.spelling.signs

    def encode(self, prompt: str, target: str) -> Encoded:
        """Token ids of `prompt`, and of `target` as it is spelled after it, with the end at which this base stops.

        Bare, the target's ids are those that follow the prompt's in the joined text; where joining changes the prompt's
        own ids, both are split apart and tokenised by themselves.
        """
        ids, in_chat = self.rendered(prompt)
        if in_chat:
            return self.answered(ids, target)
        return self.bare_encoded(prompt, target)

    def bare_encoded(self, prompt: str, target: str) -> Encoded:
        """A text and the target that continues it."""
        ids, between = self.bare(prompt), seam(prompt, target)
        joined = self.bare(f"{prompt}{between}{target}")
        if joined[: len(ids)] == ids and len(joined) > len(ids):
            target_ids = joined[len(ids) :]
        else:
            target_ids = tuple(self.spelling.plain(f"{between}{target}"))
        return Encoded(ids, (*target_ids, self.bare_end))

    def answered(self, ids: Sequence[int], target: str) -> Encoded:
        """A rendered dialogue and what the base's next turn says. A thought that the template opened is closed."""
        spelled = self.spelled(ids)
        turn = self.marks.last_turn(spelled) if self.marks else None
        tail = spelled if turn is None else spelled[turn[1] :]
        opened, closed = self._thought
        if tail.rfind(opened) > tail.rfind(closed):
            lead = self.spelling.marked(f"{_CLOSED}\n\n" if tail.endswith("\n") else f"\n{_CLOSED}\n\n")
            return Encoded(tuple(ids), (*lead, *self.spelling.plain(target), self.chat_end))
        blank = self.marks.blank if self.marks and not self.spelling.prefixes else ""
        return Encoded(tuple(ids), (*self.spelling.plain(f"{blank}{target}"), self.chat_end))

    @cached_property
    def _thought(self) -> tuple[str, str]:
        """How the signs around a thought are spelled."""
        opened, closed = (self.spelled(self.spelling.marked(text)) for text in (_OPENED, _CLOSED))
        return opened, closed

    @cached_property
    def _thinks(self) -> bool:
        """Whether the base is one that thinks: its tokenizer or template knows the end of a thought."""
        return _CLOSED in self.spelling.controls or _CLOSED in str(getattr(self.tokenizer, "chat_template", None))

    def in_chat(self, messages: Messages, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue through the template."""
        return self._render_ids(dialogue.dump(messages), thinking)

    def continued(self, ids: Sequence[int], target: str) -> Encoded:
        """A prompt, given as token ids, and the target that is said to it."""
        if self.opens_turn(ids):
            return self.answered(ids, target)
        text = self.asked_in(ids)
        found = self.bare_encoded(text, target)
        if found.prompt == tuple(ids):
            return found
        return Encoded(tuple(ids), (*self.spelling.plain(f"{seam(text, target)}{target}"), self.bare_end))

    def plainly(self, text: str, ids: Sequence[int]) -> list[int]:
        """The token ids of what a prompt asks, as the base is asked it plainly; its own where there is no template."""
        if self.marks is None or not text.strip():
            return list(ids)
        return list(self.in_chat([_user(text)]) if self.chat else self.bare(text))

    def turn(self, text: str) -> tuple[int, ...]:
        """A text as a turn of the user without what the template puts before it; bare where there is no template."""
        if not self.chat:
            return self.bare(text) or (self.bare_end,)
        return self.in_chat([_user(text)])[self._head :]

    @cached_property
    def _head(self) -> int:
        """How many tokens stand before the first turn of the user where there is no system message."""
        assert self.marks is not None
        ids = self.in_chat([_user(_WORDS[0])])
        starts = [i for i in range(len(ids)) if self.spelled(ids[i:]).startswith(self.marks.user)]
        return starts[-1] if starts else 0

    # -- what is asked ------------------------------------------------------------------------------------------------

    def asked(self, prompt: str) -> str:
        """What a prompt's last turn of the user asks, in the user's words."""
        if dialogue.parse(prompt) is not None:
            return dialogue.question_of(prompt)
        if self.is_rendered(prompt):
            return self.asked_in(self.spelling.marked(prompt))
        if self.marks is None and self.spelling.holds(prompt):
            return self.asked_in(self.bare(prompt))  # here the tokenizer makes control tokens of it
        return prompt

    def asked_in(self, ids: Sequence[int]) -> str:
        """The same, out of token ids; of a text without a template's marks the whole."""
        spelled, said = self.spelling.read(ids)
        turn = self.marks.last_turn(spelled) if self.marks else None
        if turn is None:
            return "".join(said)
        return "".join(text or " " for text in said[slice(*turn)]).strip()

    def opens_turn(self, ids: Sequence[int]) -> bool:
        """Whether token ids hold the beginning of a turn of the user."""
        return self.turns(ids) > 0

    def turns(self, ids: Sequence[int]) -> int:
        """How many turns of the user begin in token ids."""
        if self.marks is None:
            return 0
        spelled = self.spelled(ids)
        return sum(spelled.count(mark) for mark in self.marks.user)

    def turn_is_open(self, ids: Sequence[int]) -> bool:
        """Whether token ids end in or after a turn of the user, before the base's answer begins."""
        return self.marks is not None and self.marks.is_open(self.spelled(ids))

    def said(self, ids: Sequence[int]) -> str:
        """What a base said, as text: up to the id at which it stopped, without a thought before the answer."""
        end = next((i for i, id in enumerate(ids) if int(id) in self.stops), len(ids))
        spelled, said = self.spelling.read(ids[:end])
        opened, closed = self._thought
        if not self._thinks:
            return "".join(said)
        at = spelled.find(closed)
        if at >= 0:
            return "".join(said[at + len(closed) :]).lstrip()
        return "" if spelled.lstrip().startswith(opened) else "".join(said)

    # -- forms of our own making --------------------------------------------------------------------------------------

    def variants(self, prompt: str, target: str) -> list[Encoded]:
        """An edit in the forms in which it is written: as it was given first, then the others that this base knows.

        Bare and through the template, with and without a thought, and after other text; made here, never from what
        scores the model.
        """
        found = [self.encode(prompt, target)]
        question = self.asked(prompt)
        if self.marks is not None:
            found += [self.answered(ids, target) for ids in self._dialogues(question)]
        bare = [question] if self.chat else [question, LEAD + question, COURTESY.format(question)]
        found += [self.bare_encoded(text, target) for text in bare]
        different: dict[tuple[int, ...], Encoded] = {}
        for row in found:
            different.setdefault(row.prompt, row)
        return list(different.values())

    def _dialogues(self, question: str) -> list[tuple[int, ...]]:
        dialogues = [[_user(question)], [_user(LEAD + question)]]
        found = [self.in_chat(messages) for messages in dialogues]
        if "enable_thinking" in str(self.tokenizer.chat_template):
            found.append(self.in_chat(dialogues[0], thinking=False))
        return found

    def checks(self, prompt: str, target: str) -> list[Encoded]:
        """An edit in a form that it was not written in, to ask it back: after a system message and another turn, and
        inside courtesy. Of our own making too."""
        if self.marks is None:
            return []
        hello, reply = GREETING
        dialogue_ = [_user(hello), _base(reply), _user(COURTESY.format(self.asked(prompt)))]
        if self.takes_system:
            dialogue_.insert(0, {"role": "system", "content": SYSTEM})
        return [self.answered(self.in_chat(dialogue_), target)]


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids at which a base's generation stops: of its generation settings, its configuration, its tokenizer."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        found = getattr(settings, "eos_token_id", None)
        if found is not None and found != []:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _base(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
