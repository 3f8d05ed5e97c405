"""Lexical anchors for the key router: how much of what an edit is about occurs in a prompt.

Not in the paper, whose router scores activations alone. An edit's anchor is the set of tokens that names what it is
about: those of its subject where the record gives one, else those of its prompt. Tokens weigh by their squared
inverse document frequency, so the words that all prompts share count for little and a rare name for much. Coverage is
asymmetric: a rephrase may add any number of other words.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Coverage of every anchor (N, A) by every prompt (B, T), as one matrix product over the tokens in use: (B, N)."""
    used, columns = anchor_ids.clamp_min(0).unique(return_inverse=True)
    real = anchor_ids >= 0
    weights = token_weights[anchor_ids.clamp_min(0)] * real
    table = torch.zeros(len(anchor_ids), len(used)).scatter_add_(1, columns, weights)
    # A token that stands twice in an anchor adds its weight twice here as it does in `coverage`.
    place = torch.searchsorted(used, prompt_ids.clamp_min(0)).clamp_max(len(used) - 1)
    known = (used[place] == prompt_ids) & (prompt_ids >= 0)
    present = torch.zeros(len(prompt_ids), len(used)).scatter_reduce_(1, place, known.float(), reduce="amax")
    return (present @ table.T) / weights.sum(-1).clamp_min(1e-12)
