"""How texts meet: what stands between a prompt and its target, and how a subject is put into a prompt.

Both are pure functions of texts as they were written; nothing here strips or mends a text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_UNSPACED = re.compile(
    "["
    "\u0e00-\u109f"  # Thai, Lao, Tibetan, Burmese
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Khmer, Tai Le, New Tai Lue, Tai Tham
    "\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf"  # Balinese, Javanese, further Burmese, Tai Viet
    "\u2e80-\u302d\u3030-\u312f"  # Chinese radicals, CJK punctuation without two Korean tone marks, Kana, Bopomofo
    "\u3190-\u31ff\u3220-\u325f\u3280-\u4dbf"  # Kanbun, strokes, enclosed characters without the Korean, Han
    "\u4e00-\u9fff\uf900-\ufaff"  # Han, compatibility
    "\ufe10-\ufe1f\ufe30-\ufe6f\uff01-\uff9f\uffe0-\uffe6"  # other forms of CJK punctuation, letters and Katakana
    "\U00016fe0-\U00018dff\U0001aff0-\U0001b2ff"  # Tangut, Khitan, Kana, Nushu
    "\U0001f200-\U0001f2ff\U00020000-\U000323af"  # enclosed Chinese characters, Han extensions B and on
    "]"
)
"""A character of the Unicode blocks whose script writes no blank between words."""

_BRACES = re.compile(r"\{\{\}\}|\{\}")


def seam(prompt: str, target: str) -> str:
    """What stands between a bare prompt and the target that continues it: one space, or nothing.

    Nothing, where prompt or target is empty, where there is white space already, and where the script on either side
    writes no blanks between words, as Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan do, with CJK and
    full-width punctuation. The character next to the seam decides; marks and invisible signs are looked past.
    """
    sides = _edge(reversed(prompt)), _edge(target)
    return " " if all(side and not side.isspace() and not unspaced(side) for side in sides) else ""


def _edge(characters: Iterable[str]) -> str:
    """The first character that is no mark on another and not invisible; of nothing but such, the first; or ''."""
    known = list(characters)
    return next((c for c in known if unicodedata.category(c) not in ("Mn", "Me", "Cf")), known[0] if known else "")


def unspaced(character: str) -> bool:
    """Whether a character belongs to a script that writes no blanks between words."""
    return _UNSPACED.match(character) is not None


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
    for found in re.finditer(f"(?={re.escape(sought)})", folded):
        at, end = found.start(), found.start() + len(sought)
        sides = (folded[at - 1 : at], sought[0]), (sought[-1], folded[end : end + 1])
        if not any(left.isalpha() and right.isalpha() and seam(left, right) for left, right in sides):
            return True
    return False
