"""The closed loop as Lightning callbacks. They meet in the ledger and never call each other."""

from .error_monitor import ErrorSampleMonitor as ErrorSampleMonitor
from .probe_gate import ProbeGate as ProbeGate
from .progress import StreamProgress as StreamProgress
from .prune_retrigger import PruneAndRetrigger as PruneAndRetrigger
from .routing_dashboard import RoutingDashboard as RoutingDashboard
from .scoreboard import Scoreboard as Scoreboard
from .ties_merge import LossAwareTiesMerge as LossAwareTiesMerge

CALLBACKS = {
    "gate": ProbeGate,
    "monitor": ErrorSampleMonitor,
    "dashboard": RoutingDashboard,
    "feedback": PruneAndRetrigger,
    "scoreboard": Scoreboard,
    "merge": LossAwareTiesMerge,
    "progress": StreamProgress,
}
"""Those of every run, in their order, under the names of their options."""
