"""How fast is an 8B base? Random weights of LLaMA-3-8B's shape in bfloat16, made on the GPU; the world's tokenizer and
edits; the editor's own code for everything else: `keyed` at the published layer and at the last one, in batches of 128,
and `repair` at the last one, a shard of 16 at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.context import Context
from benchmarks.machine import seconds_of
from benchmarks.report import MIB, Rows
from benchmarks.streams import base_bytes, load_edits, make_stream, shard_bytes, write
from repair_lightning.editors import Keyed, Repair
from repair_lightning.models.architectures import resolve_layer
from repair_lightning.models.base import Base, load_tokenizer
from repair_lightning.types import Edit
from repair_lightning.world import WORLD, base_dir

LLAMA3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
_BATCH = 128
_WARM = 4
"""Edits that are written before the clock starts."""


def run_part(context: Context, device: str | None = None, shape: Mapping[str, int] = LLAMA3_8B) -> Rows | str:
    """Write the world's edits; skipped without a CUDA device."""
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        return "skipped: no CUDA device"
    world = replace(context, data=WORLD, format="jsonl", irrelevant=WORLD, irrelevant_prefix="")
    edits, _ = load_edits(world, context.gpu_edits + _WARM)
    base = random_base(shape, device, context.seed)
    return [measured(world, base, kind, layer, edits) for kind, layer in ((Keyed, None), (Keyed, -1), (Repair, -1))]


def random_base(shape: Mapping[str, int], device: str, seed: int) -> Base:
    """A causal LM with random weights in bfloat16, made on the device, that reads the world's tokens."""
    tokenizer = load_tokenizer(str(base_dir()))
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(**dict[str, Any](shape), **special, tie_word_embeddings=False)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    return Base(model, tokenizer, "random-llama", "0" * 64, sum(p.numel() for p in model.parameters()), as_stored=False)


def measured(
    context: Context, base: Base, kind: type[Keyed | Repair], layer: int | None, edits: Sequence[Edit]
) -> dict[str, Any]:
    """Write all edits but those that warm up, in full batches."""
    device = base.model.device
    editor = kind("random-llama", layer=layer, seed=context.seed)
    editor.build(base, resolve_layer(base.model, layer))
    editor.to(device)
    editor.prepare(*make_stream(context, edits, max_irrelevant=128).irrelevant_parts(editor)[:2])
    write(editor, edits[:_WARM])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size = min(_BATCH, editor.batch_limit(edits))
    batches = [edits[at : at + size] for at in range(_WARM, len(edits), size)]
    steps: list[int] = []
    seconds = seconds_of(lambda: steps.extend(write(editor, batch)[0].steps for batch in batches))
    found = {
        "device": device.type,
        "editor": editor.editor_name,
        "B parameters": base.parameters / 1e9,
        "layer": editor.layer,
        "edits": len(edits) - _WARM,
        "seconds": seconds,
        "edits/s": (len(edits) - _WARM) / seconds,
        "peak MiB": torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else None,
        "base MiB": base_bytes(editor) / MIB,
        "shards MiB": shard_bytes(editor) / MIB,
        "cache MiB": getattr(editor.edited.prefixes, "used", 0) / MIB,
        "steps": steps,
    }
    editor.edited.release()
    return found
