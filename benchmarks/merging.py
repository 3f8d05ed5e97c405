"""What a merge keeps: scores of K shards before and after they are fused into one, by rule; and shards whose loss lies.

Every merge starts from the same bank, is made by the callback's own code, is scored by the project's own scorer, and is
undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.report import Table, number, percent
from benchmarks.streams import clear, prepared
from callbacks import LossAwareTiesMerge
from callbacks.ties_merge import MergeGuard, accept, mean_loss
from repair_lightning.editors import Repair
from repair_lightning.editors.repair import Writing
from repair_lightning.edits.records import load_records
from repair_lightning.functional import Normalize
from repair_lightning.scoring.metrics import KIND_OF_PROMPT
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, PROTOCOLS, TEACHER_FORCED
from repair_lightning.scoring.scorer import Result, Scorer, oracle_choice
from repair_lightning.types import Edit, EditBatch
from repair_lightning.world import WORLD, edits_path

TITLE = "Merging: K shards into one"
FORMS: Mapping[str, Writing] = {
    "dense": Writing(form="dense"),
    "dense, mask 0.2": Writing(form="dense", mask_ratio=0.2),  # the published ratio
    "low rank": Writing(form="low_rank"),
}
GENTLY: Mapping[str, Any] = {"lr": 0.1, "check_every": 1}
ENOUGH: Mapping[str, Any] = {**GENTLY, "stop_margin": 0.0}
"""How the shards beside an odd one are written: in small steps, no further than to the right answer. At the usual
margin all losses are next to nothing, and whatever is made of them weighs all shards alike."""
ODD: Mapping[str, Mapping[str, Any]] = {
    "like the others": ENOUGH,
    "undertrained": {**GENTLY, "stop_margin": -3.0},
    "overfitted": {"steps": 600, "stop_margin": None},
    "wrong targets": {"steps": 600, "stop_margin": None},
}
"""How the last shard of a bank is written: its loss tells what it is worth, tells too much, or lies."""
RIDGE = 1e-4
"""Of the least-squares reference, as a share of the mean diagonal of what it inverts."""
MAX_OP_DROP = 0.01
"""What the guard lets a merge cost by default."""


@dataclass(frozen=True)
class Rule:
    """One way to fuse shards; `kind` is `ties` or a reference that the editor does not offer."""

    alpha: float = 1.0
    normalize: Normalize = "contributors"
    density: float = 1.0
    kind: str = "ties"

    def delta(self, editor: Repair, shards: list[int]) -> tuple[Tensor, list[float] | None]:
        """The fused delta (D, F), and the shards' weights where the rule has any."""
        if self.kind == "sum":
            return editor.memory.stacked(shards).detach().sum(0), None
        if self.kind == "least squares":
            return least_squares(editor, shards), None
        merge = LossAwareTiesMerge(True, self.alpha, self.normalize, self.density)
        return merge.fused_delta(shards, editor), list(merge.weights.values())

    @property
    def words(self) -> tuple[str, str]:
        """Its cells in the table: normalisation and density."""
        return (self.normalize, f"{self.density:g}") if self.kind == "ties" else (f"({self.kind})", "-")


REFERENCES = (Rule(kind="sum"), Rule(kind="least squares"))


@torch.no_grad()
def least_squares(editor: Repair, shards: Sequence[int]) -> Tensor:
    """The delta (D, F) that changes the least what each shard adds where its own edits' target tokens are read.

    With G_i = K_i^T K_i of the activations K_i (R_i, F) at those positions: `(sum delta_i G_i) (sum G_i)^-1`, RegMean's
    solution (arXiv 2212.09849) for one layer.
    """
    total, gram = 0.0, 0.0
    for shard in shards:
        rows = editor._rows([editor.ledger.edit(id) for id in editor.ledger.owned_by(shard)], ())
        keys = rows.reading(rows.activations).double()
        own = keys.T @ keys
        total, gram = total + editor.memory[shard].delta.double() @ own, gram + own  # type: ignore[assignment]
    assert isinstance(gram, Tensor)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, total, left=False).float()  # type: ignore[arg-type]


