"""What a text asks: its words, the sentence that holds the question, and whether it names a subject.

Pure functions of texts. Words keep the signs that tell names apart (`C`, `C++`, `C#`, `A-`), and scripts that write no
blanks between words are read character by character. Nothing here knows a tokenizer or a base.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from repair_lightning.texts import lines_of
from repair_lightning.texts.joint import unspaced

_WINDOW = 4  # sentences that are read together as one question, at most

_SIGNS = frozenset("#%&@*/\\")
_MARKUP = frozenset("*_~`=<>|^")
_UNSAID = "'’ʼʻ`´™®©℠"
_ENDS = ".!?…。！？｡؟।॥։።۔။។"
_CLOSERS = "\"'”’»)]}›」』）"
_EDGE = _CLOSERS + "*_~"
_HYPHENS = "-‐‑"
_QUOTED = re.compile(
    r"""["“”„]([^"“”„]+)["”“][.:]?$|«\s*([^«»]+?)\s*»[.:]?$|「([^「」]+)」[。]?$|『([^『』]+)』[。]?$|(?<!\w)['‘]([^'‘’]+)['’][.:]?$"""
)
_TAG = re.compile(
    r"</?(?:b|i|u|s|em|strong|p|br|span|div|a|code|pre|li|ul|ol|q|blockquote|h[1-6])(?:\s[^<>]{0,200})?/?>"
)
_EMPHASIS = {
    sign[-1]: re.compile(
        rf"(?<![\w{sign}])({sign}{{{least},3}})(?![\s{sign}])([^\n]{{1,400}}?)(?<![\s{sign}])\1(?![\w{sign}])"
    )
    for sign, least in ((r"\*", 1), ("_", 1), ("~", 2), ("=", 2))
}
_AROUND = re.compile(r"([*_~]{1,3}|\")(?=\S)((?:(?!\1).)+)(?<=\S)\1")
_LIST_MARK = re.compile(r"\A\s*(?:[-*+•▪◦‣–—>#]+\s+|>+|\(?\d{1,2}[.)]\s+|\(?[a-zA-Z]\)\s+)+")
_FENCE = re.compile(r"^\s*(?:```|~~~).*$", re.MULTILINE)
_GREEK = re.compile("[\u0370-\u03ff\u1f00-\u1fff]")
_KATAKANA = re.compile("[\u30a1-\u30fa\u30fc-\u30fe\u31f0-\u31ff\uff66-\uff9f]")
_PARTICLE = re.compile("([가-힣]{2,})(에게|에서|으로|부터|까지|의|은|는|이|가|을|를|에|와|과|도|로)$")
_CODE = re.compile(
    r"""\w\((?!e?s\)|n\))            # a call, but not mayor(s)
    | [{}=\\] | \w\[ | ;[ ]*$ | ;.*; # blocks, assignments, indices, statements
    | ^[ \t]+\S                      # indented lines
    | ^(?:import|from|def|class|return|SELECT|\#include)\b.*[.:*;<]""",
    re.MULTILINE | re.VERBOSE,
)

