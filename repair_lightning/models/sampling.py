"""Texts that the base writes by itself: stand-ins for irrelevant prompts, and contexts to put before a prompt."""

from __future__ import annotations

from typing import Any

import torch

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
    texts: list[str] = []
    for at in range(0, len(firsts), batch_size):
        rows, mask = pad_left([[start, first] for first in firsts[at : at + batch_size]], device=model.device)
        output = model.generate(
            input_ids=rows,
            attention_mask=mask,
            max_new_tokens=length - 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
    return [text.strip() for text in texts if text.strip()]


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    return 0
