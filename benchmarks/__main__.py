"""`python -m benchmarks [PART ...] [options]`: measure, print, and write JSON and a page of tables."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.context import Context, parse
from benchmarks.machine import describe, use_threads


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for, one after the other; a part that fails does not stop the others."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with tempfile.TemporaryDirectory(prefix="repair-benchmarks-") as work:
        parts, context = parse(argv, Path(work))
        use_threads(context.threads)
        failed = [part for part in parts if not measured(part, context, argv)]
    return int(bool(failed))


def measured(part: str, context: Context, argv: Sequence[str]) -> bool:
    """Measure one part, save it, print it and bring the page up to date; false where it failed."""
    from rich.console import Console
    from rich.markdown import Markdown

    from benchmarks import report

    told = Console(stderr=True)
    told.print(f"{part} ...", style="bold", highlight=False)
    machine, start = describe(context.threads), time.perf_counter()
    try:
        result = report.module_of(part).run_part(context)
    except Exception:  # whatever it is, it is printed whole, the exit code says it, and the other parts are measured
        told.print_exception(max_frames=8)
        return False
    report.save(context, part, result, machine | {"took_seconds": time.perf_counter() - start}, argv)
    console = Console(width=max(told.width, report.WIDTH))
    console.print(Markdown(report.tables(part, result)))
    told.print(f"Everything is in {report.write_page(context.out)} and the JSON files beside it.", highlight=False)
    return True


if __name__ == "__main__":
    sys.exit(main())
