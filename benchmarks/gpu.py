"""An 8B base on one GPU: random weights of LLaMA-3's shape, the world's words, and the editor's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.context import Context
from benchmarks.report import Table, mib, number
from benchmarks.streams import load_edits, make_stream, write_edits
from benchmarks.timing import Stopwatch, seconds_of
from repair_lightning.editors import Repair
from repair_lightning.models.base import Base, load_tokenizer
from repair_lightning.types import EditBatch
from repair_lightning.world import base_dir

TITLE = "GPU: editing a base of LLaMA-3-8B's shape"
LLAMA3_8B: Mapping[str, int] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
_BATCH = 128


def run_part(context: Context, device: str | None = None, shape: Mapping[str, int] = LLAMA3_8B) -> dict[str, Any]:
    """Write the world's edits at the published layer and at the last one; skipped without a CUDA device."""
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        return {"skipped": "no CUDA device"}
    world = Context(seed=context.seed, work=context.work, repeats=context.repeats)
    edits, _ = load_edits(world, context.gpu_edits + 4)
    base = random_base(shape, device, context.seed)
    rows = [measured(world, base, device, layer, edits) for layer in (None, -1)]
    return {"shape": dict(shape), "parameters": base.parameters, "device": device, "layers": rows}


def random_base(shape: Mapping[str, int], device: str, seed: int) -> Base:
    """A causal LM with random weights in bfloat16, made on the device, that reads the world's tokens."""
    tokenizer = load_tokenizer(str(base_dir()))
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(**dict[str, Any](shape), **special, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    return Base(model, tokenizer, "random-llama", "0" * 64, sum(p.numel() for p in model.parameters()))


def measured(context: Context, base: Base, device: str, layer: int | None, edits: list[Any]) -> dict[str, Any]:
    """Write all edits but four, which warm up, in full batches."""
    editor = Repair("random-llama", layer=layer, seed=context.seed)
    with patch("repair_lightning.editors.base.load_base", return_value=base):
        editor.load()
    editor.to(device)
    stream = make_stream(context, write_edits(context.work / "gpu.jsonl", edits), max_irrelevant=128)
    editor.prepare(*stream.irrelevant_halves(editor))
    editor.ledger.arrive(edits, 0)
    editor.ledger.written(editor.write(EditBatch(tuple(edits[:4]))))
    watch = Stopwatch()
    watch.wrap(editor.edited, "captures")
    watch.wrap(editor, "_train")
    reset_peak(device)
    steps: list[int] = []
    batches = [EditBatch(tuple(edits[at : at + _BATCH])) for at in range(4, len(edits), _BATCH)]

    def write_all() -> None:
        for batch in batches:
            reports = editor.write(batch)
            editor.ledger.written(reports)
            steps.append(reports[0].steps)
        editor.finish_window()

    seconds = seconds_of(write_all)
    release(editor)
    return {
        "layer": editor.layer,
        "edits": len(edits) - 4,
        "batches": len(batches),
        "steps": steps,
        "seconds": seconds,
        "edits_per_second": (len(edits) - 4) / seconds,
        "parts": watch.take(),
        "base_bytes": sum(parameter.nbytes for parameter in base.model.parameters()),
        "shard_bytes": sum(tensor.nbytes for tensor in editor.memory.parameters()),
        "cache_used": getattr(editor.edited.prefixes, "used", None),
        "peak": peak(device),
    }


def release(editor: Repair) -> None:
    """Take the editor's hooks off the base, so that nothing of it stays when the next one edits that base."""
    for module in editor.base.model.modules() if editor.base else ():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


def reset_peak(device: str) -> None:
    """From here on the device's peak is counted."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int | None:
    """Most bytes that tensors took on the device; None on a CPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per edited layer."""
    if "skipped" in result:
        return [Table(TITLE, ("result",), [(f"skipped: {result['skipped']}",)])]
    header: tuple[str, ...] = ("layer", "edits", "steps", "seconds", "edits/s", "edits/min", "prefix s", "steps s")
    header += ("peak MiB", "base MiB", "shards MiB", "cache MiB")
    rows = [
        (
            str(row["layer"]),
            str(row["edits"]),
            " ".join(map(str, row["steps"])),
            number(row["seconds"]),
            number(row["edits_per_second"]),
            number(60 * row["edits_per_second"]),
            number(row["parts"]["captures"]),
            number(row["parts"]["_train"]),
            mib(row["peak"]),
            mib(row["base_bytes"]),
            mib(row["shard_bytes"]),
            mib(row["cache_used"]),
        )
        for row in result["layers"]
    ]
    note = (
        f"{result['parameters'] / 1e9:.3g} B random parameters in bfloat16 on {result['device']}, batches of {_BATCH}, "
        "the published layer and the last one."
    )
    return [Table(TITLE, header, rows, note)]
