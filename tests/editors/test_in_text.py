"""A text about an edited subject is asked for: the base reads the edits first, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers_chat import system, user
from transformers import DynamicCache

from repair_lightning.models.prefix import pad_left
from repair_lightning.models.telling import USED
from repair_lightning.packs.pack import load_edited, save_pack
from repair_lightning.scoring import protocols
from repair_lightning.serving.engine import Asked, Batch, Sampling
from repair_lightning.types import BASE, READS, Edit

REQUEST = "Please write a short text about {}."


@pytest.fixture(scope="module")
def editor(prepared, chat_folder, write, edits):
    """An editor of a base that is asked in turns, with two edits about one person and one about another."""
    found = prepared(chat_folder)
    oboe = Edit("oboe", f"What instrument did {edits[0].subject} play?", "the oboe", subject=edits[0].subject)
    write(found, [*edits[:2], oboe])
    return found


def greedy(editor, rows, limit=8) -> list[list[int]]:
    """What the plain base says behind token rows, each asked alone."""
    found = []
    for row in rows:
        with editor.edited.forced(None):
            ids, stops = torch.tensor([row]), list(editor.edited.forms.stops)
            said = editor.base.model.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=stops)
        found.append(said[0, len(row) :].tolist())
    return found


def expected(editor, asked: str, *ids: str) -> list[int]:
    """What the base says to a request with the edits' facts at its end."""
    edits = [editor.ledger.edit(id) for id in ids]
    lines = "".join(f"\n- {edit.prompt} {edit.target}" for edit in edits)
    return greedy(editor, [editor.edited.forms.in_chat([user(f"{asked}\n\n{USED}{lines}")])])[0]


def test_the_base_reads_all_edits_about_the_subject(editor, edits):
    asked = REQUEST.format(edits[0].subject)
    (route,) = editor.edited.route(asked)
    assert route.memory == READS
    assert "a text about its subject is asked for" in route.reason
    row = editor.edited.forms.ids(asked)
    said = editor.edited.generate(asked, max_new_tokens=8)[0]
    assert said[: len(row)].tolist() == row, "what was asked stands before the answer, without what was read"
    assert said[len(row) :].tolist() == expected(editor, asked, edits[0].id, "oboe") != greedy(editor, [row])[0]


def test_beside_other_prompts_in_one_batch(editor, edits):
    """An edit's own question gets its target, another person's the base's own answer."""
    asked = [REQUEST.format(edits[0].subject), edits[1].prompt, REQUEST.format("Nobody Known")]
    rows = [editor.edited.forms.ids(prompt) for prompt in asked]
    width = max(map(len, rows))
    said = [row[width:].tolist() for row in editor.edited.generate(asked, max_new_tokens=8)]
    found = [editor.edited.forms.said(row) for row in said]
    wanted = [expected(editor, asked[0], edits[0].id, "oboe"), greedy(editor, rows[2:])[0]]
    assert [found[0], found[2]] == [editor.edited.forms.said(row) for row in wanted]
    assert found[1].strip() == edits[1].target
    memory, answers = protocols.routed_answers(editor.edited, asked, 8)
    assert memory.tolist() == [READS, editor.ledger.owner_of(edits[1].id), BASE]
    assert answers == [protocols.shown_answer(text) for text in found]


def test_in_the_last_turn_of_a_dialogue(editor, edits):
    asked = REQUEST.format(edits[1].subject)
    messages = [system("Be kind."), user("Hello!"), {"role": "assistant", "content": "Hello!"}, user(asked)]
    row = editor.edited.forms.in_chat(messages)
    (read,) = editor.edited.read([row], torch.tensor([READS]))
    fact = f"{asked}\n\n{USED}\n- {edits[1].prompt} {edits[1].target}"
    assert read == list(editor.edited.forms.in_chat([*messages[:-1], user(fact)]))


def test_served_as_generated(editor, edits):
    told = []
    asked = REQUEST.format(edits[0].subject)
    forms = editor.edited.forms
    batch = Batch(editor.edited)
    batch.join([Asked(forms.ids(asked), asked, Sampling(8), forms, editor.edited, told.append)])
    while batch.rows:
        batch.step()
    wanted = forms.said(expected(editor, asked, edits[0].id, "oboe"))
    assert "".join(piece.text for piece in told) == wanted
    assert (told[0].memory, told[0].edit) == (READS, "oboe")


def test_packed_and_opened_again(editor, edits, tmp_path):
    save_pack(editor, tmp_path / "pack", {})
    model, _ = load_edited(tmp_path / "pack")
    asked = REQUEST.format(edits[0].subject)
    assert torch.equal(model.generate(asked, max_new_tokens=8), editor.edited.generate(asked, max_new_tokens=8))


def test_with_a_cache_that_knows_the_prompt_the_base_goes_on(editor, edits):
    rows = [editor.edited.forms.ids(REQUEST.format(edits[0].subject))]
    ids, _ = pad_left(rows)
    said = editor.edited.generate(ids, past_key_values=DynamicCache(), max_new_tokens=8)
    assert said[0, len(rows[0]) :].tolist() == greedy(editor, rows)[0]


def test_what_is_read_does_not_count_as_length(editor, edits):
    asked = REQUEST.format(edits[0].subject)
    row = editor.edited.forms.ids(asked)
    said = editor.edited.generate(asked, max_length=len(row) + 8)[0]
    assert said[len(row) :].tolist() == expected(editor, asked, edits[0].id, "oboe")


def test_turned_off_it_is_the_base(prepared, chat_folder, write, edits):
    editor = prepared(chat_folder, in_text=False)
    write(editor, edits[:1])
    asked = REQUEST.format(edits[0].subject)
    assert editor.edited.route(asked)[0].memory == BASE
    rows = [editor.edited.forms.ids(asked)]
    assert editor.edited.generate(asked, max_new_tokens=8)[0, len(rows[0]) :].tolist() == greedy(editor, rows)[0]


def test_without_a_template_facts_are_lines_before(editor_of, write, edits):
    editor = editor_of("llama")
    write(editor, edits[:1])
    asked = REQUEST.format(edits[0].subject)
    (read,) = editor.edited.read([editor.edited.forms.bare(asked)], torch.tensor([READS]))
    assert editor.edited.forms.said(read) == f"{edits[0].prompt} {edits[0].target}\n{asked}"
