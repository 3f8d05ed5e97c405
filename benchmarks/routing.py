"""Finding a prompt's memory among many: two levels against one for shards, an index by words for edits."""

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
from repair_lightning.editors import Repair
from repair_lightning.edits.records import load_irrelevant, load_records
from repair_lightning.functional.relations import RelationSpace
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import ActivationRouter, Anchor, KeyRouter, Router
from repair_lightning.memory.routers.base import Read
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.texts import asking
from repair_lightning.types import BASE, Edit
from repair_lightning.world import WORLD, edits_path, irrelevant_path

TITLE = "Routing among many"
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
_TIMED = 128
"""Most calls that are timed of one kind."""
NOWHERE = SideMemory((1, 1))


def run_part(context: Context) -> dict[str, Any]:
    """The activation router over banks of synthetic shards, the key router with ever more edits."""
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
    return Query(("",) * len(activations), one, activations[:, None, :0], activations[:, None])


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
    router = source.prepared(KeyRouter())
    names = made_up_names(source.subjects, context.seed)
    known = list(source.own)
    source.add(router, known, 0)
    for size in sizes:
        while len(known) < size:
            new = [(source.pick(), next(names)) for _ in range(min(_CHUNK, size - len(known)))]
            source.add(router, new, len(known))
            known += new
        held_out = Query.of_texts(source.background)
        calibrating = seconds_of(lambda held_out=held_out: router.calibrate(NOWHERE, {}, held_out))  # type: ignore[misc]
        asked = random.Random(size).sample(range(len(known)), min(PROMPTS, len(known)))
        state = router.state_dict()
        row = {
            "edits": len(known),
            **answered(router, source, known, asked),
            **costs(router, source, [source.said(known[i], rephrased=True) for i in asked]),
        }
        loading = seconds_of(lambda state=state: KeyRouter().load_state_dict(state))  # type: ignore[misc]
        yield row | {"calibrating": calibrating, "loading": loading}


def answered(
    router: KeyRouter, source: Invented, known: Sequence[tuple[int, str]], asked: Sequence[int]
) -> dict[str, float]:
    """Shares: of edits asked again in their own words and in others that reach their shard, of unrelated prompts that
    the base keeps."""
    own = torch.tensor(asked)
    found = {}
    for name, rephrased in (("own", False), ("recall", True)):
        texts = [source.said(known[i], rephrased) for i in asked]
        found[name] = float((router.route(Query.of_texts(texts), NOWHERE).memory == own).float().mean())
    kept = router.route(Query.of_texts(source.unrelated), NOWHERE).memory == BASE
    return found | {"base": float(kept.float().mean())}


def costs(router: KeyRouter, source: Invented, rephrased: Sequence[str]) -> dict[str, Any]:
    """Seconds per prompt that no one has asked before, one at a time and `BATCH` at once: of rephrases with the base's
    reading and without it, and of unrelated prompts."""
    found: dict[str, Any] = {}
    remembering = router.read
    for name, texts in (("rephrased", rephrased), ("searched", rephrased), ("unrelated", source.unrelated)):
        router.read = source.last_states if name == "rephrased" else remembering
        found[name] = {}
        for batch in (1, BATCH):
            spent = []
            for part in [texts[i : i + batch] for i in range(0, len(texts), batch)][:_TIMED]:
                forget_texts(router)
                query = Query.of_texts(part)
                spent.append(seconds_of(lambda query=query: router.route(query, NOWHERE)) / len(part))  # type: ignore[misc]
            found[name][f"batch_{batch}"] = {"median": median(spent), "all": spent}
    router.read = remembering
    return found


def forget_texts(router: KeyRouter) -> None:
    """What is remembered of texts, as if none had been asked before."""
    router._vectors_of.clear()
    for remembered in (asking.windows, asking._short_words):
        remembered.cache_clear()


class Remembering:
    """A base's reading of texts that reads each text once."""

    def __init__(self, read: Read) -> None:
        self.read, self.known = read, dict[str, Tensor]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The states (n, D) of texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, self.read(new), strict=True))
        return torch.stack([self.known[text] for text in texts])


