"""Score an edited model: `python evaluate.py --pack DIR --data.path FILE [--out FILE] [--quiet]`."""

import sys

from repair_lightning.starting import uncollected

with uncollected():
    from repair_lightning.commands.cli import guarded
    from repair_lightning.commands.evaluate import main

if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:], "evaluate.py"))
