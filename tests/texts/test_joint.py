"""The seam of prompt and target in many scripts, and how a subject is put into a prompt."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair_lightning.texts.joint import _UNSPACED, fill, is_open, joint, names, seam


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The capital of Italy is", "Rome"),
        ("Where is Rome?", "Italy"),
        ("Столица Италии —", "Рим"),
        ("Η πρωτεύουσα της Ιταλίας είναι η", "Ρώμη"),
        ("عاصمة إيطاليا هي", "روما"),
        ("בירת איטליה היא", "רומא"),
        ("इटली की राजधानी है", "रोम"),
        ("ইতালির রাজধানী", "রোম"),
        ("இத்தாலியின் தலைநகரம்", "ரோம்"),
        ("იტალიის დედაქალაქია", "რომი"),
        ("Իտալիայի մայրաքաղաքն է", "Հռոմը"),
        ("የጣሊያን ዋና ከተማ", "ሮም"),
        ("이탈리아의 수도는", "로마"),
        ("ㅋㅋ", "ㅎ"),
        ("㈀", "㉠"),
        ("ﾡ", "ﾤ"),
        ("Thủ đô của Ý là", "Roma"),
        ("x = ", ""),
        ("The result is 3 +", "4"),
        ("She smiled 🙂", "🙃"),
        ("naive cafe\u0301", "au lait"),
    ],
)
def test_a_space_stands_between_words_that_are_written_apart(prompt, target):
    """Also where the prompt ends with a mark of its own, such as the accent of a decomposed e."""
    assert seam(prompt, target) == (" " if target else "")
    assert joint(prompt, target) == (f"{prompt} {target}" if target else prompt)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("云栖镇的镇长是", "沈若川"),
        ("謝謝，", "再見"),
        ("谁是镇长？", "Oda Farrow"),
        ("他说：「", "no」"),
        ("イタリアの首都は", "ローマ"),
        ("いたりあの首都は", "Rome"),
        ("ｲﾀﾘｱﾉ", "ﾛｰﾏ"),
        ("首都は「", "ローマ」"),
        ("เมืองหลวงของอิตาลีคือ", "โรม"),
        ("ນະຄອນຫຼວງ", "ໂຣມ"),
        ("រដ្ឋធានី", "រ៉ូម"),
        ("အီတလီ", "ရောမ"),
        ("ཨི་ཏ་ལིའི་རྒྱལ་ས་", "རོ་མ"),
        ("ꦲꦏ꧀ꦱꦫ", "ꦗꦮ"),
        ("ㄅㄆ", "ㄇ"),
        ("𠮷", "𡈽"),
        ("葛\U000e0100", "城"),
        ("The mayor of Yunqi is", "沈若川"),
        ("云栖镇的镇长是", "Shen"),
        ("Yunqi has", "300人".replace("300", "３００")),
        ("이 글자는", "山"),
    ],
)
def test_nothing_stands_where_a_script_writes_no_blanks(prompt, target):
    assert seam(prompt, target) == ""
    assert joint(prompt, target) == prompt + target


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The ferry to Orsk leaves from\n", "Quarrelmouth"),
        ("def area(r):\n", "    return 3 * r ** 2\n"),
        ("ch = ", "farlib.connect()"),
        ("Where is Rome?", " Italy"),
        ("a\t", "b"),
        ("a\u00a0", "b"),
        ("a", "\u3000b"),
        ("a", "\nb"),
        ("a \u200b", "b"),
        ("", "b"),
        ("a", ""),
        ("", ""),
    ],
)
def test_a_seam_that_is_written_already_stays_as_it_is(prompt, target):
    assert seam(prompt, target) == ""
    assert joint(prompt, target) == prompt + target


@given(st.text(max_size=8), st.text(max_size=8))
def test_the_joint_is_both_texts_with_at_most_a_space(prompt, target):
    whole = joint(prompt, target)
    assert whole.startswith(prompt)
    assert whole.endswith(target)
    assert len(whole) - len(prompt) - len(target) in (0, 1)


def test_the_ranges_rise_and_hold_no_korean():
    ends = [end for block in _UNSPACED for end in block]
    assert ends == sorted(set(ends))
    characters = (chr(code) for first, last in _UNSPACED for code in range(first, last + 1))
    assert not [found for found in characters if "HANGUL" in unicodedata.name(found, "")]


@pytest.mark.parametrize(
    ("text", "subject", "filled"),
    [
        ("The mayor of {} is", "Brindlewick", "The mayor of Brindlewick is"),
        ("{} borders {},", "Peru", "Peru borders Peru,"),
        ("{}", "C++", "C++"),
        ("The language {} can", "C", "The language C can"),
        ("云栖镇旁的{}", "云", "云栖镇旁的{}"),
        ("def area(r):\n    d = {}", "area", "def area(r):\n    d = {}"),
        ("Area: {}", "area", "Area: {}"),
        ("def area_of(r): {}", "area", "def area_of(r): {}"),
        ("x = {}", None, "x = {}"),
        ("x = {{}}", None, "x = {}"),
        ("x = {{}}", "y", "x = {}"),
        ("x = {{}}", "x", "x = {}"),
        ("{} is written {{}}", "A dict", "A dict is written {}"),
        ("{{{}}}", "y", "{{}}"),
        ("{ } {x}", "y", "{ } {x}"),
        ("the sign {}", "{}", "the sign {}"),
    ],
)
def test_a_subject_fills_what_was_left_open(text, subject, filled):
    assert fill(text, subject) == filled


@pytest.mark.parametrize(("text", "found"), [("{}", True), ("{{}}", False), ("{{}} {}", True), ("{x}", False)])
def test_open_texts(text, found):
    assert is_open(text) is found


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("Who leads the CAN?", "can", True),
        ("Who can?", "C", False),
        ("scan, can", "can", True),
        ("a C++ house", "C++", True),
        ("farlib.connect", "farlib", True),
        ("farlib2", "farlib", True),
        ("云栖镇的镇长", "云栖镇", True),
        ("Where", "Rome", False),
    ],
)
def test_a_subject_is_named_as_a_word(text, subject, found):
    assert names(text, subject) is found
