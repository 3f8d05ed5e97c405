"""REPAIR-Lightning: correct a language model while it is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repair_lightning.packs import load_edited

__version__ = "0.1.0"
__all__ = ["__version__", "load_edited"]


def __getattr__(name: str) -> Any:
    """Load heavy parts when they are first asked for."""
    if name == "load_edited":
        from repair_lightning.packs import load_edited

        return load_edited
    raise AttributeError(f"module 'repair_lightning' has no attribute '{name}'")
