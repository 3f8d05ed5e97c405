"""What every part is told. No torch in here: the number of threads is set before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = (
    "editing",
    "flat",
    "roofline",
    "generation",
    "memory",
    "clustering",
    "routing",
    "checkpoints",
    "merging",
    "recursion",
    "scaling",
    "gpu",
)
_UNSET: Any = None


def option(default: Any, help: str, quick: Any = _UNSET) -> Any:
    """A setting with a command line option; `quick` is its default under `--quick` where that differs."""
    return field(default=default, metadata={"help": help, "quick": default if quick is _UNSET else quick})


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
    edits: int = option(100, "editing: edits per run", quick=8)
    sizes: tuple[int, ...] = option((100, 1_000, 10_000), "flat, recursion: stream lengths to look at", quick=(50, 200))
    window: int = option(100, "flat, checkpoints: edits per window", quick=50)
    batch: int = option(128, "roofline: edits per batch", quick=32)
    batches: tuple[int, ...] = option((1, 8, 64), "generation: prompts per batch", quick=(1, 8))
    shards: tuple[int, ...] = option((1, 8, 64), "generation: shards in the bank", quick=(1, 8))
    tokens: int = option(16, "generation: new tokens per prompt")
    stream: int = option(1_000, "memory: edits of the stream", quick=100)
    cache_mib: tuple[int, ...] = option((64, 2048), "memory: budgets of the prefix cache, in MiB", quick=(4,))
    points: tuple[int, ...] = option(
        (1_000, 10_000, 100_000, 500_000), "clustering: vectors to cluster", quick=(1_000, 20_000)
    )
    banks: tuple[int, ...] = option((16, 256, 4_096), "routing: shards in the bank", quick=(16, 64))
    keyed: tuple[int, ...] = option((1_000, 20_000, 100_000), "routing: edits in the key router", quick=(1_000, 2_000))
    checkpointed: tuple[int, ...] = option(
        (1_000, 10_000, 100_000), "checkpoints: edits that are held", quick=(200, 1_000)
    )
    limit: int = option(0, "flat, recursion, clustering, routing, checkpoints: leave out sizes above this; 0 for none")
    merged: tuple[int, ...] = option((2, 4, 8), "merging: shards that become one", quick=(2,))
    per_shard: int = option(16, "merging: edits per shard", quick=4)
    densities: tuple[float, ...] = option((1.0, 0.5, 0.2), "merging: shares of a shard that are kept", quick=(1.0, 0.2))
    alphas: tuple[float, ...] = option(
        (0.0, 1.0, 10.0, 100.0), "merging: sensitivities to the losses, per nat, with an odd shard", quick=(0.0, 10.0)
    )
    ranks: tuple[int, ...] = option((1, 2), "scaling: numbers of processes")
    ranks_window: int = option(256, "scaling: edits per window", quick=8)
    gpu_edits: int = option(256, "gpu: edits to write", quick=64)
    out: Path = Path("benchmarks/results/world")
    work: Path = Path("runs/benchmarks/work")
    quick: bool = False

    @property
    def name(self) -> str:
        """The base's short name."""
        return Path(self.base).name

    def within_limit(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those sizes that `limit` lets through, smallest first."""
        return tuple(sorted(size for size in sizes if not self.limit or size <= self.limit))

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Context:
        """The inverse of :meth:`as_dict`."""
        known: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        return cls(**{**known, "out": Path(known["out"]), "work": Path(known["work"])})


def parse(argv: Sequence[str], work: Path) -> tuple[tuple[str, ...], Context]:
    """The parts to run and the settings, from a command line."""
    parser = _parser()
    given = parser.parse_args(argv)
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    settings = {
        item.name: _choice(getattr(given, item.name), item.metadata["quick"] if given.quick else item.default)
        for item in fields(Context)
        if item.metadata
    }
    if given.irrelevant is None and settings["data"] != Context.data:
        settings["irrelevant"] = ""  # the world's questions would mean nothing to another base
    context = Context(**settings, work=work, quick=given.quick)
    folder = Path("runs/benchmarks" if given.quick else "benchmarks/results") / context.name
    return tuple(given.parts or PARTS), replace(context, out=Path(given.out or REPOSITORY / folder))


def _choice(given: Any, default: Any) -> Any:
    if given is None:
        return default
    return tuple(given) if isinstance(given, list) else given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed, memory and scaling.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="everything small: does it run? (writes to runs/)")
    parser.add_argument("--out", help="folder of the results (default: benchmarks/results/<base>)")
    for item in fields(Context):
        if item.metadata:
            default: Any = item.default
            many = isinstance(default, tuple)
            kind = type(default[0] if many else default)
            shown = " ".join(map(str, default)) if many else default
            text = f"{item.metadata['help']} (default: {shown!r})" if shown != "" else item.metadata["help"]
            parser.add_argument(f"--{item.name}", type=kind, nargs="+" if many else None, help=text)
    return parser
