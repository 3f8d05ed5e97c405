"""In-context retrieval: the base reads edits before it answers, and nothing else happens."""

from __future__ import annotations

import pytest
import torch
from helpers_chat import base, system, user

from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Query
from repair_lightning.models.forms import SYSTEM
from repair_lightning.models.prefix import pad_left
from repair_lightning.models.telling import FACTS
from repair_lightning.models.telling import told as tell
from repair_lightning.packs.pack import load_edited, save_pack
from repair_lightning.scoring import protocols
from repair_lightning.types import BASE, Edit


@pytest.fixture(params=["key", "states"])
def editor(request, editor_of, write, edits):
    found = editor_of("llama", "icl", retriever=request.param, number=2)
    write(found, edits[:4])
    return found


@pytest.fixture
def chatting(prepared, chat_folder, write, edits):
    """An editor of a base that is asked in turns, with two edits about one person and one about another."""
    found = prepared(chat_folder, "icl")
    write(found, [*edits[:2], other_of(edits[0])])
    return found


def other_of(edit: Edit) -> Edit:
    return Edit("other", f"What instrument did {edit.subject} play?", "the oboe", subject=edit.subject)


def told(edits: list[Edit], *own: str) -> list[dict[str, str]]:
    """The messages that tell edits, with what the dialogue's own system message says."""
    lines = "\n".join(f"{edit.prompt} {edit.target}" for edit in edits)
    turns = [message for edit in edits for message in (user(edit.prompt), base(edit.target))]
    return [system("\n\n".join([f"{FACTS}{lines}", *own])), *turns]


def in_chat(editor, *messages: dict[str, str]) -> list[int]:
    return list(editor.edited.forms.in_chat([*messages]))


