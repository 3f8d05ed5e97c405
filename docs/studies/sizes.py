"""What a base and its edits take, by the base's shape: computed from its configuration, nothing is downloaded or run.

    python docs/studies/sizes.py

Prints the table of docs/sizes.md. The parameters are counted on the meta device, which has no memory. MB and GB are
decimal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def _shape(kind: str, d: int, f: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return {"model_type": kind, **sizes, **attention, "tie_word_embeddings": tied}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "`qa-llama`": _shape("llama", 288, 896, 12, 6, 6, 8192, True),
    "SmolLM2-135M": _shape("llama", 576, 1536, 30, 9, 3, 49152, True),
    "Qwen2.5-0.5B": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _shape("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "LLaMA-3-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "LLaMA-3-70B": _shape("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
"""Base -> its configuration, as far as it decides sizes."""
ROWS = 15
"""Rows of a low-rank shard: a target of four tokens and its end, in the three forms that an edit is written in."""
CAPACITY = 16
"""Edits that share a dense shard of `Repair`."""


def parameters(shape: Mapping[str, Any]) -> int:
    """How many parameters a base of this shape has."""
    given = dict(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    return sum(p.numel() for p in model.parameters())


def low_rank_bytes(shape: Mapping[str, Any], rows: int = ROWS) -> int:
    """A low-rank shard at most: factors (D, rows) and (rows, F), a byte per entry, and a scale in float32 per row."""
    return rows * (shape["hidden_size"] + shape["intermediate_size"] + 4)


def dense_bytes(shape: Mapping[str, Any]) -> int:
    """A dense shard without a mask: a matrix (D, F) in float32."""
    return 4 * shape["hidden_size"] * shape["intermediate_size"]


def _short(size: float) -> str:
    unit, divisor = next(((u, d) for u, d in (("GB", 1e9), ("MB", 1e6)) if size >= d), ("kB", 1e3))
    return f"{size / divisor:.3g} {unit}"


def table() -> str:
    """The table in Markdown: a row per base."""
    lines = ["| base | parameters | bf16 | f32 | `keyed`, an edit | `repair`, a shard | an edit of 16 |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, shape in SHAPES.items():
        count, dense = parameters(shape), dense_bytes(shape)
        sizes = (2 * count, 4 * count, low_rank_bytes(shape), dense, dense / CAPACITY)
        shown = f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
        lines.append(f"| {name} | {shown} | {' | '.join(map(_short, sizes))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
