"""What a base says by itself is asked once, whoever asks; what an edited base says is never taken for it."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair_lightning.editors import Keyed
from repair_lightning.models.base import in_memory, load_base
from repair_lightning.models.kept_answers import KeptAnswers
from repair_lightning.scoring import protocols
from repair_lightning.types import BASE

PROMPTS = ["Where do penguins live?", "Who wrote the book?", "What is the largest number on a clock?"]
TARGETS = ["In the cold.", "A sailor.", "Twelve."]
NOBODY = torch.full((3,), BASE)


@pytest.fixture
def model(prepared, chat_folder, tmp_path):
    found = prepared(chat_folder).edited
    found.kept = KeptAnswers(tmp_path, "a base")
    return found


@pytest.fixture
def passes(model):
    """How often the base has run, so far."""
    calls: list[int] = []
    handle = model.base.register_forward_hook(lambda *_: calls.append(1))
    yield lambda: len(calls)
    handle.remove()


def asked(model, prompts=PROMPTS, limit=6):
    chosen = NOBODY[: len(prompts)]
    return protocols.answers(model, prompts, chosen, limit), protocols.forced_tokens(model, prompts, TARGETS, chosen)


def test_an_answer_is_asked_once_and_the_same_ever_after(model, passes, tmp_path):
    model.kept, kept = None, model.kept
    plain = asked(model)
    model.kept = kept
    assert asked(model) == plain
    before = passes()
    model.kept = KeptAnswers(tmp_path, "a base")  # another run's
    assert asked(model) == plain
    assert passes() == before


def test_another_limit_target_or_base_is_another_question(model, passes, tmp_path):
    asked(model)
    for change in (
        lambda: asked(model, limit=5),
        lambda: protocols.forced_tokens(model, PROMPTS, ["Two."] * 3, NOBODY),
    ):
        before = passes()
        change()
        assert passes() > before
    model.kept = KeptAnswers(tmp_path, "another base")
    before = passes()
    asked(model)
    assert passes() > before


def test_what_an_edited_base_says_is_neither_kept_nor_taken_from_what_is_kept(model):
    plain, answers = asked(model), {}
    shape = model.weights.matrix(model.layer).shape
    try:
        model.weights.add(model.layer, 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        answers["kept"] = asked(model)
        model.kept, kept = None, model.kept
        answers["asked"] = asked(model)
    finally:
        model.weights.restore()
    assert answers["kept"] == answers["asked"] != plain
    model.kept = kept
    assert asked(model) == plain


def test_a_cache_that_is_damaged_costs_time_alone(model, caplog):
    plain = asked(model)
    model.kept.file.write_bytes(b"no database" * 100)
    with caplog.at_level(logging.WARNING):
        assert asked(model) == plain
    assert "the base's answers cannot be kept" in caplog.text
    assert len(caplog.records) == 1


def test_a_model_that_somebody_loaded_is_asked_each_time(chat_folder):
    """Its weights may not be those of its folder any more."""
    loaded = in_memory(AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder))
    editor = Keyed()
    editor.build(loaded, 1)
    assert editor.edited.kept is None
    editor = Keyed()
    editor.build(load_base(str(chat_folder)), 1)
    assert editor.edited.kept is not None


def test_other_settings_of_the_same_weights_are_another_base(chat_folder):
    model = load_base(str(chat_folder)).model
    before = KeptAnswers.of(model, "weights").file
    assert KeptAnswers.of(model, "weights").file == before != KeptAnswers.of(model, "others").file
    model.generation_config.suppress_tokens = [5]
    assert KeptAnswers.of(model, "weights").file != before


def test_a_file_that_another_process_has_just_begun_is_empty(model):
    model.kept.file.write_bytes(b"")
    assert asked(model) == asked(model)
    assert model.kept.works
