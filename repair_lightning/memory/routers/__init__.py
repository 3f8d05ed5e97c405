"""Routers: which memory answers a prompt. A new one is a file with a class, and its place in `ROUTERS`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from repair_lightning.errors import ConfigError
from repair_lightning.memory.routers.activation import ActivationRouter
from repair_lightning.memory.routers.ball import BallRouter
from repair_lightning.memory.routers.base import Anchor, NobodyRouter, Router
from repair_lightning.memory.routers.gate import GateRouter
from repair_lightning.memory.routers.hybrid import HybridRouter
from repair_lightning.memory.routers.key import KeyRouter
from repair_lightning.memory.routers.lookup import LookupRouter
from repair_lightning.memory.routers.retrieval import FactsRouter, RetrievalRouter

_KINDS = (
    ActivationRouter,
    KeyRouter,
    HybridRouter,
    LookupRouter,
    BallRouter,
    GateRouter,
    RetrievalRouter,
    FactsRouter,
    NobodyRouter,
)
ROUTERS: Mapping[str, type[Router]] = {cls.name: cls for cls in _KINDS}


def make_router(name: str, **options: Any) -> Router:
    """A router by name, with its constructor's options.

    Raises:
        ConfigError: unknown name.
    """
    if name not in ROUTERS:
        close = difflib.get_close_matches(name, ROUTERS, n=1)
        hint = f" did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"unknown router '{name}':{hint} known: {', '.join(ROUTERS)}")
    return ROUTERS[name](**options)


__all__ = [
    "ROUTERS",
    "ActivationRouter",
    "Anchor",
    "BallRouter",
    "FactsRouter",
    "GateRouter",
    "HybridRouter",
    "KeyRouter",
    "LookupRouter",
    "NobodyRouter",
    "RetrievalRouter",
    "Router",
    "make_router",
]
