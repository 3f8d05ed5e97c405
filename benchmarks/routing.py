"""Finding a prompt's memory among many: two levels against one, in what they find and in what they cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.context import Context
from benchmarks.report import Table, number, percent
from benchmarks.streams import made_up_names
from benchmarks.timing import interleaved, seconds_of
from repair_lightning.data.records import load_irrelevant, load_records
from repair_lightning.editors import Repair
from repair_lightning.memory.query import Choice, Query, canonical_ids
from repair_lightning.memory.routers import ActivationRouter, Anchor, KeyRouter, Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE, Edit
from repair_lightning.world import WORLD, edits_path, irrelevant_path

TITLE = "Routing: two levels against one"
SHAPE = (128, 512)
"""(D, F) of the synthetic shards: 4,096 of them take 1 GiB."""
PER_SHARD = 8
PROMPTS, BATCH = 512, 64
NEVER = 1 << 40
"""Two levels from so many on: one level."""
_RECORDS = 512
"""Records that are edits of the key router, and that the invented ones are made from."""
_CHUNK = 5_000
"""Edits that arrive at once."""


def run_part(context: Context) -> dict[str, Any]:
    """The activation router over banks of synthetic shards, the key router over ever more edits."""
    banks = [bank_row(size, context) for size in context.within_limit(context.banks)]
    sizes = context.within_limit(context.keyed)
    keyed = list(key_rows(sizes, context)) if sizes else []
    return {"shape": list(SHAPE), "per_shard": PER_SHARD, "prompts": PROMPTS, "batch": BATCH, "banks": banks} | {
        "keyed": keyed
    }


# -- shards ------------------------------------------------------------------------------------------------------------


def bank_row(size: int, context: Context) -> dict[str, Any]:
    """A bank of `size` shards: routed rephrases of their edits, and prompts about nothing of them."""
    memory, owned, asked = synthetic_bank(size, context.seed)
    router = ActivationRouter()
    background = plain_query(torch.randn(500, SHAPE[1], generator=torch.Generator().manual_seed(context.seed + 1)))
    router.calibrate(memory, {shard: plain_query(own) for shard, own in owned.items()}, background)
    unrelated = torch.randn(PROMPTS, SHAPE[1], generator=torch.Generator().manual_seed(context.seed + 2))
    prompts = plain_query(torch.cat([asked, unrelated]))
    router.two_level_from = 1
    first = seconds_of(lambda: router.route(prompts.rows(slice(0, 1)), memory))
    row = compared(router, memory, prompts, context.repeats)
    return {"shards": size, "sketching": first, "centroid": centroid_recall(router, memory, owned, prompts), **row}


def synthetic_bank(size: int, seed: int) -> tuple[SideMemory, dict[int, Tensor], Tensor]:
    """Shards that answer the activations of their own edits, four of them about each topic; those activations by shard;
    and other wordings of `PROMPTS` edits.

    A shard is the sum of its edits' `g a^T` with random outputs g, as gradient steps leave it, behind noise of a third
    of its size.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    width, inner = SHAPE
    topics = draw(max(1, size // 4), inner)
    memory, owned = SideMemory(SHAPE), {}
    for _ in range(size):
        shard = memory.open_shard()
        own = topics[shard % len(topics)] + draw(PER_SHARD, inner)
        delta = draw(width, PER_SHARD) @ own / inner
        noise = draw(width, inner)
        memory[shard].delta.data.copy_(delta + noise * (delta.norm() / noise.norm() / 3))
        owned[shard] = own
    every = torch.cat([*owned.values()])
    picked = every[torch.randint(len(every), (PROMPTS,), generator=generator)]
    return memory, owned, picked + 0.7 * draw(PROMPTS, inner)


def plain_query(activations: Tensor) -> Query:
    """Prompts of one token with these activations (B, F) and nothing else."""
    one = torch.ones(len(activations), 1, dtype=torch.bool)
    return Query(
        torch.zeros(len(activations), 0, dtype=torch.long), one, activations[:, None, :0], activations[:, None]
    )


def centroid_recall(router: ActivationRouter, memory: SideMemory, owned: dict[int, Tensor], prompts: Query) -> float:
    """What the same number of candidates would find, were they chosen by the centroids of the shards' own edits."""
    router.two_level_from = NEVER
    exact = router.route(prompts, memory).memory
    centroids = torch.stack([normalize(owned[shard].mean(0), dim=-1) for shard in memory.ids])
    near = prompts.activations[:, 0] @ centroids.T
    chosen = near.topk(min(router.candidates, len(centroids)), dim=-1).indices
    held = (torch.tensor(memory.ids)[chosen] == exact[:, None]).any(-1)
    return float(held[exact != BASE].float().mean())


# -- keys --------------------------------------------------------------------------------------------------------------


def key_rows(sizes: Sequence[int], context: Context) -> Iterator[dict[str, Any]]:
    """One router that edits keep arriving at, looked at whenever it holds so many."""
    source = Invented.from_base(context)
    router = KeyRouter(two_level_from=1)
    router.fit(source.background, source.embeddings)
    names = made_up_names(source.subjects, context.seed)
    known = list(source.own)
    source.add(router, known, 0)
    for size in sizes:
        while len(known) < size:
            new = [(source.pick(), next(names)) for _ in range(min(_CHUNK, size - len(known)))]
            source.add(router, new, len(known))
            known += new
        router.radii = torch.full((len(known),), router.caution)
        made = known[len(source.own) :]
        asked = random.Random(size).sample(made, min(PROMPTS, len(made)))
        rephrased = [source.query(about, rephrased=True) for about in (source.own, asked)]
        prompts, nowhere = Query.join([*rephrased, source.unrelated]), SideMemory((1, 1))
        filling = seconds_of(at_level(router, nowhere, prompts.rows(slice(0, 1)), 1))
        row = compared(router, nowhere, prompts, context.repeats)
        router.two_level_from = 1
        held = {"width": router.keys.shape[1], "cells": len(router.centroids), "filling": filling}
        yield {"edits": len(known), **held, **row}


@dataclass
class Invented:
    """Prompts about people who do not exist, by what a real base makes of the prompts that they are made from.

    The words are the invented prompt's own. Its last state is that of the prompt that it is made from, moved as another
    subject moves it: by half of another prompt's distance from the mean.
    """

    tokenizer: Any
    embeddings: Tensor
    patterns: list[Edit]
    states: Tensor
    rephrased: Tensor
    background: Query
    unrelated: Query
    draw: random.Random

    @classmethod
    def from_base(cls, context: Context) -> Invented:
        """The context's base, records and irrelevant prompts."""
        editor = Repair(context.base, seed=context.seed)
        editor.load()
        assert editor.base is not None
        path = edits_path() if context.data == WORLD else context.data
        edits = load_records(path, context.format, on_bad_record="skip").edits
        patterns = [edit for edit in edits if edit.subject and edit.subject in edit.prompt and said_again(edit)][
            :_RECORDS
        ]
        texts = [[edit.prompt for edit in patterns], [said_again(edit) for edit in patterns]]
        states, rephrased = (editor.edited.last_states(text).last_hidden().cpu() for text in texts)
        path = irrelevant_path() if context.irrelevant in (WORLD, "") else context.irrelevant
        irrelevant = load_irrelevant(path, context.irrelevant_prefix)[:1000]
        background, unrelated = (editor.edited.last_states(part) for part in (irrelevant[::2], irrelevant[1::2]))
        draw = random.Random(f"keys-{context.seed}")
        embeddings = editor.base.embeddings
        return cls(editor.tokenizer, embeddings, patterns, states, rephrased, background, unrelated, draw)

    @property
    def subjects(self) -> list[str]:
        """The subjects of the prompts that others are made from."""
        return [str(edit.subject) for edit in self.patterns]

    @property
    def own(self) -> list[tuple[int, str]]:
        """The records themselves, as (made from, name)."""
        return list(enumerate(self.subjects))

    def pick(self) -> int:
        """A prompt to make another from."""
        return self.draw.randrange(len(self.patterns))

    def query(self, about: Sequence[tuple[int, str]], rephrased: bool = False) -> Query:
        """Prompts as (made from, name), in the record's first words or in other ones."""
        made_from = [self.patterns[i] for i, _ in about]
        said = [said_again(edit) if rephrased else edit.prompt for edit in made_from]
        texts = [
            text.replace(str(edit.subject), name) for text, edit, (_, name) in zip(said, made_from, about, strict=True)
        ]
        index = torch.tensor([i for i, _ in about])
        other = torch.tensor([random.Random(name).randrange(len(self.patterns)) for _, name in about])
        states = (self.rephrased if rephrased else self.states)[index]
        moved = torch.tensor([name != str(edit.subject) for edit, (_, name) in zip(made_from, about, strict=True)])
        states = states + 0.5 * moved[:, None] * (self.states[other] - self.states.mean(0))
        one = torch.ones(len(about), 1, dtype=torch.bool)
        return Query(canonical_ids(self.tokenizer, texts), one, states[:, None], states[:, None, :0])

    def add(self, router: KeyRouter, about: Sequence[tuple[int, str]], first: int) -> None:
        """Make them edits of the router; each has a shard of its own."""
        names = canonical_ids(self.tokenizer, [name for _, name in about]).tolist()
        anchors = [Anchor(tuple(token for token in name if token >= 0), named=True) for name in names]
        places = range(first, first + len(about))
        router.add([str(i) for i in places], anchors, self.query(about), places)


def said_again(edit: Edit) -> str:
    """A rephrase that names the edit's subject; empty where there is none."""
    return next((text for text in edit.rephrases if edit.subject and edit.subject in text), "")


# -- both --------------------------------------------------------------------------------------------------------------


def compared(router: Any, memory: SideMemory, prompts: Query, repeats: int) -> dict[str, Any]:
    """What two levels say of the prompts that one level sends to a shard, and their cost at batch 1 and `BATCH`."""
    exact, found = (at_level(router, memory, prompts, level)() for level in (NEVER, 1))
    fires = exact.memory != BASE
    same = exact.memory == found.memory
    row: dict[str, Any] = {
        "fires": float(fires.float().mean()),
        "recall": float(same[fires].float().mean()),
        "base": float(same[~fires].float().mean()) if bool((~fires).any()) else None,
    }
    for batch in (1, BATCH):
        part = prompts.rows(slice(0, batch))
        calls = {name: at_level(router, memory, part, level) for name, level in (("one", NEVER), ("two", 1))}
        seconds = interleaved(calls, max(3, 5 * repeats))
        costs = {name: median(spent) / batch for name, spent in seconds.items()}
        row[f"batch_{batch}"] = costs | {"ratio": costs["two"] / costs["one"], "all": seconds}
    return row


def at_level(router: Router, memory: SideMemory, prompts: Query, two_level_from: int) -> Callable[[], Choice]:
    """Routing with two levels from so many shards or edits on."""

    @torch.no_grad()
    def route() -> Choice:
        router.two_level_from = two_level_from  # type: ignore[attr-defined]
        return router.route(prompts, memory)

    return route


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per bank, and one per number of edits."""
    sides = ("ms/prompt", "two levels", "ratio")
    costs = (*(f"{side}, batch 1" for side in sides), *(f"{side}, batch {result['batch']}" for side in sides))
    width, inner = result["shape"]
    banks = [
        (f"{row['shards']:,}", *found(row), f"{percent(row['centroid'])} %", *cost(row, result["batch"]))
        for row in result["banks"]
    ]
    note = (
        f"Dense shards of {width} x {inner}, {result['per_shard']} edits each, four about each topic; "
        f"{result['prompts']} rephrases and as many unrelated prompts. Recall: of the prompts that one level sends to "
        "a shard, the share that two levels send to the same; base: the same of the others. By centroids: were the "
        "candidates chosen so."
    )
    found_banks = Table(
        f"{TITLE}, activation router", ("shards", "recall", "base", "by centroids", *costs), banks, note
    )
    keyed = [
        (f"{row['edits']:,}", str(row["cells"]), *found(row), *cost(row, result["batch"]), number(row["filling"]))
        for row in result["keyed"]
    ]
    note = (
        f"Keys of width {result['keyed'][0]['width'] if result['keyed'] else 0}; rephrases of the first records and "
        f"of {result['prompts']} edits made from them about invented names, and unrelated prompts; all of `route`, "
        "encoding included. Radii as if nothing else came near (their calibration compares all pairs). Filling: "
        "seconds to put all keys into their cells after loading."
    )
    found_keys = Table(f"{TITLE}, key router", ("edits", "cells", "recall", "base", *costs, "filling s"), keyed, note)
    return [found_banks, found_keys]


def found(row: dict[str, Any]) -> tuple[str, ...]:
    """What two levels find, in per cent."""
    return (f"{percent(row['recall'])} %", f"{percent(row['base'])} %")


def cost(row: dict[str, Any], batch: int) -> tuple[str, ...]:
    """What both cost at batch 1 and `batch`, in ms per prompt, and their ratios."""
    sides = [row[f"batch_{size}"] for size in (1, batch)]
    return tuple(
        text
        for side in sides
        for text in (number(1e3 * side["one"]), number(1e3 * side["two"]), number(side["ratio"], "x"))
    )
