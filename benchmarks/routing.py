"""What does the router find where memories are many, and what does a prompt cost? Ms are of all of `route` per prompt.

*Activation router*: synthetic dense shards of 128 x 512, eight edits each, four shards about each topic, at one and at
two levels in the same process, interleaved. *Recall*: of the prompts that one level sends to a shard, the share that
two levels send to the same one; *base*: the same of the others.

*Key router*: one router that grows by edits made from the first records about invented names. *Own*, *recall*, *base*:
of edits asked again in their own words and in the records' other words that reach their shard, and of unrelated prompts
that the base keeps, in per cent. *Rephrased* and *unrelated*: prompts that nobody has asked before; *searched*:
rephrases whose question the base has read. *Calibrating*, *loading*: seconds for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.machine import interleaved, seconds_of
from benchmarks.report import Rows
from benchmarks.streams import inventing, loaded, make_stream, records
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import ActivationRouter, Anchor, KeyRouter
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.texts import asking
from repair_lightning.types import BASE, Edit

SHAPE = (128, 512)
"""(D, F) of the synthetic shards: 4,096 of them take 1 GiB."""
PER_SHARD = 8
PROMPTS, BATCH = 512, 64
NEVER = 1 << 40
"""Two levels from so many on: one level."""
_CHUNK = 5_000
"""Edits that arrive at once."""
_TIMED = 128
"""Most calls that are timed of one kind."""
NOWHERE = SideMemory((1, 1))


def run_part(context: Context) -> dict[str, Rows]:
    """A row per size of bank, and one per number of edits."""
    banks = [bank_row(size, context) for size in context.banks]
    return {"Activation router": banks, "Key router": list(key_rows(context))}


# -- shards ------------------------------------------------------------------------------------------------------------


def bank_row(size: int, context: Context) -> dict[str, Any]:
    """A bank of `size` shards, asked rephrases of their edits and prompts about nothing of them."""
    memory, owned, asked = synthetic_bank(size, context.seed)
    router = ActivationRouter()
    background, unrelated = torch.randn(2, PROMPTS, SHAPE[1], generator=torch.Generator().manual_seed(context.seed + 1))
    router.calibrate(memory, {shard: plain_query(own) for shard, own in owned.items()}, plain_query(background))
    prompts = plain_query(torch.cat([asked, unrelated]))
    exact, found = (at_level(router, memory, prompts, level)().memory for level in (NEVER, 1))
    fires, same = exact != BASE, 100 * (exact == found).float()
    row: dict[str, Any] = {"shards": size, "recall": float(same[fires].mean()), "base": float(same[~fires].mean())}
    for batch in (1, BATCH):
        part = prompts.rows(slice(0, batch))
        calls = {name: at_level(router, memory, part, level) for name, level in (("one", NEVER), ("two", 1))}
        seconds = interleaved(calls, max(3, 5 * context.repeats))
        one, two = (median(seconds[name]) for name in calls)
        levels = {"one level ms": 1e3 * one / batch, "two levels ms": 1e3 * two / batch, "ratio": two / one}
        row |= {f"{name}, batch {batch}": value for name, value in levels.items()}
    return row


def synthetic_bank(size: int, seed: int) -> tuple[SideMemory, dict[int, Tensor], Tensor]:
    """Shards that answer the activations of their own edits, four of them about each topic; those activations by shard;
    and other wordings of `PROMPTS` edits.

    A shard is the sum of its edits' `g a^T` with random outputs g, as gradient steps leave it, under noise of a third
    of its size.
    """
    generator = torch.Generator().manual_seed(seed)
    width, inner = SHAPE
    topics = torch.randn(max(1, size // 4), inner, generator=generator)
    memory, owned = SideMemory(SHAPE), {}
    for _ in range(size):
        shard = memory.open_shard()
        owned[shard] = topics[shard % len(topics)] + torch.randn(PER_SHARD, inner, generator=generator)
        delta = torch.randn(width, PER_SHARD, generator=generator) @ owned[shard] / inner
        noise = torch.randn(width, inner, generator=generator)
        memory[shard].delta.data.copy_(delta + noise * (delta.norm() / noise.norm() / 3))
    every = torch.cat([*owned.values()])
    picked = every[torch.randint(len(every), (PROMPTS,), generator=generator)]
    return memory, owned, picked + 0.7 * torch.randn(PROMPTS, inner, generator=generator)


def plain_query(activations: Tensor) -> Query:
    """Prompts of one token with these activations (B, F) and nothing else."""
    one = torch.ones(len(activations), 1, dtype=torch.bool)
    return Query(("",) * len(activations), one, activations[:, None, :0], activations[:, None])


def at_level(router: ActivationRouter, memory: SideMemory, prompts: Query, two_level_from: int) -> Callable[[], Choice]:
    """Routing with two levels from so many shards on."""

    @torch.no_grad()
    def route() -> Choice:
        router.two_level_from = two_level_from
        return router.route(prompts, memory)

    return route


# -- keys --------------------------------------------------------------------------------------------------------------


def key_rows(context: Context) -> Iterator[dict[str, Any]]:
    """One router that edits keep arriving at, looked at whenever it holds so many."""
    known = said_again(context)
    invented = inventing(known, context.seed)
    router, background, unrelated = key_router(context, known)
    add(router, known, 0)
    for size in sorted(context.keyed):
        while len(known) < size:
            new = list(islice(invented, min(_CHUNK, size - len(known))))
            add(router, new, len(known))
            known += new
        calibrating = seconds_of(lambda: router.calibrate(NOWHERE, {}, Query.of_texts(background)))
        asked = random.Random(size).sample(range(len(known)), min(PROMPTS, len(known)))
        own, rephrased = [known[i].prompt for i in asked], [known[i].rephrases[0] for i in asked]
        state = router.state_dict()
        yield {
            "edits": size,
            "own": reached(router, own, asked),
            "recall": reached(router, rephrased, asked),
            "base": reached(router, unrelated, [BASE] * len(unrelated)),
            **costs(router, rephrased, unrelated, 1),
            **costs(router, rephrased, unrelated, BATCH),
            "calibrating": calibrating,
            "loading": seconds_of(lambda state=state: KeyRouter().load_state_dict(state)),  # type: ignore[misc]
        }


def said_again(context: Context) -> list[Edit]:
    """The first records whose prompt and a rephrase name the subject, each with that rephrase alone."""
    found = []
    for edit in records(context):
        named = [text for text in (edit.prompt, *edit.rephrases) if edit.subject and edit.subject in text]
        if len(named) > 1 and named[0] == edit.prompt:
            found.append(Edit(edit.id, edit.prompt, edit.target, edit.subject, (named[1],)))
    return found[:PROMPTS]


def key_router(context: Context, edits: Sequence[Edit]) -> tuple[KeyRouter, list[str], list[str]]:
    """A router that knows what is common, with a real base that reads for it; irrelevant prompts to calibrate it by,
    and others."""
    editor = loaded(context)
    background, unrelated, _ = make_stream(context, edits).irrelevant_parts(editor)
    editor.prepare(background, background)
    assert isinstance(editor.router, KeyRouter)
    return editor.router, background, unrelated


def add(router: KeyRouter, edits: Sequence[Edit], first: int) -> None:
    """Make them edits of the router, each with a shard of its own; the first one's has this number."""
    texts, places = [edit.prompt for edit in edits], range(first, first + len(edits))
    anchors = [Anchor(str(edit.subject), edit.prompt) for edit in edits]
    router.add([str(place) for place in places], anchors, Query.of_texts(texts), places)


def reached(router: KeyRouter, texts: Sequence[str], shards: Sequence[int]) -> float:
    """The share of texts that the router sends to their shards, in per cent."""
    return 100 * float((router.route(Query.of_texts(texts), NOWHERE).memory == torch.tensor(shards)).float().mean())


def costs(router: KeyRouter, rephrased: Sequence[str], unrelated: Sequence[str], batch: int) -> dict[str, float]:
    """Median milliseconds per prompt, `batch` at once; no text is remembered, but what was read of the searched."""
    spent: dict[str, list[float]] = {"rephrased": [], "searched": [], "unrelated": []}
    for names, texts in ((("rephrased", "searched"), rephrased), (("unrelated",), unrelated)):
        for part in [texts[at : at + batch] for at in range(0, len(texts), batch)][:_TIMED]:
            router._vectors_of.clear()
            for name in names:
                asking.windows.cache_clear()
                asking._short_words.cache_clear()
                call = partial(router.route, Query.of_texts(part), NOWHERE)
                spent[name].append(1e3 * seconds_of(call) / len(part))
    return {f"{name} ms, batch {batch}": median(times) for name, times in spent.items()}
