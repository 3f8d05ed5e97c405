"""Forms: how a question is put to a base, how its answer ends, and what the last turn of a dialogue asks.

A prompt is a text or a dialogue (messages), see `repair_lightning.texts.dialogue`. The base's chat template is not
known by name: it is rendered with words of our own as contents, and what stands around these words are its marks.
Marks are compared as token ids turned into text in which every special token is one private character, so that no text
which a user types can look like one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from repair_lightning.errors import ConfigError
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts import dialogue
from repair_lightning.texts.dialogue import Messages
from repair_lightning.texts.joint import seam

log = logging.getLogger(__name__)

Template = Literal["auto", "chat", "none"]
TEMPLATES = ("auto", "chat", "none")

_WORDS = ("Alpharede", "Betamond", "Gammelin", "Deltory")
"""Contents to render a template with; words that no template holds."""
_PRIVATE = 0xF0000
"""The first of the private characters that stand for special tokens."""
_PRIVATE_SIGN = re.compile("[\U000f0000-\U0010fffd]")
_THINK = re.compile(r".*?</think>\s*", re.DOTALL)
_OPENED = "<think>"
_CLOSED = "</think>"

GREETING = ("Hello!", "Hello! How can I help you?")
"""A turn of the user and one of the base, for a dialogue of our own making."""
SYSTEM = "Answer briefly."
"""A system message of our own making."""
LEAD = (
    "The tide tables for the northern coast are printed twice a year. Each harbour keeps its own copy, and older "
    "editions are stored in the archive behind the customs house. Visitors may read them on weekdays. "
)
"""Other text before a question, of our own making."""


@dataclass(frozen=True)
class Marks:
    """What a chat template puts around turns, in the spelling of :meth:`Forms.spelled`.

    Attributes:
        start: what every rendered dialogue begins with.
        user: what opens a turn of the user.
        close: what ends it.
        end: the token id that ends a turn of the base; None where it is none.
    """

    start: str
    user: str
    close: str
    end: int | None


class Forms:
    """The forms in which one base is asked.

    Args:
        tokenizer: the base's.
        stops: ids at which its generation stops, the first being the one that ends a bare answer.
        template: whether plain texts are put through the chat template: `chat`, `none`, or `auto`, where there is one.

    Raises:
        ConfigError: `chat` for a tokenizer without a template, or an unknown value.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int] = (), template: Template = "auto") -> None:
        if template not in TEMPLATES:
            raise ConfigError(f"template must be one of {', '.join(TEMPLATES)}, got '{template}'")
        has = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has:
            raise ConfigError(
                "template is 'chat', but the base's tokenizer has no chat template; give 'none' or 'auto'"
            )
        self.tokenizer, self.template = tokenizer, template
        self.chat = has if template == "auto" else template == "chat"
        known = list(dict.fromkeys(stops)) or [tokenizer.eos_token_id]
        turn = self.marks.end if self.marks else None
        self.stops: tuple[int, ...] = tuple(dict.fromkeys([*known, *([] if turn is None else [turn])]))
        self.bare_end = tokenizer.eos_token_id if tokenizer.eos_token_id in known else known[0]
        self.chat_end = self.bare_end if turn is None else turn
        self._render_ids = lru_cache(1 << 14)(self._rendered)

    # -- the template -------------------------------------------------------------------------------------------------

    @cached_property
    def _special(self) -> dict[int, str]:
        """Special and added tokens as private characters."""
        known = sorted({*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})})
        return {id: chr(_PRIVATE + i) for i, id in enumerate(known)}

    def spelled(self, ids: Sequence[int]) -> str:
        """Token ids as text in which each special token is one private character, and no other text holds such."""
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                text = self.tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                parts.append(_PRIVATE_SIGN.sub("\ufffd", text))
                run.clear()

        for id in ids:
            sign = self._special.get(int(id))
            if sign is None:
                run.append(int(id))
            else:
                flush()
                parts.append(sign)
        flush()
        return "".join(parts)

    @cached_property
    def marks(self) -> Marks | None:
        """The template's marks; None where there is no template, or one whose turns cannot be told apart."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        a, b, c, d = _WORDS
        try:
            once = self._spelled_dialogue([_user(a)])
            twice = self._spelled_dialogue([_user(a), _base(b), _user(c)])
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            log.warning("the chat template cannot be rendered (%s): only bare prompts are understood", error)
            return None
        if once.count(a) != 1 or any(twice.count(word) != 1 for word in (a, b, c)):
            log.warning("the chat template changes what is said: only bare prompts are understood")
            return None
        before, after = once.split(a)
        head, first, second = _between(twice, a, b, c)
        user = _common_end([before, head, second])
        close = _common_start([after, first])
        try:
            told = self._spelled_dialogue([{"role": "system", "content": d}, _user(a)])
            if told.count(d) == 1 and told.count(a) == 1 and told.index(d) < told.index(a):
                user = _common_end([user, told.split(d)[1].split(a)[0]])
        except (TemplateError, ValueError, TypeError, KeyError):
            pass  # a template without a system turn
        user = _shortest_mark(user, others=[first])
        if not user.strip() or not close.strip():
            return None
        return Marks(_opening(before), user, _closing(close), self._end_of(second, user))

    def _end_of(self, between: str, user: str) -> int | None:
        """The first special token behind what the base said."""
        ids, said = {sign: id for id, sign in self._special.items()}, between.lstrip()
        return None if not said or said.startswith(user) else ids.get(said[0])

    def _spelled_dialogue(self, messages: Messages) -> str:
        return self.spelled(self._template(messages))

    def _template(self, messages: Messages, **options: Any) -> list[int]:
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options
            )
        )

    def _rendered(self, prompt: str, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue as token ids, its contents as plain text whatever signs they hold."""
        messages = dialogue.parse(prompt)
        assert messages is not None
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            if not any(self._holds_special(message["content"]) for message in messages):
                return tuple(self._template(messages, **options))
            return tuple(self._rendered_piecewise(messages, options))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"the base's chat template cannot put {dialogue.shown(prompt)[:60]!r}: {error}"
            ) from error

    def _rendered_piecewise(self, messages: Messages, options: Mapping[str, Any]) -> list[int]:
        """The template's own text and the contents tokenised apart: a content cannot spell a mark."""
        stand_ins = [f"{_WORDS[0]}{i:04d}" for i in range(len(messages))]
        asked = [{**message, "content": word} for message, word in zip(messages, stand_ins, strict=True)]
        text = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **options)
        ids: list[int] = []
        for word, message in zip(stand_ins, messages, strict=True):
            if word not in text:
                continue  # the template leaves that turn out
            before, text = text.split(word, 1)
            ids += self._plain(before, special=True) + self._plain(message["content"].strip())
        return ids + self._plain(text, special=True)

    def _plain(self, text: str, special: bool = False, first: bool = False) -> list[int]:
        """Token ids of a text; unless `special`, nothing in it becomes a special token."""
        if not text and not first:
            return []
        options = {} if special or not self._holds_special(text) else {"split_special_tokens": True}
        return list(self.tokenizer(text, add_special_tokens=first, **options)["input_ids"])

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        if self.marks is None:
            return ()  # without a template nothing is told by special tokens
        return tuple(str(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values())

    def _holds_special(self, text: str) -> bool:
        return any(token in text for token in self._special_texts)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, as the base is asked it."""
        return list(self.rendered(prompt)[0])

    def rendered(self, prompt: str) -> tuple[tuple[int, ...], bool]:
        """The token ids of a prompt, and whether they went through the template."""
        if dialogue.parse(prompt) is not None:
            if self.marks is None and not getattr(self.tokenizer, "chat_template", None):
                raise ConfigError("a prompt is a dialogue, and the base's tokenizer has no chat template; give a text")
            return self._render_ids(prompt), True
        if self.is_rendered(prompt):
            return tuple(self._plain(prompt, special=True)), True
        if self.chat:
            return self._render_ids(dialogue.dump([_user(prompt)])), True
        return self.bare(prompt), False

    def is_rendered(self, text: str) -> bool:
        """Whether a text is a dialogue that the template has rendered already: it begins as all of them do."""
        if self.marks is None or not self._holds_special(text):
            return False
        spelled = self.spelled(self._plain(text, special=True))
        start = _PRIVATE_SIGN.match(spelled)
        return start is not None and spelled.startswith(self.marks.start) and self.marks.user in spelled

    def bare(self, text: str) -> tuple[int, ...]:
        """The token ids of a text without a template; an end that the tokenizer puts behind it is taken off."""
        ids = tuple(self._plain(text, first=True))
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.stops else ids

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
            target_ids = tuple(self._plain(f"{between}{target}"))
        return Encoded(ids, (*target_ids, self.bare_end))

    def answered(self, ids: Sequence[int], target: str) -> Encoded:
        """A rendered dialogue and what the base's next turn says. A thought that the template opened is closed."""
        opened = self.spelled(ids[-8:]) if ids else ""
        text = self.tokenizer.decode(list(ids[-8:]))
        lead = f"\n{_CLOSED}\n\n" if _OPENED in text and _CLOSED not in text.split(_OPENED)[-1] else ""
        lead = lead.lstrip("\n") if opened.endswith("\n") else lead
        return Encoded(tuple(ids), (*self._plain(lead, special=True), *self._plain(target), self.chat_end))

    def in_chat(self, messages: Messages, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue through the template."""
        return self._render_ids(dialogue.dump(messages), thinking)

    def continued(self, ids: Sequence[int], target: str) -> Encoded:
        """A prompt, given as token ids, and the target that is said to it."""
        if self.marks is not None and self.opens_turn(ids):
            return self.answered(ids, target)
        text = self.asked_in(ids)
        found = self.bare_encoded(text, target)
        if found.prompt == tuple(ids):
            return found
        return Encoded(tuple(ids), (*self._plain(f"{seam(text, target)}{target}"), self.bare_end))

    def plainly(self, text: str, ids: Sequence[int]) -> list[int]:
        """The token ids of what a prompt asks, as the base is asked it plainly; its own where there is no template."""
        if self.marks is None or not text.strip():
            return list(ids)
        return list(self.in_chat([_user(text)]) if self.chat else self.bare(text))

    def turn(self, text: str) -> tuple[int, ...]:
        """A text as a turn of the user without what the template puts before it; bare where there is no template."""
        if self.marks is None or not self.chat:
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
        if dialogue.parse(prompt) is None and self.is_rendered(prompt):
            return self.asked_in(self._plain(prompt, special=True))
        return dialogue.question_of(prompt)

    def asked_in(self, ids: Sequence[int]) -> str:
        """The same, out of token ids; of a text without a template's marks the whole."""
        spelled = self.spelled(ids)
        if self.marks is not None:
            _, mark, turn = spelled.rpartition(self.marks.user)
            if mark:
                inside = turn.split(self.marks.close, 1)[0]
                return _PRIVATE_SIGN.sub(" ", inside).strip()
        return _PRIVATE_SIGN.sub("", spelled)

    def opens_turn(self, ids: Sequence[int]) -> bool:
        """Whether token ids hold the beginning of a turn of the user."""
        return self.marks is not None and self.marks.user in self.spelled(ids)

    def said(self, ids: Sequence[int]) -> str:
        """What a base said, as text: up to the id at which it stopped, without a thought before the answer."""
        end = next((i for i, id in enumerate(ids) if int(id) in self.stops), len(ids))
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        return _THINK.sub("", text, count=1) if _CLOSED in text else text

    # -- forms of our own making --------------------------------------------------------------------------------------

    def variants(self, prompt: str, target: str) -> list[Encoded]:
        """An edit in the forms in which it is written: as it was given first, then the others that this base knows.

        Bare and through the template, with and without a thought, behind a system message and behind other text; made
        here, never from what scores the model.
        """
        found = [self.encode(prompt, target)]
        question = self.asked(prompt)
        if self.marks is None:
            return found
        found += [self.answered(ids, target) for ids in self._dialogues(question)]
        found.append(self.bare_encoded(question, target))
        return list({row.prompt: row for row in found}.values())

    def _dialogues(self, question: str) -> list[tuple[int, ...]]:
        dialogues = [[_user(question)], [_user(LEAD + question)]]
        found = [self.in_chat(messages) for messages in dialogues]
        if "enable_thinking" in str(self.tokenizer.chat_template):
            found.append(self.in_chat(dialogues[0], thinking=False))
        return found

    def checks(self, prompt: str, target: str) -> list[Encoded]:
        """An edit in a form that it was not written in, to ask it back: behind a system message and another turn, and
        inside courtesy. Of our own making too."""
        if self.marks is None:
            return []
        hello, reply = GREETING
        dialogue_ = [_user(hello), _base(reply), _user(f"I have a question. {self.asked(prompt)} Thank you.")]
        if self._takes_system:
            dialogue_.insert(0, {"role": "system", "content": SYSTEM})
        return [self.answered(self.in_chat(dialogue_), target)]

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template has a turn for a system message."""
        a, _, _, d = _WORDS
        try:
            told = self._spelled_dialogue([{"role": "system", "content": d}, _user(a)])
        except (TemplateError, ValueError, TypeError, KeyError):
            return False
        return d in told


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


def _between(text: str, *words: str) -> tuple[str, str, str]:
    """What stands before the first of three words, between it and the second, and between that and the third."""
    first, rest = text.split(words[0], 1)
    second, rest = rest.split(words[1], 1)
    return first, second, rest.split(words[2], 1)[0]


def _common_start(texts: Sequence[str]) -> str:
    first, *others = texts
    same = (i for i, char in enumerate(first) if any(other[i : i + 1] != char for other in others))
    return first[: next(same, len(first))]


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def _shortest_mark(mark: str, others: Sequence[str]) -> str:
    """The shortest end of a mark that begins with a special token and ends none of the others; the whole if none is."""
    starts = [found.start() for found in _PRIVATE_SIGN.finditer(mark)]
    for start in reversed(starts):
        if not any(other.endswith(mark[start:]) for other in others):
            return mark[start:]
    return mark


def _opening(before: str) -> str:
    """What a rendered dialogue begins with: its first special token, or its first word."""
    found = _PRIVATE_SIGN.match(before)
    return found.group() if found else before[: len(before) - len(before.lstrip())] + (before.split() or [""])[0]


def _closing(close: str) -> str:
    """The first special token of what ends a turn, or the words of it."""
    found = _PRIVATE_SIGN.search(close)
    return found.group() if found else close.strip()
