"""The pack: an edited model's side memory as `repair_config.json`, `side_memory.safetensors` and the ledger.

Loading one reads JSON and safetensors only and never runs code. Of a masked shard only the open coordinates are stored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repair_lightning.data.ledger import Ledger
from repair_lightning.errors import RepairError
from repair_lightning.memory.routers import make_router
from repair_lightning.memory.side_memory import Shard, SideMemory
from repair_lightning.models.architectures import architecture_of, value_shape
from repair_lightning.models.base import Base, files_hash, load_base
from repair_lightning.models.edited import EditedModel

if TYPE_CHECKING:
    from repair_lightning.editors.base import Editor

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOLDED = "base.value_weight"
"""The base's W_v after a merge into it."""
LOW_RANK = "low_rank."
"""What the names of the low-rank shards' tensors begin with."""
CONFIG_FILE, WEIGHTS_FILE, LEDGER_FILE, MERGED_FOLDER = (
    "repair_config.json",
    "side_memory.safetensors",
    "ledger.parquet",
    "merged",
)


def save_pack(editor: Editor, folder: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write an editor's memory, router and ledger; returns the folder.

    Where a merge wrote into the base's own W_v, that matrix goes along, and the whole base beside it as a plain Hugging
    Face checkpoint that needs neither pack nor router.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assert editor.base is not None
    state = editor.router.state_dict()
    router = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    tensors = {f"router.{key}": value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    tensors |= shard_tensors(editor.memory)
    if editor.base_changed:
        tensors[FOLDED] = editor.edited.value_weight.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner alone
    config = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": files_hash([folder / WEIGHTS_FILE]),
        "editor": editor.editor_name,  # type: ignore[attr-defined]
        "base": {"name": editor.base.name, "sha256": editor.base.sha256},
        "layer": editor.layer,
        "shape": list(editor.memory.shape),
        "mask_ratio": editor.memory.mask_ratio,
        "next_shard": editor.memory.next_id,
        "shards": {str(shard): editor.memory[shard].generation for shard in editor.memory.ids},
        "router": {"name": editor.router.name, "options": editor.router.options(), "state": router},
        "provenance": dict(provenance),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    editor.ledger.to_parquet(folder / LEDGER_FILE)
    if editor.base_changed:
        editor.base.model.save_pretrained(folder / MERGED_FOLDER)
        editor.base.tokenizer.save_pretrained(folder / MERGED_FOLDER)
    return folder


def shard_tensors(memory: SideMemory) -> dict[str, Tensor]:
    """The dense shards' deltas, a masked one as its bit-packed mask and the values that the mask opens; the low-rank
    shards' factors."""
    states = ((shard, memory[shard].state_dict()) for shard in memory.ids)
    found = {f"shard.{shard}.{key}": value for shard, state in states for key, value in state.items()}
    found |= {f"{LOW_RANK}{key}": value for key, value in memory.low_rank_tensors().items()}
    return {key: value.cpu().contiguous() for key, value in found.items()}


def read_pack(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A pack's configuration and tensors.

    Raises:
        RepairError: no pack there, damaged, or of a version that this release does not read.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise RepairError(f"'{folder}' is no pack: it has no {CONFIG_FILE}; give the folder that train.py wrote")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        raise _damaged(folder, str(error)) from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise RepairError(f"pack '{folder}' has format version {version}; this release reads {FORMAT_VERSION}")
    if config.get("weights_sha256") != files_hash([folder / WEIGHTS_FILE]):
        raise _damaged(folder, f"{WEIGHTS_FILE} is not the file that {CONFIG_FILE} was written for")
    return config, tensors


def _damaged(folder: str | Path, problem: str) -> RepairError:
    return RepairError(f"pack '{folder}' is damaged: {problem.splitlines()[0]}; restore it from a copy")


def load_edited(
    folder: str | Path, base: str | None = None, precision: str = "auto", trust_remote_code: bool = False
) -> tuple[EditedModel, Any]:
    """An edited model and its tokenizer from a pack and the base that it was made with.

    Args:
        folder: the pack.
        base: the base's folder or hub name; None takes the name that the pack remembers.
        precision: of the base.
        trust_remote_code: let the base's repository run its own code.

    Raises:
        RepairError: the pack is damaged or belongs to another base.
    """
    config, tensors = read_pack(folder)
    model = open_pack(folder, config, tensors, base, precision, trust_remote_code)
    fold_into(model, tensors)
    return model, model.tokenizer


def open_pack(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: str | None = None,
    precision: str = "auto",
    trust_remote_code: bool = False,
) -> EditedModel:
    """The model of a pack that was read, before :func:`fold_into`: its base still has its own weights."""
    try:
        loaded = _base_of(config, base, precision, trust_remote_code)
        return _edited_from(config, tensors, loaded).eval()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{CONFIG_FILE} does not fit ({type(error).__name__}: {error})") from error


def fold_into(model: EditedModel, tensors: Mapping[str, Tensor]) -> bool:
    """Write a merged W_v into the base, where the pack holds one; returns whether it does."""
    if FOLDED not in tensors:
        return False
    model.value_weight.data.copy_(tensors[FOLDED])
    return True


def _edited_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor], loaded: Base) -> EditedModel:
    memory = memory_from(config, tensors)
    found = value_shape(architecture_of(loaded.model).value_module(loaded.model, config["layer"]))
    if found != memory.shape:
        raise ValueError(f"its shards are {memory.shape}, the value matrix of layer {config['layer']} is {found}")
    router = make_router(config["router"]["name"], **config["router"]["options"])
    of_router = {key[len("router.") :]: value for key, value in tensors.items() if key.startswith("router.")}
    router.load_state_dict(config["router"]["state"] | of_router)
    router.bind(loaded.embeddings)
    return EditedModel(loaded.model, loaded.tokenizer, memory.to(loaded.model.device), router, config["layer"])


def _base_of(config: Mapping[str, Any], base: str | None, precision: str, trust: bool) -> Base:
    loaded = load_base(base or config["base"]["name"], precision, trust)
    wanted = config["base"]["sha256"]
    if loaded.sha256 != wanted:
        raise RepairError(
            f"the pack belongs to base '{config['base']['name']}' ({wanted[:12]}), but '{loaded.name}' is "
            f"{loaded.sha256[:12]}; give the base that it was made with"
        )
    return loaded


def memory_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SideMemory:
    """The bank of shards that a pack holds."""
    shape = (int(config["shape"][0]), int(config["shape"][1]))
    memory = SideMemory(shape, config["mask_ratio"])
    memory.next_id = int(config["next_shard"])
    low_rank = {key[len(LOW_RANK) :]: value for key, value in tensors.items() if key.startswith(LOW_RANK)}
    if low_rank:
        memory.load_low_rank(low_rank)
    for name, generation in config["shards"].items():
        if name in memory.shards:
            continue
        start = f"shard.{name}."
        state = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        if not ({"delta"} <= state.keys() or {"mask", "values"} <= state.keys()):
            raise RepairError(f"the pack lacks shard {name}; restore it from a copy")
        shard = Shard(shape, generation=generation)
        shard.load_state_dict(state)
        memory.shards[name] = shard.requires_grad_(False)
    return memory


def load_ledger(folder: str | Path) -> Ledger:
    """The ledger that travels with a pack."""
    return Ledger.from_parquet(Path(folder) / LEDGER_FILE)