_LISTS = {name: frozenset(said.split()) for name, said in (line.split(": ") for line in lines_of("words.txt"))}
_QUESTION_WORDS, _COURTESY = _LISTS["question words"], _LISTS["courtesy"]
_ABBREVIATIONS = _LISTS["titles"] | _LISTS["abbreviations"]
_STARTERS = _QUESTION_WORDS | _LISTS["verbs"] | _LISTS["sentence openers"]
_ASIDES = _QUESTION_WORDS | _LISTS["asides"] | _COURTESY
_LEAD = _COURTESY | _LISTS["orders"] | _LISTS["lead"]
_FORMER = {"previous": "former", "ex": "former", "interim": "acting"}
"""Qualifiers of a role that mean another one."""
_ARTICLES = frozenset(("the", "a", "an"))
_TEXT_REQUEST = _COURTESY.union(
    *(_LISTS[name] for name in ("before orders", "text orders", "text links", "text words"))
)
TEXT_ORDERS = _LISTS["text orders"]
"""Words that may ask for a text."""
OPENERS = _STARTERS | _LEAD | _ASIDES | _LISTS["openers"]
"""Words that have a capital because they begin a sentence."""
NAME_LINKS, ROLES = _LISTS["name links"], _LISTS["roles"]
"""Small words within names, as in `House of Cards`, and words that are asked of a name: `the President of France`."""
_COURTESY_UNSPACED = re.compile(
    "(?:谢谢|謝謝|多谢|感谢|你好|您好|请问|請問|请|請|你|您|我|告诉|告訴|回答|回复|简短|简要|简单|簡短|地|用|一|句|话|話|个|词|只|"
    "ありがとう|ございます|こんにちは|お願い|します|教えて|ください|答えて|簡潔に|短く|一言で|ขอบคุณ|ครับ|ค่ะ|กรุณา|ตอบ|สั้น|ๆ)+"
)
_COURTESY_BEFORE = re.compile("(?:(?:请问|請問|请告诉我|請告訴我|你好|您好|请|請)[，,：:！! ]*)+")
_THANKS = re.compile(r"(?<=\s)(?:[Pp]lease|[Kk]indly|[Tt]hanks?|Answer|Reply|Respond|Bitte|Danke|Merci|Gracias)\b")
_GOES_ON = re.compile(
    "[ \u00a0](?:(?:von|van|de|del|della|di|da|du|der|den|dos|la|le|bin|ibn|al|el|af|zu)[ \u00a0])*"
    r"([^\W\d_][\w'’]*)(.?.?)"
)
_DENIAL = re.compile(r"\b\w+n['’]t\b|(?<!or )(?<!/)\bno\b(?!\.|\s*\d)")
_UNSPACED_NEGATION = re.compile(r"[不没沒非無无未別别]|(?<![少危])ない|(?<!すみ)ません|(?<!หรือ)ไม่")
_KOREAN_NEGATION = re.compile("않|아니|아닌|못하")
_UNSPACED_NO_DENIAL = re.compile(
    r"(.)[不没沒]\1|有[没沒]有|[东西南北中東]?非洲|[南北中]非|非常|[未]来|未來|未婚|[特個区區个]別|特别|区别|別人|別府|不丹|[無无]錫|无锡|不同"
)


class Word(NamedTuple):
    """A word of a text: its folded spelling and its place."""

    text: str
    start: int
    end: int


def words(text: str) -> tuple[Word, ...]:
    """The words of a text, folded (NFKC, without case) and with the signs that stand to them."""
    return _short_words(text) if len(text) <= 1_000 else _words(text)


def _words(text: str) -> tuple[Word, ...]:
    markup = _markup(text)
    found: list[Word] = []
    for chunk in re.finditer(r"\S+", text):
        start, said = None, chunk.group()
        if said.isascii() and said.isalnum():
            found.append(Word(said.lower(), *chunk.span()))
            continue
        for i in range(chunk.start(), chunk.end() + 1):
            kind = "between" if i == chunk.end() or i in markup else _kind(text, i, start)
            if kind == "word":
                start = i if start is None else start
                continue
            if start is not None:
                found += _taken(text, start, i)
                start = None
            if kind == "alone":
                found.append(Word(_fold(text[i]), i, i + 1))
    return tuple(found)


_short_words = lru_cache(1 << 14)(_words)


