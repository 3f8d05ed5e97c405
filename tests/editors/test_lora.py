"""LoRA: what is added to each matrix is of low rank, is what peft's adapters say, and is all that is kept."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers_runs import logits

from repair_lightning.editors.lora import _start
from repair_lightning.errors import ConfigError

OPTIONS = {"rank": 4, "alpha": 8, "lr": 0.01, "epochs": 5, "stop_loss": None}
PER_LAYER = {"llama": 7, "gpt2": 4}
"""Linear modules of a layer's attention and feed-forward network."""


@pytest.mark.parametrize("model_type", PER_LAYER)
def test_every_linear_layer_changes_by_a_matrix_of_low_rank(model_type, editor_of, write, edits):
    """Of the same rank after a second batch: it goes on training the same adapters. The head is left alone."""
    editor = editor_of(model_type, "lora", **OPTIONS)
    weights, head = editor.edited.weights, editor.base.model.get_output_embeddings().weight.clone()
    seen = []
    for part in (edits[:4], edits[4:]):
        write(editor, part)
        assert len(weights.state()) == 3 * PER_LAYER[model_type]
        for name, kept in weights.state().items():
            added = weights.matrix(name) - weights.original(name)
            sizes = torch.linalg.svdvals(added)
            assert sizes[0] > 1e-3
            assert sizes[4] < 1e-4 * sizes[0]
            assert kept.shape == (sum(added.shape), 4)
        seen.append(weights.state())
    assert all(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert torch.equal(editor.base.model.get_output_embeddings().weight, head)


@pytest.mark.parametrize("model_type", PER_LAYER)
def test_the_folded_base_says_what_pefts_adapters_say(model_type, editor_of, write, edits):
    editor = editor_of(model_type, "lora", **OPTIONS)
    write(editor, edits[:4])
    weights, prompts = editor.edited.weights, [edit.prompt for edit in edits]
    folded, factors = logits(editor.edited, editor.tokenizer, prompts), {n: weights.factors(n) for n in weights.state()}
    with weights.originals():
        plain = logits(editor.edited, editor.tokenizer, prompts)
        with editor._adapters() as layers:
            for name, layer in layers.items():
                _start(layer, factors[name], torch.Generator())
            adapted = logits(editor.edited, editor.tokenizer, prompts)
        assert torch.equal(logits(editor.edited, editor.tokenizer, prompts), plain)
    torch.testing.assert_close(folded, adapted, rtol=1e-3, atol=1e-3)
    assert (folded - plain).abs().max() > 1


def test_a_small_batch_is_a_step(editor_of, write, edits):
    """Four edits by three, twice: two steps an epoch."""
    (report, *_) = write(editor_of("llama", "lora", **OPTIONS | {"batch": 3, "epochs": 2}), edits[:4])
    assert report.steps == 4


def test_it_ends_once_the_edits_are_said(editor_of, write, edits):
    few = write(editor_of("llama", "lora", **OPTIONS | {"epochs": 60, "stop_loss": 0.5}), edits[:2])
    assert few[0].steps < 60
    assert sum(report.loss for report in few) / 2 < 0.5


def test_what_it_refuses(editor_of, monkeypatch):
    with pytest.raises(ConfigError, match=r"lora writes into every layer, got layer 1; leave --model\.layer out"):
        editor_of("llama", "lora", layer=1)
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        editor_of("llama", "lora", rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora needs peft; pip install 'repair-lightning\[lora\]'"):
        editor_of("llama", "lora")
