"""`python -m repair_lightning.compare`: `repair-lightning compare` by its earlier name, see `commands.compare`."""

import sys

from repair_lightning.starting import uncollected

with uncollected():
    from repair_lightning.commands.cli import guarded
    from repair_lightning.commands.compare import command

if __name__ == "__main__":
    guarded(lambda: command(sys.argv[1:], "python -m repair_lightning.compare"))
