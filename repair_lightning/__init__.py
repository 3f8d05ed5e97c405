"""REPAIR-Lightning: correct a language model while it is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repair_lightning.packs.pack import PackedModel, load_edited, restore_editor
    from repair_lightning.serving.live import LiveModel, edit

__version__ = "0.1.0"
__all__ = ["LiveModel", "PackedModel", "__version__", "edit", "load_edited", "restore_editor"]


def __getattr__(name: str) -> Any:
    """Load heavy parts when they are first asked for."""
    if name in ("PackedModel", "load_edited", "restore_editor"):
        from repair_lightning.packs import pack as packs

        return getattr(packs, name)
    if name in ("LiveModel", "edit"):
        from repair_lightning.serving import live

        return getattr(live, name)
    raise AttributeError(f"module 'repair_lightning' has no attribute '{name}'")
