"""Success by probability, as ROME's evaluation has it on CounterFact (Meng et al. 2022, arXiv 2202.05262, Sec. 3.4).

Of two answers to a prompt the likelier by the mean log probability of its tokens, fed after the prompt (teacher
forcing) without the end. The efficacy score `es` is the share of edits whose target is likelier than the old answer;
`ps`, the paraphrase score, of rephrases; `ns`, the neighbourhood score, the share of neighbours whose own answer is
likelier than the target. Aliases do not count. Our deviation: the memory that the router chooses from the prompt alone
reads both answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.protocols import forced_tokens, mean_of
from repair_lightning.types import Edit


def probability_scores(model: EditedModel, edits: Sequence[Edit]) -> dict[str, float | None] | None:
    """`es`, `ps` and `ns` in [0, 1], over the edits that say what their target replaces; None where none does."""
    asked: list[tuple[str, str, str, str]] = []  # the score, a prompt, what should be likelier there, and than what
    for edit in edits:
        if (old := edit.old_answer) is not None:
            asked += [("es", edit.prompt, edit.target, old)]
            asked += [("ps", prompt, edit.target, old) for prompt in edit.rephrases]
            asked += [("ns", probe.prompt, probe.answer or old, edit.target) for probe in edit.near]
    asked = [one for one in asked if all(_fits(model, one[1], answer) for answer in one[2:])]
    if not asked:
        return None
    pairs = dict.fromkeys((prompt, answer) for _, prompt, *both in asked for answer in both)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    memory = dict(zip(prompts, model.choose(prompts).memory.tolist(), strict=True))
    chosen = torch.tensor([memory[prompt] for prompt, _ in pairs])
    likely = dict(zip(pairs, _log_probabilities(model, list(pairs), chosen), strict=True))
    marks = [(name, likely[prompt, more] > likely[prompt, less]) for name, prompt, more, less in asked]
    return {name: mean_of(mark for of, mark in marks if of == name) for name in ("es", "ps", "ns")}


def _fits(model: EditedModel, prompt: str, answer: str) -> bool:
    return len(model.forms.encode(prompt, answer).ids) <= model.longest


def _log_probabilities(model: EditedModel, pairs: Sequence[tuple[str, str]], memory: Tensor) -> list[float]:
    """The mean log probability, in nats, of an answer's tokens after its prompt, each pair by its memory (B,)."""

    def read(logits: Tensor, labels: Tensor) -> list[float]:
        logits, labels = logits[:, :-1], labels[:, :-1]  # without the end, which stands last in every row
        tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        fed = labels >= 0
        return ((tokens * fed).sum(-1) / fed.sum(-1).clamp(min=1)).tolist()

    prompts, answers = (list(column) for column in zip(*pairs, strict=True))
    return forced_tokens(model, prompts, answers, memory, read)
