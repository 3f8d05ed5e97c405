"""Rebuild or check the small world: ``python -m repair_lightning.world {build,check}``."""

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from repair_lightning.world import base_dir
from repair_lightning.world.base import Recipe, build_base
from repair_lightning.world.check import check_base
from repair_lightning.world.edits import make_edits, make_irrelevant, write_jsonl
from repair_lightning.world.facts import build_world


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m repair_lightning.world", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="the world's seed (default: %(default)s)")
    common.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    commands = parser.add_subparsers(required=True)
    builder = commands.add_parser("build", parents=[common], help="rebuild tokenizer, base, edits and irrelevant")
    builder.add_argument(
        "--out", type=Path, default=base_dir().parent, help="folder to write to (default: the package's)"
    )
    builder.add_argument("--epochs", type=int, default=Recipe.epochs, help="training epochs (default: %(default)s)")
    builder.set_defaults(command=build)
    checker = commands.add_parser("check", parents=[common], help="measure the accuracies of the base")
    checker.add_argument("--dir", type=Path, default=base_dir(), help="the base's folder (default: the package's)")
    checker.add_argument("--sample", type=int, default=1_000, help="questions of each kind (default: %(default)s)")
    checker.set_defaults(command=check)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options.command(options)


def build(options: argparse.Namespace) -> int:
    """Write edits, irrelevant questions, tokenizer and base model of a seed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    world = build_world(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(make_edits(world, options.seed), options.out / "edits.jsonl")
    write_jsonl(make_irrelevant(world, options.seed), options.out / "irrelevant.jsonl")
    torch.manual_seed(options.seed)
    build_base(world, options.out / "base-model", Recipe(epochs=options.epochs), random.Random(options.seed))
    return 0


def check(options: argparse.Namespace) -> int:
    """Print a table of accuracies; status 1 if one is below what is required."""
    scores = check_base(options.dir, build_world(options.seed), options.sample, random.Random(options.seed))
    print(f"{'questions':<12}{'exact':>12}{'accuracy':>10}{'required':>10}")
    for score in scores:
        exact = f"{score.correct}/{score.total}"
        print(f"{score.kind:<12}{exact:>12}{score.accuracy:>10.2%}{score.required:>10.0%}")
    return int(any(score.accuracy < score.required for score in scores))


if __name__ == "__main__":
    sys.exit(main())
