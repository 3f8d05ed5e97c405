"""`python -m benchmarks [PART ...] [options]`: measure, print, and write JSON, Markdown and a figure."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.context import Context, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for, one after the other; a part that fails does not stop the others."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with tempfile.TemporaryDirectory(prefix="repair-benchmarks-") as work:
        parts, context = parse(argv, Path(work))
        set_up(context.threads)
        failed = [part for part in parts if not measured(part, context, argv)]
    finish(context)
    return int(bool(failed))


def set_up(count: int) -> None:
    """Threads of OpenMP (before it is loaded), torch and FAISS; and no progress bars among the tables."""
    os.environ |= {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}
    import faiss
    import torch
    import transformers

    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    transformers.utils.logging.disable_progress_bar()


def measured(part: str, context: Context, argv: Sequence[str]) -> bool:
    """Measure one part, save it and print it; false where it failed."""
    from rich.console import Console

    from benchmarks import machine, report

    console = Console(stderr=True)
    console.print(f"{part} ...", style="bold", highlight=False)
    known, start = machine.describe(context.threads), time.perf_counter()
    try:
        result = importlib.import_module(f"benchmarks.{part}").run_part(context)
    except Exception:  # whatever it is, it is printed whole, the exit code says it, and the other parts are measured
        console.print_exception(max_frames=8)
        return False
    report.save(context, part, result | {"took_seconds": time.perf_counter() - start}, known, argv)
    report.show(report.tables_of(part, result))
    return True


def finish(context: Context) -> None:
    """The page and the figure of all that the folder holds."""
    from rich.console import Console

    from benchmarks import figure, report

    if not report.load(context.out):
        return
    drawn = figure.draw(context.out)
    page = report.write_markdown(context.out)
    names = ", ".join(file.name for file in (page, *drawn))
    Console(stderr=True).print(f"Everything is in {context.out}: JSON per part, {names}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
