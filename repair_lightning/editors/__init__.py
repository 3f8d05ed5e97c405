"""The editing methods, one per file. Importing this package makes all of them known to the command line."""

from .base import REGISTRY as REGISTRY
from .base import Editor as Editor
from .base import editor_class as editor_class
from .base import make_editor as make_editor
from .base import register as register
from .defer import Defer as Defer
from .ft import FT as FT
from .ft_ewc import FTEWC as FTEWC
from .grace import GRACE as GRACE
from .icl import InContext as InContext
from .keyed import Keyed as Keyed
from .lookup import Lookup as Lookup
from .memit import MEMIT as MEMIT
from .mend import MEND as MEND
from .repair import Repair as Repair
from .rls_repair import RLSRepair as RLSRepair
from .rlsedit import RLSEdit as RLSEdit
from .rome import ROME as ROME
from .ultraedit import UltraEdit as UltraEdit
from .wise import WISE as WISE
