"""What a model makes of a context that others wrote: how likely a continuation is, and what it continues with itself.

Which memory answers is decided from the context alone. A router that sees the continuation too could tell by it which
edit is meant, and every score would flatter the model; so :func:`route_contexts` is not given it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from repair_lightning.errors import RepairError
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix import pad_left
from repair_lightning.scoring.protocols import GREEDY, forced_choice, sorted_batches
from repair_lightning.types import BASE


def longest_text(model: EditedModel) -> int:
    """The longest text that the base reads, in tokens; 2048 where its configuration does not say."""
    return model.longest or 2048


@torch.no_grad()
def route_contexts(model: EditedModel, contexts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
    """The memory (B,) that answers each context: a shard's id or `BASE`.

    Equal contexts are asked once. One without words asks for nothing: the base answers. Of one that is longer than the
    base reads, the end counts.
    """
    special, limit = set(model.tokenizer.all_special_ids), longest_text(model)
    rows = [tuple(context[-limit:]) for context in contexts]
    asked = [row for row in dict.fromkeys(rows) if not special.issuperset(row)]
    found = dict.fromkeys(rows, BASE)
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        choice = model.choose_rows(part)
        found |= dict(zip(part, choice.memory.tolist(), strict=True))
    return torch.tensor([found[row] for row in rows], dtype=torch.long)


@torch.no_grad()
def log_likelihoods(
    model: EditedModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    memory: Tensor,
    batch_size: int = 16,
) -> list[tuple[float, bool]]:
    """Per row the log-likelihood of the continuation, summed over its tokens, and whether greedy decoding says it.

    Args:
        model: the edited model.
        contexts: token ids, at least one each; of what is too long for the base, the end is read.
        continuations: token ids.
        memory: (B,) shard ids or `BASE`.
        batch_size: rows per call.

    Raises:
        RepairError: a continuation is longer than the base reads.
    """
    limit = longest_text(model)
    if (most := max(map(len, continuations), default=0)) > limit:
        raise RepairError(f"a continuation has {most} tokens, and the base reads {limit}; leave its task out")
    rows = [[*context, *then][-limit - 1 :] for context, then in zip(contexts, continuations, strict=True)]
    found = [(0.0, True)] * len(rows)
    for index in sorted_batches([len(row) for row in rows], batch_size):
        ids, mask = pad_left([rows[i][:-1] for i in index], device=model.device)
        keep = max(1, *(len(continuations[i]) for i in index))
        with model.forced(forced_choice(memory[index])):
            logits = model.base(**model.split.inputs(ids, mask), logits_to_keep=keep).logits
        for i, row in zip(index, logits, strict=True):
            then = torch.tensor(continuations[i], dtype=torch.long, device=row.device)
            row = row[keep - len(then) :].float()
            said = row.log_softmax(-1).gather(-1, then[:, None])
            found[i] = (float(said.sum()), bool((row.argmax(-1) == then).all()))
    return found


class _Until(StoppingCriteria):
    """A row is done once one of some strings stands in what it says."""

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, until, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([cut(text, self.until) != text for text in texts], device=input_ids.device)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    return min((text.partition(stop)[0] for stop in until if stop), key=len, default=text)


def _before(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A row up to the first of some ids: not every end of a turn is one that decoding leaves out."""
    return list(row[: next((i for i, id in enumerate(row) if id in ends), len(row))])


@torch.no_grad()
def completions(
    model: EditedModel,
    contexts: Sequence[Sequence[int]],
    memory: Tensor,
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> list[str]:
    """Greedy continuations of contexts, up to a string of `until`, the model's own end or `max_new_tokens`.

    Args:
        model: the edited model.
        contexts: token ids, at least one each; of what is too long for the base, the end is read.
        memory: (B,) shard ids or `BASE`.
        until: strings that end a continuation; they are not part of it.
        max_new_tokens: most tokens of a continuation.
        batch_size: rows per call.

    Raises:
        RepairError: `max_new_tokens` leaves no room for a context.
    """
    room, tokenizer = longest_text(model) - max_new_tokens, model.tokenizer
    if room < 1:
        raise RepairError(
            f"max_gen_toks is {max_new_tokens}, and the base reads {longest_text(model)} tokens, the context's with "
            "them; give fewer"
        )
    rows, found = [context[-room:] for context in contexts], [""] * len(contexts)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for index in sorted_batches([len(row) for row in rows], batch_size):
        ids, mask = pad_left([rows[i] for i in index], fill=pad, device=model.device)
        ends = list(model.forms.stops)
        options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": ends, **GREEDY}
        stop = StoppingCriteriaList([_Until(tokenizer, until, ids.shape[1])])
        with model.forced(forced_choice(memory[index])):
            output = model.base.generate(input_ids=ids, attention_mask=mask, stopping_criteria=stop, **options)
        said = [_before(row, ends) for row in output[:, ids.shape[1] :].tolist()]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        for i, text in zip(index, texts, strict=True):
            found[i] = cut(text, until)
    return found