# -- the bank ----------------------------------------------------------------------------------------------------------


def write_shard(editor: Repair, edits: Sequence[Edit], wrong: bool = False, **writing: Any) -> int:
    """Write edits into a shard of their own with the editor's own code; the router knows their prompts after that.

    Args:
        editor: whose shards hold as many edits as are given.
        edits: of one shard.
        wrong: write each with the target of the next, while the ledger holds its own.
        writing: options that hold for this shard alone.
    """
    editor.ledger.arrive(edits, 0)
    targets = [edit.target for edit in edits]
    told = [replace(edit, target=target) for edit, target in zip(edits, targets[1:] + targets[:1], strict=True)]
    kept, rate = editor.writing, editor.value_rate
    editor.writing = replace(kept, **writing)
    editor.value_rate = rate * editor.writing.rate / kept.rate
    try:
        reports = editor.write(EditBatch(tuple(told if wrong else edits)))
    finally:
        editor.writing, editor.value_rate = kept, rate
    editor.ledger.written(reports)
    editor.finish_window()
    (shard,) = {report.shard for report in reports}
    return shard


@contextmanager
def undone(editor: Repair) -> Iterator[None]:
    """Whatever happens to the bank, the router and the ledger inside is undone."""
    memory, router, ledger = editor.memory.snapshot(), editor.router.state_dict(), editor.ledger.state_dict()
    try:
        yield
    finally:
        editor.memory.restore((dict(memory[0]), memory[1]))
        editor.router.load_state_dict(router)
        editor.ledger.load_state_dict(ledger)


def fuse(editor: Repair, shards: list[int], rule: Rule) -> list[float] | None:
    """Fuse shards as the callback does, whatever it costs; returns the weights that they had."""
    owned = [id for shard in shards for id in editor.ledger.owned_by(shard)]
    delta, weights = rule.delta(editor, shards)
    editor.ledger.reassign(owned, editor.fuse(shards, delta))
    editor.calibrate()
    return weights


# -- measuring ---------------------------------------------------------------------------------------------------------


