"""A base with its side memory: called and asked to generate like any Hugging Face causal LM.

Hooks on the base's own modules do the work, so its parameters, names and code stay as they are, and prompts that no
shard answers get the base's own bits. The choice is made once per sequence, when its prompt is first seen, and held
while the key-value cache grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repair_lightning.distributed.team import ALONE, Team
from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Check, Choice, Query, canonical_ids, pad_right
from repair_lightning.memory.routers import Router
from repair_lightning.memory.side_memory import Selection, SideMemory
from repair_lightning.models.prefix import Capture, SplitModel, pad_left, stack_left
from repair_lightning.models.prefix_cache import PrefixCache, canonical_batches, capture_rows
from repair_lightning.models.weights import BaseWeights
from repair_lightning.types import BASE, Route

ROOM = 64
"""Positions that stay free for an answer where a prompt is put behind other texts."""
_HELD = "_repair_turn"
"""The attribute of a key-value cache that remembers which memory its sequences chose."""


@dataclass(slots=True)
class _Turn:
    """What the hooks know of the sequences in flight: their prompts until a choice is made, then the choice."""

    words: Tensor | None = None
    mask: Tensor | None = None
    choice: Choice | None = None
    selection: Selection | None = None
    hidden: Tensor | None = None


class EditedModel(nn.Module):
    """A frozen causal LM, its shards and its router.

    Args:
        base: the causal LM; it is not copied.
        tokenizer: its tokenizer.
        memory: the bank of shards of the edited layer.
        router: picks among the shards.
        layer: index of the edited layer.

    Attributes:
        weights: the base's own value matrices, for what is written into them.
        prefixes: where the states of prompts that come again are kept; None runs the base anew each time.
        team: the ranks among which many prompts are dealt out; all of them must ask alike.
    """

    def __init__(self, base: Any, tokenizer: Any, memory: SideMemory, router: Router, layer: int) -> None:
        super().__init__()
        self.base = base
        self.tokenizer = tokenizer
        self.weights = BaseWeights(base)
        self.router = router
        self.prefixes: PrefixCache | None = None
        self.team: Team = ALONE
        self._turn: _Turn | None = None  # what the hooks obey, inside a call alone
        self._hooks: list[Any] = []
        self.move_to(layer, memory)

    def move_to(self, layer: int, memory: SideMemory) -> None:
        """Edit another layer, with another memory; the router is the caller's to fit anew, and so are the prefixes."""
        self.release()
        self.layer, self.memory = layer, memory
        self.split = SplitModel(self.base, layer)
        self._hooks = [
            self.split.layers[layer].register_forward_pre_hook(self._at_layer, with_kwargs=True),
            self.split.value.register_forward_hook(self._at_value),
        ]

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
            past_key_values: a filled cache continues with the choice of the prompt that filled it.
            prompt_mask: (B, T), true on the tokens that the router may see; by default all that attention sees.
            options: as the base takes them.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.router.prefaces:
            return self._forward_behind_prefaces(input_ids, attention_mask, past_key_values, prompt_mask, options)
        continues = past_key_values is not None and past_key_values.get_seq_length() > 0
        turn = getattr(past_key_values, _HELD, None) if continues else None
        if turn is None:
            turn = self._new_turn(input_ids, attention_mask if prompt_mask is None else prompt_mask)
        with self._during(turn):
            output = self.base(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **options
            )
        cache = past_key_values if past_key_values is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _HELD, turn)
        return output

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Generate as the base does, every sequence with the memory that its prompt chose; see `transformers`."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.router.prefaces:
            rows = _real(input_ids, attention_mask)
            choice = self.router.route(self.query_rows(rows), self.memory)
            ids, mask = pad_left(self.read(rows, choice.memory), self._padding, self.device)
            with self.forced(choice):
                output = self.base.generate(input_ids=ids, attention_mask=mask, **options)
            copies = len(output) // len(input_ids)
            return torch.cat([input_ids.repeat_interleave(copies, 0), output[:, ids.shape[1] :]], dim=1)
        with self._during(self._new_turn(input_ids, attention_mask)):
            return self.base.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

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

    def route(self, prompts: str | Sequence[str]) -> list[Route]:
        """Which memory answers each prompt, and why."""
        return self.choose([prompts] if isinstance(prompts, str) else prompts).routes()

    @torch.no_grad()
    def choose(self, prompts: Sequence[str], batch_size: int = 64) -> Choice:
        """The router's choice for prompts, given as text; dealt out among the ranks."""
        mine = self.team.mine_of(prompts)
        asked = [prompts[i] for i in mine]
        parts = [
            self.router.route(self.query(asked[start : start + batch_size]), self.memory)
            for start in range(0, len(asked), batch_size)
        ]
        return self.shared_choice(mine, Choice.join(parts) if parts else Choice.base(0))

    def shared_choice(self, mine: Sequence[int], part: Choice) -> Choice:
        """The choices of all ranks, from this one's `part` for the prompts with the indices `mine`."""
        if self.team.parts == 1:
            return part
        memory, score, threshold = self.team.rows(mine, part.memory, part.score, part.threshold)
        named = self.team.texts(mine, ["" if name is None else f"={name}" for name in part.nearest])
        nearest = tuple(name[1:] if name else None for name in named)
        return Choice(memory, score, threshold, nearest, self._shared_checks(mine, part))

    def _shared_checks(self, mine: Sequence[int], part: Choice) -> tuple[Check, ...]:
        names = max(self.team.all_texts([check.name for check in part.checks] if mine else []), key=len)
        values = [tensor for check in part.checks for tensor in (check.value, check.limit)]
        whole = self.team.rows(mine, *(values if mine else [part.score] * 2 * len(names)))
        return tuple(
            Check(name, *pair) for name, pair in zip(names, zip(whole[::2], whole[1::2], strict=True), strict=True)
        )

    def shared_query(self, number: int, ask: Callable[[list[int]], Query]) -> Query:
        """The states of `number` prompts, each computed by one rank.

        Args:
            number: of prompts.
            ask: gives the states of those with the given indices.
        """
        mine = self.team.mine(number)
        if self.team.parts == 1 or self.router.reads_all_tokens:  # whole prompts are too much to send around
            return ask(list(range(number)))
        some = ask(mine or [0])  # one at the least: its shape is needed
        part = some if mine else some.rows(slice(0, 0))
        words = pad_right([[token for token in row if token >= 0] for row in part.words.tolist()])
        width = max(found.shape[1] for (found,) in self.team.gather(words))
        padded = torch.nn.functional.pad(words, (0, width - words.shape[1]), value=-1)
        return Query(*self.team.rows(mine, padded, part.mask, part.hidden, part.activations))

    def query(self, prompts: Sequence[str]) -> Query:
        """Prompts as routers see them."""
        return self.query_rows(self.tokenizer(list(prompts))["input_ids"])

    def query_rows(self, rows: Sequence[Sequence[int]]) -> Query:
        """Prompts, given as token ids, as routers see them."""
        return self.query_of(rows, self.captures(rows))

    def query_of(self, rows: Sequence[Sequence[int]], captures: Sequence[Capture]) -> Query:
        """Prompts, given as token ids with their states, as routers see them.

        States may go on behind the prompt; what follows is cut off. Where the router reads last tokens alone, the
        others are left out.
        """
        words = self._words(rows)
        first = 0 if self.router.reads_all_tokens else -1
        hidden = [capture.hidden[: len(row)][first:] for row, capture in zip(rows, captures, strict=True)]
        activations = [capture.activations[: len(row)][first:] for row, capture in zip(rows, captures, strict=True)]
        lengths = torch.tensor([len(part) for part in hidden], device=self.device)
        padded = stack_left(hidden)
        columns = torch.arange(padded.shape[1], device=self.device)
        mask = columns >= padded.shape[1] - lengths[:, None]
        return Query(words, mask, padded, stack_left(activations))

    @torch.no_grad()
    def last_states(self, prompts: Sequence[str], batch_size: int = 64) -> Query:
        """Prompts with the state of their last token alone and no activations: the cheapest look at a prompt."""
        rows = self.tokenizer(list(prompts))["input_ids"]
        _refuse_empty(rows)
        hidden: list[Any] = [None] * len(rows)
        with self.forced(None):
            for index, ids in canonical_batches(self.split, rows, batch_size):
                states = self.split.states(ids, torch.ones_like(ids))
                for i, row in zip(index, states, strict=True):
                    hidden[i] = row[len(rows[i]) - 1]
        last = torch.stack(hidden)[:, None]
        one = torch.ones(len(rows), 1, dtype=torch.bool, device=self.device)
        return Query(self._words(rows), one, last, last[..., :0])

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

    def _new_turn(self, ids: Tensor, mask: Tensor) -> _Turn:
        rows = _real(ids, mask)
        return _Turn(words=self._words(rows), mask=mask.bool())

    def _words(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The words (B, W) of prompts given as token ids; a template's special tokens are no words."""
        _refuse_empty(rows)
        texts = self.tokenizer.batch_decode(
            [list(row) for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return canonical_ids(self.tokenizer, texts)

    def _at_layer(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._turn is not None and self._turn.choice is None and self._turn.selection is None:
            self._turn.hidden = args[0] if args else kwargs["hidden_states"]

    def _at_value(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        turn = self._turn
        if turn is None:
            return None
        if turn.selection is None:
            turn.choice = self._decide(turn, args[0]) if turn.choice is None else turn.choice
            turn.selection = self.memory.select(turn.choice.memory)
        selection = turn.selection
        if not selection:
            return None
        if selection.size == 1:  # one shard for every row, however the architecture lays out its tokens
            return selection(output[None], args[0][None])[0]
        shape = (selection.size, -1, output.shape[-1])
        activations = args[0].reshape(selection.size, -1, args[0].shape[-1])
        return selection(output.reshape(shape), activations).reshape(output.shape)

    def _decide(self, turn: _Turn, activations: Tensor) -> Choice:
        assert turn.hidden is not None
        assert turn.words is not None
        assert turn.mask is not None
        size, width = turn.hidden.shape[:2]
        copies = size // len(turn.words)  # beams and several samples per prompt come as repeated rows
        mask = turn.mask[:, -width:].repeat_interleave(copies, 0)
        words = turn.words.repeat_interleave(copies, 0)
        query = Query(words, mask, turn.hidden.detach(), activations.detach().reshape(size, width, -1))
        turn.hidden = None
        return self.router.route(query if self.router.reads_all_tokens else query.at_last(), self.memory)


def _real(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows without what the mask hides."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def _refuse_empty(rows: Sequence[Sequence[int]]) -> None:
    if not all(rows):
        raise RepairError("a prompt without tokens cannot be routed; give each sequence at least one token")


def _uniform(memory: int) -> Choice:
    none = torch.zeros(1)
    return Choice(torch.tensor([memory]), none, none, (None,))
