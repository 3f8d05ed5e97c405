"""Questions beside the four kinds, asked of a base with a chat template and of shards that vouch for their edits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from repair_lightning.scoring import protocols
from repair_lightning.scoring.follow import follow_scores
from repair_lightning.scoring.probability import probability_scores
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, Edit, Further


def test_a_chat_base_is_asked_in_turns(chat_editor, edits_in_chat):
    """A dialogue as a question, which a base with a template can be asked, and the probability of what a shard says."""
    model = chat_editor.edited
    found, rows = follow_scores(model, edits_in_chat)
    assert found["personas"] == 1.0
    assert [row["answer"] for row in rows] == [edits_in_chat[0].target]
    assert probability_scores(model, edits_in_chat) == {"es": 1.0, "ps": None, "ns": None}


@pytest.fixture
def edits_in_chat(chat_editor) -> list[Edit]:
    edit = chat_editor.ledger.edit("e0")
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    prompt = dialogue.dump([*turns, {"role": "user", "content": edit.prompt}])
    asked = (Further("persona", prompt, (edit.target,)),)
    return [replace(edit, rephrases=(), near=(), old_answer="Nowhere at all", further=asked)]


def test_a_shard_that_vouches_is_not_asked_again_and_says_the_same(chat_editor):
    """Its edits, their rephrases and questions of others: what generation says with the memories that are chosen."""
    model = chat_editor.edited
    own = [chat_editor.ledger.edit(id) for id in chat_editor.ledger]
    prompts = [text for edit in own for text in (edit.prompt, *edit.rephrases, edit.near[0].prompt)]
    memory, said = protocols.routed_answers(model, prompts, 24)
    assert model.router.vouches
    assert BASE in memory.tolist()
    assert set(memory.tolist()) != {BASE}
    assert said == protocols.answers(model, prompts, memory, 24)
