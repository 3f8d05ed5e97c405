"""The editing methods, one per file. Importing this package makes all of them known to the command line."""

from .base import REGISTRY, Editor, editor_class, make_editor, register
from .repair import Repair
from .rlsedit import RLSEdit

__all__ = ["REGISTRY", "Editor", "RLSEdit", "Repair", "editor_class", "make_editor", "register"]