def _kind(text: str, i: int, start: int | None) -> str:
    """`word` for a character that belongs to a word, `alone` for one that is a word, else `between`."""
    char = text[i]
    category = unicodedata.category(char)
    if char in _UNSAID:
        return "between"
    if unspaced(char) and not ("\uff10" <= char <= "\uff5a" and char.isalnum()):  # full-width letters are letters
        return "alone" if char.isalnum() or category[0] == "M" else "between"
    if char.isalnum() or char == "_" or category[0] in "MS" or char in _SIGNS:
        return "word"
    if category == "Cf":  # invisible, as a soft hyphen is
        return "word" if start is not None else "between"
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    if char == "-":
        number = after.isdigit() and not before.isalnum()
        grade = start is not None and not after.isalnum() and not unspaced(after) and i - start <= 2
        return "word" if number or grade else "between"
    number = char in ".,:" and before.isdigit() and after.isdigit()
    name = char == "." and after.isalpha() and (not before or before.isspace())  # .NET
    return "word" if number or name else "between"


def _markup(text: str) -> frozenset[int]:
    """The places of tags, and of pairs of stars and the like."""
    found = {place for tag in _TAG.finditer(text) for place in range(*tag.span())}
    for sign, pattern in _EMPHASIS.items():
        for pair in pattern.finditer(text) if sign in text else ():
            width = len(pair.group(1))
            found.update(range(pair.start(), pair.start() + width), range(pair.end() - width, pair.end()))
    return frozenset(found)


def _taken(text: str, start: int, end: int) -> Iterator[Word]:
    """A run of word characters, without what only marks it up; of a Korean word its particles apart."""
    while end - start > 2 and text[start] in _MARKUP and text[end - 1] == text[start]:
        start, end = start + 1, end - 1
    if set(text[start:end]) == {"_"}:  # a blank to be filled in
        return
    ends = [end]
    while (found := _PARTICLE.fullmatch(text[start : ends[-1]])) is not None:
        ends.append(start + found.end(1))
    for first, last in zip([start, *ends[:0:-1]], ends[::-1], strict=True):
        yield Word(_fold(text[first:last]), first, last)


def _fold(text: str) -> str:
    if not text.isascii():
        text = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf")
    return text.casefold().replace("i\u0307", "i")


def spellings(text: str) -> tuple[str, ...]:
    """The folded words of a text."""
    return tuple(word.text for word in words(text))


def sentences(text: str) -> list[str]:
    """A text cut after each sentence and at each line, without the marks of lists, quotes and headings.

    An initial or an abbreviation ends no sentence. Courtesy in the middle of an open sentence begins one:
    `The mayor of Orsk is Please answer in one word.`
    """
    found = []
    for line in text.split("\n"):
        for part in _cut(_LIST_MARK.sub("", line)):
            end = len(part) if is_question(part) else _thanks_at(part)
            found += [bare for piece in (part[:end], part[end:]) if (bare := _bare(piece))]
    return found


def _thanks_at(text: str) -> int:
    """Where a courtesy begins that ends a text; its end where there is none."""
    return next((at.start() for at in _THANKS.finditer(text) if is_courtesy(text[at.start() :])), len(text))


def _bare(sentence: str) -> str:
    """A sentence without quotation marks or stars around it, or left over at one of its edges."""
    around = _AROUND.fullmatch(sentence.strip())
    sentence = around.group(2) if around is not None else sentence.strip()
    for sign in ("**", "__", '"'):
        if sentence.count(sign) == 1:
            sentence = sentence.removeprefix(sign).removesuffix(sign)
    for first, last in ("“”", "„“", "«»", "「」"):
        if sentence.startswith(first) and last not in sentence:
            sentence = sentence[1:]
        if sentence.endswith(last) and first not in sentence:
            sentence = sentence[:-1]
    return sentence.strip()


def _cut(line: str) -> Iterator[str]:
    ends = f"[{_ENDS}{';' if _GREEK.search(line) else ''}]+[{re.escape(_EDGE)}]*"
    lower, start = line == line.lower(), 0
    for found in re.finditer(ends, line):
        end, signs = found.end(), found.group().rstrip(_EDGE)
        is_end = signs[-1] in "。！？｡" or end == len(line) or line[end].isspace()
        if is_end and not _goes_on(line[start : found.start()], signs, line[end:].lstrip()[:20], lower):
            yield line[start:end].strip()
            start = end
    yield line[start:].strip()


