"""Edits as token ids. One space joins prompt and target; the target ends with the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repair_lightning.functional import IGNORED


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its target as token ids; the target includes the end-of-sequence token."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and target in one row."""
        return self.prompt + self.target


def encode(tokenizer: Any, prompt: str, target: str) -> Encoded:
    """Token ids of `prompt`, and of `target` as it is spelled after it.

    The target's ids are those that follow the prompt's in the joined text; where joining changes the prompt's own ids,
    both are split apart and tokenised by themselves.
    """
    prompt_ids = tuple(tokenizer(prompt)["input_ids"])
    joined = _without_end(tokenizer, tuple(tokenizer(f"{prompt} {target}")["input_ids"]))
    prompt_ids = _without_end(tokenizer, prompt_ids)
    if joined[: len(prompt_ids)] == prompt_ids and len(joined) > len(prompt_ids):
        target_ids = joined[len(prompt_ids) :]
    else:
        target_ids = tuple(tokenizer(f" {target}", add_special_tokens=False)["input_ids"])
    return Encoded(prompt_ids, (*target_ids, tokenizer.eos_token_id))


def _without_end(tokenizer: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def target_labels(rows: Sequence[Encoded], device: Any = None) -> Tensor:
    """Labels (B, max target length) of left-padded rows: target tokens at the right end, `IGNORED` before them."""
    width = max(len(row.target) for row in rows)
    padded = [[IGNORED] * (width - len(row.target)) + list(row.target) for row in rows]
    return torch.tensor(padded, device=device)
