"""How close the inner steps come to what this machine's matrix products allow.

Legend: M target tokens, R real tokens of the rows, D = d_model, F = d_ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.context import Context
from benchmarks.report import Table, number, percent
from benchmarks.streams import clear, load_edits, prepared
from benchmarks.timing import seconds_of
from repair_lightning.editors import Repair
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.low_rank import LowRankWriter
from repair_lightning.editors.repair import Writing
from repair_lightning.types import Edit, EditBatch

TITLE = "Roofline: share of this machine's matmul rate that the inner steps reach"
_PRODUCTS = 7
"""Products whose best is the rate, before a write and behind it."""


def run_part(context: Context) -> dict[str, Any]:
    """Write a full batch: into low-rank shards, into a dense one, and into that beside the rehearsed first; repeat."""
    size = context.batch
    edits, _ = load_edits(context, 2 * size)
    size = len(edits) // 2
    first, second = edits[:size], edits[size:]
    dense = Writing(form="dense", capacity=2 * size, batch_tokens=1 << 30, replay=size)
    writes = {"low rank": (Writing(batch_tokens=1 << 30), [first]), "dense": (dense, [first, second])}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, (writing, halves) in writes.items():
        editor = prepared(context, edits, precision="float32", writing=writing)
        empty = editor.memory.snapshot()
        for turn in range(context.repeats + 1):
            clear(editor, empty)
            for i, half in enumerate(halves):
                found = measured_write(editor, half)
                if turn:  # the first round warms up
                    runs.setdefault(name + (", beside rehearsed" if i else ""), []).append(found)
    return {"batch": size, "layer": editor.layer, "batches": {name: summary(found) for name, found in runs.items()}}


def measured_write(editor: Repair, edits: Sequence[Edit]) -> dict[str, Any]:
    """Write one batch as the stream would, and look at its inner loop."""
    editor.ledger.arrive(list(edits), 0)
    if editor.writing.form == "low_rank":
        return measured_low_rank(editor, edits)
    seen: dict[str, Any] = {}
    train = editor._train

    def spied(*args: Any) -> Any:
        rows = next(value for value in args if isinstance(value, TargetRows))
        seen["measured"] = measured(editor, rows, lambda: train(*args))
        seen["rows"] = rows
        return seen["measured"][1]

    editor._train = spied  # type: ignore[method-assign,assignment]
    try:
        reports = editor.write(EditBatch(tuple(edits)))
    finally:
        del editor._train  # the class's own again
    editor.ledger.written(reports)
    timing, (steps, _, _) = seen["measured"]
    flops = step_flops(editor, seen["rows"])
    return result_of(timing, steps, flops, steps * flops["step"] + flops["look"])


def measured_low_rank(editor: Repair, edits: Sequence[Edit]) -> dict[str, Any]:
    """The same for low-rank shards, each of which takes its own number of steps."""
    rows = editor._rows(edits, ())
    timing, outcomes = measured(editor, rows, lambda: LowRankWriter(editor).train(rows, editor.writing.steps))
    own = [step_flops(editor, rows.part(list(outcome.loss))) for outcome in outcomes]
    needed = sum(outcome.steps * flops["step"] + flops["look"] for outcome, flops in zip(outcomes, own, strict=True))
    steps = round(sum(outcome.steps for outcome in outcomes) / len(outcomes))
    return result_of(timing, steps, step_flops(editor, rows), needed)


def measured(editor: Repair, rows: TargetRows, call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a call and the best matmul rate right before and behind it, with what the call returned."""
    kept: list[Any] = []
    before = matmul_rate(editor, targets_of(rows))
    seconds = seconds_of(lambda: kept.append(call()))
    rate = max(before, matmul_rate(editor, targets_of(rows)))
    return {"seconds": seconds, "rate": rate, "targets": targets_of(rows)}, kept[0]


def result_of(timing: dict[str, float], steps: int, flops: dict[str, float], needed: float) -> dict[str, Any]:
    """What was needed beside what it took."""
    ideal = needed / timing["rate"]
    share = ideal / timing["seconds"]
    return timing | {"steps": steps, "flops": flops, "needed_flops": needed, "ideal_seconds": ideal, "share": share}


def targets_of(rows: TargetRows) -> int:
    """M, the target tokens of all rows."""
    return int((rows.labels >= 0).sum())


