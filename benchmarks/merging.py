"""What does a merge keep of what it merges? Quality, not speed.

Banks of K shards (`--merged`) of `--per_shard` edits each are written with the editor's own code, fused into one by the
callback's, scored on all their edits in per cent, and undone before the next rule. The plain *sum* is a reference that
the callback does not offer. *Oracle*: OP with perfect routing, so that what the merge loses is not taken for what
routing loses. *Accepted*: whether the guard would keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.report import Rows, percent
from benchmarks.streams import prepared, records, write
from callbacks.ties_merge import MergeGuard, accept, mean_loss
from repair_lightning.editors import Repair
from repair_lightning.editors.repair import Writing
from repair_lightning.functional import Normalize, loss_weights, ties_merge, trim
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, TEACHER_FORCED
from repair_lightning.scoring.scorer import Scorer

FORMS: Mapping[str, Writing] = {
    "dense": Writing(),
    "dense, mask 0.2": Writing(mask_ratio=0.2),  # the published ratio
}
MAX_OP_DROP = 0.06
"""What the guard lets a merge cost by default."""


@dataclass(frozen=True)
class Rule:
    """One way to fuse shards: `kind` is `ties`, `least squares` or `sum`."""

    alpha: float = 1.0
    normalize: Normalize = "contributors"
    density: float = 1.0
    kind: str = "ties"

    def delta(self, editor: Repair, shards: list[int]) -> Tensor:
        """The fused delta (D, F)."""
        if self.kind == "sum":
            return editor.memory.stacked(shards).detach().sum(0)
        weights = loss_weights(torch.tensor([mean_loss(editor.ledger, shard) for shard in shards]), self.alpha)
        if self.kind == "least squares":
            return editor.least_squares(shards, weights.tolist())
        deltas = torch.stack([trim(delta, self.density) for delta in editor.memory.stacked(shards).detach()])
        return ties_merge(deltas, weights.to(deltas), self.normalize)


OTHERS = (Rule(kind="least squares"), Rule(kind="sum"))


@contextmanager
def undone(editor: Repair) -> Iterator[None]:
    """Whatever happens to the bank, the router and the ledger inside is undone."""
    memory, router, ledger = editor.memory.snapshot(), editor.router.state_dict(), editor.ledger.state_dict()
    try:
        yield
    finally:
        editor.memory.restore(memory)
        editor.router.load_state_dict(router)
        editor.ledger.load_state_dict(ledger)


def fuse(editor: Repair, shards: list[int], rule: Rule) -> None:
    """Fuse shards as the callback does, whatever it costs."""
    owned = [id for shard in shards for id in editor.ledger.owned_by(shard)]
    editor.ledger.reassign(owned, editor.fuse(shards, rule.delta(editor, shards)))
    editor.calibrate()


def run_part(context: Context) -> Rows:
    """For every form of shard, banks of growing size, each as it is and merged by every rule."""
    size, counts = context.per_shard, sorted(context.merged)
    edits = records(context, size * counts[-1])
    if counts[0] < 2 or len(edits) < size * counts[-1]:
        raise ValueError(f"needs 2 shards or more of {size} edits, got {len(edits)} edits: merged, per_shard")
    groups = [edits[at : at + size] for at in range(0, len(edits), size)]
    rules = [Rule(*setting) for setting in product(context.alphas, get_args(Normalize), context.densities)]
    rows: Rows = []
    for form, plain in FORMS.items():
        editor = prepared(context, edits, Repair, writing=replace(plain, capacity=size))
        scorer = Scorer(editor.edited, edits)
        for count in counts:
            for group in groups[len(editor.memory) : count]:
                write(editor, group)
            asked = scorer.subset({edit.id for edit in edits[: count * size]})
            rows += [{"form": form, "K": count} | row for row in merges(editor, asked, [*rules, *OTHERS])]
    return rows


def merges(editor: Repair, scorer: Scorer, rules: Sequence[Rule]) -> Iterator[dict[str, Any]]:
    """The figures of a bank as it is, and after each rule has fused all of it."""
    shards = editor.memory.ids
    guard = MergeGuard(editor, [id for shard in shards for id in editor.ledger.owned_by(shard)])
    before = guard.score()
    yield dict.fromkeys(asdict(Rule())) | {"kind": "before"} | figures(editor, scorer) | {"accepted": None}
    for rule in rules:
        with undone(editor):
            fuse(editor, shards, rule)
            kept = accept(before, guard.score(), MAX_OP_DROP).yes
            yield asdict(rule) | figures(editor, scorer) | {"accepted": kept}


def figures(editor: Repair, scorer: Scorer) -> dict[str, float | None]:
    """The scores, and OP with perfect routing."""
    owners = editor.owner_choice([question.edit for question in scorer.questions])
    routed = scorer.score("routed", scorer.choose(), owners).scores
    oracle = scorer.by_oracle(owners).scores
    found = {name: percent(routed[AUTOREGRESSIVE][name.lower()]) for name in ("Rel", "Gen", "OP")}
    found["OP forced"] = percent(routed[TEACHER_FORCED]["op"])
    return found | {"OP oracle": percent(oracle[AUTOREGRESSIVE]["op"])}
