"""Keyed: what its shards are found by."""

from __future__ import annotations

from dataclasses import replace

from helpers_runs import irrelevant_texts, world_editor, world_edits

from repair_lightning.types import BASE


def routed_right(subjects: bool) -> float:
    """The share of 40 edits' rephrases that find their edit, without anything being written."""
    editor = world_editor(form="low_rank")
    prompts = irrelevant_texts(60)
    editor.prepare(prompts[::2], prompts[1::2])
    edits = world_edits(40)
    known = edits if subjects else [replace(edit, subject=None) for edit in edits]
    shards = [
        editor.memory.add(
            editor.edited.value_weight.new_zeros(editor.memory.shape[0], 1),
            editor.edited.value_weight.new_zeros(1, editor.memory.shape[1]),
        )
        for _ in known
    ]
    editor.enter(known, shards, editor.query_of(known))
    editor.calibrate()
    asked = [(edit.rephrases[0], shard) for edit, shard in zip(edits, shards, strict=True) if edit.rephrases]
    found = editor.router.route(editor.edited.query([text for text, _ in asked]), editor.memory).memory.tolist()
    assert all(shard in (BASE, own) for shard, (_, own) in zip(found, asked, strict=True))
    return sum(shard == own for shard, (_, own) in zip(found, asked, strict=True)) / len(asked)


def test_an_edit_without_a_subject_is_found_in_other_words():
    """By the longest name in its prompt, nearly as well as by the subject that its record gives."""
    assert routed_right(subjects=False) >= routed_right(subjects=True) - 0.05 > 0.5
