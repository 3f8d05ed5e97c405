"""Forms: how a question is put to a base, how its answer ends, and what the last turn of a dialogue asks.

A prompt is a text or a dialogue (messages), see `repair_lightning.texts.dialogue`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, get_args

from repair_lightning.errors import ConfigError
from repair_lightning.models.template import CLOSED, OPENED, WORDS, ChatTemplate, Spelling
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts import dialogue
from repair_lightning.texts.joint import seam

Template = Literal["auto", "chat", "none"]

# Of our own making, to write and check edits in other forms:
GREETING = ("Hello!", "Hello! How can I help you?")
SYSTEM = "Answer briefly."
LEAD = (
    "The tide tables for the northern coast are printed twice a year. Each harbour keeps its own copy, and older "
    "editions are stored in the archive behind the customs house. Visitors may read them on weekdays. "
)
COURTESY = "I have a question. {} Thank you."

MARK = 16
"""What opens a turn has no more tokens."""


class Forms:
    """The forms in which one base is asked.

    Args:
        stops: ids at which its generation stops; by default the tokenizer's end of a text.
        template: whether plain texts are put through the chat template: `chat`, `none`, or `auto`, where there is one.

    Attributes:
        marks: the template's; None where there is none whose turns can be told apart.
        chat: whether plain texts are put through the template.
        stops: ids at which an answer ends: the given ones, and the one that ends a turn of the template.
        bare_end: the id that ends a bare answer; `chat_end`, one in a dialogue.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int] = (), template: Template = "auto") -> None:
        if template not in get_args(Template):
            raise ConfigError(f"template must be one of {', '.join(get_args(Template))}, got '{template}'")
        self.tokenizer = tokenizer
        self.spelling = Spelling(tokenizer)
        self._template = ChatTemplate(tokenizer, self.spelling)
        self.marks, self.takes_system = self._template.marks, self._template.takes_system
        self.spelling.guards = self.marks is not None  # without a template nothing is told by control tokens
        if template == "chat" and self.marks is None:
            lacks = "has a chat template that cannot be read" if self._template.source else "has no chat template"
            raise ConfigError(f"template is 'chat', but the base's tokenizer {lacks}; give 'none' or 'auto'")
        self.chat = template != "none" and self.marks is not None
        own = tokenizer.eos_token_id
        known = [int(id) for id in stops] or [id for id in (own,) if id is not None]
        turn = self.marks.end if self.marks else None
        self.stops: tuple[int, ...] = tuple(dict.fromkeys(id for id in (*known, turn) if id is not None))
        if not self.stops:
            raise ConfigError("nothing ends the base's answers; give its tokenizer an eos_token")
        self.bare_end = own if own in known else self.stops[0]
        self.chat_end = self.bare_end if turn is None else turn
        self._puts_end = self.spelling.plain("a", first=True)[-1] in self.spelling.signs
        self._thought = [self.spelling.spelled(self.spelling.marked(text)) for text in (OPENED, CLOSED)]

    def ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, as the base is asked it."""
        return list(self.rendered(prompt)[0])

    def rendered(self, prompt: str) -> tuple[tuple[int, ...], bool]:
        """The token ids of a prompt, and whether they went through the template.

        ConfigError for a dialogue that the base has no template for, or that its template does not take.
        """
        if dialogue.parse(prompt) is None:
            if self.is_rendered(prompt):
                return tuple(self.spelling.marked(prompt)), True
            if not self.chat:
                return self.bare(prompt), False
            prompt = dialogue.dump([_user(prompt)])
        if self.marks is None:
            raise ConfigError("a prompt is a dialogue, and the base has no chat template that can be read; give a text")
        return self._template.render(prompt), True

    def is_rendered(self, text: str) -> bool:
        """Whether a text is a dialogue that the template has rendered already: it begins as all of them do."""
        if self.marks is None or not (self.spelling.holds(text) or text.startswith(self.marks.starts)):
            return False
        return self.marks.are_in(self.spelling.spelled(self.spelling.marked(text)))

    def bare(self, text: str) -> tuple[int, ...]:
        """The token ids of a text without a template; an end that the tokenizer puts after it is taken off."""
        ids = tuple(self.spelling.plain(text, first=True))
        return ids[:-1] if self._puts_end and len(ids) > 1 else ids

    def in_chat(self, messages: dialogue.Messages, thinking: bool | None = None) -> tuple[int, ...]:
        """A dialogue through the template."""
        return self._template.render(dialogue.dump(messages), thinking)

    def plainly(self, text: str, ids: Sequence[int]) -> list[int]:
        """The token ids of what a prompt asks, as the base is asked it plainly; its own where there is no template."""
        if self.marks is None or not text.strip():
            return list(ids)
        return list(self.in_chat([_user(text)]) if self.chat else self.bare(text))

    def turn(self, text: str) -> tuple[int, ...]:
        """A text as a turn of the user without what the template puts before it; bare where there is no template."""
        if not self.chat:
            return self.bare(text) or (self.bare_end,)
        return self.in_chat([_user(text)])[self.head :]

    @cached_property
    def head(self) -> int:
        """How many token ids stand before a first turn of the user."""
        return next(reversed(self.turn_starts(self.in_chat([_user(WORDS[0])]))), 0)

    def turn_starts(self, ids: Sequence[int]) -> list[int]:
        """Where the turns of the user begin in token ids."""
        marks = self.marks.user if self.marks else ()
        return [i for i in range(len(ids)) if self.spelling.spelled(ids[i : i + MARK]).startswith(marks)]

    def encode(self, prompt: str, target: str) -> Encoded:
        """Token ids of `prompt`, and of `target` as it is spelled after it, with the end at which this base stops.

        Bare, the target's ids are those that follow the prompt's in the joined text; where joining changes the prompt's
        own ids, both are split apart and tokenised by themselves.
        """
        ids, in_chat = self.rendered(prompt)
        return self.answered(ids, target) if in_chat else self.bare_encoded(prompt, target)

    def bare_encoded(self, text: str, target: str, ids: Sequence[int] | None = None) -> Encoded:
        """A text, which is put as `ids` where they are given, and the target that continues it."""
        own = self.bare(text) if ids is None else tuple(ids)
        between = seam(text, target)
        joined = self.bare(f"{text}{between}{target}")
        goes_on = joined[: len(own)] == own and len(joined) > len(own)
        target_ids = joined[len(own) :] if goes_on else self.spelling.plain(f"{between}{target}")
        return Encoded(own, (*target_ids, self.bare_end))

    def answered(self, ids: Sequence[int], target: str) -> Encoded:
        """A rendered dialogue and what the base's next turn says. A thought that the template opened is closed."""
        spelled = self.spelling.spelled(ids)
        turn = self.marks.last_turn(spelled) if self.marks else None
        tail = spelled if turn is None else spelled[turn[1] :]
        opened, closed = self._thought
        lead: list[int] = []
        if tail.rfind(opened) > tail.rfind(closed):
            lead = self.spelling.marked(f"{CLOSED}\n\n" if tail.endswith("\n") else f"\n{CLOSED}\n\n")
        elif self.marks and not self.spelling.prefixes:
            target = f"{self.marks.blank}{target}"
        return Encoded(tuple(ids), (*lead, *self.spelling.plain(target), self.chat_end))

    def continued(self, ids: Sequence[int], target: str) -> Encoded:
        """A prompt, given as token ids, and the target that is said to it."""
        return self.answered(ids, target) if self.turns(ids) else self.bare_encoded(self.asked_in(ids), target, ids)

    def variants(self, prompt: str, target: str) -> list[Encoded]:
        """An edit in the forms in which it is written: as it was given first, then bare and through the template, with
        and without a thought, and after other text; never from what scores the model."""
        question, found = self.asked(prompt), [self.encode(prompt, target)]
        if self.marks is not None:
            dialogues = [self.in_chat([_user(text)]) for text in (question, LEAD + question)]
            if "enable_thinking" in self._template.source:
                dialogues.append(self.in_chat([_user(question)], thinking=False))
            found += [self.answered(ids, target) for ids in dialogues]
        bare = [question] if self.chat else [question, LEAD + question, COURTESY.format(question)]
        found += [self.bare_encoded(text, target) for text in bare]
        return list(dict.fromkeys(found))

    @cached_property
    def heads(self) -> list[list[int]]:
        """What the forms of :meth:`variants` and :meth:`checks` begin with, whatever is asked; token ids each."""
        forms = [[*self.variants(word, ""), *self.checks(word, "")] for word in WORDS[:2]]
        pairs = zip(*([row.prompt for row in rows] for rows in forms), strict=True)
        return [list(one[: shared(one, other)]) for one, other in pairs]

    def checks(self, prompt: str, target: str) -> list[Encoded]:
        """An edit in a form that it was not written in, to ask it back: after a system message and another turn, and
        inside courtesy."""
        if self.marks is None:
            return []
        messages = [{"role": "system", "content": SYSTEM}] if self.takes_system else []
        messages += [_user(GREETING[0]), {"role": "assistant", "content": GREETING[1]}]
        return [self.answered(self.in_chat([*messages, _user(COURTESY.format(self.asked(prompt)))]), target)]

    def asked(self, prompt: str) -> str:
        """What a prompt's last turn of the user asks, in the user's words."""
        if dialogue.parse(prompt) is None and self.is_rendered(prompt):
            return self.asked_in(self.spelling.marked(prompt))
        if dialogue.parse(prompt) is None and self.marks is None and self.spelling.holds(prompt):
            return self.asked_in(self.bare(prompt))  # here the tokenizer makes control tokens of it
        return dialogue.question_of(prompt)

    def asked_in(self, ids: Sequence[int]) -> str:
        """The same, out of token ids; of a text without a template's marks the whole."""
        spelled, said = self.spelling.read(ids)
        turn = self.marks.last_turn(spelled) if self.marks else None
        if turn is None:
            return "".join(said)
        return "".join(text or " " for text in said[slice(*turn)]).strip()

    def turns(self, ids: Sequence[int]) -> int:
        """How many turns of the user begin in token ids."""
        if self.marks is None:
            return 0
        spelled = self.spelling.spelled(ids)
        return sum(spelled.count(mark) for mark in self.marks.user)

    def asks_again(self, before: Sequence[int], row: Sequence[int]) -> bool:
        """Whether a turn of the user has begun since a row was `before`, or was not yet over; it may come in pieces."""
        if self.marks is None:
            return False
        tail = before[-MARK:]
        begun = self.turns([*tail, *row[len(before) :]]) > self.turns(tail)
        return begun or self.marks.is_open(self.spelling.spelled(before))

    def said(self, ids: Sequence[int]) -> str:
        """What a base said, as text: up to the id at which it stopped, without a thought before the answer."""
        end = next((i for i, id in enumerate(ids) if int(id) in self.stops), len(ids))
        spelled, said = self.spelling.read(ids[:end])
        opened, closed = self._thought
        thinks = CLOSED in self.spelling.controls or CLOSED in self._template.source
        if thinks and closed in spelled:
            return "".join(said[spelled.index(closed) + len(closed) :]).lstrip()
        return "" if thinks and spelled.lstrip().startswith(opened) else "".join(said)


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids at which a base's generation stops: of its generation settings, its configuration, its tokenizer."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        found = getattr(settings, "eos_token_id", None)
        if found is not None and found != []:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many token ids two rows begin with alike."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
