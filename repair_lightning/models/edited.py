"""A base with its side memory: called and asked to generate like any Hugging Face causal LM.

Hooks on the base's own modules do the work, so its parameters, names and code stay as they are, and prompts that no
shard answers get the base's own bits. The choice is made once per turn of a dialogue, from what the user asks in it,
and held while the key-value cache grows. A shard that is known by its edit says that edit's target or nothing: where
what it would say is anything else, and as soon as what was said leaves the target, the base answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.errors import RepairError, counted
from repair_lightning.memory.query import Check, Choice, Query
from repair_lightning.memory.routers import Router
from repair_lightning.memory.shards import Selection
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.forms import Forms, stop_ids
from repair_lightning.models.prefix import Capture, SplitModel, pad_left, stack_left
from repair_lightning.models.prefix_cache import PrefixCache, canonical_batches, capture_rows
from repair_lightning.models.tokenizing import Encoded, target_labels
from repair_lightning.models.weights import BaseWeights
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, Route

ROOM = 64
"""Positions that stay free for an answer where a prompt is put behind other texts."""
_MARK = 16
"""Most tokens of what opens a turn of the user."""
_HELD = "_repair_turn"
"""The attribute of a key-value cache that remembers which memory its sequences chose."""


Prompts = str | Sequence[str] | Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]] | Tensor
"""What may be asked: a text, texts, messages, several dialogues, or token ids."""


@dataclass(slots=True)
class _Turn:
    """What the hooks know of the sequences in flight.

    Attributes:
        choice: who answers each.
        rows: their token ids so far.
        targets: what each memory was learnt to say, where that is known; None follows nothing.
        place: how many tokens of it each sequence has said; -1 once it has left it.
        width: of the ids that the base was fed last.
    """

    choice: Choice | None = None
    selection: Selection | None = None
    rows: list[list[int]] = field(default_factory=list)
    targets: list[tuple[int, ...]] | None = None
    place: list[int] = field(default_factory=list)
    width: int = 0

    def repeat(self, times: int) -> None:
        """Several sequences of each prompt (beams, samples) come as repeated rows."""
        if times < 2 or self.choice is None or (len(self.choice.memory) == 1 and self.targets is None):
            return
        self.choice = self.choice.repeated(times)
        self.place = [0] * len(self.choice.memory)
        if self.targets is not None:
            self.targets = [row for row in self.targets for _ in range(times)]

    def follow(self, tokens: Sequence[int]) -> bool:
        """Take in the token that each sequence has said; whether one has left its target and is the base's now."""
        assert self.targets is not None
        assert self.choice is not None
        left = []
        for i, (token, row) in enumerate(zip(tokens, self.targets, strict=True)):
            at = self.place[i]
            if row and at >= 0:
                self.place[i] = at + 1 if at < len(row) and row[at] == token else -1
                left += [i] if self.place[i] < 0 else []
        if left:
            memory = self.choice.memory.clone()
            memory[left] = BASE
            self.choice = replace(self.choice, memory=memory)
        return bool(left)

    def fed(self, ids: Tensor, cache: Any) -> Tensor:
        """Of the ids (B, T) of a call what came since the last one: all, where a cache holds what was before."""
        new = ids if cache is not None and cache.get_seq_length() > 0 else ids[:, self.width :]
        self.width = ids.shape[1]
        return new


