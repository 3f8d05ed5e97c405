"""Where a base stops: what its generation settings say holds, whatever its tokenizer says of it."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.scorer import Scorer

TOKENS = {"</s>": 2, "<s>": 1}


def changed(folder: Path, base: Path, tokenizer: str, generation: str) -> Path:
    """A copy of a base whose tokenizer and generation settings name these tokens as the end."""
    shutil.copytree(base, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": TOKENS[generation]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": tokenizer}))
    return folder


@pytest.fixture(scope="module")
def scored(folder_of, tmp_path_factory, prepared, edits, write) -> dict[tuple[str, str], Any]:
    """By the tokenizer's end and the generation settings', an editor with four edits and their scores."""
    found = {}
    for tokenizer, generation in product(TOKENS, TOKENS):
        name = f"{TOKENS[tokenizer]}{TOKENS[generation]}"
        folder = changed(tmp_path_factory.mktemp("ends") / name, folder_of("llama"), tokenizer, generation)
        editor = prepared(folder)
        assert (editor.tokenizer.eos_token, editor.edited.forms.stops) == (tokenizer, (TOKENS[generation],))
        assert all(report.error is None for report in write(editor, edits[:4]))
        scorer = Scorer(editor.edited, edits[:4])
        owners = editor.owner_choice([question.edit for question in scorer.questions])
        found[tokenizer, generation] = editor, scorer.score("final", scorer.choose(), owners)
    return found


@pytest.mark.parametrize("generation", TOKENS)
def test_the_same_scores_where_they_differ_and_where_they_agree(scored, generation):
    results = [scored[tokenizer, generation][1] for tokenizer in TOKENS]
    assert results[0].scores == results[1].scores
    assert results[0].rows == results[1].rows
    assert results[0].scores["autoregressive"]["rel"] == results[0].scores["teacher_forced"]["rel"] == 1.0


@pytest.mark.parametrize("generation", TOKENS)
@pytest.mark.parametrize("named", TOKENS)
def test_edits_learn_to_stop_there(scored, edits, named, generation):
    """What generation gives ends with that very token, long before it must; so says the closed loop."""
    editor, _ = scored[named, generation]
    for edit in edits[:4]:
        row = editor.encode(edit)
        assert row.target[-1] == TOKENS[generation]
        output = editor.edited.generate(edit.prompt, do_sample=False, max_new_tokens=30)
        assert tuple(output[0, len(row.prompt) :].tolist()) == row.target
    assert set(correctness(editor, edits[:4]).values()) == {1.0}
