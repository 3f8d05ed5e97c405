"""How near do the inner steps come to this machine's limit? The inner loop of one batch of low-rank shards.

With M target tokens, R real tokens of the rows, D = d_model and vocabulary V, a step needs `4 M V D` FLOPs for the head
(its product, and the gradient of what enters it: the head is frozen) and `4 r^2 D` for a shard of r target tokens. Each
layer above the edited one costs `2 R P` forward and as much backward for its P matrix entries, and causal attention.
*Share*: what all steps need, over the rate of the head's two products (best of seven, right before and after), over the
time that the whole inner loop took. Softmax, cross-entropy and the optimiser move memory and count as nothing, so 100 %
is out of reach.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.context import Context
from benchmarks.machine import seconds_of
from benchmarks.report import Rows
from benchmarks.streams import load_edits, prepared
from repair_lightning.editors import Keyed
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.low_rank import LowRankWriter

_PRODUCTS = 7
"""Products whose best is the rate, before the inner loop and after it."""


def run_part(context: Context) -> Rows:
    """The inner loop of one full batch of low-rank shards, as often as `repeats` after a round to warm up."""
    edits, _ = load_edits(context, context.batch)
    editor = prepared(context, edits)
    editor.ledger.arrive(edits, 0)
    rows = editor._rows(edits)
    runs = [measured(editor, rows) for _ in range(context.repeats + 1)][1:]
    row = {"edits": len(edits), "layer": editor.layer} | {key: median(run[key] for run in runs) for key in runs[0]}
    return [row | {"all shares": [run["share, %"] for run in runs]}]


def measured(editor: Keyed, rows: TargetRows) -> dict[str, float]:
    """What one inner loop needs, at the best matmul rate right before and after it, beside what it takes; each edit
    takes its own number of steps, and one more look."""
    targets = int((rows.labels >= 0).sum())
    outcomes: list[Any] = []
    before = matmul_rate(editor, targets)
    seconds = seconds_of(lambda: outcomes.extend(LowRankWriter(editor).train(rows, editor.writing.steps)))
    rate = max(before, matmul_rate(editor, targets))
    needed = 0.0
    for edit, outcome in enumerate(outcomes):
        flops = step_flops(editor, rows.part([edit]))
        needed += outcome.steps * flops["step"] + flops["look"]
    return {
        "target tokens": targets,
        "steps": round(sum(outcome.steps for outcome in outcomes) / len(outcomes)),
        "GFLOP/step": step_flops(editor, rows)["step"] / 1e9,
        "GFLOP/s": rate / 1e9,
        "needs ms": 1e3 * needed / rate,
        "took ms": 1e3 * seconds,
        "share, %": 100 * needed / rate / seconds,
    }


def step_flops(editor: Keyed, rows: TargetRows) -> dict[str, float]:
    """FLOPs that one inner step needs on these rows, and one look; a product of (m, k) and (k, n) counts 2 m k n.

    Where the edited layer is not the last one, the layers above run over all real tokens forward, and backward to their
    inputs: their matrices once more, attention twice.
    """
    weight = editor.edited.base.get_output_embeddings().weight
    width = editor.memory.shape[0]
    head = 2.0 * int((rows.labels >= 0).sum()) * weight.numel()
    value = 2.0 * width * int((rows.ranks**2).sum())  # of an edit's target tokens in all forms
    matrices = attention = 0.0
    if not editor.edited.split.adds_up():
        above = list(editor.edited.split.layers)[editor.layer + 1 :]
        entries = sum(entry.numel() for layer in above for entry in layer.parameters() if entry.dim() == 2)
        lengths = rows.mask.sum(-1).double()
        matrices = 2.0 * entries * float(lengths.sum())
        attention = 2.0 * width * float(lengths.square().sum()) * len(above)
    look = value + head + matrices + attention
    return {"look": look, "step": 2 * look + attention}


@torch.no_grad()
def matmul_rate(editor: Keyed, targets: int) -> float:
    """FLOP/s of the head's two products at M target positions, each at its best, in the base's own precision."""
    weight = editor.edited.base.get_output_embeddings().weight.detach()
    states, logits = (torch.randn(targets, size).to(weight) for size in reversed(weight.shape))
    forward = min(seconds_of(lambda: nn.functional.linear(states, weight)) for _ in range(_PRODUCTS))
    backward = min(seconds_of(lambda: logits @ weight) for _ in range(_PRODUCTS))
    return 4.0 * targets * weight.numel() / (forward + backward)
