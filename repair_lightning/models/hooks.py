"""Hooks in a base's own modules, through which a memory answers sequences from the prompt on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from repair_lightning.memory.shards import Selection
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.prefix import SplitModel
from repair_lightning.types import BASE


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
    """What a memory adds to a base's value matrix; outside of :meth:`during` nothing."""

    def __init__(self, split: SplitModel, memory: SideMemory) -> None:
        self._memory = memory
        self._turn: Turn | None = None
        self._handles = [
            split.model.register_forward_pre_hook(self._at_call, with_kwargs=True),
            split.value.register_forward_hook(self._at_value),
            split.model.register_forward_hook(self._at_end),
        ]

    def remove(self) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def during(self, turn: Turn) -> Iterator[None]:
        """Inside, the base's own calls are those of a turn."""
        before, self._turn = self._turn, turn
        try:
            yield
        finally:
            self._turn = before

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
        if turn is None:
            return None
        if turn.selection is None:
            assert turn.memory is not None
            turn.selection = self._memory.select(turn.memory)
        if not turn.selection:
            return None
        # One shard for all rows needs no rows, however the architecture lays out its tokens.
        rows = (turn.selection.size, -1) if turn.selection.size > 1 else (1, *output.shape[:-1])
        activations = args[0].reshape(*rows, args[0].shape[-1])
        return turn.selection(output.reshape(*rows, output.shape[-1]), activations).reshape(output.shape)


def quote(logits: Tensor, token: int) -> None:
    """Make a token all but certain in logits (V,), in place."""
    logits[token] = logits.max() + 30