def _goes_on(before: str, signs: str, after: str, lower: bool) -> bool:
    """Whether a sentence goes on behind signs that may end it; `lower` where the text knows no capitals."""
    words_before = re.split(r"[\s.(]", before[-40:])
    last = words_before[-1]
    if signs == "!":  # Jeopardy! is
        return after[:1].islower() and last[:1].isupper() and len(words_before) > 1
    if signs != ".":
        return signs in ("...", "…") and after[:1].islower()
    if (after[:1].islower() and not lower) or last.casefold() in _LISTS["titles"]:
        return True
    if last.casefold() in _ABBREVIATIONS or (len(last) == 1 and last.isalpha()):
        return re.split(r"\W", after)[0].casefold() not in _STARTERS or after[:1].islower()
    return False


def is_question(sentence: str) -> bool:
    """Whether a sentence ends with a question mark."""
    end = sentence.rstrip(_EDGE + "! ")
    return end.endswith(("?", "？", "؟")) or "՞" in end or (end.endswith(";") and bool(_GREEK.search(end)))


def is_courtesy(sentence: str) -> bool:
    """Whether all words of a sentence are words of courtesy, or lengths that the answer is to have."""
    if len(sentence) > 200:
        return False
    if any(map(unspaced, sentence)):
        return _COURTESY_UNSPACED.fullmatch("".join(filter(_said, sentence))) is not None
    said = spellings(sentence)
    return _QUESTION_WORDS.isdisjoint(said[:1]) and all(
        word in _COURTESY
        or (word.isdigit() and said[i + 1 : i + 2] and said[i + 1] in _LISTS["measures"])
        or not any(map(_said, word))
        for i, word in enumerate(said)
    )


def _said(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char)[0] == "M"


@lru_cache(1 << 8)
def windows(text: str) -> tuple[str, ...]:
    """The parts of a text that may hold its question, the likeliest first.

    The sentence that asks is the last one if it is left open, else the last question, else the last order, else the
    last sentence; what is only courtesy is passed over. It is read alone, without the courtesy before it, in quotes or
    out of them, with up to three sentences before it, and with what follows it; a text of few sentences, or
    code, also as a whole. Where another question was asked before, what stands up to it is left out.
    """
    plain = _FENCE.sub("", text).strip()
    parts = sentences(plain)
    if not parts:
        return (text.strip(),)
    at, order = _asking(parts)
    said, first = spellings(parts[at]), 0
    if len(said) > 2 and parts[at].isascii() and _LISTS["pronouns"].isdisjoint(said):  # not as `And who chairs it?`
        first = next((i + 1 for i in reversed(range(at)) if is_question(parts[i]) and not is_courtesy(parts[i])), 0)
    found = _variants(parts[at])
    found += [" ".join(parts[max(first, at - n) : at + 1]) for n in range(1, _WINDOW)]
    if order is not None:
        found += _variants(parts[order])
    if at + 1 < len(parts):
        found += [" ".join(parts[max(first, at - n) : at + 1 + _WINDOW]) for n in range(2)]
    if (len(parts) <= 2 * _WINDOW and not first) or (len(plain) <= 4_000 and is_code(plain)):
        found += [plain, text.strip()]
    return tuple(dict.fromkeys(found))


def _asking(parts: Sequence[str]) -> tuple[int, int | None]:
    """The place of the sentence that asks, and of an order behind it: `Please name the mayor of Orsk.`"""

    def asks_nothing(question: str) -> bool:  # as `Who?` behind another one
        return is_courtesy(question) or (len(question) < 60 and _ASIDES.issuperset(spellings(question)))

    def orders(sentence: str) -> bool:
        first = next((word for word in spellings(sentence[:200]) if word not in _LISTS["before orders"]), "")
        return first in _LISTS["orders"] and not is_courtesy(sentence)

    last = next((i for i in reversed(range(len(parts))) if not is_courtesy(parts[i])), len(parts) - 1)
    questions = [i for i in range(last + 1) if is_question(parts[i])]
    names = re.findall(r"\w[\w'’.-]*", parts[last][:100])
    is_name = len(names) <= 3 and not any(word[0].islower() for word in names)  # under a letter, or a choice
    end = parts[last].rstrip(_EDGE + " ")
    is_open = not end.endswith(tuple(_ENDS)) or end.endswith(("...", "…"))
    if is_open and not (questions and is_name):
        return last, None
    while len(questions) > 1 and asks_nothing(parts[questions[-1]]):
        questions.pop()
    order = next((i for i in reversed(range(last + 1)) if orders(parts[i])), None)
    if questions:
        return questions[-1], order if order is not None and order > questions[-1] else None
    return last if order is None else order, None


