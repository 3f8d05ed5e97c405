"""The editing methods. Importing this package makes all of them known to the command line."""

from .base import REGISTRY, Editor, editor_class, make_editor, register
from .defer import Defer
from .ft import FT, FTEWC
from .grace import GRACE
from .icl import InContext, Lookup
from .keyed import Keyed
from .lora import Lora
from .memit import MEMIT, ROME
from .mend import MEND
from .repair import Repair
from .rls_repair import RLSRepair
from .rlsedit import RLSEdit
from .ultraedit import UltraEdit
from .wise import WISE