class EditedModel(nn.Module):
    """A frozen causal LM, its shards and its router.

    Args:
        base: the causal LM; it is not copied.
        tokenizer: its tokenizer.
        memory: the bank of shards of the edited layer.
        router: picks among the shards.
        layer: index of the edited layer.
        forms: how the base is asked; by default through its chat template, where it has one.

    Attributes:
        weights: the base's own value matrices, for what is written into them.
        prefixes: where the states of prompts that come again are kept; None runs the base anew each time.
        target_of: from an edit's id what it is to say; None where that is not known.
    """

    def __init__(
        self, base: Any, tokenizer: Any, memory: SideMemory, router: Router, layer: int, forms: Forms | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.tokenizer = tokenizer
        self.forms = forms or Forms(tokenizer, stop_ids(base, tokenizer))
        self.weights = BaseWeights(base)
        self.router = router
        self.prefixes: PrefixCache | None = None
        self.target_of: Callable[[str], str | None] = lambda _: None
        self._turn: _Turn | None = None  # what the hooks obey, inside a call alone
        self._hooks: list[Any] = []
        self.move_to(layer, memory)

    def move_to(self, layer: int, memory: SideMemory) -> None:
        """Edit another layer, with another memory; the router is the caller's to fit anew, and so are the prefixes."""
        self.release()
        self.layer, self.memory = layer, memory
        self.split = SplitModel(self.base, layer)
        self._hooks = [
            self.base.register_forward_pre_hook(self._at_call, with_kwargs=True),
            self.split.value.register_forward_hook(self._at_value),
        ]
        self.router.read = self.last_states

    def release(self) -> None:
        """Take hooks and edits out of the base, which is then as it was, and forget its states; this model is used
        up."""
        while self._hooks:
            self._hooks.pop().remove()
        self.weights.restore()
        if self.prefixes is not None:
            self.prefixes.close()

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def longest(self) -> int | None:
        """The longest text that the base reads, in tokens; None where its configuration does not say."""
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        return min([number for name in names if (number := getattr(self.config, name, None))], default=None)

    @property
    def generation_config(self) -> Any:
        """The base's generation settings."""
        return self.base.generation_config

    @property
    def value_weight(self) -> Tensor:
        """W_v of the edited layer in the base, in its storage order."""
        return self.weights.parameter(self.layer)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        prompt_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The base's forward pass with each sequence answered by its memory.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), by default all ones.
            past_key_values: a filled cache continues with the choice of the prompt that filled it, until the user's
                next turn.
            prompt_mask: (B, T), true on the tokens that the router may see; by default all that attention sees.
            options: as the base takes them.
        """
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.router.prefaces:
            return self._forward_behind_prefaces(input_ids, given, past_key_values, prompt_mask, options)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            attention_mask = given  # where a cache is filled, no mask stands for all of it and these tokens
        shown = given if prompt_mask is None else prompt_mask
        turn = self._turn_of(past_key_values, _real(input_ids, shown[:, -input_ids.shape[1] :]))
        with self._during(turn):
            output = self.base(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **options
            )
        cache = past_key_values if past_key_values is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _HELD, turn)
        return output

    def _turn_of(self, cache: Any, rows: list[list[int]]) -> _Turn:
        """The turn that tokens belong to: the cache's own, which they go on with, or a new one."""
        held: _Turn | None = None
        if cache is not None and cache.get_seq_length() > 0:
            held = getattr(cache, _HELD, None)
        if held is None or len(held.rows) != len(rows):
            return self._new_turn(rows)
        rows = [[*before, *now] for before, now in zip(held.rows, rows, strict=True)]
        if any(self._asks_again(before, row) for row, before in zip(rows, held.rows, strict=True)):
            return self._new_turn(rows)
        held.rows = rows
        return held

    def _asks_again(self, before: Sequence[int], row: Sequence[int]) -> bool:
        """Whether a turn of the user has begun since a row was `before`, or was not yet over; it may come in pieces."""
        tail = list(before[-_MARK:])
        if self.forms.turns([*tail, *row[len(before) :]]) > self.forms.turns(tail):
            return True
        return self.forms.turn_is_open(before)

    @torch.no_grad()
    def generate(
        self, inputs: Prompts | None = None, attention_mask: Tensor | None = None, input_ids: Any = None, **options: Any
    ) -> Tensor:
        """Generate as the base does, every sequence with the memory that what it asks chose; see `transformers`.

        Args:
            inputs: token ids (B, T), a text, texts, messages or several dialogues; texts are put as the base is asked.
            attention_mask: (B, T), by default all ones.
            input_ids: the same as `inputs`.
            options: as the base takes them; it stops where it was taught to end its answers.

        Raises:
            RepairError: nothing is asked, or a prompt leaves no room for an answer in what the base reads.
        """
        asked = inputs if input_ids is None else input_ids
        ids, mask = self._inputs(asked, attention_mask)
        options.setdefault("eos_token_id", list(self.forms.stops))
        options.setdefault("pad_token_id", self._padding)
        rows = _real(ids, mask)
        self._refuse_long(rows)
        if self.router.prefaces:
            choice = self.router.route(self.query_rows(rows), self.memory)
            padded, seen = pad_left(self.read(rows, choice.memory), self._padding, self.device)
            with self.forced(choice):
                output = self.base.generate(input_ids=padded, attention_mask=seen, **options)
            copies = len(output) // len(ids)
            return torch.cat([ids.repeat_interleave(copies, 0), output[:, padded.shape[1] :]], dim=1)
        texts = None if isinstance(asked, Tensor) else [self.forms.asked(prompt) for prompt in prompts_of(asked)]
        turn = self._new_turn(rows, texts)
        if options.get("num_beams", 1) != 1:
            turn.targets = None  # beams change places, and nothing says how
        with self._during(turn):
            output = self.base.generate(input_ids=ids, attention_mask=mask, **options)
        if options.get("past_key_values") is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            self._hold(options["past_key_values"], turn, sequences[:, ids.shape[1] :].tolist(), ids.shape[1])
        return output

    def _refuse_long(self, rows: Sequence[Sequence[int]]) -> None:
        tokens = max(map(len, rows), default=0)
        if self.longest is not None and tokens >= self.longest:
            raise RepairError(
                f"a prompt has {counted(tokens, 'token')}, and the base reads {self.longest:,} with its answer: at "
                f"most {self.longest - 1:,} may be asked; shorten it"
            )

    @staticmethod
    def _hold(cache: Any, turn: _Turn, said: list[list[int]], width: int) -> None:
        """A cache that was filled while generating remembers its turn, where its rows are still the prompts'."""
        if len(said) == len(turn.rows):
            known = cache.get_seq_length() - width  # the last token was not fed
            turn.rows = [[*row, *new[:known]] for row, new in zip(turn.rows, said, strict=True)]
            setattr(cache, _HELD, turn)

    def _inputs(self, asked: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if asked is None:
            raise RepairError("nothing is asked: give token ids, texts or messages")
        if isinstance(asked, Tensor):
            return asked, torch.ones_like(asked) if mask is None else mask
        return pad_left([self.forms.ids(prompt) for prompt in prompts_of(asked)], self._padding, self.device)

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], memory: Tensor) -> list[list[int]]:
        """Prompts, given as token ids, as the base reads them: behind what their memory (B,) puts before them.

        What does not fit with room for an answer loses its beginning; a first token that every text has stays first.
        """
        if not self.router.prefaces:
            return [list(row) for row in rows]
        prefaces = self.router.preface(self.query_rows(rows), memory.tolist())
        first, most = self.tokenizer.bos_token_id, getattr(self.config, "max_position_embeddings", 1 << 20) - ROOM
        found = []
        for row, preface in zip(rows, prefaces, strict=True):
            start = 1 if len(row) > 1 and row[0] == first else 0
            room = max(0, most - len(row))
            found.append([*row[:start], *preface[max(0, len(preface) - room) :], *row[start:]])
        return found

    def _forward_behind_prefaces(
        self, ids: Tensor, mask: Tensor, cache: Any, prompt_mask: Tensor | None, options: dict[str, Any]
    ) -> Any:
        """The forward pass where something stands before the prompts; its logits are those of the given tokens."""
        if cache is not None or options.get("labels") is not None:
            raise RepairError("texts stand before prompts here: call generate(), or forward() without cache and labels")
        rows = _real(ids, mask)
        asked = rows if prompt_mask is None else _real(ids, mask.bool() & prompt_mask.bool())
        choice = self.router.route(self.query_rows(asked), self.memory)
        behind = self.read(asked, choice.memory)
        with self.forced(None):  # what nothing stands before keeps the base's own bits
            output = self.base(input_ids=ids, attention_mask=mask, **{**options, "use_cache": False})
        moved = [i for i, (own, read) in enumerate(zip(asked, behind, strict=True)) if own != read]
        if moved:
            padded, seen = pad_left(
                [[*behind[i], *rows[i][len(asked[i]) :]] for i in moved], self._padding, self.device
            )
            with self.forced(None):
                found = self.base(input_ids=padded, attention_mask=seen, use_cache=False).logits
            for i, logits in zip(moved, found, strict=True):
                output.logits[i, mask[i].bool()] = logits[-len(rows[i]) :]
        return output

    @property
    def _padding(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def route(self, prompts: Prompts) -> list[Route]:
        """Which memory answers each prompt, and why. A prompt is a text, messages, or a row of token ids."""
        if isinstance(prompts, Tensor):
            return self.choose_rows(prompts.tolist()).routes()
        return self.choose(prompts_of(prompts)).routes()

    @torch.no_grad()
    def choose(self, prompts: Sequence[str], batch_size: int = 64) -> Choice:
        """Who answers prompts."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            parts.append(self._choose([self.forms.asked(p) for p in part], [self.forms.ids(p) for p in part]))
        return Choice.join(parts) if parts else Choice.base(0)

    @torch.no_grad()
    def choose_rows(self, rows: Sequence[Sequence[int]]) -> Choice:
        """Who answers prompts, given as token ids."""
        return self._choose([self.forms.asked_in(row) for row in rows], rows)

    def _choose(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> Choice:
        _refuse_empty(rows)
        query = self._query(texts, rows) if self.router.reads_states else Query.of_texts(texts)
        return self.held(self.router.route(query, self.memory), rows)

    def held(self, choice: Choice, rows: Sequence[Sequence[int]]) -> Choice:
        """The choice where the memory would say its edit's target to the very prompt (B rows of ids), else the base.

        Only where the router vouches for the edit that it names, and its target is known.
        """
        if not self.router.vouches:
            return choice
        targets = self._targets(choice, rows)
        asked = [i for i, row in enumerate(targets) if row is not None]
        value, limit = torch.ones(len(rows)), torch.full((len(rows),), -torch.inf)
        limit[asked] = 1.0
        if asked:
            encoded = [row for row in targets if row is not None]
            said = self.over_targets(encoded, choice.memory[asked], _argmax_rows)
            for i, row, tokens in zip(asked, encoded, said, strict=True):
                value[i] = sum(a == b for a, b in zip(row.target, tokens, strict=True)) / len(row.target)
        check = Check("its target's tokens said", value, limit)
        memory = torch.where(value >= 1, choice.memory, torch.full_like(choice.memory, BASE))
        return replace(choice, memory=memory, checks=(*choice.checks, check))

    def _targets(self, choice: Choice, rows: Sequence[Sequence[int]]) -> list[Encoded | None]:
        """Each row with what its memory is to say there; None where that is not known, or the base answers."""
        found: list[Encoded | None] = []
        for row, memory, id in zip(rows, choice.memory.tolist(), choice.nearest, strict=True):
            target = self.target_of(id) if memory != BASE and id is not None else None
            found.append(None if target is None else self.forms.continued(row, target))
        return found

    @torch.no_grad()
    def over_targets(
        self, rows: Sequence[Encoded], memory: Tensor, read: Callable[[Tensor, Tensor], list[Any]], batch_size: int = 64
    ) -> list[Any]:
        """Feed prompts with their targets, each with its memory (B,); `read(logits (B, T, V), labels (B, T))` says what
        to keep per row. The layers below the edited one run once per row where there is a prefix cache."""
        found: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            ids, mask = pad_left([rows[i].ids for i in index], device=self.device)
            labels = target_labels([rows[i] for i in index], device=self.device)
            hidden = stack_left([capture.hidden for capture in self.captures([rows[i].ids for i in index])])
            none = torch.zeros(len(index))
            forced = Choice(memory[index], none, none, (None,) * len(index))
            with self.forced(forced), self.split.skipping():
                logits, _ = self.split.tail(ids, mask, hidden, labels.shape[1] + 1)
            for i, value in zip(index, read(logits[:, :-1].float(), labels), strict=True):
                found[i] = value
        return found

    def query(self, prompts: Sequence[str]) -> Query:
        """Prompts as routers see them."""
        return self._query([self.forms.asked(p) for p in prompts], [self.forms.ids(p) for p in prompts])

    def query_rows(self, rows: Sequence[Sequence[int]]) -> Query:
        """Prompts, given as token ids, as routers see them."""
        _refuse_empty(rows)
        return self._query([self.forms.asked_in(row) for row in rows], rows)

    def _query(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> Query:
        """What prompts ask, in the one form in which the base is asked plainly: no system message, no history."""
        plain = [self.forms.plainly(text, row) for text, row in zip(texts, rows, strict=True)]
        return self.query_of(texts, plain, self.captures(plain))

    def query_of(self, texts: Sequence[str], rows: Sequence[Sequence[int]], captures: Sequence[Capture]) -> Query:
        """Prompts, given as what they ask and as token ids with their states, as routers see them.

        States may go on behind the prompt; what follows is cut off. Where the router reads last tokens alone, the
        others are left out.
        """
        first = 0 if self.router.reads_all_tokens else -1
        hidden = [capture.hidden[: len(row)][first:] for row, capture in zip(rows, captures, strict=True)]
        activations = [capture.activations[: len(row)][first:] for row, capture in zip(rows, captures, strict=True)]
        lengths = torch.tensor([len(part) for part in hidden], device=self.device)
        padded = stack_left(hidden)
        columns = torch.arange(padded.shape[1], device=self.device)
        mask = columns >= padded.shape[1] - lengths[:, None]
        return Query(tuple(texts), mask, padded, stack_left(activations))

    @torch.no_grad()
    def last_states(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """The state (n, D) of each text's last token where it enters the edited layer, float32 on the CPU: the cheapest
        look at what a text asks. It is put as a turn of the user, or bare where there is no template."""
        rows = [self.forms.turn(text) for text in texts]
        _refuse_empty(rows)
        hidden: list[Any] = [None] * len(rows)
        with self.forced(None), self.weights.originals():
            for index, ids in canonical_batches(self.split, rows, batch_size):
                states = self.split.states(ids, torch.ones_like(ids))
                for i, row in zip(index, states, strict=True):
                    hidden[i] = row[len(rows[i]) - 1].float().cpu()
        return torch.stack(hidden)

    @torch.no_grad()
    def captures(self, rows: Sequence[Sequence[int]]) -> list[Capture]:
        """The states of token rows at the edited layer, each without padding."""
        _refuse_empty(rows)
        with self.forced(None):
            if self.prefixes is not None:
                return self.prefixes.get(rows)
            return capture_rows(self.split, rows)

    @contextmanager
    def forced(self, choice: Choice | Selection | int | None) -> Iterator[None]:
        """Inside, a given choice answers the base's own calls: one per row, one shard for all, or None for the base."""
        if isinstance(choice, Selection):
            turn = _Turn(selection=choice)
        elif choice is None or isinstance(choice, int):
            turn = _Turn(choice=_uniform(BASE if choice is None else choice))
        else:
            turn = _Turn(choice=choice)
        with self._during(turn):
            yield

    @contextmanager
    def _during(self, turn: _Turn) -> Iterator[None]:
        before, self._turn = self._turn, turn
        try:
            yield
        finally:
            self._turn = before

    def _new_turn(self, rows: list[list[int]], texts: Sequence[str] | None = None) -> _Turn:
        choice = self.choose_rows(rows) if texts is None else self._choose(texts, rows)
        followed = self.router.vouches and bool((choice.memory != BASE).any())
        targets = [() if row is None else row.target for row in self._targets(choice, rows)] if followed else None
        return _Turn(choice, rows=rows, targets=targets, place=[0] * len(rows))

    def _at_call(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """Follow what was said: who leaves the target, or has said all of it, goes on with the base."""
        turn, ids = self._turn, args[0] if args else kwargs.get("input_ids")
        if turn is None or turn.choice is None or ids is None:
            return
        new = turn.fed(ids, kwargs.get("past_key_values"))
        if turn.selection is None:
            turn.repeat(len(ids) // len(turn.choice.memory))
        elif turn.targets is not None:
            left = [turn.follow(tokens) for tokens in new.T.tolist()]
            if any(left):
                turn.selection = self.memory.select(turn.choice.memory)

    def _at_value(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        turn = self._turn
        if turn is None:
            return None
        if turn.selection is None:
            assert turn.choice is not None
            turn.selection = self.memory.select(turn.choice.memory)
        selection = turn.selection
        if not selection:
            return None
        if selection.size == 1:  # one shard for every row, however the architecture lays out its tokens
            return selection(output[None], args[0][None])[0]
        shape = (selection.size, -1, output.shape[-1])
        activations = args[0].reshape(selection.size, -1, args[0].shape[-1])
        return selection(output.reshape(shape), activations).reshape(output.shape)


def _real(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows without what the mask hides."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def _refuse_empty(rows: Sequence[Sequence[int]]) -> None:
    if not all(rows):
        raise RepairError("a prompt without tokens cannot be routed; give each sequence at least one token")


def _argmax_rows(logits: Tensor, labels: Tensor) -> list[list[int]]:
    chosen = logits.argmax(-1)
    return [row[keep].tolist() for row, keep in zip(chosen, labels >= 0, strict=True)]


def prompts_of(asked: Any) -> list[str]:
    """Prompts from a text, texts, messages or several dialogues."""
    if isinstance(asked, str):
        return [asked]
    if dialogue.is_messages(asked):
        return [dialogue.dump(asked)]
    found = [dialogue.dump(item) if dialogue.is_messages(item) else item for item in asked]
    if not all(isinstance(item, str) for item in found):
        raise RepairError(
            "a prompt must be a text, or messages such as [{'role': 'user', 'content': '...'}] that end with the user's"
        )
    return found


def _uniform(memory: int) -> Choice:
    none = torch.zeros(1)
    return Choice(torch.tensor([memory]), none, none, (None,))
