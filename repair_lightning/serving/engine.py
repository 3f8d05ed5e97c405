"""Continuous batching: what is asked joins the batch between two tokens, and leaves it when it has ended.

One thread runs the base, for all models around it: each pass is one token of every sequence in flight, whoever answers
it, and between two passes new questions are routed and read, and corrections are written. So no question ever sees half
of a correction, and none waits for another's end.

Shapes: B sequences, W positions of the key-value cache, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from repair_lightning.errors import RepairError
from repair_lightning.memory.shards import AnyShard
from repair_lightning.memory.side_memory import selection_of
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left
from repair_lightning.models.routed import Turn, quote
from repair_lightning.types import BASE

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BATCH = 32
"""Sequences in flight; what comes beyond them waits."""
MAX_TOKENS = 32_768
"""Tokens in flight, prompts and what may be said to them; one sequence may have more."""
MAX_WAITING = 256
"""Sequences that may wait; what comes beyond them is refused."""


class BusyError(RepairError):
    """Too much waits already."""


COLD = 1e-3
"""The likeliest token is taken below this temperature."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0; `top_p` in (0, 1]; `stop` texts are not part of the answer."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a sequence tells its asker: first who answers (`edit`, `memory`, `reason`), then text, at the end why it
    ended (`finish`: `stop` or `length`) and how many tokens it took, or an `error`."""

    text: str = ""
    finish: str | None = None
    tokens: int = 0
    edit: str | None = None
    memory: int = BASE
    reason: str = ""
    first: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class Asked:
    """One answer in the making.

    Attributes:
        row: the prompt's token ids.
        text: what it asks, for the router.
        model: None asks the base.
        tell: is given each piece, in the engine's thread.
        trims: whether white space before the answer is left out, as where a bare base is asked as in chat.
        shard: what answers; None is the base.
        rest: what the edit's target has left; None follows nothing.
        sent: how many characters were told.
    """

    row: list[int]
    text: str
    sampling: Sampling
    forms: Forms
    model: EditedModel | None
    tell: Callable[[Piece], None]
    trims: bool = False
    cancelled: bool = False
    said: list[int] = field(default_factory=list)
    shard: AnyShard | None = None
    rest: list[int] | None = None
    quotes: bool = False
    sent: int = 0
    generator: torch.Generator | None = None

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        return len(self.row) + self.sampling.max_tokens


class Engine:
    """Runs a base for all models around it, in a thread of its own, or in the one that calls :meth:`run`.

    Args:
        model: any edited model of the base, for the base's own sake: its tokenizer, its forms, its stops.
        threaded: off, nothing is answered until `run` is called. A process's first thread is the faster one: measured
            on a CPU, half as fast again.
    """

    def __init__(self, model: EditedModel, max_batch: int = MAX_BATCH, threaded: bool = True) -> None:
        self.plain, self.max_batch = model, max_batch
        self._free = threading.Condition()
        self._waiting: deque[Asked] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._batch = Batch(model)
        self._stopping = False
        self._ended = threading.Event()
        if threaded:
            threading.Thread(target=self.run, name="engine", daemon=True).start()

    @property
    def load(self) -> tuple[int, int]:
        """How many sequences are in flight, and how many wait."""
        return len(self._batch.rows), len(self._waiting)

    def ask(self, sequences: Sequence[Asked]) -> None:
        """Let sequences join; each tells its pieces from the engine's thread. BusyError where too many wait."""
        with self._free:
            if self._stopping:
                raise BusyError("the server is shutting down; ask again later")
            if len(self._waiting) + len(sequences) > MAX_WAITING:
                raise BusyError(f"{len(self._waiting)} answers wait already, of {MAX_WAITING}; ask again later")
            self._waiting.extend(sequences)
            self._free.notify()

    def do(self, job: Callable[[], T]) -> Future[T]:
        """Do something between two passes, before what is asked later."""
        future: Future[T] = Future()
        with self._free:
            if self._stopping:
                raise BusyError("the server is shutting down; ask again later")
            self._jobs.append((job, future))
            self._free.notify()
        return future

    def stop(self) -> None:
        """End when all that was asked is answered; returns when it is."""
        with self._free:
            self._stopping = True
            self._free.notify()
        self._ended.wait()

    def _admitted(self) -> list[Asked]:
        """What may join the batch now: as many as there is room for, in sequences and in tokens."""
        found: list[Asked] = []
        tokens = sum(asked.size for asked in self._batch.rows)
        while self._waiting and len(self._batch.rows) + len(found) < self.max_batch:
            tokens += self._waiting[0].size
            if tokens > MAX_TOKENS and (found or self._batch.rows):
                break
            found.append(self._waiting.popleft())
        return found

    def run(self) -> None:
        """Answer until :meth:`stop` is called, and what was asked before it."""
        try:
            self._run()
        finally:
            self._ended.set()

    def _run(self) -> None:
        while True:
            with self._free:
                self._free.wait_for(lambda: self._jobs or self._waiting or self._batch.rows or self._stopping)
                if self._stopping and not (self._jobs or self._waiting or self._batch.rows):
                    return
                jobs = [self._jobs.popleft()] if self._jobs else []  # answers go on between two corrections
                new = self._admitted()
            for job, future in jobs:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(job())
                    except BaseException as error:
                        future.set_exception(error)
            try:
                with torch.inference_mode():
                    self._batch.drop_cancelled()
                    self._batch.join([sequence for sequence in new if not sequence.cancelled])
                    self._batch.step()
            except Exception as error:  # whoever asked is told, and the next ones are answered
                log.exception("a pass failed: those in flight are told")
                for sequence in {*self._batch.rows, *new}:
                    sequence.tell(Piece(error=error))
                self._batch = Batch(self.plain)