@dataclass
class Invented:
    """Prompts about people who do not exist, in the words of real records, with a real base that reads them."""

    last_states: Read
    patterns: list[Edit]
    background: Sequence[str]
    unrelated: Sequence[str]
    draw: random.Random
    space: RelationSpace

    @classmethod
    def from_base(cls, context: Context) -> Invented:
        """The context's base, records and irrelevant prompts."""
        editor = Repair(context.base, seed=context.seed)
        editor.load()
        path = edits_path() if context.data == WORLD else context.data
        edits = load_records(path, context.format, on_bad_record="skip").edits
        patterns = [edit for edit in edits if edit.subject and edit.subject in edit.prompt and said_again(edit)]
        path = irrelevant_path() if context.irrelevant in (WORLD, "") else context.irrelevant
        irrelevant = load_irrelevant(path, context.irrelevant_prefix)[:1000]
        read = editor.edited.last_states
        draw = random.Random(f"keys-{context.seed}")
        space = editor._relation_space()
        return cls(read, patterns[:_RECORDS], irrelevant[::2], irrelevant[1::2], draw, space)

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

    def said(self, about: tuple[int, str], rephrased: bool = False) -> str:
        """A prompt as (made from, name), in the record's first words or in other ones."""
        pattern, name = self.patterns[about[0]], about[1]
        return (said_again(pattern) if rephrased else pattern.prompt).replace(str(pattern.subject), name)

    def prepared(self, router: Any) -> Any:
        """A key router that knows what is common, and reads each text once."""
        router.space, router.read = self.space, Remembering(self.last_states)
        router.fit(Query.of_texts(self.background))
        return router

    def add(self, router: Router, about: Sequence[tuple[int, str]], first: int) -> None:
        """Make them edits of the router; each has a shard of its own."""
        texts = [self.said(one) for one in about]
        anchors = [Anchor(name, text) for (_, name), text in zip(about, texts, strict=True)]
        places = range(first, first + len(about))
        router.add([str(i) for i in places], anchors, Query.of_texts(texts), places)


def said_again(edit: Edit) -> str:
    """A rephrase that names the edit's subject; empty where there is none."""
    return next((text for text in edit.rephrases if edit.subject and edit.subject in text), "")


# -- shards, in two levels ---------------------------------------------------------------------------------------------


def compared(router: ActivationRouter, memory: SideMemory, prompts: Query, repeats: int) -> dict[str, Any]:
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


def at_level(router: ActivationRouter, memory: SideMemory, prompts: Query, two_level_from: int) -> Callable[[], Choice]:
    """Routing with two levels from so many shards on."""

    @torch.no_grad()
    def route() -> Choice:
        router.two_level_from = two_level_from
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
    kinds = ("rephrased", "searched", "unrelated")
    keyed = [
        (
            f"{row['edits']:,}",
            *(f"{percent(row[name])} %" for name in ("own", "recall", "base")),
            *(number(1e3 * row[kind][f"batch_{size}"]["median"]) for size in (1, result["batch"]) for kind in kinds),
            number(row["calibrating"]),
            number(row["loading"]),
        )
        for row in result["keyed"]
    ]
    note = (
        f"Edits made from the first records about invented names. Of {result['prompts']} of them: the share whose own "
        "words, and whose other words, reach their shard; base: of unrelated prompts, the share that the base keeps. "
        "Ms/prompt: medians of all of `route` for prompts that were not asked before; rephrased: with what the base "
        "reads, searched: without it. Seconds: to calibrate what came last, and to load a state."
    )
    header = (
        *("edits", "own words", "recall", "base"),
        *(f"{kind}, batch {size}" for size in (1, result["batch"]) for kind in ("ms/prompt rephrased", *kinds[1:])),
        *("calibrating s", "loading s"),
    )
    found_keys = Table(f"{TITLE}, key router", header, keyed, note)
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
