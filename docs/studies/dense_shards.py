"""What a dense shard of many edits holds, by how it was trained, and what a merge of several keeps.

    python docs/studies/dense_shards.py BASE ZSRE_RECORDS IRRELEVANT_QUESTIONS

Records 600 to 727 of a ZsRE file, in the base's own form; every edit is asked of the shard that holds it (perfect
routing), at the last layer. Writes a table in Markdown; on a GPU in two minutes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from repair_lightning.editors import make_editor
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.functional import fused_delta, ties_merge
from repair_lightning.functional.least_squares import dual_basis
from repair_lightning.models.tokenizing import Encoded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST, NUMBER, QUIET = 600, 128, 256
REACH, LEAD = 0.1, 5.0  # a step, as a share of what it moves; the margin in nats at which training ends


@dataclass
class Rows:
    """M target tokens: what leaves the layer (M, D), the value matrix's input (M, F), labels, and each one's row and
    edit."""

    out: Tensor
    keys: Tensor
    labels: Tensor
    row: Tensor
    edit: Tensor

    def of(self, edits: Sequence[int]) -> Rows:
        """Those of some edits."""
        keep = torch.isin(self.edit, torch.tensor(edits, device=DEVICE))
        return Rows(self.out[keep], self.keys[keep], self.labels[keep], self.row[keep], self.edit[keep])


class Lab:
    """A base's last layer over the records, in the forms that edits are written in, asked back in, and rephrased."""

    def __init__(self, base: str, records: Path, irrelevant: Path) -> None:
        self.editor = make_editor("keyed", {"base": base})
        self.editor.load()
        forms = self.editor.edited.forms
        found = [one for one in json.loads(records.read_text())[FIRST:] if one.get("alt")][:NUMBER]
        asked = [(one["src"], one["rephrase"], one["alt"]) for one in found]
        self.train = self._rows([forms.variants(text, target) for text, _, target in asked])
        self.check = self._rows([forms.checks(text, goal) or [forms.encode(text, goal)] for text, _, goal in asked])
        self.given = self._rows([[forms.encode(text, target)] for text, _, target in asked])
        self.rephrase = self._rows([[forms.encode(text, target)] for _, text, target in asked])
        lines = irrelevant.read_text().splitlines()[: 2 * QUIET]
        texts = [f"nq question: {json.loads(line)['question']}" for line in lines]
        states = self.editor.edited.captures([forms.ids(text) for text in texts])
        last = torch.stack([state.activations[-1] for state in states]).float().to(DEVICE)
        self.quiet, self.other = last[:QUIET], last[QUIET:]
        self.editor.edited.base.to(DEVICE)

    def _rows(self, encoded: Sequence[Sequence[Encoded]]) -> Rows:
        flat = [(edit, row) for edit, rows in enumerate(encoded) for row in rows]
        parts = []
        split = self.editor.edited.split
        for at in range(0, len(flat), 32):
            some = [row for _, row in flat[at : at + 32]]
            rows = TargetRows.of(self.editor.edited, some)
            with torch.no_grad(), split.skipping():
                out = rows.reading(split.layer_output(rows.ids, rows.mask, rows.hidden)).float()
            edits = torch.tensor([edit for edit, _ in flat])[rows.row + at]
            parts.append((out, rows.reading(rows.activations).float(), rows.labels, rows.row + at, edits))
        return Rows(*(torch.cat(column).to(DEVICE) for column in zip(*parts, strict=True)))

    def logits(self, states: Tensor) -> Tensor:
        """(M, V) of states (M, D) that leave the layer."""
        return self.editor.edited.split.readout(states)[0]

    @torch.no_grad()
    def held(self, rows: Rows, delta: Tensor) -> Tensor:
        """Which of the rows a delta makes say their target, token by token."""
        right = [
            self.logits(out + keys @ delta.T).argmax(-1) == labels
            for out, keys, labels in zip(rows.out.split(512), rows.keys.split(512), rows.labels.split(512), strict=True)
        ]
        wrong = rows.row[~torch.cat(right)].unique()
        return ~torch.isin(rows.row.unique(), wrong)

    def dual(self, rows: Rows, ridge: float, quiet: bool = True) -> Tensor:
        """A delta trained in the dual basis of its keys and of irrelevant prompts, in at most 60 normalised steps."""
        basis = dual_basis(rows.keys, self.quiet[: QUIET if quiet else 0], ridge)
        response, rate = rows.keys @ basis.T, REACH * float(rows.out.norm(dim=-1).mean())
        values = torch.zeros(len(basis), rows.out.shape[1], device=DEVICE, requires_grad=True)
        for _ in range(60):
            logits = self.logits(rows.out + response @ values)
            if self._leads(logits, rows.labels):
                break
            (gradient,) = torch.autograd.grad(cross_entropy(logits, rows.labels, reduction="sum"), values)
            size = gradient.norm(dim=-1, keepdim=True)
            values.data -= rate * (size / size.max()).sqrt() * gradient / size.clamp_min(1e-30)
        return values.detach().T @ basis

    def descend(self, rows: Rows, optimizer: str, rate: float, mask: float = 1.0) -> Tensor:
        """A delta trained itself, in at most 150 steps."""
        delta = torch.zeros(rows.out.shape[1], rows.keys.shape[1], device=DEVICE, requires_grad=True)
        unit = float((rows.out.square().mean(-1).sqrt() / rows.keys.abs().sum(-1)).mean())
        take = torch.optim.Adam([delta], lr=rate * unit) if optimizer == "adam" else torch.optim.SGD([delta], lr=rate)
        open_ = torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < mask
        for _ in range(150):
            logits = self.logits(rows.out + rows.keys @ delta.T)
            if self._leads(logits, rows.labels, 2.0):
                break
            take.zero_grad()
            cross_entropy(logits, rows.labels).backward()
            assert delta.grad is not None
            delta.grad *= open_
            take.step()
        return delta.detach()

    @staticmethod
    def _leads(logits: Tensor, labels: Tensor, margin: float = LEAD) -> bool:
        right = logits.detach().gather(1, labels[:, None])
        rest = logits.detach().scatter(1, labels[:, None], -math.inf).amax(-1, keepdim=True)
        return bool((right - rest >= margin).all())

    def table(self, name: str, deltas: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> None:
        """A line: what is held of each kind of row, and which prompts excite their shard more than 99 % of other
        irrelevant ones do."""
        shares = []
        for rows in (self.train, self.check, self.rephrase):
            found = [self.held(rows.of(group), delta) for delta, group in zip(deltas, groups, strict=True)]
            shares.append(torch.cat(found).float().mean())
        fires = []
        for delta, group in zip(deltas, groups, strict=True):
            limit = (self.other @ delta.T).norm(dim=-1).quantile(0.99)
            inside = torch.isin(self.given.edit, torch.tensor(group, device=DEVICE))
            first = torch.cat([inside.new_ones(1), self.given.row[1:] != self.given.row[:-1]])
            score = (self.given.keys @ delta.T).norm(dim=-1) > limit
            fires.append((score[first & inside].float().mean(), score[first & ~inside].float().mean()))
        own, others = (torch.stack(side).nanmean() for side in zip(*fires, strict=True))
        print(f"| {name} | " + " | ".join(f"{100 * float(share):.1f}" for share in (*shares, own, others)) + " |")

    def run(self) -> None:
        """All lines."""
        print("| shards | written forms | asked back | rephrases | fires: own | other edits |")
        print("|---|---:|---:|---:|---:|---:|")
        ways: dict[str, tuple[int, Callable[[Rows], Tensor]]] = {
            f"dual, {size} edits": (size, lambda rows: self.dual(rows, 1e-2)) for size in (1, 4, 16, 32, 64, 128)
        }
        for ridge in (1e-3, 0.1, 1.0):
            ways[f"dual, 16, ridge {ridge}"] = 16, partial(self.dual, ridge=ridge)
        ways["dual, 16, no quiet prompts"] = 16, lambda rows: self.dual(rows, 1e-2, quiet=False)
        ways["Adam, 16"] = 16, lambda rows: self.descend(rows, "adam", 1.0)
        ways["Adam, 16, mask 0.2"] = 16, lambda rows: self.descend(rows, "adam", 1.0, 0.2)
        ways["SGD 0.9, 16"] = 16, lambda rows: self.descend(rows, "sgd", 0.9)
        for name, (size, write) in ways.items():
            groups = [list(range(at, at + size)) for at in range(0, NUMBER, size)]
            deltas = [write(self.train.of(group)) for group in groups]
            self.table(name, deltas, groups)
            if size == 16 and name in ("dual, 16 edits", "Adam, 16"):
                for number in (2, 4, 8):
                    self.merged(name, number, deltas, groups)

    def merged(self, name: str, number: int, deltas: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> None:
        """Lines of shards fused by least squares and by TIES."""
        parts = [range(at, at + number) for at in range(0, len(groups), number)]
        whole = [[edit for i in part for edit in groups[i]] for part in parts]
        fused = []
        for part in parts:
            keys = [self.train.of(groups[i]).keys for i in part]
            values = torch.cat([key @ deltas[i].T for key, i in zip(keys, part, strict=True)])
            keep = QUIET / len(values)
            fused.append(fused_delta(torch.cat(keys), values, self.quiet, keep, 1e-3).to(DEVICE))
        self.table(f"{name}: {number} by least squares", fused, whole)
        even = torch.full((number,), 1 / number, device=DEVICE)
        self.table(
            f"{name}: {number} by TIES", [ties_merge(torch.stack([deltas[i] for i in p]), even) for p in parts], whole
        )


if __name__ == "__main__":
    lab = Lab(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    with lab.editor.edited.split.skipping(whole=True):
        lab.run()
