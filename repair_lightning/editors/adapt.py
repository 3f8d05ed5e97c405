"""Settings for a base that was never seen: layer, learning rate and margin, found by probe edits that the editor makes.

Ours, not the paper's, whose settings were tuned by hand for each base. No edit of the user's and nothing that scores
one takes part. A probe asks an irrelevant prompt and wants what the base says to another one. Each candidate writes all
probes as the stream would, into a memory of its own that is thrown away. With the right shard forced it is then asked
how many are answered, on their own prompts and with one word left out, which stands in for other words. (Contexts
before the prompt do not: they speak for low layers, where real rephrases fare no better.)

Candidates stand in the order in which they are liked, the default first. The first one that no other beats by more than
noise is taken, so a cheap layer is left for a reason alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repair_lightning.errors import ConfigError
from repair_lightning.functional import IGNORED
from repair_lightning.models.base import can_stop
from repair_lightning.models.sampling import greedy_answers
from repair_lightning.types import BASE, Edit, EditBatch

if TYPE_CHECKING:
    from repair_lightning.editors.adaptive import AdaptiveEditor

AUTO = "auto"  # an option's value that asks for the search
DEPTHS = (1.0, 0.9, 0.75, 0.6, 0.4)  # candidate layers, as shares of the depth
RATES = (1.0, 3.0, 0.3)  # candidate learning rates, in the units of `writing.lr`
MARGINS = (2.0, 4.0, 1.0)  # candidate margins at which the inner steps stop, in nats
PROBES = 50  # most probe edits
STEPS = 60  # most inner steps of a candidate
NOISE = 2.0  # how many standard errors of the paired difference are noise
LEAST = 0.05
"""What must be won besides, as a share of the probes: less is not worth a setting that was not measured widely."""
OTHER_WORDS = 2  # most other wordings in which a probe is asked
SAMPLE = 64  # how many irrelevant prompts tell a candidate the unit of its learning rate


@dataclass(frozen=True)
class Settings:
    """What is searched for: the edited layer, `writing.lr` and `writing.stop_margin`."""

    layer: int
    lr: float
    stop_margin: float | None


@dataclass(frozen=True)
class Adapted(Settings):
    """What the search found.

    Attributes:
        probes: how many probe edits it took.
        seconds: how long.
        candidates: what was tried and how it fared: `written` and `in_other_words` are shares of the probes, `steps`
            the most of one.
    """

    probes: int
    seconds: float
    candidates: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        tried = f"{len(self.candidates)} settings on {self.probes} probes of its own in {self.seconds:.1f} s"
        return f"layer {self.layer}, lr {self.lr:g}, stop_margin {self.stop_margin}: chosen by {tried}"


def adapt(editor: AdaptiveEditor, background: Sequence[str], held_out: Sequence[str]) -> Adapted:
    """Find the settings that an editor's options leave to `auto`; the editor itself is not touched.

    What is not `auto` is kept; so is the layer where something is written already. The prompts are irrelevant ones as
    `Editor.prepare` takes them; probes ask some of the first.
    """
    started = time.perf_counter()
    probes = make_probes(editor, background)
    prompts = (background[:SAMPLE], held_out[:SAMPLE])
    rows: dict[Settings, dict[str, Any]] = {}
    scores: dict[Settings, Tensor] = {}
    found = Settings(editor.layer, editor.writing.rate, editor.writing.margin)
    with ExitStack() as stack:
        trial_at = cache(lambda layer: stack.enter_context(editor.trial(layer)))
        for name, values in searched(editor).items():
            settings = [replace(found, **{name: value}) for value in values]
            for one in settings:
                if one not in rows:
                    rows[one], scores[one] = try_out(trial_at(one.layer), one, probes, *prompts)
            found = next(one for one in settings if not any(beats(scores[two], scores[one]) for two in settings))
    seconds = time.perf_counter() - started
    return Adapted(found.layer, found.lr, found.stop_margin, len(probes), seconds, tuple(rows.values()))


def searched(editor: AdaptiveEditor) -> dict[str, list[Any]]:
    """The options that are `auto`, each with its candidates in the order in which they are liked."""
    depth = len(editor.edited.split.layers)
    layers = [] if editor.ledger.sizes() else [max(0, round(share * depth) - 1) for share in DEPTHS]
    asked: dict[str, tuple[Any, Sequence[Any]]] = {
        "layer": (editor.layer_option, [editor.layer, *layers]),
        "lr": (editor.writing.lr, RATES),
        "stop_margin": (editor.writing.stop_margin, MARGINS),
    }
    return {name: list(dict.fromkeys(values)) for name, (option, values) in asked.items() if option == AUTO}


def make_probes(editor: AdaptiveEditor, prompts: Sequence[str]) -> list[Edit]:
    """Edits that give prompts the base's own answers to others; the editor's seed draws the prompts."""
    asked = random.Random(editor.seed).sample(list(prompts), min(PROBES, len(prompts)))
    with editor.edited.forced(None):
        said = greedy_answers(editor.edited.base, editor.edited.forms, asked)
    pairs = [(prompt, answer) for prompt, answer in zip(asked, said, strict=True) if answer]
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    if len(answers) < 2:
        raise ConfigError(
            f"'auto' needs a base that says different things to irrelevant prompts, got {len(answers)} answer(s) to "
            f"{len(asked)} prompts; give --data.irrelevant other questions, or layer, writing.lr and "
            "writing.stop_margin as numbers"
        )
    other = {answer: answers[(i + len(answers) // 2) % len(answers)] for i, answer in enumerate(answers)}
    return [Edit(f"probe-{i}", prompt, other[answer]) for i, (prompt, answer) in enumerate(pairs)]


def try_out(
    trial: AdaptiveEditor,
    settings: Settings,
    probes: Sequence[Edit],
    background: Sequence[str],
    held_out: Sequence[str],
) -> tuple[dict[str, Any], Tensor]:
    """Write the probes under some settings with an editor of the layer, and ask them with the right shard forced;
    returns a row of `Adapted.candidates`, and each probe's score (n,), the mean of both shares."""
    started = time.perf_counter()
    steps = min(STEPS, trial.writing.steps)
    trial.writing = replace(trial.writing, lr=settings.lr, stop_margin=settings.stop_margin, steps=steps)
    trial.forget([probe.id for probe in probes])
    trial.memory.drop(trial.memory.ids)
    trial.prepare(background, held_out)
    size = trial.batch_limit(probes)
    batches = [EditBatch(tuple(probes[at : at + size])) for at in range(0, len(probes), size)]
    reports = [report for batch in batches for report in trial.write(batch)]
    shards = torch.tensor([BASE if report.error else report.shard for report in reports])
    reworded = [(i, edit) for i, probe in enumerate(probes) for edit in other_words(probe, trial.seed)]
    of = torch.tensor([i for i, _ in reworded])
    written = answered(trial, probes, shards)
    said = answered(trial, [edit for _, edit in reworded], shards[of])
    others = torch.zeros(len(probes)).index_add(0, of, said) / of.bincount(minlength=len(probes))
    row = {"written": float(written.mean()), "in_other_words": float(others.mean())}
    row |= {"steps": max(report.steps for report in reports), "seconds": time.perf_counter() - started}
    return asdict(settings) | row, (written + others) / 2


