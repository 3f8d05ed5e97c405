"""How fast is an 8B base? Random weights of LLaMA-3-8B's shape in bfloat16, made on the GPU; the world's tokenizer and
edits; the editor's own code for everything else: `keyed` at the published layer and at the last one, in batches of 128,
and `repair` at the last one, a shard of 16 at a time.

*Waits*: how often the processor waits for the GPU while one more batch is written, in all and inside the loop of its
inner steps (PyTorch's own count; that loop looks every few steps whether an edit is written). *Generation*: as in the
part `generation`, beside a second copy of the base.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.context import Context
from benchmarks.generation import cell
from benchmarks.machine import seconds_of
from benchmarks.report import MIB, Result
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


def run_part(context: Context, device: str | None = None, shape: Mapping[str, int] = LLAMA3_8B) -> Result:
    """Write the world's edits, and ask them; skipped without a CUDA device."""
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        return "skipped: no CUDA device"
    world = replace(context, data=WORLD, format="jsonl", irrelevant=WORLD, irrelevant_prefix="")
    further = min(_BATCH, context.gpu_edits)
    edits, _ = load_edits(world, _WARM + context.gpu_edits + further)
    base, plain = (random_base(shape, device, context.seed) for _ in range(2))
    editing, generation = [], []
    for kind, layer in ((Keyed, -1), (Repair, -1), (Keyed, None)):
        editor = ready(world, base, kind, layer, edits)
        editing.append(measured(editor, edits[:-further], edits[-further:]))
        print("{editor}, layer {layer}: {edits/s:.1f} edits/s".format_map(editing[-1]), flush=True)
        prompts = [edit.prompt for edit in edits]
        names = {"editor": editor.editor_name, "layer": editor.layer}
        generation += [names | cell(world, editor, plain.model, prompts[:batch]) for batch in context.batches]
        editor.edited.release()
    return {"Editing": editing, "Generation": generation}


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


def ready(context: Context, base: Base, kind: type[Keyed | Repair], layer: int | None, edits: Sequence[Edit]) -> Any:
    """An editor of the base that knows the irrelevant prompts."""
    editor = kind("random-llama", layer=layer, seed=context.seed)
    editor.build(base, resolve_layer(base.model, layer))
    editor.to(base.model.device)
    editor.prepare(*make_stream(context, edits, max_irrelevant=128).irrelevant_parts(editor)[:2])
    return editor


def measured(editor: Any, edits: Sequence[Edit], further: Sequence[Edit]) -> dict[str, Any]:
    """Write all edits but those that warm up, in full batches; then one batch of further ones, counting waits."""
    device, base = editor.edited.device, editor.base
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
    taken: list[int] = []
    waits, inside = waited(device, lambda: taken.append(write(editor, further[:size])[0].steps))
    return found | {"steps of one batch": taken[0], "waits": waits, "in the steps": inside}


LOOPS = ("inner_loop.py", "descend"), ("dense.py", "train")
"""Where inner steps are taken."""


def waited(device: torch.device, call: Callable[[], Any]) -> tuple[int | None, int | None]:
    """How often a call waits for the GPU, in all and inside the loop of the inner steps; None without one."""
    if device.type != "cuda":
        call()
        return None, None
    seen: list[bool] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            frames = [(Path(frame.filename).name, frame.name) for frame in traceback.extract_stack()]
            seen.append(any(loop in frames for loop in LOOPS))

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return len(seen), sum(seen)
