"""The editing methods, one per file. Importing this package makes all of them known to the command line."""

from .base import REGISTRY, Editor, editor_class, make_editor, register
from .defer import Defer
from .ft import FT
from .ft_ewc import FTEWC
from .grace import GRACE
from .icl import InContext
from .keyed import Keyed
from .lookup import Lookup
from .memit import MEMIT
from .mend import MEND
from .repair import Repair
from .rls_repair import RLSRepair
from .rlsedit import RLSEdit
from .rome import ROME
from .ultraedit import UltraEdit
from .wise import WISE

__all__ = [
    "FT",
    "FTEWC",
    "GRACE",
    "MEMIT",
    "MEND",
    "REGISTRY",
    "ROME",
    "WISE",
    "Defer",
    "Editor",
    "InContext",
    "Keyed",
    "Lookup",
    "RLSEdit",
    "RLSRepair",
    "Repair",
    "UltraEdit",
    "editor_class",
    "make_editor",
    "register",
]
