"""What a model makes of a context that others wrote: how likely a continuation is, and what it continues with itself.

Which memory answers is decided from the context alone. A router that sees the continuation too could tell by it which
edit is meant, and every score would flatter the model; so :func:`route_contexts` is not given it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from repair_lightning.errors import RepairError
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix import pad_left
from repair_lightning.scoring.protocols import decoded, sorted_batches
from repair_lightning.types import BASE


@torch.no_grad()
def route_contexts(model: EditedModel, contexts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
    """The memory (B,) that answers each context: a shard's id, or `BASE`, also where it has no words. Equal ones are
    asked once; of one that is longer than the base reads, the end counts."""
    special = set(model.tokenizer.all_special_ids)
    rows = [tuple(context[-model.longest :]) for context in contexts]
    asked = [row for row in dict.fromkeys(rows) if not special.issuperset(row)]
    found = dict.fromkeys(rows, BASE)
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        found |= zip(part, model.choose_rows(part).memory.tolist(), strict=True)
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

    Contexts have at least one token; of what is too long for the base, the end is read, and a continuation alone that
    is too long is a RepairError. `memory` holds (B,) shard ids or `BASE`.
    """
    limit = model.longest
    if (most := max(map(len, continuations), default=0)) > limit:
        raise RepairError(f"a continuation has {most} tokens, and the base reads {limit}; leave its task out")
    rows = [[*context, *then][-limit - 1 :] for context, then in zip(contexts, continuations, strict=True)]
    found = [(0.0, True)] * len(rows)
    for index in sorted_batches([len(row) for row in rows], batch_size):
        ids, mask = pad_left([rows[i][:-1] for i in index], device=model.device)
        keep = max(1, *(len(continuations[i]) for i in index))
        with model.forced(memory[index]):
            logits = model.base(**model.split.inputs(ids, mask), logits_to_keep=keep).logits
        for i, row in zip(index, logits, strict=True):
            then = torch.tensor(continuations[i], dtype=torch.long, device=row.device)
            row = row[keep - len(then) :].float()
            said = row.log_softmax(-1).gather(-1, then[:, None])
            found[i] = (float(said.sum()), bool((row.argmax(-1) == then).all()))
    return found


class _Until(StoppingCriteria):
    """A row is done once one of some strings stands in what it says."""

    def __init__(self, model: EditedModel, until: Sequence[str]) -> None:
        self.model, self.until, self.start = model, until, 0

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:  # type: ignore[override]
        self.start = self.start or input_ids.shape[1] - 1  # the first call comes with the first token
        texts = _texts(self.model, input_ids[:, self.start :].tolist())
        return torch.tensor([_cut(text, self.until) != text for text in texts], device=input_ids.device)


def _texts(model: EditedModel, rows: Sequence[Sequence[int]]) -> list[str]:
    """Rows as texts up to the first stop: not every end of a turn is one that decoding leaves out."""
    said = [list(takewhile(lambda id: id not in model.forms.stops, row)) for row in rows]
    return model.tokenizer.batch_decode(said, skip_special_tokens=True)


def _cut(text: str, until: Sequence[str]) -> str:
    return min((text.partition(stop)[0] for stop in until if stop), key=len, default=text)


@torch.no_grad()
def completions(
    model: EditedModel,
    contexts: Sequence[Sequence[int]],
    memory: Tensor,
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> list[str]:
    """Greedy continuations of contexts, up to a string of `until` (not part of them), the model's own end or
    `max_new_tokens`; a RepairError where these leave no room for a context. Contexts and memory are as above."""
    room = model.longest - max_new_tokens
    if room < 1:
        words = f"max_gen_toks is {max_new_tokens}, and the base reads {model.longest} tokens, the context's with them"
        raise RepairError(f"{words}; give fewer")
    rows, found = [context[-room:] for context in contexts], [""] * len(contexts)
    for index in sorted_batches([len(row) for row in rows], batch_size):
        stop = StoppingCriteriaList([_Until(model, until)])
        said = decoded(model, [rows[i] for i in index], memory[index], max_new_tokens, stopping_criteria=stop)
        for i, text in zip(index, _texts(model, said), strict=True):
            found[i] = _cut(text, until)
    return found
