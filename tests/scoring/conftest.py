"""An edited model with two shards, and plain transformers models that say what it must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_runs import written_editor
from transformers import AutoModelForCausalLM

from repair_lightning.editors import Keyed
from repair_lightning.types import BASE
from repair_lightning.world import base_dir


@pytest.fixture(scope="session")
def written() -> tuple[Any, Any]:
    """Eight world edits in shards 0 and 1: (editor, stream). Tests must leave both as they are."""
    editor, stream = written_editor(steps=60)
    assert stream.ledger.sizes() == {0: 4, 1: 4}
    return editor, stream


@pytest.fixture(scope="session")
def plain(written) -> Callable[[int], Any]:
    """The reference: the base, or the base with one shard added to W_v, loaded anew and without any of our code."""
    editor, _ = written
    models: dict[int, Any] = {}

    def model(memory: int) -> Any:
        if memory not in models:
            found = AutoModelForCausalLM.from_pretrained(str(base_dir()), dtype=torch.float32, local_files_only=True)
            if memory != BASE:
                weight = found.model.layers[editor.layer].mlp.down_proj.weight
                weight.data += editor.memory[memory].delta.detach()
            models[memory] = found.eval()
        return models[memory]

    return model


@pytest.fixture(scope="session")
def chat_editor(chat_folder, prepared, write, edits) -> Keyed:
    """Four edits in low-rank shards of a base with a chat template. Tests must leave it as it is."""
    editor = prepared(chat_folder)
    assert all(report.error is None for report in write(editor, edits[:4]))
    return editor
