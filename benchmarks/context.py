"""What every part is told. No torch in here: the number of threads is set before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = (
    *("editing", "flat", "roofline", "generation", "memory", "routing"),
    *("checkpoints", "merging", "recursion", "scaling", "serving", "stream100k", "gpu"),
)


def option(default: Any, help: str, quick: Any = None) -> Any:
    """A setting with a command line option; `quick` is its default under `--quick` where that differs."""
    return field(default=default, metadata={"help": help, "quick": default if quick is None else quick})


@dataclass(frozen=True)
class Context:
    """The settings of one run; each but `out`, `work` and `quick` is an option of the same name."""

    base: str = option("world", "a folder in Hugging Face format, or 'world' for the embedded base")
    data: str = option("world", "records to edit: a file or 'world'")
    format: str = option("jsonl", "their format, as in --data.format")
    irrelevant: str = option("world", "unrelated questions: a file, 'world', or '' to let the base write its own")
    irrelevant_prefix: str = option("", "put before each of them")
    threads: int = option(1, "CPU threads of torch, OpenMP and FAISS")
    seed: int = option(0, "of edits, vectors and runs")
    repeats: int = option(3, "interleaved repeats of what is short", quick=1)
    edits: int = option(100, "editing, scaling: edits per run", quick=8)
    sizes: tuple[int, ...] = option((100, 1_000, 10_000), "flat, recursion: stream lengths", quick=(50, 200))
    window: int = option(100, "flat, checkpoints: edits per window", quick=50)
    batch: int = option(128, "roofline: edits per batch", quick=32)
    batches: tuple[int, ...] = option((1, 8, 64), "generation: prompts per batch", quick=(1, 8))
    shards: tuple[int, ...] = option((1, 8, 64), "generation: shards in the bank", quick=(1, 8))
    tokens: int = option(16, "generation: new tokens per prompt")
    stream: int = option(1_000, "memory: edits of the stream", quick=100)
    cache_mib: tuple[int, ...] = option((64, 2048), "memory: budgets of the prefix cache, in MiB", quick=(4,))
    banks: tuple[int, ...] = option((16, 256, 4_096), "routing: shards in the bank", quick=(16, 64))
    keyed: tuple[int, ...] = option((1_000, 20_000, 100_000), "routing: edits in the key router", quick=(1_000,))
    checkpointed: tuple[int, ...] = option((1_000, 10_000, 100_000), "checkpoints: edits held", quick=(200, 1_000))
    merged: tuple[int, ...] = option((2, 4, 8), "merging: shards that become one", quick=(2,))
    per_shard: int = option(16, "merging: edits per shard", quick=4)
    densities: tuple[float, ...] = option((1.0, 0.5, 0.2), "merging: shares of a shard that are kept", quick=(1.0, 0.2))
    alphas: tuple[float, ...] = option((0.0, 1.0), "merging: sensitivities to the losses, per nat")
    ranks: tuple[int, ...] = option((1, 2), "scaling: numbers of processes")
    ranks_window: int = option(256, "scaling: edits per window", quick=8)
    served: int = option(1_000, "serving: edits that are there", quick=4)
    load_minutes: float = option(5.0, "serving: how long askers and the editor go on", quick=0.05)
    kills: int = option(20, "serving: kills meanwhile", quick=1)
    airports: int = option(100_000, "stream100k: edits about real subjects", quick=64)
    airports_window: int = option(128, "stream100k: edits per window", quick=16)
    airports_folder: str = option("", "stream100k: where it is written, and goes on; '' for a temporary folder")
    sampled: int = option(2_000, "stream100k: edits of each decile that are asked", quick=8)
    killed: int = option(2_000, "stream100k: edits of the stream that is killed and compared, 0 for none", quick=32)
    gpu_edits: int = option(256, "gpu: edits to write", quick=64)
    out: Path = Path("benchmarks/results/world")
    work: Path = Path("runs/benchmarks/work")
    quick: bool = False

    @property
    def name(self) -> str:
        """The base's short name."""
        return Path(self.base).name

    def as_dict(self) -> dict[str, Any]:
        """The settings that a result names, for JSON."""
        return {key: value for key, value in asdict(self).items() if key not in ("out", "work")}


def parse(argv: Sequence[str], work: Path) -> tuple[tuple[str, ...], Context]:
    """The parts to run and the settings, from a command line."""
    parser = _parser(quick="--quick" in argv)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    parts, out = given.pop("parts"), given.pop("out")
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if given["irrelevant"] is None:  # the world's questions would mean nothing to another base
        given["irrelevant"] = Context.irrelevant if given["data"] == Context.data else ""
    folder = REPOSITORY / ("runs/benchmarks" if given["quick"] else "benchmarks/results") / Path(given["base"]).name
    return parts or PARTS, Context(**given, work=work, out=out or folder)


def _parser(quick: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed, memory and scaling.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="everything small: does it run? (writes to runs/)")
    parser.add_argument("--out", type=Path, help="folder of the results instead of benchmarks/results/<base>")
    for item in fields(Context):
        if item.metadata:
            default: Any = item.metadata["quick"] if quick else item.default
            many = isinstance(default, tuple)
            kind = type(default[0] if many else default)
            nargs = "+" if many else None
            parser.add_argument(f"--{item.name}", type=kind, nargs=nargs, default=default, help=item.metadata["help"])
    parser.set_defaults(irrelevant=None)
    return parser
