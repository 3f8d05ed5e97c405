"""The name that a text is about, for edits whose record does not say what their subject is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from repair_lightning.texts import asking

_WORD = re.compile(r"[^\s\"“”«»()\[\],;:?!…]+")
_QUOTED = re.compile(r"[\"“«「]([^\"“”«»「」]{2,80})[\"”»」]")
_OWNS = re.compile(r"['’]s?$")
_IN_BRACKETS = re.compile(r"\s*\([^()]{1,40}\)")


def named_in(text: str) -> str:
    """What stands in quotes, else the run of words with capitals that has most words; empty where there is none."""
    return named_in_each([text])[0]


def named_in_each(texts: Sequence[str]) -> list[str]:
    """Likewise of texts that stand together; a name that most of them share is only taken where there is no other.

    `Who leads Sales at Acme Corporation?` is about Sales among other questions about that company. Most are more than
    half, and at least three.
    """
    spans = [[quoted.group(1).strip()] if (quoted := _QUOTED.search(text)) else list(_names(text)) for text in texts]
    counts = Counter(name for names in spans for name in {name.casefold() for name in names})
    most = max(2, len(texts) / 2)
    apart = [[name for name in names if counts[name.casefold()] <= most] for names in spans]
    return [max(own or names, key=_weight, default="") for own, names in zip(apart, spans, strict=True)]


def _names(text: str) -> Iterator[str]:
    words, at = list(_WORD.finditer(text)), 0
    while at < len(words):
        word = words[at + (words[at].group().isdigit() and len(words) > at + 1)]  # the 2032 Olympics
        opens = text[: word.start()].rstrip()[-1:] in ("", ".", "?", "!", ":")  # a sentence
        if not any(map(str.isupper, word.group())) or (opens and _plain(word.group()) in asking.OPENERS):
            at += 1
            continue
        last = _last(text, words, at)
        end = words[last].end()
        brackets = _IN_BRACKETS.match(text, end)
        yield _OWNS.sub("", text[words[at].start() : end]).rstrip(".") + (brackets.group() if brackets else "")
        at = last + 1


def _last(text: str, words: list[re.Match[str]], at: int) -> int:
    """The place of the last word of the name that begins at a place."""
    last = here = at
    while here + 1 < len(words) and not text[words[here].end() : words[here + 1].start()].strip():
        own, following = words[here].group(), words[here + 1].group()
        if own.endswith(".") and _plain(following) in asking.OPENERS:
            break
        here += 1
        if any(map(str.isupper, following)) or following[0].isdigit():
            last = here
        elif following not in asking.NAME_LINKS or here - last > 2 or _OWNS.search(own) or _plain(own) in asking.ROLES:
            break
    return last


def _plain(word: str) -> str:
    return re.split("['’]", word)[0].strip(".-").casefold()


def _weight(name: str) -> float:
    """Words, small ones aside; an abbreviation or a role is a name where there is no other."""
    said = [word for word in name.split() if word not in asking.NAME_LINKS]
    return len(said) - name.isupper() / 2 - (_plain(name) in asking.ROLES)
