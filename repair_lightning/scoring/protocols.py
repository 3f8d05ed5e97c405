"""How an edited model is asked, and what a score is. Two protocols, never mixed.

`autoregressive`: greedy generation from the prompt alone with natural stop, compared after normalisation. An alias of
the target counts as right.
`teacher_forced`: the share of the expected tokens that are the argmax when the expected text is fed; aliases are not.

What asks prompts deals them out among the model's ranks: all of them must ask the same.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from repair_lightning.memory.query import Choice
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.forms import Forms
from repair_lightning.models.prefix import pad_left
from repair_lightning.models.routed import argmax_rows
from repair_lightning.training.team import team_of
from repair_lightning.types import BASE

AUTOREGRESSIVE, TEACHER_FORCED = PROTOCOLS = ("autoregressive", "teacher_forced")
KIND_OF_PROMPT: Mapping[str, str] = {"edit": "rel", "rephrase": "gen", "locality": "loc", "near": "near"}
KINDS = tuple(KIND_OF_PROMPT.values())

Scores = dict[str, dict[str, float | None]]
"""Protocol -> kind -> mean score in [0, 1]; None for what was not asked."""

BATCH = 64
"""Prompts in a forward pass."""
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Greedy decoding, whatever the base's own generation settings say."""


def mean_of(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else None


def scores_of(marks: Iterable[tuple[str, float, float]]) -> Scores:
    """The scores of both protocols: the mean per kind (`rel`, `gen`, `loc`, `near`), and `op`.

    A mark is a prompt's kind with its score in each protocol: in free generation, and under teacher forcing.
    """
    marks, found = list(marks), {}
    free, forced = [(kind, mark) for kind, mark, _ in marks], [(kind, mark) for kind, _, mark in marks]
    for protocol, pairs in zip(PROTOCOLS, (free, forced), strict=True):
        means = {name: mean_of(mark for of, mark in pairs if of == kind) for kind, name in KIND_OF_PROMPT.items()}
        found[protocol] = means | {"op": overall_performance(means["rel"], means["gen"], means["loc"])}
    return found


def overall_performance(rel: float | None, gen: float | None, loc: float | None) -> float | None:
    """The geometric mean of the three, None where one does not apply (paper, Sec. 3)."""
    return None if rel is None or gen is None or loc is None else (rel * gen * loc) ** (1 / 3)


def normalise(text: str) -> str:
    """Text as answers are compared: Unicode composed, case folded, white space single, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .")


def shown_answer(text: str) -> str:
    """An answer as it is kept: without white space around it, but for the indentation of its first line."""
    kept = text.rstrip().lstrip("\n")
    return kept if "\n" in kept or kept[:2].isspace() else kept.strip()


def same_answer(said: str, target: str) -> bool:
    """Whether an answer is the target: one of several lines, or one that is indented, exactly but for white space at
    the end; else after normalisation."""
    wanted = shown_answer(target)
    if "\n" in wanted or wanted[:1].isspace():
        return shown_answer(said) == wanted
    return normalise(said) == normalise(target)


def contains(said: str, target: str) -> bool:
    """Whether an answer holds the target, after normalisation, as whole words."""
    wanted = normalise(target)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalise(said)) is not None


def says(said: str, answers: Iterable[str]) -> bool:
    """Whether an answer is one of those that count as right: a target, or an alias of it."""
    return any(same_answer(said, answer) for answer in answers)


def holds(said: str, answers: Iterable[str]) -> bool:
    """Whether an answer contains one of those that count as right, see :func:`contains`."""
    return any(contains(said, answer) for answer in answers)


def still_says(said: str, old: str, right: Iterable[str]) -> bool:
    """Whether an answer contains what its target replaces, elsewhere than inside the target or an alias of it."""
    rest = normalise(said)
    for answer in map(normalise, right):
        rest = re.sub(rf"(?<!\w){re.escape(answer)}(?!\w)", "...", rest) if contains(answer, old) else rest
    return contains(rest, old)


def sorted_batches(keys: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The indices of rows in batches of alike keys, the smallest first."""
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def answers(
    model: EditedModel, prompts: Sequence[str], memory: Tensor, max_new_tokens: int | Sequence[int]
) -> list[str]:
    """Greedy answers to B prompts, each by the memory that was chosen for it ((B,) shard ids or `BASE`), until the
    model itself stops or at most so many tokens, for all or for each, are said."""
    rows = [model.forms.ids(prompt) for prompt in prompts]
    limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else max_new_tokens
    team = team_of(model)
    mine = team.mine_of(prompts)
    own = [rows[i] for i in mine], memory[mine], [limits[i] for i in mine]
    return team.items(mine, answer_rows(model, *own))


def routed_answers(
    model: EditedModel, prompts: Sequence[str], max_new_tokens: int | Sequence[int]
) -> tuple[Tensor, list[str]]:
    """Who answers prompts, (B,) shard ids or `BASE`, and what is said; a shard that was chosen because it says its
    target is not asked for it again."""
    choice = model.choose(prompts)
    said = _chosen_answers(model, prompts, choice, range(len(prompts)), max_new_tokens)
    return choice.memory, [said[i] for i in range(len(prompts))]


def answers_beside_base(
    model: EditedModel, prompts: Sequence[str], max_new_tokens: int, base_changed: bool = False
) -> tuple[Tensor, dict[int, tuple[str, str]]]:
    """Who answers prompts, (B,) shard ids or `BASE`; and by place, of those that a shard answers, or of all where the
    base has changed, what is said and what the base as it was says."""
    choice = model.choose(prompts)
    at = [i for i, shard in enumerate(choice.memory.tolist()) if shard != BASE or base_changed]
    now = _chosen_answers(model, prompts, choice, at, max_new_tokens)
    with model.weights.originals():
        before = answers(model, [prompts[i] for i in at], torch.full((len(at),), BASE), max_new_tokens)
    return choice.memory, {i: (now[i], said) for i, said in zip(at, before, strict=True)}


def both_answers(
    model: EditedModel, prompts: Sequence[str], max_new_tokens: int, base_changed: bool = False
) -> tuple[Tensor, list[tuple[str, str]]]:
    """As :func:`answers_beside_base`, with both answers to each prompt: where nothing could change the base's, they are
    one."""
    memory, both = answers_beside_base(model, prompts, max_new_tokens, base_changed)
    rest = [i for i in range(len(prompts)) if i not in both]
    own = answers(model, [prompts[i] for i in rest], torch.full((len(rest),), BASE), max_new_tokens)
    both |= {i: (said, said) for i, said in zip(rest, own, strict=True)}
    return memory, [both[i] for i in range(len(prompts))]


def kept_rows(
    model: EditedModel, kind: str, asked: Mapping[str, str], max_new_tokens: int, base_changed: bool = False
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Who answers prompts, each given with the id of an edit, whose answers are to stay the base's: (B,) shard ids or
    `BASE`; and of each that is asked twice, see :func:`answers_beside_base`, a line of `generations.jsonl`."""
    prompts = list(asked)
    memory, both = answers_beside_base(model, prompts, max_new_tokens, base_changed)
    rows = []
    for i, (said, before) in both.items():
        row = {"stage": "further", "id": asked[prompts[i]], "kind": kind, "prompt": prompts[i], "answer": said}
        rows.append(row | {"base_answer": before, "kept": said == before, "memory": int(memory[i])})
    return memory, rows


def vouched(model: EditedModel, choice: Choice) -> dict[int, str]:
    """By place, the answers that choosing has found already: where the router lets a shard answer only if it says its
    edit's target, that is what it says."""
    if not model.router.vouches:
        return {}
    named = {i: id for i, id in enumerate(choice.nearest) if id is not None and int(choice.memory[i]) >= 0}
    targets = {i: model.target_of(id) for i, id in named.items()}
    return {i: shown_answer(target) for i, target in targets.items() if target is not None}


def _chosen_answers(
    model: EditedModel, prompts: Sequence[str], choice: Choice, at: Sequence[int], max_new_tokens: int | Sequence[int]
) -> dict[int, str]:
    """By place, what the chosen memories say to the prompts at some places."""
    known = vouched(model, choice)
    ask = [i for i in at if i not in known]
    limits = max_new_tokens if isinstance(max_new_tokens, int) else [max_new_tokens[i] for i in ask]
    found = answers(model, [prompts[i] for i in ask], choice.memory[ask], limits)
    return {i: known[i] for i in at if i in known} | dict(zip(ask, found, strict=True))


@torch.no_grad()
def answer_rows(model: EditedModel, rows: Sequence[Sequence[int]], memory: Tensor, limits: Sequence[int]) -> list[str]:
    """Greedy answers to prompts, given as token ids, each of at most so many tokens; see :func:`answers`."""

    def ask(places: list[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for batch in sorted_batches([len(rows[i]) for i in places], BATCH):
            index = [places[i] for i in batch]
            read = model.read([rows[i] for i in index], memory[index])
            said = decoded(model, read, memory[index], max(limits[i] for i in index))
            found |= {i: _up_to_stop(model, ids[: limits[i]]) for i, ids in zip(index, said, strict=True)}
        return [found[i] for i in places]

    asked = [(limit, *model.forms.stops, -1, *row) for limit, row in zip(limits, rows, strict=True)]
    return [shown_answer(model.forms.said(ids)) for ids in _unless_kept(model, asked, memory, ask)]


def _up_to_stop(model: EditedModel, ids: Sequence[int]) -> list[int]:
    """Token ids up to the first stop, which is among them."""
    end = next((i + 1 for i, token in enumerate(ids) if token in model.forms.stops), len(ids))
    return list(ids[:end])


def _unless_kept(
    model: EditedModel, asked: Sequence[Sequence[int]], memory: Tensor, ask: Callable[[list[int]], list[list[int]]]
) -> list[list[int]]:
    """What B questions are answered with, as token ids: by the base (`memory` (B,) is `BASE`) from what is kept where
    it is known, else by `ask`, which is given the places of some."""
    own = (memory == BASE).nonzero()[:, 0].tolist()
    kept = None if model.weights else model.kept  # what an edited base says is not the base's
    known = {own[i]: ids for i, ids in kept.get([asked[i] for i in own]).items()} if kept else {}
    missing = [i for i in range(len(asked)) if i not in known]
    found = known | (dict(zip(missing, ask(missing), strict=True)) if missing else {})
    if kept:
        kept.put((asked[i], found[i]) for i in own if i not in known)
    return [found[i] for i in range(len(asked))]


def decoded(
    model: EditedModel, rows: Sequence[Sequence[int]], memory: Tensor, limit: int, **options: Any
) -> list[list[int]]:
    """The token ids that greedy decoding appends to each row, the base's stops and padding included."""
    pad = model.tokenizer.pad_token_id
    ids, mask = pad_left(rows, fill=pad or 0, device=model.device)
    options |= {"max_new_tokens": limit, "pad_token_id": pad, "eos_token_id": list(model.forms.stops), **GREEDY}
    with model.answering(memory, rows):
        output = model.base.generate(input_ids=ids, attention_mask=mask, **options)
    return output[:, ids.shape[1] :].tolist()


def forced_tokens(
    model: EditedModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    memory: Tensor,
    read: Callable[[Tensor, Tensor], list[Any]] = argmax_rows,
) -> list[Any]:
    """Prompts with their targets fed: the argmax token at each position of the target and its end, or what `read(logits
    (B, T, V), labels (B, T))` keeps of a row."""
    team = team_of(model)
    mine = team.mine_of(prompts)
    own = [model.forms.encode(prompts[i], targets[i]) for i in mine]
    read_as = model.read([row.prompt for row in own], memory[mine])
    own = [replace(row, prompt=tuple(prompt)) for row, prompt in zip(own, read_as, strict=True)]
    who = memory[mine]

    def ask(places: list[int]) -> list[Any]:
        return model.over_targets([own[i] for i in places], who[places], read, BATCH)

    if read is not argmax_rows:
        return team.items(mine, ask(list(range(len(own)))))
    asked = [(-2, len(row.prompt), *row.ids) for row in own]
    return team.items(mine, _unless_kept(model, asked, who, ask))


def answered(model: EditedModel, prompts: Sequence[str], targets: Sequence[str], memory: Tensor) -> list[bool]:
    """Whether each greedy answer equals its target, as :func:`answers` and :func:`normalise` would find.

    One pass with the target fed settles nearly all: where every token, the end included, is the argmax, greedy decoding
    says just that; where the first other token cannot lead to the same text, it does not. Only the rest is generated.
    """
    rows = [model.forms.encode(prompt, target).target for prompt, target in zip(prompts, targets, strict=True)]
    forced = forced_tokens(model, prompts, targets, memory)
    found = [_settled(model.forms, said, row, target) for said, row, target in zip(forced, rows, targets, strict=True)]
    unsettled = [i for i, right in enumerate(found) if right is None]
    # Two tokens past the target are enough to see that an answer does not stop where it should.
    limits = [len(rows[i]) + 2 for i in unsettled]
    said = answers(model, [prompts[i] for i in unsettled], memory[unsettled], limits)
    for i, text in zip(unsettled, said, strict=True):
        found[i] = same_answer(text, targets[i])
    return [bool(right) for right in found]


def _settled(forms: Forms, said: Sequence[int], row: Sequence[int], target: str) -> bool | None:
    """What the argmax tokens at a target's positions say of a greedy answer: right, wrong, or None for not known."""
    wrong = next((i for i, (a, b) in enumerate(zip(said, row, strict=True)) if a != b), None)
    text = forms.said(said if wrong is None else said[: wrong + 1])
    if wrong is None or said[wrong] in forms.stops:
        return same_answer(shown_answer(text), target)
    # The last character may still change with what follows it: a part of a letter, an accent, a full stop. So may a
    # space before it, which some tokenizers take away from a sign.
    whole, begun = (normalise(text).replace(" ", "") for text in (target, text))
    return None if whole.startswith(begun.rstrip("\ufffd")[:-1]) else False


def token_share(found: Sequence[int], expected: Sequence[int]) -> float:
    """The share of positions where two token rows of one length agree."""
    return sum(a == b for a, b in zip(found, expected, strict=True)) / max(len(expected), 1)


def target_loss(
    model: EditedModel, prompts: Sequence[str], targets: Sequence[str], memory: Tensor
) -> tuple[float, int]:
    """The negative log likelihood of the targets' tokens (with their end) given their prompts, in nats, summed; and
    how many tokens they are."""

    def read(logits: Tensor, labels: Tensor) -> list[tuple[float, int]]:
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return list(zip(losses.sum(-1).tolist(), (labels >= 0).sum(-1).tolist(), strict=True))

    sums = forced_tokens(model, prompts, targets, memory, read)
    return sum(total for total, _ in sums), sum(count for _, count in sums)


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """Token perplexity: exp of the mean over all tokens of what :func:`target_loss` gave, once or of several parts."""
    return math.exp(sum(total for total, _ in losses) / max(sum(tokens for _, tokens in losses), 1))
