"""What is worked out once per base and kept in the user's cache, by the hash of all that it depends on."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from repair_lightning.functional.relations import RelationSpace
from repair_lightning.models.gguf import cache_dir

log = logging.getLogger(__name__)


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
