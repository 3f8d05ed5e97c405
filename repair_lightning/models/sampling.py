"""Texts that the base writes by itself: stand-ins for irrelevant prompts, and contexts to put before a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left


@torch.no_grad()
def own_texts(model: Any, tokenizer: Any, number: int, length: int = 12, batch_size: int = 64) -> list[str]:
    """The base's greedy continuations of its BOS token, one per first token in order of probability.

    Args:
        number: how many texts; at most the vocabulary.
        length: most tokens of a text.
    """
    start = _first_token(tokenizer)
    ids = torch.tensor([[start]], device=model.device)
    ranked = model(input_ids=ids).logits[0, -1].float()
    ranked[list(tokenizer.all_special_ids)] = -torch.inf
    firsts = ranked.topk(min(number, len(ranked))).indices.tolist()
    rows = _continued(model, tokenizer, [[start, first] for first in firsts], length - 1, batch_size)
    texts = tokenizer.batch_decode([row[1:] for row in rows], skip_special_tokens=True)
    return [text.strip() for text in texts if text.strip()]


@torch.no_grad()
def greedy_answers(
    model: Any, forms: Forms, prompts: Sequence[str], length: int = 8, batch_size: int = 64
) -> list[str]:
    """What the base says to prompts by itself, with single spaces between the words; empty where it says nothing.

    Args:
        length: most tokens of an answer.
    """
    asked, tokenizer = [forms.ids(prompt) for prompt in prompts], forms.tokenizer
    found: list[str] = []
    for at in range(0, len(asked), batch_size):
        part = asked[at : at + batch_size]
        width = max(map(len, part))
        rows = _continued(model, tokenizer, part, length, batch_size)
        found += tokenizer.batch_decode([row[width:] for row in rows], skip_special_tokens=True)
    return [" ".join(text.split()) for text in found]


@torch.no_grad()
def greedy_rows(
    model: Any, forms: Forms, prompts: Sequence[str], length: int = 8, batch_size: int = 64
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of prompts, each with those of what the base says to it, with an end where it ended by itself.

    Args:
        length: most tokens of an answer, the end included.
    """
    found = []
    ends, tokenizer = set(forms.stops), forms.tokenizer
    asked = [forms.ids(prompt) for prompt in prompts]
    for at in range(0, len(asked), batch_size):
        part = asked[at : at + batch_size]
        width = max(map(len, part))
        for ids, row in zip(part, _continued(model, tokenizer, part, length, batch_size), strict=True):
            said = row[width:]
            ended = next((i + 1 for i, token in enumerate(said) if token in ends), len(said))
            found.append((tuple(ids), tuple(said[:ended])))
    return found


def _continued(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Token rows, padded on the left in batches, with the model's greedy continuations."""
    found: list[list[int]] = []
    for at in range(0, len(rows), batch_size):
        ids, mask = pad_left(rows[at : at + batch_size], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        found += output.tolist()
    return found


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    return 0