class Batch:
    """The sequences in flight and what the base knows of them, padded on the left to one width."""

    def __init__(self, model: EditedModel) -> None:
        self.model = model
        self.rows: list[Asked] = []
        self.cache: DynamicCache | None = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self.last = torch.zeros(0, dtype=torch.long, device=model.device)
        self._selections: list[tuple[EditedModel, Any]] | None = None

    def drop_cancelled(self) -> None:
        """Leave out what nobody waits for any more."""
        self._keep([i for i, sequence in enumerate(self.rows) if not sequence.cancelled])

    @torch.no_grad()
    def join(self, new: list[Asked]) -> None:
        """Route sequences, read their prompts, and say their first tokens."""
        if not new:
            return
        new = routed(new)
        if not new:
            return
        part = Batch(self.model)
        part.rows = new
        ids, part.mask = pad_left([sequence.row for sequence in new], self.model.padding, self.model.device)
        part.cache = DynamicCache()
        positions = (part.mask.cumsum(-1) - 1).clamp_min(0)
        part.last = part.next_tokens(part.forward(ids, positions))
        self._merge(part)
        self._keep(advance(self.rows[-len(new) :], self.last[-len(new) :].tolist(), len(self.rows) - len(new)))

    @torch.no_grad()
    def step(self) -> None:
        """The next token of every sequence."""
        if not self.rows:
            return
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
        positions = (self.mask.sum(-1) - 1)[:, None]
        self.last = self.next_tokens(self.forward(self.last[:, None], positions))
        before = [sequence.shard for sequence in self.rows]
        kept = advance(self.rows, self.last.tolist())
        if [sequence.shard for sequence in self.rows] != before:
            self._selections = None
        self._keep(kept)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The last position's logits (B, V) of a pass over ids (B, T) beyond the cache."""
        if self._selections is None:
            models = {id(s.model): s.model for s in self.rows if s.model is not None and s.shard is not None}
            self._selections = [
                (model, selection_of([s.shard if s.model is model else None for s in self.rows], self.model.device))
                for model in models.values()
            ]
        with ExitStack() as stack:
            for model, selection in self._selections:
                stack.enter_context(model.during(Turn(None, selection=selection)))
            output = self.model.base(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]

    def next_tokens(self, logits: Tensor) -> Tensor:
        """The tokens (B,) that the sequences say next, from logits (B, V)."""
        for row, sequence in zip(logits, self.rows, strict=True):
            if sequence.quotes and sequence.rest:
                quote(row, sequence.rest[0])
        found = logits.argmax(-1)
        for i, sequence in enumerate(self.rows):
            if sequence.sampling.temperature >= COLD and not sequence.rest:  # what an edit says is not drawn
                found[i] = sampled(logits[i], sequence)
        return found

    def _merge(self, part: Batch) -> None:
        """Take another batch's sequences in behind one's own."""
        assert part.cache is not None
        if not self.rows or self.cache is None:
            self.rows, self.cache, self.mask, self.last = part.rows, part.cache, part.mask, part.last
        else:
            width = max(self.mask.shape[1], part.mask.shape[1])
            pairs = zip(_states(self.cache), _states(part.cache), strict=True)
            self.cache = _cache_of(
                (
                    torch.cat([_widened(mine[0], width), _widened(its[0], width)]),
                    torch.cat([_widened(mine[1], width), _widened(its[1], width)]),
                )
                for mine, its in pairs
            )
            self.mask = torch.cat([torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self.mask, part.mask)])
            self.last = torch.cat([self.last, part.last])
            self.rows = [*self.rows, *part.rows]
        self._selections = None

    def _keep(self, index: list[int]) -> None:
        """Go on with some of the sequences, without the positions that only the others had."""
        if len(index) == len(self.rows):
            return
        at = torch.tensor(index, dtype=torch.long, device=self.mask.device)
        self.rows, self.mask, self.last = [self.rows[i] for i in index], self.mask[at], self.last[at]
        self._selections = None
        if not index:
            self.cache, self.mask = None, self.mask[:, :0]
            return
        start = int(self.mask.any(0).long().argmax())
        assert self.cache is not None
        self.mask = self.mask[:, start:]
        self.cache = _cache_of((keys[at, :, start:], values[at, :, start:]) for keys, values in _states(self.cache))


