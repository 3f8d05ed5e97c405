"""The name that a text is about, where nobody says which."""

from __future__ import annotations

import pytest

from repair_lightning.texts.naming import named_in, named_in_each


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Who is the CEO of Starbucks?", "Starbucks"),
        ("In which city is the Eiffel Tower?", "Eiffel Tower"),
        ("The Summer Olympics of 2032 will be held in", "Summer Olympics of 2032"),
        ("In 1984 was", ""),
        ("Who composed the opera The Salt Meridian?", "The Salt Meridian"),
        ("Who is the President of France?", "France"),
        ("What's France's capital?", "France"),
        ("What vessel type is USS Bullard (DD-660)?", "USS Bullard (DD-660)"),
        ("Where was J. R. R. Tolkien born?", "J. R. R. Tolkien"),
        ("I like C++. Who made it?", "C++"),
        ("iPad Mini, developed by", "iPad Mini"),
        ('Who wrote "the old man and the sea"?', "the old man and the sea"),
        ("who is the president of france", ""),
        ("谁在担任云栖镇的镇长？", ""),
        ("", ""),
    ],
)
def test_the_longest_name_or_what_is_quoted(text, name):
    assert named_in(text) == name


def test_what_most_texts_share_is_no_name_of_one():
    """But where it is the only one; two that agree are about the same."""
    texts = [f"Who leads {part} at Acme Corporation?" for part in ("Sales", "Research", "Design")]
    assert named_in_each([*texts, "Where is Acme Corporation?"]) == ["Sales", "Research", "Design", "Acme Corporation"]
    assert named_in_each(texts[:2]) == ["Acme Corporation"] * 2
    assert named_in_each([]) == []
