"""lm-evaluation-harness on tiny tasks that lie in a folder; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_runs import main_here

from repair_lightning.commands.harness import harness, task_manager
from repair_lightning.errors import ConfigError
from repair_lightning.packs.pack import save_pack
from repair_lightning.scoring.continuations import log_likelihoods
from repair_lightning.types import BASE

HERE = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HERE, reason='needs lm-eval: pip install "repair-lightning[lm-eval]"')

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}
NAMES = tuple(f"tiny_{name}" for name in TASKS)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory) -> Any:
    """Data sets are built in a folder of the test's own, and nobody asks the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(written, tmp_path_factory) -> Path:
    """Edits and unrelated questions, each with the right answer and two others, as tasks of three kinds."""
    folder, edits = tmp_path_factory.mktemp("tasks"), written[1].edits
    docs = []
    for i, edit in enumerate(edits):
        probe, others = edit.locality[0], [edits[(i + j) % len(edits)].target for j in (2, 5)]
        docs += [{"prompt": edit.prompt, "choices": [edit.target, *others]}]
        docs += [{"prompt": probe.prompt, "choices": [probe.answer, *others]}]
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"tiny_{name}"} | source | task))
    return folder


@pytest.fixture(scope="module")
def pack(written, tmp_path_factory) -> Path:
    return save_pack(written[0], tmp_path_factory.mktemp("packs") / "pack", {})


@needs_lm_eval
class TestRequests:
    @pytest.fixture
    def lm(self, written) -> Any:
        from repair_lightning.scoring.lm_eval_model import EditedLM

        return EditedLM(written[0].edited, batch_size=5)

    def test_the_continuation_does_not_choose(self, lm, written):
        """Unrelated contexts keep the base whatever follows, an edit's its shard; the numbers are of that choice."""
        edits = written[1].edits
        asked = [(c, f" {t.target}") for e in edits for c in (e.prompt, e.locality[0].prompt) for t in edits]
        asked += [(e.locality[0].prompt, f" {e.prompt} {e.target}") for e in edits]  # an edit word by word, behind it
        asked += [("", f"{e.prompt} {e.target}") for e in edits]
        seen = lm.loglikelihood([request(*pair) for pair in asked], disable_tqdm=True)
        assert (lm.requests, lm.by_shards) == (len(asked), 64)
        owner = {edit.prompt: written[1].ledger.owner_of(edit.id) for edit in edits}
        memory = torch.tensor([owner.get(context, BASE) for context, _ in asked])
        pairs = [lm._encode_pair(*pair) if pair[0] else ([1], lm.tok_encode(pair[1], False)) for pair in asked]
        expected = log_likelihoods(lm.edited, *zip(*pairs, strict=True), memory, batch_size=5)
        assert seen == expected

    def test_a_dialogue_reaches_its_shard_and_ends_with_the_turn(self, chat_editor, edits):
        """The answer is the target alone, though the turn's end is no string of `until`."""
        from repair_lightning.scoring.lm_eval_model import EditedLM

        lm = EditedLM(chat_editor.edited, batch_size=2)
        greeted = [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": "Hi."}]
        texts = [lm.apply_chat_template([*greeted, {"role": "user", "content": e.prompt}]) for e in edits[:2]]
        said = lm.generate_until([request(text, {"until": [], "max_gen_toks": 20}) for text in texts])
        assert said == [edit.target for edit in edits[:2]]
        assert lm.by_shards == 2


@pytest.fixture(scope="module")
def found(pack, tasks) -> dict[str, Any]:
    return harness(pack, NAMES, batch_size=5, include_path=str(tasks))


@needs_lm_eval
class TestTasks:
    def test_the_edits_are_learnt_and_the_rest_stays(self, found):
        """Half of the documents are edits: right after, wrong before."""
        before, after = found["base"]["scores"], found["edited"]["scores"]
        assert set(before) == set(after) == set(NAMES)
        said = [scores["tiny_said"]["exact_match,none"] for scores in (before, after)]
        assert said[1] == pytest.approx(said[0] + 0.5, abs=1e-9)
        assert after["tiny_choice"]["acc,none"] > before["tiny_choice"]["acc,none"]
        assert after["tiny_choice"]["acc,none"] >= 0.9
        assert after["tiny_rolling"] == before["tiny_rolling"]
        assert found["base"]["by_shards"] == 0
        assert found["edited"]["requests"] == 16 * 3 + 16 + 16
        assert found["edited"]["by_shards"] == 32  # 8 edits, three choices and one answer each

    def test_unknown_tasks(self, tasks):
        with pytest.raises(ConfigError, match=r"no task 'tiny_chioce'; did you mean 'tiny_choice'"):
            task_manager(["tiny_chioce"], str(tasks))


def test_without_lm_eval_one_line_with_the_remedy(pack, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = ("harness", "--pack", pack, "--tasks", "arc_easy")
    assert main_here(monkeypatch, "repair_lightning/__main__.py", *options) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.endswith('pip install "repair-lightning[lm-eval]"')
