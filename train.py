"""Run an edit stream: `python train.py --config NAME_OR_PATH [--model.base DIR] [--data.path FILE] ...`."""

from pathlib import Path

import callbacks
from repair_lightning.commands.cli import EditCLI, finish, guarded

CALLBACKS = {
    "gate": callbacks.ProbeGate,
    "monitor": callbacks.ErrorSampleMonitor,
    "dashboard": callbacks.RoutingDashboard,
    "feedback": callbacks.PruneAndRetrigger,
    "scoreboard": callbacks.Scoreboard,
    "merge": callbacks.LossAwareTiesMerge,
    "progress": callbacks.StreamProgress,
}


def main() -> None:
    """Load, edit, score, and write everything to the run directory."""
    cli = EditCLI(CALLBACKS, configs=[Path(__file__).parent / "configs"])
    cli.load()
    cli.fit()
    finish(cli)


if __name__ == "__main__":
    guarded(main, resumes=True)
