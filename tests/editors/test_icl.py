"""In-context retrieval: the base reads the nearest edits before the prompt, and nothing else happens."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.errors import RepairError
from repair_lightning.models.prefix import pad_left
from repair_lightning.scoring import protocols


@pytest.fixture
def editor(editor_of, write, edits):
    found = editor_of("llama", "icl", number=2)
    write(found, edits[:4])
    return found


def greedy(editor, rows) -> list[list[int]]:
    """What the plain base says behind token rows."""
    ids, mask = pad_left(rows)
    with editor.edited.forced(None):
        output = editor.base.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return output[:, ids.shape[1] :].tolist()


def test_the_base_reads_the_edit_and_its_neighbour_before_the_prompt(editor, edits):
    prompts = [edit.prompt for edit in edits[:4]]
    rows = editor.tokenizer(prompts)["input_ids"]
    chosen = editor.choose(prompts).memory
    assert chosen.tolist() == editor.owner_choice([edit.id for edit in edits[:4]]).tolist()
    for row, read, edit in zip(rows, editor.edited.read(rows, chosen), edits, strict=False):
        own = editor.tokens_of(edit)
        text = editor.tokenizer.decode(read, skip_special_tokens=True)
        assert text.split("\n")[-2] == f"{edit.prompt} {edit.target}"
        assert len(text.split("\n")) == 3  # two edits, and the prompt
        start = int(row[0] == editor.tokenizer.bos_token_id)
        assert read[-len(row[start:]) :] == row[start:]
        assert read[-len(row[start:]) - len(own) : -len(row[start:])] == own


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
    with pytest.raises(RepairError, match="call generate\\(\\), or forward\\(\\) without cache and labels"):
        editor.edited(ids, labels=ids)