def step_flops(editor: Repair, rows: TargetRows) -> dict[str, float]:
    """FLOPs that one inner step needs on these rows; a product of (m, k) and (k, n) counts 2 m k n.

    Where the last layer's output simply adds up, the value matrix is needed at the M target positions alone; else at
    all R real tokens, and the layers above run over them forward, and backward to their inputs.
    """
    model, memory = editor.edited.base, editor.memory
    targets, real = targets_of(rows), int(rows.mask.sum())
    d, f = memory.shape
    vocabulary, width = model.get_output_embeddings().weight.shape
    alone = editor.edited.split.adds_up()
    positions = targets if alone else real
    value = 2 * positions * d * f
    if editor.writing.form == "low_rank":  # an edit's own target tokens excite its own right factor
        value = 2 * d * int((rows.row.bincount() ** 2).sum())
    head = 2 * targets * vocabulary * width
    above = 0.0 if alone else sum(layer_flops(layer, rows, d) for layer in layers_above(editor))
    return {
        "value_forward": value,
        "value_backward": value,  # to the delta; what enters the matrix is fixed
        "head_forward": head,
        "head_backward": head,  # to what enters the head; the head is fixed
        "above_forward": above,
        "above_backward": 2 * above - linear_flops_above(editor, real) if above else 0.0,
        "look": value + head + above,
        "step": 2 * value + 2 * head + (3 * above - linear_flops_above(editor, real) if above else 0.0),
    }


def layers_above(editor: Repair) -> list[nn.Module]:
    """The layers behind the edited one."""
    return list(editor.edited.split.layers)[editor.layer + 1 :]


def layer_flops(layer: nn.Module, rows: TargetRows, width: int) -> float:
    """One layer's forward FLOPs: its matrices on every real token, and causal attention (half of T x T, twice)."""
    lengths = rows.mask.sum(-1).double()
    return linear_parameters(layer) * 2.0 * float(lengths.sum()) + 2.0 * width * float(lengths.square().sum())


def linear_flops_above(editor: Repair, real: int) -> float:
    """Forward FLOPs of the matrices behind the edited layer: backward needs them once, for attention twice."""
    return 2.0 * real * sum(linear_parameters(layer) for layer in layers_above(editor))


def linear_parameters(layer: nn.Module) -> int:
    """Entries of a layer's matrices."""
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)


@torch.no_grad()
def matmul_rate(editor: Repair, targets: int) -> float:
    """FLOP/s of the head's two products at M target positions, each at its best, in the base's own precision."""
    weight = editor.edited.base.get_output_embeddings().weight.detach()
    states = torch.randn(targets, weight.shape[1], device=weight.device).to(weight.dtype)
    logits = torch.randn(targets, weight.shape[0], device=weight.device).to(weight.dtype)
    forward = min(seconds_of(lambda: nn.functional.linear(states, weight)) for _ in range(_PRODUCTS))
    backward = min(seconds_of(lambda: logits @ weight) for _ in range(_PRODUCTS))
    return 4.0 * targets * weight.numel() / (forward + backward)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians over repeats, and all shares."""
    middle = {key: median(run[key] for run in runs) for key in ("seconds", "ideal_seconds", "rate", "share")}
    first = runs[0]
    kept = {key: first[key] for key in ("steps", "targets", "flops", "needed_flops")}
    return {**kept, **middle, "all_shares": [run["share"] for run in runs]}


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per batch."""
    header = ("write", "target tokens", "steps", "MFLOP/step", "GFLOP/s", "needs ms", "took ms", "share", "all")
    rows = [
        (
            name,
            str(int(row["targets"])),
            str(row["steps"]),
            number(row["flops"]["step"] / 1e6),
            number(row["rate"] / 1e9),
            number(1e3 * row["ideal_seconds"]),
            number(1e3 * row["seconds"]),
            f"{percent(row['share'])} %",
            " ".join(percent(share) for share in row["all_shares"]),
        )
        for name, row in result["batches"].items()
    ]
    note = (
        f"Batches of {result['batch']} edits, layer {result['layer']}. Share: FLOPs that the steps need, over the rate "
        "of the head's two products measured right before and behind, over the time that the whole inner loop took."
    )
    return [Table(TITLE, header, rows, note)]
