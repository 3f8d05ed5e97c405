"""A base with its side memory and its router: which memory answers a prompt, and what a prompt is to the router.

The choice is made from what the last turn of the user asks. A shard that is known by its edit says that edit's target
or nothing: where what it would say is anything else, the base answers.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Check, Choice, Query
from repair_lightning.memory.routers import Router
from repair_lightning.memory.shards import Selection
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.forms import Forms, stop_ids
from repair_lightning.models.kept_answers import KeptAnswers
from repair_lightning.models.prefix import Capture, SplitModel, pad_left, stack_left
from repair_lightning.models.prefix_cache import PrefixCache, canonical_batches, capture_rows
from repair_lightning.models.tokenizing import Encoded, target_labels
from repair_lightning.models.weights import BaseWeights
from repair_lightning.models.wrapper import Wrapper
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, Edit, Route

T = TypeVar("T")

Prompts = str | Sequence[str] | Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]] | Tensor
"""What may be asked: a text, texts, messages, several dialogues, or token ids."""


@dataclass(slots=True)
class Turn:
    """Sequences in flight, and who answers them.

    Attributes:
        memory: (B,) who answers each, or (1,) for all of them.
        rest: what each memory was learnt to say and has not said yet; None follows nothing, so does an empty list.
        rows: the token ids so far.
        quotes: whether what is left to say is said as it stands, whatever the base would say.
        selection: what the memory does to the value matrix's output.
        width: of the ids that the base was fed last; 0 before the first.
    """

    memory: Tensor | None
    rest: list[Sequence[int] | None] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    quotes: bool = False
    selection: Selection | None = None
    width: int = 0

    def feed(self, ids: Tensor, cache: Any) -> None:
        """Take in the ids (B, T) of a call: a row that leaves its target, or has said all of it, is the base's then."""
        if self.memory is None:
            return
        new = ids if cache is not None and cache.get_seq_length() > 0 else ids[:, self.width :]
        first, self.width = self.width == 0, ids.shape[1]
        if first:
            times = len(ids) // len(self.memory)
            if times > 1 and (len(self.memory) > 1 or self.rest):  # beams and samples come as repeated rows
                self.memory = self.memory.repeat_interleave(times)
                self.rest = [row for row in self.rest for _ in range(times)]
            return
        for tokens in new.T.tolist() if self.rest else ():
            for i, (token, rest) in enumerate(zip(tokens, self.rest, strict=True)):
                if rest and rest[0] == token:
                    self.rest[i] = rest[1:]
                elif rest is not None:
                    self.rest[i], self.memory[i], self.selection = None, BASE, None


