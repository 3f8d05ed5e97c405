"""`python -m repair_lightning.compare`, see `commands.compare`."""

from repair_lightning.commands.compare import command

if __name__ == "__main__":
    command()
