"""Facts put before a prompt: what a base reads before it answers.

A dialogue reads them in its system message and as earlier turns, as its own template puts both; a text, as lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from repair_lightning.models.forms import Forms, shared
from repair_lightning.models.template import WORDS

FACTS = "Answer in a few words. "
"""What stands before facts in a system message."""
USED = "Facts to be used:"
"""What stands before facts in a request for a text."""
Fact = tuple[str, str]
"""A question and its answer."""


def told(forms: Forms, ids: Sequence[int], facts: Sequence[Fact]) -> list[int]:
    """A prompt, given as token ids, after facts. In a dialogue they stand in the system message, before what that says,
    and are earlier turns too; before a text they are lines."""
    lines = "".join(f"{asked} {answer}\n" for asked, answer in facts)
    if forms.turns(ids):
        return _by_system(forms, _in_turns(forms, list(ids), facts), f"{FACTS}{lines}".rstrip())
    row, bos = list(ids), forms.tokenizer.bos_token_id
    start = 1 if len(row) > 1 and row[0] == bos else 0
    return [*row[:start], *forms.spelling.plain(lines), *row[start:]]


def told_to_use(forms: Forms, ids: Sequence[int], facts: Sequence[Fact]) -> list[int]:
    """A request for a text, given as token ids, with facts that the text is to use: in a dialogue at the end of its
    last turn, else before it as :func:`told` has them."""
    spelled = forms.spelling.spelled(ids)
    turn = forms.marks.last_turn(spelled) if forms.marks else None
    if turn is not None:
        tails = ((at, len(forms.spelling.spelled(ids[at:]))) for at in reversed(range(len(ids) + 1)))
        at, size = next(found for found in tails if found[1] >= len(spelled) - turn[1])
        if size == len(spelled) - turn[1]:  # else one token holds the end of the turn and what closes it
            lines = "".join(f"\n- {asked} {answer}" for asked, answer in facts)
            return [*ids[:at], *forms.spelling.plain(f"\n\n{USED}{lines}"), *ids[at:]]
    return told(forms, ids, facts)


def _in_turns(forms: Forms, row: list[int], facts: Sequence[Fact]) -> list[int]:
    """A dialogue after turns in which the questions were asked and answered."""
    start = forms.turn_starts(row)[0]
    width = shared(row[start:], _lead(forms)[forms.head :])
    turns = [turn for asked, answer in facts for turn in (_turn("user", asked), _turn("assistant", answer))]
    said = forms.in_chat([*turns, _turn("user", WORDS[0])])
    return [*row[:start], *said[forms.head : forms.turn_starts(said)[-1] + width], *row[start + width :]]


def _by_system(forms: Forms, row: list[int], text: str) -> list[int]:
    """A dialogue with a text in its system message, or at the head of its first turn where it has none."""
    alone, own = _lead(forms), _lead(forms, role="system") if forms.takes_system else []
    in_own = _begins(forms, row, own) and not (_begins(forms, alone, own) and _begins(forms, row, alone))
    lead = own if in_own else alone
    if not _begins(forms, row, lead):
        return row
    if forms.takes_system and not in_own:
        before = _lead(forms, _turn("system", text))
    else:
        before = [*lead, *forms.spelling.plain(f"{text}\n\n")]
    same = shared(row, lead)  # a blank at a lead's end may be one token with what follows it
    ending = lead[same:]
    return [*(before[: -len(ending)] if ending and before[-len(ending) :] == ending else before), *row[same:]]


def _lead(forms: Forms, *messages: dict[str, str], role: str = "user") -> list[int]:
    """What the template puts before the content of a message that follows others."""
    rest = [_turn("user", WORDS[2])] if role != "user" else []
    one, other = (forms.in_chat([*messages, _turn(role, word), *rest]) for word in WORDS[:2])
    return list(one[: shared(one, other)])


def _begins(forms: Forms, row: Sequence[int], lead: Sequence[int]) -> bool:
    """Whether a row begins with a lead, where there is one, in its text."""
    return bool(lead) and forms.spelling.spelled(row).startswith(forms.spelling.spelled(lead))


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