def other_words(edit: Edit, seed: int) -> list[Edit]:
    """The edit asked with one word left out, neither the first nor the last; as it is where it has no other."""
    words = edit.prompt.split()
    inner = range(1, len(words) - 1)
    left_out = random.Random(f"{seed}/{edit.id}").sample(inner, min(OTHER_WORDS, len(inner)))
    prompts = [" ".join(word for i, word in enumerate(words) if i != out) for out in left_out]
    return [replace(edit, prompt=prompt) for prompt in prompts or [edit.prompt]]


def answered(editor: AdaptiveEditor, edits: Sequence[Edit], shards: Tensor) -> Tensor:
    """Of each edit 1 where greedy generation with its shard (n,) says its target and ends, else 0; (n,). The end of
    sequence does not count where the base cannot say it."""
    rows = [editor.encode(edit) for edit in edits]
    ends = can_stop(editor.edited.base, editor.tokenizer, rows[0].target[-1])

    def right(logits: Tensor, labels: Tensor) -> list[bool]:
        said = (logits.argmax(-1) == labels) | (labels == IGNORED)
        return (said if ends else said[:, :-1]).all(-1).tolist()

    found = torch.tensor(editor.edited.over_targets(rows, shards, right))
    return (found & (shards != BASE)).float()


def beats(scores: Tensor, others: Tensor) -> bool:
    """Whether scores (n,) of the same probes are higher than others by `LEAST` and by `NOISE` standard errors."""
    difference = (scores - others).double()
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return float(difference.mean()) > max(LEAST, NOISE * error)