def _widened(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, H, W, E) with zeros on the left."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def _states(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, H, W, E) of each layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]


def _cache_of(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


def routed(new: list[Asked]) -> list[Asked]:
    """Sequences that know who answers them. What cannot be routed is told, and harms nobody else."""
    try:
        route(new)
    except Exception as error:
        if len(new) > 1:
            return [one for asked in new for one in routed([asked])]
        log.exception("a question cannot be routed: its asker is told")
        new[0].tell(Piece(error=error))
        return []
    return new


def route(new: Sequence[Asked]) -> None:
    """Choose who answers sequences, and tell their askers; a choice stays, whatever is corrected meanwhile."""
    groups: dict[int, list[Asked]] = {}
    for sequence in new:
        groups.setdefault(id(sequence.model), []).append(sequence)
        if sequence.sampling.temperature >= COLD:
            sequence.generator = torch.Generator(device="cpu")
            if sequence.sampling.seed is None:
                sequence.generator.seed()
            else:
                sequence.generator.manual_seed(sequence.sampling.seed)
    for group in groups.values():
        model = group[0].model
        if model is None:
            for sequence in group:
                sequence.tell(Piece(first=True, reason="the base itself was asked"))
            continue
        rows = [sequence.row for sequence in group]
        choice = model.choose_rows(rows, [sequence.text for sequence in group])
        routes = choice.routes()
        targets = model.targets(choice.memory, choice.nearest, rows) if model.router.vouches else [None] * len(rows)
        if model.router.prefaces or model.router.in_text:
            for sequence, row in zip(group, model.read(rows, choice.memory), strict=True):
                sequence.row = row
                room = max(1, model.longest - len(row))
                sequence.sampling = replace(sequence.sampling, max_tokens=min(sequence.sampling.max_tokens, room))
        for sequence, found, target in zip(group, routes, targets, strict=True):
            sequence.shard = None if found.memory < 0 else model.memory[found.memory]
            sequence.rest = None if target is None else list(target.target)
            sequence.quotes = model.router.quotes
            edit = found.nearest if found.memory != BASE else None
            sequence.tell(Piece(first=True, edit=edit, memory=found.memory, reason=found.reason))


def advance(rows: Sequence[Asked], tokens: Sequence[int], offset: int = 0) -> list[int]:
    """Take in each sequence's next token and tell its text. Returns the indices, behind `offset` others, of those that
    go on; a sequence that leaves its edit's target, or has said all of it, is the base's from there on."""
    going = list(range(offset))
    for i, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
        if sequence.rest and sequence.rest[0] == token:
            sequence.rest = sequence.rest[1:]
        elif sequence.rest is not None:
            sequence.rest, sequence.shard = None, None
        if not _ended(sequence, token):
            going.append(offset + i)
    return going


def _ended(sequence: Asked, token: int) -> bool:
    forms, sampling = sequence.forms, sequence.sampling
    stops = token in forms.stops
    if not stops:
        sequence.said.append(token)
    whole = forms.tokenizer.decode(sequence.said, skip_special_tokens=True)
    whole = whole.lstrip() if sequence.trims else whole
    cut = min((at for text in sampling.stop if (at := whole.find(text)) >= 0), default=None)
    finish = "stop" if stops or cut is not None else "length" if len(sequence.said) >= sampling.max_tokens else None
    end = cut if cut is not None else len(whole)
    if finish is None:
        end -= _held_back(whole, sampling.stop)
    text = whole[sequence.sent : end] if end > sequence.sent else ""
    sequence.sent = max(sequence.sent, end)
    if text or finish:
        sequence.tell(Piece(text=text, finish=finish, tokens=len(sequence.said) + stops))
    return finish is not None


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may still change or turn out to be a stop's beginning."""
    broken = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    begun = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(broken, max(begun, default=0))


def sampled(logits: Tensor, sequence: Asked) -> int:
    """A token drawn from logits (V,) at the sequence's temperature, among the likeliest that make up `top_p`."""
    sampling = sequence.sampling
    shares = (logits.double() / sampling.temperature).softmax(-1).cpu()
    if sampling.top_p < 1:
        ordered, index = shares.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p
        shares = shares.index_fill(0, index[beyond], 0.0)
    return int(torch.multinomial(shares, 1, generator=sequence.generator))