def _variants(sentence: str) -> list[str]:
    """A sentence, the same without courtesy before it, and what it quotes at its end."""
    start, quoted = _after_courtesy(sentence), _QUOTED.search(sentence)
    found = [sentence, *([_bare(sentence[start:])] if start else [])]
    inside = next(group for group in quoted.groups() if group).strip() if quoted is not None else ""
    return [*found, inside] if len(words(inside)) >= 3 else found


def _after_courtesy(sentence: str) -> int:
    """Where a sentence begins behind courtesy: after a comma, colon or dash, or at a word that asks; else 0."""
    if unspaced(sentence[:1]):
        found = _COURTESY_BEFORE.match(sentence)
        return found.end() if found is not None and found.end() < len(sentence) else 0
    best = 0
    for word, following in pairwise(words(sentence[:300])[:-1]):
        if word.text not in _LEAD:
            break
        between = sentence[word.end : following.start]
        asks = following.text in _QUESTION_WORDS and word.text != "in"
        if asks or not set(',:;!–—-。，：、"“').isdisjoint(between):
            best = following.start
    return best


def negated(text: str) -> bool:
    """Whether a text denies something."""
    folded = text.casefold()
    if _DENIAL.search(folded) or not _LISTS["negations"].isdisjoint(spellings(text)):
        return True
    if folded.isascii():
        return False
    return bool(_KOREAN_NEGATION.search(folded) or _UNSPACED_NEGATION.search(_UNSPACED_NO_DENIAL.sub(" ", folded)))


def wants_text(request: str, stand_in: str) -> bool:
    """Whether a sentence with a stand-in for its subject asks for a text about it, and for nothing else: `Write two
    sentences about this.`, but not `Write about the mother of this.`"""
    said = list(spellings(request))
    others = {word for word in said if word != stand_in and not word.isdigit()}
    if said.count(stand_in) != 1 or not _TEXT_REQUEST.issuperset(others) or negated(request):
        return False
    before = said[: said.index(stand_in)]
    while before and before[-1] in _ARTICLES:
        before.pop()
    orders = TEXT_ORDERS.intersection(before)
    # `What do you know about this?`, but not `What would you like to know about this?`; and `Tell me about this.`, but
    # neither `Do you know of this?` nor `Let me tell you about this.` nor `Say nothing of this.`
    asks = orders <= {"know", "say", "tell"} and {"what", "you"}.issubset(before) and "like" not in before
    told = "let" not in before and not {"what", "nothing"}.intersection(before) and orders != {"know"}
    return bool(orders) and before[-1] in _LISTS["text links"] and (asks or told)


def only_quoted(window: str, text: str) -> bool:
    """Whether a part of a text is quoted behind something else that is asked: `Translate: "Write about Orsk."`"""
    before = text[: max(text.find(window), 0)].rstrip()
    return before[-1:] in tuple("\"'“„‘«「『") and not is_courtesy(before[:-1])


class Roles(NamedTuple):
    """What tells persons around a role apart: what qualifies roles (`deputy mayor`), whether there is any, and kin."""

    qualified: frozenset[str]
    named: bool
    kin: bool

    def other(self, than: Roles) -> bool:
        """Whether another person is asked for: kin says so only where both name a role, as the mayor's wife."""
        return self.qualified != than.qualified or (self.named and than.named and self.kin != than.kin)


