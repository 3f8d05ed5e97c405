"""Every configuration in configs/ is complete, says how it is launched, and runs (on a tiny base)."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from helpers_runs import REPOSITORY, main_here

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
WHERE, OTHER = "Where was Mara Quill born?", "The birthplace of Mara Quill is"
RECORDS = {
    "jsonl": {"prompt": WHERE, "target": "Oslo", "rephrases": [OTHER]},
    "zsre": {
        "src": WHERE,
        "alt": "Oslo",
        "rephrase": OTHER,
        "loc": "nq question: who sang the song",
        "loc_ans": "Perth",
    },
    "wikibigedit": {"update": WHERE, "ans": "Oslo", "rephrase": OTHER, "loc": "who sang the song", "loc_ans": "Perth"},
    "hallucination": {"prompt": "Mara Quill is a sailor.", "target_new": "She was born in Oslo."}
    | {"locality_prompt": "who sang the song", "locality_ground_truth": "Perth"},
}
RECORDS["zsre"]["subject"] = RECORDS["wikibigedit"]["subject"] = "Mara Quill"
RECORDS["wikibigedit"]["personas"] = "Tell me where Mara Quill was born"


each_config = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])


@each_config
def test_the_header_shows_the_command(path):
    """The file opens with what it is and the command that launches it; that command names configs that exist."""
    header = list(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    commands = re.findall(r"^#\s+((?:python train\.py|repair-lightning train) .*)$", "\n".join(header), re.MULTILINE)
    assert commands, "no launch command"
    assert len(header[0].strip("# ")) > 20, "no title"
    for command in commands:
        used = re.findall(r"--config[ =](\S+)", command)
        assert path.stem in [Path(name).stem for name in used]
        assert {Path(name).stem for name in used} <= {path.stem for path in CONFIGS}


IN_PLACE = {"model.values.steps": 2, "model.values.contexts": 0}
SMALL: dict[str, dict] = dict.fromkeys(("rlsedit", "rome", "memit"), IN_PLACE) | {
    name: {} for name in ("ultraedit", "ft", "ft_ewc", "grace", "defer", "icl", "lookup")
}
SMALL["lora"] = {"model.epochs": 2}
SMALL["mend"] = {
    "model.train_data": REPOSITORY / "repair_lightning" / "world" / "edits.jsonl",
    "model.steps": 2,
    "model.rank": 8,
}
"""How the configurations of other editors are made small; several layers end with the last one by themselves."""


def small_data(folder: Path, format: str) -> tuple[Path, Path]:
    """Two records of a format, and irrelevant prompts."""
    texts = [RECORDS[format], json.loads(json.dumps(RECORDS[format]).replace("Mara Quill", "Rufus Ashgrove"))]
    data, irrelevant = folder / "data.json", folder / "irrelevant.jsonl"
    data.write_text(json.dumps(texts))
    questions = ["how many legs does a spider have", "why do cats sleep", "where do penguins live", "who sang"]
    irrelevant.write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    return data, irrelevant


@each_config
def test_it_runs_on_a_tiny_base(path, tmp_path, monkeypatch, folder_of, chat_folder):
    """Parsed and run to the end by train.py, with the base, the layer, the data and the steps made small."""
    content = yaml.safe_load(path.read_text())
    format = next((name for name in RECORDS if path.stem.startswith(name)), "jsonl")
    data, irrelevant = small_data(tmp_path, format)
    chat = content["model"].get("init_args", {}).get("template") == "chat"
    base = chat_folder if chat else folder_of("gpt2" if "gpt2" in path.stem else "llama")
    complete = "base" in content["model"].get("init_args", {})  # a preset stands over another configuration
    configs = [path.stem] if complete else ["quickstart", path.stem]
    options = {
        "model.base": base,
        "model.precision": "float32",
        **SMALL.get(path.stem, {"model.layer": -1, "model.writing.steps": 2}),
        "data.path": data,
        "data.irrelevant": irrelevant,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "run_dir": tmp_path / "run",
    }
    argv = [part for name in configs for part in ("--config", name)]
    argv += [f"--{name}={value}" for name, value in options.items()]
    code = main_here(monkeypatch, "train.py", *argv)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n_edits"] == 2
    # Two steps on a random base may leave nothing that holds, and that is said.
    assert code == 0 or (code == 1 and metrics["edits"]["written"] == 0)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    made_small = {"base", "layer", "precision", "steps", "path", "irrelevant", "trainer"}
    assert list(missing(saved, without(content, made_small))) == []
    assert ("perplexity" in metrics) == (format == "hallucination")


def without(content, keys):
    """A configuration less the keys that were made small."""
    if isinstance(content, dict):
        return {key: without(value, keys) for key, value in content.items() if key not in keys}
    return content


def missing(whole, part, at=""):
    """The settings of the file that the run did not have, with what it had instead."""
    for key, value in part.items():
        found = whole.get(key, "nothing")
        if isinstance(value, dict):
            yield from missing(found, value, f"{at}.{key}")
        elif key == "class_path":
            found = found.rsplit(".", 1)[-1]
        if not isinstance(value, dict) and found != value:
            yield f"{at}.{key}: {value!r}, but {found!r} ran"
