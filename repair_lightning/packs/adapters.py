"""Shards as LoRA adapters, which `peft` and inference servers load; written here without `peft`.

LoRA (arXiv 2106.09685) adds `x A^T B^T` to what a matrix puts out, with A (r, F) and B (D, r): what a shard adds too. A
low-rank shard has these factors; a dense one is factored, at its numerical rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from repair_lightning.errors import ConfigError
from repair_lightning.memory.routers import make_router
from repair_lightning.memory.shards import AnyShard, LowRankShard
from repair_lightning.packs.pack import Pack, PackedModel
from repair_lightning.storage.files import replace_bytes, write_json
from repair_lightning.texts.naming import named_in
from repair_lightning.types import Edit

ADAPTERS_FOLDER, ROUTER_FILE = "adapters", "router.json"
HOW_TO_CHOOSE = (
    "A prompt takes the adapter of the edit whose subject it names and of which it asks the same, in whatever words, "
    "and no adapter where there is no such edit; `repair-lightning serve` is an implementation."
)


def require_additive(pack: Pack) -> None:
    """ConfigError where an edit of a pack is anything but a shard that adds to W_v."""
    router = make_router(pack.config["router"]["name"])
    remedy = "leave --peft out"
    if router.quotes or router.prefaces:
        kept = "as texts"
    elif pack.weights:
        kept, remedy = "in the base's own W_v", "give --merged instead"
    elif any(key.endswith(".value") for key in pack.part("shard.")):
        kept = "as outputs that replace those of W_v"
    else:
        return
    words = f"--peft takes edits as shards that add to W_v, and editor '{pack.config['editor']}' keeps them {kept}"
    raise ConfigError(f"{words}; {remedy}")


def factored(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (D, R) and (R, F) of a matrix (D, F), of the least rank R >= 1 that gives it up to float32's rounding."""
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = max(1, int((sizes > torch.finfo(torch.float32).eps * sizes[0]).sum()))
    roots = sizes[:rank].sqrt()
    return (left[:, :rank] * roots).float(), (roots[:, None] * right[:rank]).float()


def factors_of(shard: AnyShard) -> tuple[Tensor, Tensor]:
    """LoRA's B (D, r) and A (r, F) of a shard that adds to W_v."""
    return shard.factors() if isinstance(shard, LowRankShard) else factored(shard.delta)


def write_adapter(folder: Path, left: Tensor, right: Tensor, config: dict[str, Any]) -> int:
    """Write the factors (D, r) and (r, F) as `peft` reads them, for the one module that `config` names; returns bytes.

    A scale of one, whatever the rank: `lora_alpha` is `r`.
    """
    (module,), rank = config["target_modules"], left.shape[1]
    parts = {"lora_A": right, "lora_B": left}
    tensors = {f"base_model.model.{module}.{part}.weight": t.cpu().contiguous() for part, t in parts.items()}
    content = save(tensors, {"format": "pt"})
    replace_bytes(folder / "adapter_model.safetensors", content)
    write_json(folder / "adapter_config.json", config | {"r": rank, "lora_alpha": rank})
    return len(content)


@torch.no_grad()
def write_adapters(model: PackedModel, edits: Sequence[Edit], folder: Path) -> dict[str, int]:
    """Write the shards that own `edits` as adapters into a folder, with what says who takes which; returns how many
    there are, their highest rank, their bytes, and how many are larger than their dense matrices would be."""
    (rows, columns), value = model.memory.shape, model.split.value
    module = next(name for name, found in model.base.named_modules() if found is value)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base.name_or_path,
        "target_modules": [module],  # its full name, so no other; SGLang reads no regular expression
        "fan_in_fan_out": not isinstance(value, nn.Linear),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    owners: dict[str, int] = {edit.id: model.ledger.owner_of(edit.id) for edit in edits}  # type: ignore[misc]
    ranks, sizes = [], []
    for shard in sorted(set(owners.values())):
        left, right = factors_of(model.memory[shard])
        ranks.append(left.shape[1])
        sizes.append(write_adapter(folder / ADAPTERS_FOLDER / str(shard), left, right, config))
    router = {
        "how_to_choose": HOW_TO_CHOOSE,
        "base": model.card["base"],
        "layer": model.layer,
        "module": module,
        "router": {"name": model.router.name, "options": model.router.options()},
        "edits": _who_takes_which(model, edits, owners),
    }
    write_json(folder / ROUTER_FILE, router)
    larger = sum(rank * (rows + columns) > rows * columns for rank in ranks)
    return {"adapters": len(ranks), "rank": max(ranks), "bytes": sum(sizes), "larger_than_dense": larger}


def _who_takes_which(model: PackedModel, edits: Sequence[Edit], owners: Mapping[str, int]) -> list[dict[str, Any]]:
    """For each edit what it is about, its adapter, and the edit's limit and the shard's threshold in the router, where
    that has them."""
    state, found = model.router.state_dict(), []
    keys = state.get("ids", state.get("shards", ()))  # of edits or of shards
    limits = dict(zip(keys, state.get("limits", torch.zeros(0)).tolist(), strict=True))
    thresholds = state.get("thresholds", {})
    for edit in edits:
        asked, owner = model.forms.asked(edit.prompt), owners[edit.id]
        numbers = {"limit": limits.get(edit.id, limits.get(owner)), "threshold": thresholds.get(str(owner))}
        row = {"id": edit.id, "prompt": edit.prompt, "asked": asked, "subject": edit.subject or named_in(asked)}
        row |= {"target": edit.target, "adapter": f"{ADAPTERS_FOLDER}/{owner}"}
        found.append(row | {name: number for name, number in numbers.items() if number is not None})
    return found
