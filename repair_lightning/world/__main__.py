"""Rebuild or check the small world: ``python -m repair_lightning.world {build,check}``."""

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from repair_lightning.world import base_dir
from repair_lightning.world.base import Recipe, build_base, check_base
from repair_lightning.world.facts import build_world, make_edits, make_irrelevant, write_jsonl


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 1 if an accuracy is below what is required."""
    parser = argparse.ArgumentParser(
        prog="python -m repair_lightning.world",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("command", choices=["build", "check"], help="rebuild everything, or measure the base")
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, default=base_dir().parent, help="build: folder to write to")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="build: training epochs")
    parser.add_argument("--dir", type=Path, default=base_dir(), help="check: the base's folder")
    parser.add_argument("--sample", type=int, default=1_000, help="check: questions of each kind")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    world, rng = build_world(options.seed), random.Random(options.seed)
    if options.command == "build":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        options.out.mkdir(parents=True, exist_ok=True)
        write_jsonl(make_edits(world, options.seed), options.out / "edits.jsonl")
        write_jsonl(make_irrelevant(world, options.seed), options.out / "irrelevant.jsonl")
        torch.manual_seed(options.seed)
        build_base(world, options.out / "base-model", Recipe(epochs=options.epochs), rng)
        return 0
    scores = check_base(options.dir, world, options.sample, rng)
    print(f"{'questions':<12}{'exact':>12}{'accuracy':>10}{'required':>10}")
    for score in scores:
        exact = f"{score.correct}/{score.total}"
        print(f"{score.kind:<12}{exact:>12}{score.accuracy:>10.2%}{score.required:>10.0%}")
    return int(any(score.accuracy < score.required for score in scores))


if __name__ == "__main__":
    sys.exit(main())
