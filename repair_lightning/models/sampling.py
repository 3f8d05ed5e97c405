"""Texts that the base writes by itself: stand-ins for irrelevant prompts, and contexts to put before a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left


@torch.no_grad()
def own_texts(model: Any, tokenizer: Any, number: int, length: int = 12) -> list[str]:
    """The base's greedy continuations of its BOS token, of at most `length` tokens, likeliest first tokens first."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    start = next((int(token) for token in named if token is not None), 0)
    ranked = model(input_ids=torch.tensor([[start]], device=model.device)).logits[0, -1].float()
    ranked[list(tokenizer.all_special_ids)] = -torch.inf
    firsts = ranked.topk(min(number, len(ranked))).indices.tolist()
    said = _continued(model, tokenizer, [[start, first] for first in firsts], length - 1)
    rows = [[first, *row] for first, row in zip(firsts, said, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text.strip() for text in texts if text.strip()]


def greedy_answers(model: Any, forms: Forms, prompts: Sequence[str]) -> list[str]:
    """What the base says to prompts by itself, with single spaces between the words; empty where it says nothing."""
    said = [row for _, row in greedy_rows(model, forms, prompts)]
    return [" ".join(text.split()) for text in forms.tokenizer.batch_decode(said, skip_special_tokens=True)]


@torch.no_grad()
def greedy_rows(
    model: Any, forms: Forms, prompts: Sequence[str], length: int = 8
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of prompts, each with those of what the base says to it: at most `length`, with an end where it ended
    by itself."""
    asked = [forms.ids(prompt) for prompt in prompts]
    said = _continued(model, forms.tokenizer, asked, length)
    ends = [next((i + 1 for i, token in enumerate(row) if token in forms.stops), len(row)) for row in said]
    return [(tuple(ids), tuple(row[:end])) for ids, row, end in zip(asked, said, ends, strict=True)]


def _continued(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The model's greedy continuations of token rows, which are padded on the left in batches."""
    found: list[list[int]] = []
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for at in range(0, len(rows), 64):
        ids, mask = pad_left(rows[at : at + 64], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
        found += output[:, ids.shape[1] :].tolist()
    return found
