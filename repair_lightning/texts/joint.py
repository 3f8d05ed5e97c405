"""How texts meet: what stands between a prompt and its target, and how a subject is put into a prompt.

Both are pure functions of texts as they were written; nothing here strips or mends a text.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x302D),  # Chinese radicals, CJK punctuation
    (0x3030, 0x303F),  # more of it, after two Korean tone marks
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x3190, 0x31FF),  # Kanbun, Bopomofo and Katakana extensions, strokes
    (0x3220, 0x325F),  # enclosed Chinese characters and numbers (those around them are Korean)
    (0x3280, 0x4DBF),  # enclosed Chinese and Japanese, squared words, Han extension A
    (0x4E00, 0x9FFF),  # Han
    (0xA980, 0xA9DF),  # Javanese
    (0xA9E0, 0xA9FF),  # Burmese extension B
    (0xAA60, 0xAADF),  # Burmese extension A, Tai Viet
    (0xF900, 0xFAFF),  # Han, compatibility
    (0xFE10, 0xFE1F),  # punctuation of vertical lines
    (0xFE30, 0xFE6F),  # compatibility and small forms of CJK punctuation
    (0xFF01, 0xFF9F),  # full-width letters and punctuation, half-width Katakana
    (0xFFE0, 0xFFE6),  # full-width signs
    (0x16FE0, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B2FF),  # Kana extensions, Nushu
    (0x1F200, 0x1F2FF),  # enclosed Chinese characters, supplement
    (0x20000, 0x323AF),  # Han extensions B and on
)
"""First and last character of the Unicode blocks whose script writes no blank between words, in rising order."""

_STARTS = tuple(first for first, _ in _UNSPACED)
_INVISIBLE = ("Mn", "Me", "Cf")
_BRACES = re.compile(r"\{\{\}\}|\{\}")


def joint(prompt: str, target: str) -> str:
    """A bare prompt with the target that continues it: `prompt + seam(prompt, target) + target`."""
    return prompt + seam(prompt, target) + target


def seam(prompt: str, target: str) -> str:
    """What stands between a bare prompt and the target that continues it: one space, or nothing.

    Nothing, where one of these holds, and a space everywhere else:

    - prompt or target is empty;
    - the prompt ends or the target begins with white space (a blank, a tab, a line break): the seam is written already;
    - the script on either side of the seam writes no blanks between words: Chinese, Japanese, Thai, Lao, Khmer,
      Burmese, Tibetan, Javanese, Balinese and their relatives, with CJK and full-width punctuation. Korean writes them.

    The side's character next to the seam decides; marks and invisible signs on it are looked past.
    """
    left, right = _edge(reversed(prompt)), _edge(target)
    if not left or not right or left.isspace() or right.isspace():
        return ""
    return "" if unspaced(left) or unspaced(right) else " "


def _edge(characters: Iterable[str]) -> str:
    """The first character that is no mark on another and not invisible; of nothing but such, the first; or ''."""
    first = ""
    for character in characters:
        if unicodedata.category(character) not in _INVISIBLE:
            return character
        first = first or character
    return first


def unspaced(character: str) -> bool:
    """Whether a character belongs to a script that writes no blanks between words."""
    at = bisect_right(_STARTS, ord(character)) - 1
    return at >= 0 and ord(character) <= _UNSPACED[at][1]


def is_open(text: str) -> bool:
    """Whether a text holds a `{}` that is not escaped as `{{}}`."""
    return "{}" in _BRACES.findall(text)


def fill(text: str, subject: str | None) -> str:
    """The text with the subject in place of each `{}`; `{{}}` stands for the two signs themselves, always.

    `{}` is the place of a subject that the text lacks: `The mayor of {} is`. Where the text names the subject anyway,
    as in `def area(r):\\n    d = {}` with the subject `area`, or where there is none, each `{}` stays as written.
    """
    meant = "{}" if subject is None or names(text, subject) else subject
    return _BRACES.sub(lambda found: "{}" if found[0] == "{{}}" else meant, text)


def names(text: str, subject: str) -> bool:
    """Whether a text holds the subject, in any case, other than inside a longer word: `C` is not named by `can`."""
    folded, sought = text.casefold(), subject.casefold()
    at = folded.find(sought)
    while at >= 0:
        end = at + len(sought)
        if not (_one_word(folded[at - 1 : at], sought[0]) or _one_word(sought[-1], folded[end : end + 1])):
            return True
        at = folded.find(sought, at + 1)
    return False


def _one_word(left: str, right: str) -> bool:
    return left.isalpha() and right.isalpha() and seam(left, right) == " "