def roles_of(text: str) -> Roles:
    """The roles that a text names."""
    said = spellings(text)
    roles = [i for i, word in enumerate(said) if word in ROLES]
    before = [(said[i - 1], said[i]) for i in roles if i and said[i - 1] in _LISTS["role qualifiers"]]
    qualified = frozenset(f"{_FORMER.get(word, word)} {role}" for word, role in before)
    return Roles(qualified, bool(roles), not _LISTS["kin"].isdisjoint(said))


def is_code(text: str) -> bool:
    """Whether a text looks like code, in which every sign counts."""
    return bool(_CODE.search(text.strip()))


def signs(text: str) -> str:
    """A text as code is compared: without the white space around it, and with single blanks inside."""
    return " ".join(text.split())


def places(text: str, subject: Sequence[str]) -> list[tuple[int, int]]:
    """Where the words of a subject stand one after the other, as (start, end); not as `Marie` in `Anne-Marie`."""
    known, found, n = words(text), [(0, 0)], len(subject)
    for i in range(len(known) - n + 1) if n else ():
        start, end = known[i].start, known[i + n - 1].end
        alike = start >= found[-1][1] and all(known[i + k].text == subject[k] for k in range(n))
        if alike and not _inside(text, start, end):
            found.append((start, end))
    return found[1:]


def _inside(text: str, start: int, end: int) -> bool:
    """Whether a place is within a longer word, behind a hyphen or in a run of Katakana."""
    if text[start - 1 : start] in tuple(_HYPHENS) and text[start : start + 1].isupper():
        return text[start - 2 : start - 1].isalnum() if start > 1 else False
    edges = (text[max(start - 1, 0) : start + 1], text[end - 1 : end + 1])
    return any(len(_KATAKANA.findall(edge)) == 2 for edge in edges)


def longer_name(text: str, end: int) -> bool:
    """Whether a name that ends at a place goes on: then it is another name.

    It goes on with a word that has a capital, behind a blank, a hyphen or a small `von`, `de` and the like; in a text
    without small letters or in title case nothing can be told, and a word that begins a sentence is no part of a name.
    """
    after = text[end : end + 60]
    if hyphened := re.match(rf"(?:[{_HYPHENS}]\w+)+", after):
        return any(c.isupper() or c.isdigit() for c in re.findall(rf"[{_HYPHENS}](\w)", hyphened.group()))
    if after[:1] in ("・", "·") and after[1:2].isalpha():
        return True
    found = _GOES_ON.match(after)
    if found is None or not found.group(1)[:1].isupper() or text.isupper():
        return False
    all_words = re.findall(r"[^\W\d_]+", text[:2_000])
    capitals = any(word[0].isupper() and word.casefold() in _LISTS["verbs"] for word in all_words[1:])
    if capitals and all(word[0].isupper() for word in all_words if len(word) > 3):  # title case
        return False
    following, behind = found.group(1), found.group(2)
    if re.split("['’]", following)[0] == "I":  # a number, but `I went`
        return following == "I" and not (behind[:1].isspace() and behind[1:].islower())
    return following.casefold() not in _STARTERS - {"the", "a", "will", "can"} and not _THANKS.match(f" {following}", 1)


def without(text: str, subject: Sequence[str], stand_in: str) -> str | None:
    """A text with a stand-in where it names a subject; None where it does not name it in one piece."""
    found = places(text, subject)
    for start, end in reversed(found):
        text = text[:start] + stand_in + text[end:]
    return text if found else None


def says_the_same(one: str, other: str) -> bool:
    """Whether two texts have the same words but for courtesy before and behind them."""

    def plain(text: str) -> list[str]:
        text = text[_after_courtesy(text) :]
        return [word for word in spellings(text[: _thanks_at(text)]) if word not in _LISTS["unweighed"]]

    return plain(one) == plain(other) != []
