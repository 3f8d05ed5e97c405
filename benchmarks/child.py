"""One job in a process of its own, so that its memory is its own: `python -m benchmarks.child JOB.json OUT.json`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.context import REPOSITORY, Context


def run_child(context: Context, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a child process and return what it found; `job["kind"]` names one of `JOBS`."""
    context.work.mkdir(parents=True, exist_ok=True)
    source, target = context.work / f"{job['name']}.job.json", context.work / f"{job['name']}.out.json"
    source.write_text(json.dumps({"context": context.as_dict()} | job))
    run([sys.executable, "-m", "benchmarks.child", str(source), str(target)], context)
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def run(command: list[str], context: Context) -> None:
    """Run a command in the repository with the context's threads.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    count = str(context.threads)
    env = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def load_only(context: Context, job: dict[str, Any]) -> dict[str, Any]:
    """Import everything and load the base: the memory that a stream starts from."""
    from benchmarks.machine import peak_rss, rss
    from benchmarks.streams import Repair

    editor = Repair(context.base, seed=context.seed)
    editor.load()
    gc.collect()
    return {"rss": rss(), "peak": peak_rss(), "base_bytes": base_bytes(editor)}


def stream(context: Context, job: dict[str, Any]) -> dict[str, Any]:
    """Write a whole stream."""
    from benchmarks.machine import peak_rss, rss
    from benchmarks.streams import load_edits, run_stream, write_edits

    edits, made_up = load_edits(context, job["edits"])
    path = write_edits(context.work / f"{job['name']}.jsonl", edits)
    if job.get("warm"):
        warm = write_edits(context.work / f"{job['name']}-warm.jsonl", edits[:8])
        run_stream(context, warm, context.work, window=8)
        gc.collect()
    options = {"cache_mib": job["cache_mib"]} if "cache_mib" in job else {}
    editor, written = run_stream(context, path, context.work, job["window"], **options)
    return {
        "edits": len(written.edits),
        "invented": made_up,
        "windows": written.clock.windows,
        "ledger": written.ledger.counts(),
        "rss": rss(),
        "peak": peak_rss(),
        "base_bytes": base_bytes(editor),
        "shard_bytes": sum(tensor.nbytes for tensor in (*editor.memory.parameters(), *editor.memory.buffers())),
        "router_bytes": sum(getattr(value, "nbytes", 0) for value in editor.router.state_dict().values()),
        "cache_budget": editor.cache_mib << 20,
        "cache_used": getattr(editor.edited.prefixes, "used", None),
    }


def base_bytes(editor: Any) -> int:
    """Bytes of the base's weights, tied ones counted once."""
    return sum(parameter.nbytes for parameter in editor.base.model.parameters())


JOBS = {"load": load_only, "stream": stream}


def main(source: str, target: str) -> None:
    """Run the job of one file and write what it found to another."""
    job = json.loads(Path(source).read_text())
    context = Context.from_dict(job["context"])
    import torch

    torch.set_num_threads(context.threads)
    Path(target).write_text(json.dumps(JOBS[job["kind"]](context, job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
