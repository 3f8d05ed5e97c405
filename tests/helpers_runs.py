"""Short real runs on the embedded world: its base, some of its edits, a real trainer on the CPU."""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from repair_lightning.commands.cli import OURS
from repair_lightning.editors import Keyed, Repair
from repair_lightning.editors.repair import Routing, Writing
from repair_lightning.editors.shards import Steps
from repair_lightning.edits.stream import EditStream
from repair_lightning.models.prefix import pad_left
from repair_lightning.scoring.correctness import correctness
from repair_lightning.types import Edit
from repair_lightning.world import edits_path, irrelevant_path

REPOSITORY = Path(__file__).parents[1]


def world_edits(number: int, start: int = 0) -> list[Edit]:
    """Some of the embedded edits."""
    lines = edits_path().read_text().splitlines()[start : start + number]
    return [Edit.from_dict(json.loads(line)) for line in lines]


def hard_edits(number: int, start: int = 0) -> list[Edit]:
    """World edits; every second can never be answered right, whatever is written: its target has a padding token,
    which no text that a model says shows."""
    edits = world_edits(number, start)
    return [replace(e, target=f"{e.target} <pad> {e.target}") if i % 2 else e for i, e in enumerate(edits)]


def write_edits(path: Path, edits: Sequence[Edit]) -> str:
    """The edits as a `jsonl` file; returns its name."""
    path.write_text("".join(json.dumps(edit.as_dict()) + "\n" for edit in edits))
    return str(path)


def irrelevant_texts(number: int) -> list[str]:
    """Some of the embedded irrelevant prompts."""
    return [json.loads(line)["question"] for line in irrelevant_path().read_text().splitlines()[:number]]


def world_editor(routing: dict[str, Any] | None = None, form: str = "dense", **writing: Any) -> Any:
    """An editor on the embedded base, loaded, with fewer steps than usual: REPAIR with its dense shards, or `keyed`
    with low-rank ones."""
    options: dict[str, Any] = {"steps": 40} | writing
    torch.manual_seed(0)
    editor: Any
    if form == "dense":
        editor = Repair("world", precision="float32", writing=Writing(**options), routing=Routing(**(routing or {})))
    else:
        options.pop("capacity", None)
        editor = Keyed("world", precision="float32", writing=Steps(**options))
    editor.load()
    return editor


def world_stream(path: str = "world", **options: Any) -> EditStream:
    """A stream of world edits with few irrelevant prompts."""
    return EditStream(path, **({"irrelevant": "world", "max_irrelevant": 60} | options))


def attach(stream: EditStream, editor: Any) -> EditStream:
    """Let a stream without a trainer know its editor, and the editor its ledger."""
    stream.trainer = SimpleNamespace(lightning_module=editor)  # type: ignore[assignment]
    editor.ledger = stream.ledger
    return stream


def fit(
    editor: Repair,
    stream: EditStream,
    callbacks: Sequence[pl.Callback],
    folder: Path,
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    """Run the stream as train.py does, without a logger."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=list(callbacks),
            **(settings | options),
        )
        trainer.fit(editor, datamodule=stream, ckpt_path=ckpt_path)
    return trainer


def written_editor(
    number: int = 8, capacity: int = 4, routing: dict[str, Any] | None = None, path: str = "world", **writing: Any
) -> tuple[Any, EditStream]:
    """World edits in shards of `capacity`, written without a trainer and checked on their own prompts."""
    editor = world_editor(routing, **({"steps": 40, "capacity": capacity} | writing))
    stream = attach(world_stream(path, max_edits=number, window=number, batch_size=capacity), editor)
    texts = irrelevant_texts(60)
    editor.guard_prompts = texts[40:]
    editor.prepare(texts[:40:2], texts[1:40:2])
    for batch in stream.next_window():
        stream.ledger.written(editor.write(batch))
    editor.finish_window()
    stream.ledger.evaluated(correctness(editor, stream.edits), 0.85)
    return editor, stream


def command(script: str | Path, *options: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script of the repository in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, str(REPOSITORY / script), *map(str, options)]
    return subprocess.run(call, cwd=cwd, env=env | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300)


def main_here(monkeypatch: Any, script: str | Path, *options: Any) -> Any:
    """A script of the repository in this process, which is left as it was; its exit status."""
    levels = {name: logging.getLogger(name).level for name in OURS}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
    try:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def succeeded(script: str | Path, *options: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same, and it ends well."""
    ran = command(script, *options, cwd=cwd)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    return ran


def same(found: Any, expected: Any) -> bool:
    """Whether nested states are equal, tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def logits(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """What a model computes for a batch of prompts, padded left."""
    ids, mask = pad_left(tokenizer(list(prompts))["input_ids"])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def without_probes(edit: Edit) -> Edit:
    """The edit without anything that is for scoring alone."""
    return replace(edit, rephrases=(), locality=(), near=())
