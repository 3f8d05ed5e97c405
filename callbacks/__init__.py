"""The closed loop as Lightning callbacks. They meet in the ledger and never call each other."""

from .error_monitor import ErrorSampleMonitor
from .probe_gate import ProbeGate
from .progress import StreamProgress
from .prune_retrigger import PruneAndRetrigger
from .routing_dashboard import RoutingDashboard
from .scoreboard import Scoreboard
from .ties_merge import LossAwareTiesMerge

__all__ = [
    "ErrorSampleMonitor",
    "LossAwareTiesMerge",
    "ProbeGate",
    "PruneAndRetrigger",
    "RoutingDashboard",
    "Scoreboard",
    "StreamProgress",
]
