"""What a served model costs and survives, over loopback: seconds from a correction's `POST` to its answer, tokens per
second of eight clients against one batch of plain `transformers`, what routing adds where no edited subject is named,
and a load of askers, one editor and kills.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.context import Context
from benchmarks.machine import seconds_of
from benchmarks.report import Rows
from benchmarks.streams import load_edits
from repair_lightning import edit
from repair_lightning.models.base import load_base
from repair_lightning.scoring.protocols import GREEDY
from repair_lightning.serving.live import begun
from repair_lightning.types import Edit

_CLIENTS = 8
_STORY = "Write a long story about {}."
_ABOUT = ("a lighthouse", "two foxes", "the moon", "a baker", "a storm", "an old clock", "the desert", "a river")
_ERRORS = (httpx.TransportError, httpx.TimeoutException)


def run_part(context: Context) -> dict[str, Rows]:
    """Two tables."""
    return {"Answers and corrections": [answers(context)], "Under load": [under_load(context)]}


class Server:
    """`repair-lightning serve` on a run's folder, in a process of its own."""

    def __init__(self, context: Context, folder: str) -> None:
        self.call = [sys.executable, "-m", "repair_lightning", "serve", "--base", context.base, "--run", folder]
        self.env = os.environ | {"OMP_NUM_THREADS": str(context.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.start()

    def start(self) -> None:
        """Start it; returns when it answers."""
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process: Any = subprocess.Popen([*self.call, "--port", "0"], env=self.env, **out)  # type: ignore[call-overload]
        found = re.search(r"at (http://\S+)", self.process.stdout.readline())
        assert found is not None, "the server did not start"
        self.http = httpx.Client(base_url=found[1], timeout=120)  # one per call would cost more than the call

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def post(self, path: str, **body: Any) -> Any:
        """A response's JSON."""
        response = self.http.post(path, json=body)
        response.raise_for_status()
        return response.json()

    def ask(self, prompt: str, model: str = "edited", tokens: int = 16) -> tuple[str, int]:
        """What is answered, and how many tokens that took."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        found = self.post("/v1/chat/completions", **body)
        return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


def answers(context: Context) -> dict[str, Any]:
    """Corrections one by one beside the edits that are there, then clients side by side."""
    known, further = _split(context)
    folder = str(context.work / "serving")
    live = edit(context.base, [_record(one) for one in known], run=folder)
    live.close()
    del live
    base = load_base(context.base)
    again: list[Any] = []
    started = seconds_of(lambda: again.append(begun(base, "keyed", {}, folder)))
    again[0].close()
    again[0].model.release()
    server = Server(context, folder)
    corrected = [_corrected(server, one) for one in further]
    plain = [seconds_of(lambda: server.ask("What is a comet made of?", "base")) for _ in range(12)]
    routed = [seconds_of(lambda: server.ask("What is a comet made of?")) for _ in range(12)]
    prompts = [_STORY.format(about) for about in _ABOUT]
    with ThreadPoolExecutor(_CLIENTS) as pool:
        for _ in range(2):  # the first time warms up
            begin = time.perf_counter()
            said = sum(tokens for _, tokens in pool.map(lambda prompt: server.ask(prompt, tokens=64), prompts))
            served = said / (time.perf_counter() - begin)
    server.kill()
    return {
        "edits": len(known),
        "s to start, the base there": started,
        "s per correction, median": median(seconds for seconds, _ in corrected),
        "right after it": sum(right for _, right in corrected) / len(corrected),
        "routing, times": median(routed) / median(plain),
        "tokens/s of 8 clients": served,
        "of transformers": served / _plain_pace(base, prompts),
    }


def _split(context: Context) -> tuple[list[Edit], list[Edit]]:
    found, _ = load_edits(context, context.served + 12)
    return found[: context.served], found[context.served :]


def _record(one: Edit) -> dict[str, Any]:
    return {"id": one.id, "prompt": one.prompt, "target": one.target, "subject": one.subject}


def _corrected(server: Server, one: Edit) -> tuple[float, bool]:
    """Seconds from the correction to its answer in chat, and whether that is right."""
    answer: list[str] = []

    def correct() -> None:
        server.post("/v1/edits", **_record(one))
        answer.append(server.ask(one.prompt)[0])

    seconds = seconds_of(correct)
    return seconds, answer[0].strip() == one.target


def _plain_pace(base: Any, prompts: Sequence[str]) -> float:
    """Tokens per second of the same prompts as one batch of `transformers`."""
    rows = [base.forms().ids(prompt) for prompt in prompts]
    width, stops = max(map(len, rows)), base.forms().stops
    ids = torch.tensor([[base.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": 64, "pad_token_id": base.tokenizer.pad_token_id, **GREEDY}
    found: list[Any] = []
    for _ in range(2):
        seconds = seconds_of(lambda: found.append(base.model.generate(ids, attention_mask=mask, **settings)))
    said = [next((i + 1 for i, id in enumerate(row) if id in stops), len(row)) for row in found[-1][:, width:].tolist()]
    return sum(said) / seconds


def under_load(context: Context) -> dict[str, Any]:
    """Eight askers and one editor for some minutes, and kills spread over them: what was lost, wrong or unanswered."""
    edits, _ = load_edits(context, 400)
    server, generator = Server(context, str(context.work / "load")), random.Random(context.seed)
    plain = {one.prompt: server.ask(one.prompt, "base", 12)[0] for one in edits[:40]}
    done: dict[str, Edit] = {}  # acknowledged, and never taken back
    counts: Counter[str] = Counter()
    end = threading.Event()

    def asking(seed: int) -> None:
        own = random.Random(seed)
        while not end.is_set():
            if own.random() < 0.5 and done:
                one = own.choice(list(done.values()))
                prompt, model, expected = one.prompt, "edited", one.target
            else:
                prompt, model = own.choice(list(plain)), "base"
                expected = plain[prompt]
            right = _counted(counts, partial(_says, server, prompt, model, expected))
            counts["wrong"] += right is False

    def editing() -> None:
        for one in edits:
            if end.is_set():
                return
            if _counted(counts, partial(_is_written, server, one)):
                done[one.id] = one
                counts["corrections"] += 1

    threads = [threading.Thread(target=asking, args=(seed,)) for seed in range(_CLIENTS)]
    threads.append(threading.Thread(target=editing))
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60 * context.load_minutes
    for left in range(context.kills, 0, -1):
        time.sleep(max(0.5, generator.uniform(0.5, 1.5) * max(0.0, until - time.monotonic()) / left / 2))
        acknowledged = set(done)
        server.kill()
        server.start()
        held = {id for id, status in _held(server).items() if status == "written"}
        counts["lost"] += len(acknowledged - held)
    time.sleep(max(0.0, until - time.monotonic()))
    end.set()
    for thread in threads:
        thread.join(timeout=180)
    hanging = sum(thread.is_alive() for thread in threads)
    counts["lost"] += len(set(done) - _held(server).keys())
    server.kill()
    names = ("answered", "clear errors", "corrections", "lost", "wrong")
    return {"kills": context.kills, **{name: counts[name] for name in names}, "without an answer": hanging}


def _says(server: Server, prompt: str, model: str, expected: str) -> bool:
    return server.ask(prompt, model, 12)[0].strip() == expected.strip()


def _is_written(server: Server, one: Edit) -> bool:
    return bool(server.post("/v1/edits", **_record(one))["data"][0]["status"] == "written")


def _held(server: Server) -> dict[str, str]:
    found: dict[str, str] = {}
    pages, page = 1, 1
    while page <= pages:
        answer = server.http.get("/v1/edits", params={"page": page}).json()
        found |= {one["id"]: one["status"] for one in answer["data"]}
        pages, page = answer["pages"], page + 1
    return found


def _counted(counts: Counter[str], ask: Callable[[], bool]) -> bool | None:
    """What a request says; None where it ended in an error, as it does when the server is killed."""
    try:
        found = ask()
    except (*_ERRORS, httpx.HTTPStatusError):
        counts["clear errors"] += 1
        time.sleep(0.2)
        return None
    counts["answered"] += 1
    return found
