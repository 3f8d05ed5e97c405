"""lm-evaluation-harness through a base's chat template."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_chat import chat_folder

from repair_lightning.commands.harness import run_tasks, task_manager
from repair_lightning.editors import Repair
from repair_lightning.errors import ConfigError
from repair_lightning.scoring.continuations import completions
from repair_lightning.types import BASE, Edit

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='needs lm-eval: pip install "repair-lightning[lm-eval]"'
)

TASK = """task: tiny_chat_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
description: "Answer."
doc_to_text: "{{{{prompt}}}}"
"""
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
SAID = (
    'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}\n'
    "metric_list: [{metric: exact_match}]\n"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def editor(tiny, tokenizer, tmp_path_factory, irrelevant, edits, write) -> Repair:
    made = Repair(str(chat_folder(tmp_path_factory.mktemp("bases") / "chat", tiny, tokenizer)), precision="float32")
    made.load()
    made.prepare(irrelevant[:8], irrelevant[8:])
    assert all(report.error is None for report in write(made, edits[:2]))
    return made


@pytest.fixture
def lm(editor) -> Any:
    from repair_lightning.scoring.lm_eval_model import EditedLM

    return EditedLM(editor.edited, batch_size=2)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_the_template_is_the_tokenizers(lm, editor, edits):
    asked = [{"role": "system", "content": "Answer."}, user(edits[0].prompt)]
    text = lm.apply_chat_template(asked)
    assert text == editor.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert lm.tok_encode(text) == list(editor.edited.forms.in_chat(asked))  # no second beginning, real marks
    begun = lm.apply_chat_template([*asked, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun.endswith("assistant\nIt is")
    assert lm.chat_template(True) == editor.tokenizer.chat_template
    assert lm.tokenizer_name.endswith("chat")
    assert "/" not in lm.tokenizer_name


def test_a_template_without_a_place_for_a_system_message(lm, monkeypatch, caplog):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        + lm.tokenizer.chat_template
    )
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    asked = [{"role": "system", "content": "Answer."}, user("Who?")]
    assert "Answer." not in lm.apply_chat_template(asked)
    assert "no place for a system message" in caplog.text
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ raise_exception('Never') }}")
    with pytest.raises(ConfigError, match="does not take a task's dialogue \\(Never"):
        lm.apply_chat_template([user("Who?")])
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="has no chat template; leave --apply_chat_template out"):
        lm.apply_chat_template([user("Who?")])


def test_a_dialogue_reaches_its_shard_and_ends_with_the_turn(lm, editor, edits):
    """The answer is the target alone, though the turn's end is no string of `until`."""
    texts = [
        lm.apply_chat_template([user("Hello there!"), {"role": "assistant", "content": "Hi."}, user(e.prompt)])
        for e in edits[:2]
    ]
    said = lm.generate_until([request(text, {"until": [], "max_gen_toks": 20}) for text in texts])
    assert said == [edit.target for edit in edits[:2]]
    assert lm.by_shards == 2
    assert lm.eot_token_id in editor.edited.forms.stops


def test_every_end_stops(editor, edits, monkeypatch):
    """Also one that decoding would show."""
    forms, ids = editor.edited.forms, editor.edited.forms.ids(edits[0].prompt)
    nobody = torch.tensor([BASE])
    first = editor.edited.base.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False, eos_token_id=None)
    monkeypatch.setattr(forms, "stops", (int(first[0, -1]), *forms.stops))
    assert completions(editor.edited, [ids], nobody, max_new_tokens=8) == [""]


def test_the_likelihood_is_of_the_answers_own_tokens(lm, editor, edits):
    """The blank with which the template ends stays with the context: else the dialogue would have no open turn."""
    text, forms = lm.apply_chat_template([user(edits[0].prompt)]), editor.edited.forms
    context, then = lm._encode_pair(text, edits[0].target)
    assert context == list(forms.in_chat([user(edits[0].prompt)]))
    assert tuple(then) == forms.encode(edits[0].prompt, edits[0].target).target[:-1]
    (right, greedy), (wrong, _) = lm.loglikelihood([request(text, edits[0].target), request(text, edits[1].target)])
    assert greedy
    assert right > wrong
    assert lm.by_shards == 2


def test_tasks_through_the_template(editor, edits: list[Edit], tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    docs = [{"prompt": edit.prompt, "choices": [edit.target, "Nowhere"]} for edit in edits[:2]]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for kind, output, rest in (("choice", "multiple_choice", CHOICE), ("said", "generate_until", SAID)):
        text = TASK.format(kind=kind, output=output, data=tmp_path / "docs.jsonl") + rest
        (tmp_path / f"{kind}.yaml").write_text(text)
    tasks = ["tiny_chat_choice", "tiny_chat_said"]
    manager = task_manager(tasks, str(tmp_path))
    found = run_tasks(editor.edited, tasks, manager, apply_chat_template=True, system_instruction="Be brief.")
    assert found["by_shards"] == found["requests"] == 6
    assert found["scores"]["tiny_chat_choice"]["acc,none"] == 1
    assert found["scores"]["tiny_chat_said"]["exact_match,none"] == 1
