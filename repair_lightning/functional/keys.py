"""Lexical anchors for the key router: how much of what an edit is about occurs in a prompt.

Not in the paper, whose router scores activations alone. An edit's anchor is the set of tokens that names what it is
about: those of its subject where the record gives one, else those of its prompt. Tokens weigh by their squared
inverse document frequency, so the words that all prompts share count for little and a rare name for much. Coverage is
asymmetric: a rephrase may add any number of other words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_TABLE = 1 << 20
"""Cells (token, prompt) of the table that a block of prompts is looked up in: 4 MB of float32, so that it stays in the
cache. A block has at least 64 prompts, whatever the vocabulary: 38 MB for 150,000 tokens."""
_BLOCK = 1 << 19
"""Cells (anchor, prompt) of a block of coverages: 2 MB of float32."""


def document_counts(tokens: Tensor, vocabulary: int) -> Tensor:
    """In how many of the rows (N, T) each token stands, (V,) float32; -1 is no token."""
    counts = torch.zeros(vocabulary)
    for rows in tokens.split(4096):
        ordered = rows.sort(-1).values
        first = ordered >= 0
        first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        counts += torch.bincount(ordered[first], minlength=vocabulary)
    return counts


def inverse_document_frequency(document_counts: Tensor, documents: int) -> Tensor:
    """Squared inverse document frequency per token, from the number of documents (V,) that hold each token.

    `log((n + 1) / (count + 1/2))^2`: positive for every count up to n, largest for tokens never seen.
    """
    return torch.log((documents + 1) / (document_counts.float() + 0.5)).clamp_min(1e-3).square()


def coverage(prompt_ids: Tensor, anchor_ids: Tensor, token_weights: Tensor) -> Tensor:
    """The weighted share of each anchor's tokens that occur in the prompt, in [0, 1].

    Args:
        prompt_ids: (B, T) token ids, -1 where there is none.
        anchor_ids: (B, C, A) token ids of C candidate anchors per prompt, -1 where there is none.
        token_weights: (V,) weight of each token.

    Returns:
        (B, C); 0 for an anchor without tokens.
    """
    real = anchor_ids >= 0
    weights = token_weights[anchor_ids.clamp_min(0)] * real
    present = torch.zeros_like(real)
    for column in range(prompt_ids.shape[1]):
        token = prompt_ids[:, column, None, None]
        present |= (anchor_ids == token) & (token >= 0)
    return (weights * present).sum(-1) / weights.sum(-1).clamp_min(1e-12)


def coverage_matrix(prompt_ids: Tensor, anchor_ids: Tensor, token_weights: Tensor) -> Tensor:
    """Coverage of every anchor (N, A) by every prompt (B, T) at once: (B, N)."""
    found = torch.zeros(len(prompt_ids), len(anchor_ids))
    for prompts, anchors, shares in _blocks(prompt_ids, anchor_ids, token_weights):
        found[prompts, anchors] = shares.T
    return found


def highest_coverage(prompt_ids: Tensor, anchor_ids: Tensor, token_weights: Tensor, below: float = math.inf) -> Tensor:
    """The highest coverage of each anchor (N, A) by any of the prompts (M, T) that lies below a limit: (N,).

    Coverages at or above `below` are passed over; 0 where nothing is left. M x N is gone through in blocks, never
    stored: time grows with the product, memory with the sum.
    """
    best = torch.zeros(len(anchor_ids))
    for _, anchors, shares in _blocks(prompt_ids, anchor_ids, token_weights):
        highest = shares.amax(-1)
        over = (highest >= below).nonzero()[:, 0]
        if len(over):  # rare: most blocks hold no prompt that names the subject
            rest = shares[over]
            highest[over] = rest.masked_fill_(rest >= below, 0).amax(-1)
        best[anchors] = torch.maximum(best[anchors], highest)
    return best


def pairs_above(prompt_ids: Tensor, anchor_ids: Tensor, token_weights: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Which prompts (M, T) cover which anchors (N, A) by more than `above`: indices of both, (P,) each."""
    pairs = [torch.zeros(0, 2, dtype=torch.long)]
    for prompts, anchors, shares in _blocks(prompt_ids, anchor_ids, token_weights):
        pairs.append((shares > above).nonzero() + torch.tensor([anchors.start, prompts.start]))
    found = torch.cat(pairs)
    return found[:, 1], found[:, 0]


def _blocks(prompt_ids: Tensor, anchor_ids: Tensor, token_weights: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of the coverages, as (which prompts, which anchors, (anchors, prompts)).

    Each anchor is a bag of rows of a table (token, prompt) of ones and zeros that holds one block of prompts. A bag is
    summed in the order of its tokens, so a coverage does not depend on the block in which it is computed, to the bit.
    """
    real = anchor_ids >= 0
    weights = token_weights[anchor_ids.clamp_min(0)] * real
    total = weights.sum(-1, keepdim=True).clamp_min(1e-12)
    shared = _occurs(prompt_ids, token_weights) & _occurs(anchor_ids, token_weights)
    place = shared.cumsum(0) - 1
    used = max(int(shared.sum()), 1)
    held = real & shared[anchor_ids.clamp_min(0)]
    bags, weights = place[anchor_ids[held]], weights[held]
    ends = torch.cat([torch.zeros(1, dtype=torch.long), held.sum(-1).cumsum(0)])
    width = max(min(max(_TABLE // used, 64), 4096, len(prompt_ids)), 1)
    height = _BLOCK // width
    table = torch.zeros(used, width)
    for first in range(0, len(prompt_ids), width):
        block = prompt_ids[first : first + width]
        row, column = ((block >= 0) & shared[block.clamp_min(0)]).nonzero(as_tuple=True)
        cells = place[block[row, column]], row
        table[cells] = 1
        for start in range(0, len(anchor_ids), height):
            stop = min(start + height, len(anchor_ids))
            low, high = int(ends[start]), int(ends[stop])
            offsets = ends[start:stop] - low
            scores = embedding_bag(bags[low:high], table, offsets, mode="sum", per_sample_weights=weights[low:high])
            yield slice(first, first + len(block)), slice(start, stop), scores[:, : len(block)].div_(total[start:stop])
        table[cells] = 0


def _occurs(tokens: Tensor, token_weights: Tensor) -> Tensor:
    """Which tokens of the vocabulary stand anywhere in (N, T): (V,) bool."""
    found = torch.zeros(len(token_weights), dtype=torch.bool)
    found[tokens[tokens >= 0]] = True
    return found
