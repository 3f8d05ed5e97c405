"""Run an edit stream: `python train.py --config NAME_OR_PATH [--model.base DIR] [--data.path FILE] ...`."""

import sys

from repair_lightning.starting import uncollected

with uncollected():
    from callbacks import CALLBACKS
    from repair_lightning.commands.cli import guarded, train


def main() -> None:
    """Load, edit, score, and write everything to the run directory."""
    train(CALLBACKS, sys.argv[1:], "train.py")


if __name__ == "__main__":
    guarded(main, resumes=True)
