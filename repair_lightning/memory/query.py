"""What a router may look at: the prompt's own tokens and states, never the target's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repair_lightning.types import BASE, READS, Route


@dataclass(frozen=True, slots=True)
class Query:
    """A batch of prompts at the edited layer.

    Attributes:
        texts: what each of the B prompts asks: the last turn of the user, in the user's words.
        mask: (B, T) bool, true on the prompt's tokens; padding may stand on either side.
        hidden: (B, T, D) where it enters the edited layer.
        activations: (B, T, F), A(x). A router that reads no states gets texts alone, with T = 0.
    """

    texts: tuple[str, ...]
    mask: Tensor
    hidden: Tensor
    activations: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def last_hidden(self) -> Tensor:
        """The hidden state (B, D) of each prompt's last token, float32."""
        return self.at_last().hidden[:, 0].float()

    def rows(self, index: slice | Tensor) -> Query:
        """The query of some of its prompts."""
        kept = torch.arange(len(self))[index if isinstance(index, slice) else index.cpu()].tolist()
        texts = tuple(self.texts[i] for i in kept)
        return Query(texts, self.mask[index], self.hidden[index], self.activations[index])

    def at_last(self) -> Query:
        """The query with the states of each prompt's last token alone (T = 1); its texts stay whole."""
        steps = torch.arange(self.mask.shape[1], device=self.mask.device)
        last = (self.mask * steps).argmax(-1)
        rows = torch.arange(len(self), device=last.device)
        one = torch.ones(len(self), 1, dtype=torch.bool, device=last.device)
        return Query(self.texts, one, self.hidden[rows, last][:, None], self.activations[rows, last][:, None])

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Query:
        """Prompts without states, for a router that reads none."""
        none = torch.zeros(len(texts), 0, 0)
        mask = torch.zeros(len(texts), 0, dtype=torch.bool)
        return cls(tuple(texts), mask, none, none)


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ragged rows of ids as one tensor (B, W), -1 past each row's end."""
    width = max((len(row) for row in rows), default=0)
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


@dataclass(frozen=True, slots=True)
class Check:
    """What a prompt must pass besides the score: `value` (B,) of what `name` says must reach `limit` (B,). A limit of
    minus infinity asks for nothing."""

    name: str
    value: Tensor
    limit: Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """A router's answer for B prompts: `memory` (B,) holds shard ids, `BASE` or `READS`, the rest says why.

    `score` must exceed `threshold`, (B,) each; `nearest` is the id of the edit that they belong to, where the router
    knows it.
    """

    memory: Tensor
    score: Tensor
    threshold: Tensor
    nearest: tuple[str | None, ...]
    checks: tuple[Check, ...] = ()

    @classmethod
    def base(cls, size: int) -> Choice:
        """Every prompt to the base: there is nothing to choose from."""
        none = torch.zeros(size)
        return cls(torch.full((size,), BASE), none, torch.full((size,), float("inf")), (None,) * size)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], nearest: Iterable[str | None], names: Iterable[str]) -> Choice:
        """From its :meth:`tensors` and the names of its checks."""
        memory, score, threshold, *more = tensors
        checks = tuple(map(Check, names, more[::2], more[1::2]))
        return cls(memory, score, threshold, tuple(nearest), checks)

    def tensors(self) -> list[Tensor]:
        """Memory, score and threshold, then each check's value and limit, (B,) each."""
        return [self.memory, self.score, self.threshold, *(x for c in self.checks for x in (c.value, c.limit))]

    @classmethod
    def join(cls, parts: Sequence[Choice]) -> Choice:
        """Several batches' choices as one."""
        whole = [torch.cat(same) for same in zip(*(part.tensors() for part in parts), strict=True)]
        return cls.of(whole, [name for part in parts for name in part.nearest], [c.name for c in parts[0].checks])

    def routes(self) -> list[Route]:
        """The choice in words, a `Route` per prompt."""
        rows = zip(self.memory.tolist(), self.score.tolist(), self.threshold.tolist(), self.nearest, strict=True)
        named = [(check.name, check.value.tolist(), check.limit.tolist()) for check in self.checks]
        return [
            Route(*row, reason=_reason(*row, [(name, value[i], limit[i]) for name, value, limit in named]))
            for i, row in enumerate(rows)
        ]


def _reason(
    memory: int, score: float, threshold: float, nearest: str | None, checks: Sequence[tuple[str, float, float]]
) -> str:
    """Why a memory answers: what was passed, and for the base the first that was not."""
    if memory == READS:
        return f"base, which has read edit {nearest} first: a text about its subject is asked for"
    if threshold == math.inf and nearest is None:
        return "base: there is no shard" if score == 0 else "base: no edit is about what it names"
    verb = "exceeds" if score > threshold else "does not exceed"
    words = [f"score {score:.3f} {verb} {threshold:.3f}"]
    for name, value, limit in checks if score > threshold else ():
        if limit == -math.inf:
            continue
        passed = value >= limit
        words.append(f"{'' if passed else 'but '}{name} {value:.3f} {'reaches' if passed else 'is below'} {limit:.3f}")
        if not passed:
            break
    words += [f"nearest edit {nearest}"] if nearest else []
    return f"{'base' if memory == BASE else f'shard {memory}'}: {', '.join(words)}"