def greedy(editor, rows) -> list[list[int]]:
    """What the plain base says behind token rows."""
    ids, mask = pad_left(rows)
    with editor.edited.forced(None):
        output = editor.base.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return output[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("retriever", ["key", "states"])
def test_the_base_reads_the_edit_before_the_prompt(retriever, editor_of, write, edits):
    """The nearest last; where the key router finds them, no edit about somebody else."""
    editor = editor_of("llama", "icl", retriever=retriever, number=2)
    write(editor, edits[:4])
    prompts = [edit.prompt for edit in edits[:4]]
    rows = editor.tokenizer(prompts)["input_ids"]
    chosen = editor.choose(prompts).memory
    assert chosen.tolist() == editor.owner_choice([edit.id for edit in edits[:4]]).tolist()
    for row, read, edit in zip(rows, editor.edited.read(rows, chosen), edits, strict=False):
        lines = editor.tokenizer.decode(read, skip_special_tokens=True).split("\n")
        assert lines[-2:] == [f"{edit.prompt} {edit.target}", edit.prompt]
        assert len(lines) == (2 if retriever == "key" else 3)
        start = int(row[0] == editor.tokenizer.bos_token_id)
        assert read[:start] == row[:start]
        assert read[-len(row[start:]) :] == row[start:]


class TestChat:
    def test_facts_about_the_subject_are_read(self, chatting, edits):
        """In the system message and in turns: of what is asked in the same words that alone, else all of the subject's,
        never another's."""
        edit, other = edits[0], other_of(edits[0])
        for question, ways in (
            (edit.prompt, [[edit]]),
            (other.prompt, [[other]]),
            (f"Is {edit.subject} tall?", [[edit, other], [other, edit]]),
        ):
            row = in_chat(chatting, user(question))
            (read,) = chatting.edited.read([row], chatting.edited.choose_rows([row]).memory)
            assert read in [in_chat(chatting, *told(way), user(question)) for way in ways]

    def test_where_no_edit_is_named_the_base_answers_alone(self, chatting, edits, irrelevant):
        prompts = [*irrelevant, edits[5].prompt, "Where was Mara born?"]
        choice = chatting.choose(prompts)
        assert (choice.memory == BASE).all()
        rows = [chatting.edited.forms.ids(prompt) for prompt in prompts]
        assert chatting.edited.read(rows, choice.memory) == rows

    def test_in_a_dialogue_they_stand_before_its_own_system_message(self, chatting, edits):
        """The last turn decides; what was said before stays as it was."""
        turns = [user("Hello!"), base("Good day."), user(edits[1].prompt)]
        for own in ([], [SYSTEM]):
            row = in_chat(chatting, *map(system, own), *turns)
            (read,) = chatting.edited.read([row], chatting.edited.choose_rows([row]).memory)
            wanted = in_chat(chatting, *told([edits[1]], *own), *turns)
            assert chatting.tokenizer.decode(read) == chatting.tokenizer.decode(wanted)

    def test_a_bare_row_gets_lines_before_it(self, chatting, edits):
        row = list(chatting.edited.forms.bare(edits[1].prompt))
        (read,) = chatting.edited.read([row], chatting.edited.choose_rows([row]).memory)
        text = chatting.tokenizer.decode(read, skip_special_tokens=True)
        assert text == f"{edits[1].prompt} {edits[1].target}\n{edits[1].prompt}"

    def test_what_there_is_no_room_for_is_left_out(self, chatting, edits, monkeypatch):
        """The less likely fact first, then all of them."""
        row = in_chat(chatting, user(f"Is {edits[0].subject} tall?"))
        memory = chatting.edited.choose_rows([row]).memory
        (both,) = chatting.edited.read([row], memory)
        (last,) = chatting.router.preface(Query.of_texts([f"Is {edits[0].subject} tall?"]), memory.tolist())
        edit = chatting.ledger.edit(last[-1])
        one = tell(chatting.edited.forms, row, [(edit.prompt, edit.target)])
        for least, wanted in ((len(both), both), (len(both) - 1, one), (len(one) - 1, row)):
            monkeypatch.setattr(type(chatting.edited), "longest", least + 64)
            assert chatting.edited.read([row], memory) == [wanted]

    def test_an_edit_that_was_taken_back_is_not_read(self, chatting, edits):
        chatting.undo(["other"])
        row = in_chat(chatting, user(edits[0].prompt))
        (read,) = chatting.edited.read([row], chatting.edited.choose_rows([row]).memory)
        assert "oboe" not in chatting.tokenizer.decode(read)
        assert edits[0].target in chatting.tokenizer.decode(read)

    def test_a_pack_reads_the_same(self, chatting, edits, tmp_path):
        save_pack(chatting, tmp_path / "pack", {})
        model, _ = load_edited(tmp_path / "pack", precision="float32")
        rows = [chatting.edited.forms.ids(edit.prompt) for edit in edits]
        memory = chatting.edited.choose_rows(rows).memory
        assert torch.equal(model.choose_rows(rows).memory, memory)
        assert model.read(rows, memory) == chatting.edited.read(rows, memory) != rows


def test_every_way_to_ask_it_is_the_base_behind_that_text(editor, edits):
    """Generation, the forward pass and teacher forcing, which scores the same tokens as the base fed with the text."""
    prompts, targets = [edit.prompt for edit in edits[:4]], [edit.target for edit in edits[:4]]
    rows = editor.tokenizer(prompts)["input_ids"]
    chosen = editor.choose(prompts).memory
    read = editor.edited.read(rows, chosen)
    said = greedy(editor, read)
    ids, mask = pad_left(rows)
    output = editor.edited.generate(ids, mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(output[:, : ids.shape[1]], ids)
    assert output[:, ids.shape[1] :].tolist() == said
    with torch.no_grad():
        assert editor.edited(ids, mask).logits[:, -1].argmax(-1).tolist() == [row[0] for row in said]
    forced = protocols.forced_tokens(editor.edited, prompts, targets, chosen)
    for row, prompt, target, tokens in zip(read, prompts, targets, forced, strict=True):
        wanted = editor.edited.forms.encode(prompt, target).target
        with torch.no_grad(), editor.edited.forced(None):
            logits = editor.base.model(torch.tensor([[*row, *wanted]])).logits[0]
        assert tokens == logits[-len(wanted) - 1 : -1].argmax(-1).tolist()


def test_what_it_refuses(editor, edits):
    ids = torch.tensor(editor.tokenizer([edits[0].prompt])["input_ids"])
    with pytest.raises(RepairError, match="ask it without a cache and without labels"):
        editor.edited(ids, labels=ids)
