"""The editing methods, one per file. Importing this package makes all of them known to the command line."""

from .base import REGISTRY, Editor, editor_class, make_editor, register
from .icl import InContext
from .memit import MEMIT
from .repair import Repair
from .rls_repair import RLSRepair
from .rlsedit import RLSEdit
from .rome import ROME
from .ultraedit import UltraEdit

__all__ = [
    "MEMIT",
    "REGISTRY",
    "ROME",
    "Editor",
    "InContext",
    "RLSEdit",
    "RLSRepair",
    "Repair",
    "UltraEdit",
    "editor_class",
    "make_editor",
    "register",
]