class Hooks:
    """What a memory adds to a base's value matrix; outside of :meth:`during` nothing.

    A turn belongs to the thread that began it. Calls of one base come one after the other, also those of several
    models around it: a pass that replaces layers or listens to them is never seen by another thread's.
    """

    def __init__(self, split: SplitModel, memory: SideMemory) -> None:
        self._base, self._memory = split.model, memory
        self._turns: dict[int, Turn] = {}  # by thread
        self._entered: Counter[int] = Counter()  # passes that each thread is in
        self._handles = [
            split.model.register_forward_pre_hook(self._enter),
            split.model.register_forward_pre_hook(self._at_call, with_kwargs=True),
            split.value.register_forward_hook(self._at_value),
            split.model.register_forward_hook(self._at_end),
            split.model.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def lock(self) -> Any:
        """See `lock_of`."""
        return lock_of(self._base)

    @property
    def _turn(self) -> Turn | None:
        return self._turns.get(threading.get_ident())

    def _enter(self, *_: Any) -> None:
        self.lock.acquire()
        self._entered[threading.get_ident()] += 1

    def _leave(self, *_: Any) -> None:
        self._entered[threading.get_ident()] -= 1
        self.lock.release()

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def during(self, turn: Turn) -> Iterator[None]:
        """Inside, the base's own calls are those of a turn."""
        thread = threading.get_ident()
        before, inside, self._turns[thread] = self._turn, self._entered[thread], turn
        try:
            yield
        finally:
            if before is None:
                del self._turns[thread]
            else:
                self._turns[thread] = before
            while self._entered[thread] > inside:  # Ctrl-C leaves a pass without calling its last hook
                self._leave()
            if not self._entered[thread]:
                del self._entered[thread]

    def _at_call(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if self._turn is not None and ids is not None:
            self._turn.feed(ids, kwargs.get("past_key_values"))

    def _at_end(self, _: nn.Module, args: tuple, output: Any) -> None:
        turn = self._turn
        if turn is not None and turn.quotes:
            for row, rest in zip(output.logits, turn.rest, strict=True):
                if rest:
                    quote(row[-1], rest[0])

    def _at_value(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        turn = self._turn
        if turn is not None and turn.selection is None:
            turn.selection = self._memory.select(turn.memory)  # type: ignore[arg-type]
        if turn is None or not turn.selection:
            return None
        # One shard for all rows needs no rows, however the architecture lays out its tokens.
        rows = (turn.selection.size, -1) if turn.selection.size > 1 else (1, *output.shape[:-1])
        activations = args[0].reshape(*rows, args[0].shape[-1])
        return turn.selection(output.reshape(*rows, output.shape[-1]), activations).reshape(output.shape)


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(base: nn.Module) -> Any:
    """What a thread holds while it runs a base, or replaces and listens to parts of it."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(base, threading.RLock())


def alone(method: Callable[..., T]) -> Callable[..., T]:
    """A routed model's method during which no other thread runs the base."""

    @wraps(method)
    def held(self: RoutedModel, *args: Any, **kwargs: Any) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return held


def quote(logits: Tensor, token: int) -> None:
    """Make a token all but certain in logits (V,), in place."""
    logits[token] = logits.max() + 30


class RoutedModel(Wrapper):
    """A frozen causal LM, its shards in `memory`, of the edited `layer`, and its router.

    Args:
        base: the causal LM; it is not copied.
        forms: how the base is asked; by default through its chat template, where it has one.

    Attributes:
        weights: the base's own value matrices, for what is written into them.
        prefixes: where the states of prompts that come again are kept; None runs the base again each time.
        kept: what the base says by itself, from earlier runs; None asks it each time.
        edit_of: from its id an edit; None where it is not known.
    """

    def __init__(
        self, base: Any, tokenizer: Any, memory: SideMemory, router: Router, layer: int, forms: Forms | None = None
    ) -> None:
        super().__init__()
        self.base, self.tokenizer, self.router = base, tokenizer, router
        self._disabled_by: int | None = None  # the thread for which the base answers alone
        self.padding: int = tokenizer.pad_token_id or 0
        self.forms = forms or Forms(tokenizer, stop_ids(base, tokenizer))
        self.weights = BaseWeights(base)
        self.prefixes: PrefixCache | None = None
        self.kept: KeptAnswers | None = None
        self.edit_of: Callable[[str], Edit | None] = lambda _: None
        self._hooks: Hooks | None = None
        self.move_to(layer, memory)

    def move_to(self, layer: int, memory: SideMemory) -> None:
        """Edit another layer, with another memory; the caller fits the router again and replaces the prefixes."""
        self.release()
        self.layer, self.memory = layer, memory
        self.split = SplitModel(self.base, layer)
        self._hooks = Hooks(self.split, memory)
        self.during = self._hooks.during
        self.router.read = self.last_states

    def release(self) -> None:
        """Take hooks and edits out of the base and forget its states; this model is used up."""
        if self._hooks is not None:
            self._hooks.remove()
        self.weights.restore()
        if self.prefixes is not None:
            self.prefixes.close()

    def target_of(self, id: str) -> str | None:
        """What an edit is to say; None where that is not known."""
        edit = self.edit_of(id)
        return None if edit is None else edit.target

    @property
    def lock(self) -> Any:
        """What a thread holds while it runs the base, see `lock_of`."""
        return lock_of(self.base)

    @property
    def longest(self) -> int:
        """The longest text that the base reads, in tokens."""
        return self.config.max_position_embeddings

    @property
    def value_weight(self) -> Tensor:
        """W_v of the edited layer in the base, in its storage order."""
        return self.weights.parameter(self.layer)

    @property
    def is_disabled(self) -> bool:
        """Whether this thread is inside :meth:`disabled`."""
        return self._disabled_by == threading.get_ident()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, this is the plain base, whatever is asked; other threads wait: `with model.disabled(): ...`."""
        with self.lock, self.weights.originals():
            before, self._disabled_by = self._disabled_by, threading.get_ident()
            try:
                yield
            finally:
                self._disabled_by = before

    def forced(self, who: Choice | Tensor | Selection | int | None) -> AbstractContextManager[None]:
        """Inside, it is given who answers the base's own calls: a choice for each row, one shard for all, None for the
        base, or what is done to the value matrix's output."""
        if isinstance(who, Selection):
            return self.during(Turn(None, selection=who))
        if isinstance(who, Choice):
            who = who.memory
        return self.during(Turn(who if isinstance(who, Tensor) else torch.tensor([BASE if who is None else who])))

    def answering(self, memory: Tensor, rows: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """Inside, memories (B,) that some authority chose answer prompts, given as token ids."""
        rest = self._quoted(memory, rows) if self.router.quotes else []
        return self.during(Turn(memory, rest, quotes=self.router.quotes))

    def _quoted(self, memory: Tensor, rows: Sequence[Sequence[int]]) -> list[Sequence[int] | None]:
        """The target that each memory says after its row, as token ids; None for the base."""
        ids = [None if shard < 0 else self.router.edit_of(shard) for shard in memory.tolist()]
        return [None if row is None else row.target for row in self.targets(memory, ids, rows)]

    def route(self, prompts: Prompts) -> list[Route]:
        """Which memory answers each prompt, and why. A prompt is a text, messages, or a row of token ids."""
        if isinstance(prompts, Tensor):
            return self.choose_rows(prompts.tolist()).routes()
        return self.choose(prompts_of(prompts)).routes()

    def choose(self, prompts: Sequence[str], batch_size: int = 64) -> Choice:
        """Who answers prompts."""
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        parts = [self.choose_rows([*map(self.forms.ids, part)], [*map(self.forms.asked, part)]) for part in batches]
        return Choice.join(parts) if parts else Choice.base(0)

    @alone
    @torch.no_grad()
    def choose_rows(self, rows: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> Choice:
        """Who answers prompts, given as token ids, and as what they ask where that is known."""
        if not all(rows):
            raise RepairError("a prompt without tokens cannot be routed; give each sequence at least one token")
        if self.is_disabled:
            return Choice.base(len(rows))
        texts = [self.forms.asked_in(row) for row in rows] if texts is None else texts
        return self.held(self.router.route(self._seen(texts, rows), self.memory), rows)

    def held(self, choice: Choice, rows: Sequence[Sequence[int]]) -> Choice:
        """The choice where the memory would say its edit's target to the very prompt (B rows of ids), else the base.

        Where the router does not vouch for the edit that it names, the choice stays.
        """
        if not self.router.vouches or self.router.quotes:
            return choice
        targets = {i: row for i, row in enumerate(self.targets(choice.memory, choice.nearest, rows)) if row is not None}
        value, limit = torch.ones(len(rows)), torch.full((len(rows),), -torch.inf)
        limit[list(targets)] = 1.0
        for i in [i for i, row in targets.items() if len(row.ids) > self.longest]:  # there is no room to say it
            value[i] = 0.0
            del targets[i]
        likeliest = self.over_targets(list(targets.values()), choice.memory[list(targets)], argmax_rows)
        for (i, row), said in zip(targets.items(), likeliest, strict=True):
            value[i] = sum(a == b for a, b in zip(row.target, said, strict=True)) / len(row.target)
        check = Check("its target's tokens said", value, limit)
        memory = torch.where(value >= 1, choice.memory, BASE)
        return replace(choice, memory=memory, checks=(*choice.checks, check))

    def targets(self, memory: Tensor, ids: Sequence[str | None], rows: Sequence[Sequence[int]]) -> list[Encoded | None]:
        """Each row with what its memory, of the edit with this id, is to say there; None for the base, or unknown."""
        found: list[Encoded | None] = []
        for shard, id, row in zip(memory.tolist(), ids, rows, strict=True):
            target = self.target_of(id) if shard >= 0 and id is not None else None
            found.append(None if target is None else self.forms.continued(row, target))
        return found

    @alone
    @torch.no_grad()
    def over_targets(
        self, rows: Sequence[Encoded], memory: Tensor, read: Callable[[Tensor, Tensor], list[Any]], batch_size: int = 64
    ) -> list[Any]:
        """Feed prompts with their targets, each with its memory (B,); `read(logits (B, T, V), labels (B, T))` says what
        to keep per row."""
        found: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = [rows[i] for i in index]
            ids, mask = pad_left([row.ids for row in batch], device=self.device)
            labels = target_labels(batch, device=self.device)
            hidden = stack_left([capture.hidden for capture in self.captures([row.ids for row in batch])])
            with self.forced(memory[index]), self.split.skipping():
                logits = self.split.tail(ids, mask, hidden, labels.shape[1] + 1)[0][:, :-1].float()
            if self.router.quotes:
                self._quote(logits, labels, memory[index], [row.prompt for row in batch])
            for i, value in zip(index, read(logits, labels), strict=True):
                found[i] = value
        return found

    def _quote(self, logits: Tensor, labels: Tensor, memory: Tensor, prompts: Sequence[Sequence[int]]) -> None:
        """Let memories (B,) say their targets in logits (B, T, V), as far as what is fed, `labels`, goes along."""
        for at, expected, said in zip(logits, labels, self._quoted(memory, prompts), strict=True):
            fed = [(place, int(expected[place])) for place in (expected >= 0).nonzero()[:, 0].tolist()]
            for (place, token), own in zip(fed, said or (), strict=False):
                quote(at[place], own)
                if token != own:
                    break

    @alone
    @torch.no_grad()
    def captures(self, rows: Sequence[Sequence[int]]) -> list[Capture]:
        """The states of token rows at the edited layer, each without padding."""
        with self.forced(None):
            return capture_rows(self.split, rows) if self.prefixes is None else self.prefixes.get(rows)

    def query(self, prompts: Sequence[str]) -> Query:
        """Prompts as routers see them."""
        return self._query([self.forms.asked(p) for p in prompts], [self.forms.ids(p) for p in prompts])

    def query_of(self, texts: Sequence[str], rows: Sequence[Sequence[int]], captures: Sequence[Capture]) -> Query:
        """Prompts, given as what they ask and as token ids with their states, which may go on after the prompt."""
        places = [slice(0 if self.router.reads_all_tokens else len(row) - 1, len(row)) for row in rows]
        hidden = [capture.hidden[at] for at, capture in zip(places, captures, strict=True)]
        activations = [capture.activations[at] for at, capture in zip(places, captures, strict=True)]
        mask = stack_left([torch.ones(len(part), dtype=torch.bool, device=self.device) for part in hidden])
        return Query(tuple(texts), mask, stack_left(hidden), stack_left(activations))

    def _seen(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> Query:
        """Prompts as far as the router looks at them."""
        return self._query(texts, rows) if self.router.reads_states else Query.of_texts(texts)

    def _query(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> Query:
        """What prompts ask, in the one form in which the base is asked plainly: no system message, no history."""
        plain = [self.forms.plainly(text, row) for text, row in zip(texts, rows, strict=True)]
        return self.query_of(texts, plain, self.captures(plain))

    @alone
    @torch.no_grad()
    def last_states(self, texts: Sequence[str]) -> Tensor:
        """The state (n, D) of each text's last token where it enters the edited layer, float32 on the CPU; the text is
        put as a turn of the user, or bare where there is no template."""
        rows = [self.forms.turn(text) for text in texts]
        hidden: list[Any] = [None] * len(rows)
        with self.forced(None), self.weights.originals():
            for index, ids in canonical_batches(self.split, rows):
                states = self.split.capture(ids, torch.ones_like(ids)).hidden
                for i, row in zip(index, states, strict=True):
                    hidden[i] = row[len(rows[i]) - 1].float().cpu()
        return torch.stack(hidden)


def argmax_rows(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """The likeliest token at each label, row by row, from logits (B, T, V) and labels (B, T)."""
    return [row[keep].tolist() for row, keep in zip(logits.argmax(-1), labels >= 0, strict=True)]


def prompts_of(asked: Any) -> list[str]:
    """Prompts from a text, texts, messages or several dialogues."""
    if isinstance(asked, str) or dialogue.is_messages(asked):
        asked = [asked]
    found = [dialogue.dump(item) if dialogue.is_messages(item) else item for item in asked]
    if not all(isinstance(item, str) for item in found):
        raise RepairError(
            "a prompt must be a text, or messages such as [{'role': 'user', 'content': '...'}] that end with the user's"
        )
    return found