def run_part(context: Context) -> dict[str, Any]:
    """Every form of shard: banks of growing size merged by every rule, then a bank with an odd shard."""
    path = edits_path() if context.data == WORLD else context.data
    wanted = context.per_shard * max(context.merged)
    edits = list(load_records(path, context.format, wanted, on_bad_record="skip").edits)
    counts = [count for count in sorted(context.merged) if count * context.per_shard <= len(edits)]
    if not counts or min(counts) < 2:
        raise ValueError(
            f"needs 2 shards or more of {context.per_shard} edits, got {len(edits)} edits: merged, per_shard"
        )
    groups = [edits[at : at + context.per_shard] for at in range(0, counts[-1] * context.per_shard, context.per_shard)]
    middle = groups[: counts[len(counts) // 2]]
    banks: list[dict[str, Any]] = []
    odd: list[dict[str, Any]] = []
    for form, plain in FORMS.items():
        writing = replace(plain, capacity=context.per_shard)
        editor = prepared(context, edits, precision="float32", writing=writing)
        empty = editor.memory.snapshot()
        scorer = Scorer(editor.edited, edits)
        banks += [{"form": form} | bank for bank in growing(context, editor, scorer, groups, counts)]
        clear(editor, empty)
        odd += [{"form": form} | case for case in odd_shards(context, editor, scorer, middle)]
    return {"per_shard": context.per_shard, "banks": banks, "odd": odd}


def growing(
    context: Context, editor: Repair, scorer: Scorer, groups: Sequence[Sequence[Edit]], counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Banks of each size, every one merged by every rule."""
    normalizes: tuple[Normalize, ...] = get_args(Normalize)
    rules = [Rule(*setting) for setting in product((0.0, 1.0), normalizes, context.densities)]
    for count in counts:
        for group in groups[len(editor.memory) : count]:
            write_shard(editor, group)
        asked = scorer.subset({edit.id for group in groups[:count] for edit in group})
        yield {"shards": count} | merges(editor, asked, (*rules, *REFERENCES))


def odd_shards(
    context: Context, editor: Repair, scorer: Scorer, groups: Sequence[Sequence[Edit]]
) -> Iterator[dict[str, Any]]:
    """Banks whose last shard is written in another way, merged with every sensitivity to the losses."""
    for group in groups[:-1]:
        write_shard(editor, group, **ENOUGH)
    asked = scorer.subset({edit.id for group in groups for edit in group})
    rules = [Rule(alpha) for alpha in context.alphas]
    for kind, writing in ODD.items():
        with undone(editor):
            shard = write_shard(editor, groups[-1], wrong=kind == "wrong targets", **writing)
            losses = {other: mean_loss(editor.ledger, other) for other in editor.memory.ids}
            known = {"kind": kind, "shards": len(groups), "loss": losses.pop(shard)}
            known["loss_of_others"] = sum(losses.values()) / len(losses)
            own = {edit.id for edit in groups[-1]}
            yield known | merges(editor, asked, rules, own)


def merges(editor: Repair, scorer: Scorer, rules: Sequence[Rule], own: set[str] | None = None) -> dict[str, Any]:
    """The figures of a bank as it is, and after each rule has fused all of it."""
    shards = editor.memory.ids
    guard = MergeGuard(editor, 256)
    before = figures(editor, scorer, own) | {"guard": guard.score()}
    norms = editor.memory.stacked(shards).detach().flatten(1).norm(dim=1).tolist()
    found = []
    for rule in rules:
        with undone(editor):
            weights = fuse(editor, shards, rule)
            after = figures(editor, scorer, own) | {"guard": guard.score()}
            after["accepted"] = bool(accept(before["guard"], after["guard"], MAX_OP_DROP))
            settings = {"kind": rule.kind, "alpha": rule.alpha, "normalize": rule.normalize, "density": rule.density}
            found.append({"rule": settings, "weights": weights} | after)
    return {"norms": norms, "before": before, "after": found}


def figures(editor: Repair, scorer: Scorer, own: set[str] | None) -> dict[str, Any]:
    """The scores in both protocols, routed and with perfect routing; those of the odd shard's own edits, and of the
    others, apart."""
    owners = editor.owner_choice([question.edit for question in scorer.questions])
    routed = scorer.score("routed", scorer.choose(), owners)
    oracle = scorer.score("oracle", oracle_choice(scorer.questions, owners), owners)
    found: dict[str, Any] = {"scores": routed.scores, "oracle": oracle.scores}
    if own:
        others = {question.edit for question in scorer.questions} - own
        found |= {"own": part_of(routed, own), "others": part_of(routed, others)}
    return found


def part_of(result: Result, ids: set[str]) -> dict[str, dict[str, float | None]]:
    """Rel and Gen of some of the edits, per protocol."""
    found: dict[str, dict[str, float | None]] = {}
    for protocol, figure in ((AUTOREGRESSIVE, "correct"), (TEACHER_FORCED, "teacher_forced")):
        found[protocol] = {}
        for kind in ("edit", "rephrase"):
            values = [float(row[figure]) for row in result.rows if row["kind"] == kind and row["id"] in ids]
            found[protocol][KIND_OF_PROMPT[kind]] = sum(values) / len(values) if values else None
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[Table]:
    """What each rule keeps, by number of shards; and what the losses of an odd shard do."""
    return [_banks(result), _odd(result)]


def _banks(result: dict[str, Any]) -> Table:
    counts = list(dict.fromkeys(bank["shards"] for bank in result["banks"]))
    header: tuple[str, ...] = ("shards", "normalize", "density")
    header += tuple(f"{name}, K={count}" for count in counts for name in ("Rel", "Gen", "OP", "TF"))
    rows: list[tuple[str, ...]] = []
    for form in dict.fromkeys(bank["form"] for bank in result["banks"]):
        banks = [bank for bank in result["banks"] if bank["form"] == form]
        rows.append((form, "(before)", "-", *(cell for bank in banks for cell in _scores(bank["before"]))))
        for at, first in enumerate(banks[0]["after"]):
            rule = Rule(**first["rule"])
            if rule.alpha:
                rows.append((form, *rule.words, *(cell for bank in banks for cell in _scores(bank["after"][at]))))
    ours = [after for bank in result["banks"] for after in bank["after"] if after["rule"]["kind"] == "ties"]
    note = (
        f"{result['per_shard']} edits a shard; Rel, Gen and OP of free generation in per cent, on the edits of the K "
        "shards; TF: OP teacher forced. Weights: alpha 1; equal ones (alpha 0) change no OP by more than "
        f"{percent(_by_weights(result))}, and perfect routing none by more than {percent(_by_routing(result))}. (sum): "
        "the deltas added up; (least squares): the delta that changes the least at the edits' own target positions; "
        "neither is an option of the editor. The guard would keep "
        f"{sum(after['accepted'] for after in ours)} of {len(ours)} merges by the editor's rules."
    )
    return Table(TITLE, header, rows, note)


def _op(figures: dict[str, Any], where: str = "scores") -> float:
    return figures[where][AUTOREGRESSIVE]["op"] or 0.0


def _scores(figures: dict[str, Any]) -> tuple[str, ...]:
    routed, forced = figures["scores"][AUTOREGRESSIVE], figures["scores"][TEACHER_FORCED]
    return tuple(percent(value) for value in (routed["rel"], routed["gen"], routed["op"], forced["op"]))


def _by_weights(result: dict[str, Any]) -> float:
    """The largest difference in OP between the weights of alpha 1 and equal ones."""
    differences = [0.0]
    for bank in result["banks"]:
        ops = {tuple(after["rule"].values()): _op(after) for after in bank["after"]}
        pairs = [(rule, (*rule[:1], 0.0, *rule[2:])) for rule in ops if rule[1]]
        differences += [abs(ops[rule] - ops[equal]) for rule, equal in pairs if equal in ops]
    return max(differences)


def _by_routing(result: dict[str, Any]) -> float:
    rows = [row for bank in result["banks"] for row in (bank["before"], *bank["after"])]
    return max((abs(_op(row) - _op(row, "oracle")) for row in rows), default=0.0)


def _odd(result: dict[str, Any]) -> Table:
    header: tuple[str, ...] = ("shards", "the last one", "loss, others'", "norm, others'", "alpha", "weight")
    header += ("own Rel", "own Gen", "others' Rel", "others' Gen", "OP", "TF")
    rows = []
    for case in result["odd"]:
        norms = case["norms"]
        of_others = sum(norms[:-1]) / (len(norms) - 1)
        losses = f"{number(case['loss'])}, {number(case['loss_of_others'])}"
        known = (case["form"], case["kind"], losses, f"{number(norms[-1])}, {number(of_others)}")
        for figures in (case["before"], *case["after"]):
            rule = figures.get("rule")
            words = (f"{rule['alpha']:g}", f"{figures['weights'][-1]:.3f}") if rule else ("(before)", "-")
            parts = [
                percent(figures[whose][AUTOREGRESSIVE][kind]) for whose in ("own", "others") for kind in ("rel", "gen")
            ]
            rows.append((*known, *words, *parts, *(percent(figures["scores"][p]["op"]) for p in PROTOCOLS)))
    shards = result["odd"][0]["shards"] if result["odd"] else 0
    note = (
        f"{shards} shards of {result['per_shard']} edits into one, normalize contributors, density 1. They are written "
        "no further than to the right answer, but for the last: undertrained, until no target token trails its best "
        "rival by more than 3 nats; overfitted, 600 steps and no early stop; wrong targets, the same, each edit with "
        "the target of the next, while the ledger holds its own. Losses: mean last training loss of a shard's edits, "
        "nats a token; norm: of the delta; own: that shard's edits."
    )
    return Table("Merging: a shard whose loss tells more or less", header, rows, note)
