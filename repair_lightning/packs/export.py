"""Leaving a pack behind: a plain Hugging Face checkpoint with all edits in W_v, a folder that needs no other base, or
the shards as LoRA adapters.

One matrix cannot ask which edit is meant, so the plain checkpoint answers worse than the routed model; how much worse
is measured on both and written beside it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from operator import eq
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.functional import fused_delta
from repair_lightning.models.base import base_files, stored_dtype, weights_hash_of
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.packs.adapters import ROUTER_FILE, require_additive, write_adapters
from repair_lightning.packs.pack import BASE_FOLDER, CARD_FILE, CONFIG_FILE, Pack, PackedModel
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, KINDS, answers, normalise, overall_performance
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.storage.files import write_json
from repair_lightning.storage.folders import replace_folder, whereabouts
from repair_lightning.types import BASE, Edit, Probe

log = logging.getLogger(__name__)

REPORT_FILE = "export.json"
ASKED = {"edits": "edit", "unrelated": "unrelated prompt", "neighbours": "neighbour"}
SAMPLE = 64
"""Edits, unrelated prompts and neighbours by which a merge is chosen, at most."""
KEEP = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Weights of what must stay that a merge tries; see `functional.fused_delta`."""


def export_pack(
    pack: str | Path,
    to: str | Path,
    merged: bool = False,
    base: str | None = None,
    precision: str = "auto",
    overwrite: bool = False,
    max_edits: int | None = None,
    peft: bool = False,
) -> dict[str, Any]:
    """Export a pack into a new folder, or with `overwrite` in place of an earlier export; returns the content of
    `export.json`. `base` and `precision` are as `load_edited` takes them.

    With `merged` the export is a plain checkpoint with all edits fused into W_v, measured on at most `max_edits` live
    edits; with `peft` the shards as LoRA adapters, with what says which prompts take which; else the pack together with
    its base, which `load_edited` reads wherever the folder is moved. RepairError where the pack is damaged, the folder
    is taken or cannot be written, or there is nothing to merge or no shard that adds to W_v.
    """
    to = Path(to)
    if merged and peft:
        raise ConfigError("--merged and --peft are two kinds of export; give one of them")
    if max_edits is not None and max_edits < 1:
        raise ConfigError(f"max_edits must be at least 1, got {max_edits}; leave it out to ask all")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        if not (to / REPORT_FILE).is_file():
            raise ConfigError(f"'{to}' is not empty and no export; give --to a new folder")
        if not overwrite:
            raise ConfigError(f"'{to}' is not empty; give --to a new folder, or --overwrite to replace that export")
    content = Pack.read(pack)
    if peft:
        return _export_adapters(content, to, base, precision)
    return _export_merged(content, to, base, precision, max_edits) if merged else _export_whole(content, to, base)


def _export_whole(pack: Pack, to: Path, base: str | None) -> dict[str, Any]:
    """Nothing is loaded: the files are copied as they are, and what came over is checked."""
    files = base_files(base or pack.base)
    pack.check_base(str(files[0].parent), weights_hash_of(files[0].parent))
    report = {"kind": "with its base", "base": pack.config["base"], "live_edits": len(live_edits(pack.ledger))}

    def fill(part: Path) -> None:
        (part / BASE_FOLDER).mkdir()
        for name in (
            CONFIG_FILE,
            *pack.config["files"],
            *[CARD_FILE] * (whereabouts(pack.folder) / CARD_FILE).is_file(),
        ):
            shutil.copyfile(whereabouts(pack.folder) / name, part / name)
        for file in files:
            shutil.copyfile(file, part / BASE_FOLDER / file.name)
        write_json(part / REPORT_FILE, report)
        Pack.read(part).check_base(str(part / BASE_FOLDER), weights_hash_of(part / BASE_FOLDER))

    replace_folder(to, fill, what="export")
    return report


def _export_adapters(pack: Pack, to: Path, base: str | None, precision: str) -> dict[str, Any]:
    require_additive(pack)
    edits = live_edits(pack.ledger)
    if not edits:
        raise RepairError("the pack holds no live edit: there is no shard to export; export without --peft")
    model = pack.open(base, precision)
    report = {"kind": "peft", "base": model.card["base"], "live_edits": len(edits)}

    def fill(part: Path) -> None:
        report.update(write_adapters(model, edits, part))
        write_json(part / REPORT_FILE, report)

    replace_folder(to, fill, what="export")
    return report


def live_edits(ledger: Ledger) -> list[Edit]:
    """The edits that a model holds, in order of arrival."""
    held = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)
    return [ledger.edit(id) for id in held if ledger.owner_of(id) is not None]


def _export_merged(pack: Pack, to: Path, base: str | None, precision: str, max_edits: int | None) -> dict[str, Any]:
    model = pack.open(base, precision).to("cuda" if torch.cuda.is_available() else "cpu")
    edits, irrelevant = live_edits(model.ledger), model.card["irrelevant"]
    if not edits:
        raise RepairError("the pack holds no live edit: there is nothing to merge; export without --merged")
    model.prefixes = PrefixCache(model.split)
    asked = edits[:max_edits]
    if not any(edit.locality for edit in asked):  # prompts that the merge does not look at stand in, here and below
        asked[0] = replace(asked[0], locality=tuple(map(Probe, irrelevant["held_out"][1::2])))
    if not any(edit.near for edit in asked):
        asked[0] = replace(asked[0], near=tuple(map(Probe, neighbours(model, edits, 2))))
    scorer = Scorer(model, asked)
    owners = torch.tensor([model.ledger.owner_of(question.edit) for question in scorer.questions])
    log.info("measuring the routed model: %d prompts", len(scorer.questions))
    scorer.by_base("before")  # before anything changes the base
    model.weights.load(pack.weights)
    routed = scorer.score("routed", scorer.choose(), owners, bool(pack.weights)).scores[AUTOREGRESSIVE]
    keep = merge_into_base(model, edits, irrelevant["background"], irrelevant["held_out"][::2])
    model.prefixes.close()
    model.prefixes = None  # what comes now is the checkpoint's own dtype
    model.base.to(stored_dtype(base or pack.base) or model.base.dtype)
    log.info("measuring the merged model")
    after = scorer.by_base("merged", fresh=True).scores[AUTOREGRESSIVE]
    number = {"edits": len(asked), "unrelated": sum(len(edit.locality) for edit in asked)}
    number["neighbours"] = sum(len(edit.near) for edit in asked)
    report = {"kind": "merged", "base": model.card["base"], "live_edits": len(edits), "asked": number, "keep": keep}
    report |= {"routed": routed, "merged": after}

    def fill(part: Path) -> None:
        model.base.save_pretrained(part)
        model.tokenizer.save_pretrained(part)
        write_json(part / REPORT_FILE, report)

    replace_folder(to, fill, what="export")
    return report


@torch.no_grad()
def merge_into_base(
    model: PackedModel, edits: Sequence[Edit], background: Sequence[str], guard: Sequence[str]
) -> float:
    """Fuse what the shards add for live edits into the base's W_v, so that the base alone says them.

    Unrelated prompts of the `background` should keep their answers, as far as one matrix can; by those of the `guard`,
    by a sample of the edits and by their neighbours the weight of what must stay is chosen, which is returned.
    """
    keys, values = _said(model, edits)
    rows = [row for row in map(model.forms.ids, background) if row]
    kept = torch.cat([capture.activations.float() for capture in model.captures(rows)]) if rows else keys[:0]
    before = model.weights.state()
    sample = edits[:: max(1, len(edits) // SAMPLE)][:SAMPLE]
    asked = {"unrelated": list(guard)[:SAMPLE], "neighbours": neighbours(model, sample, 1)}
    expected = {name: _ask(model, prompts) for name, prompts in asked.items()}
    found: list[tuple[float, float]] = []
    for keep in KEEP:
        model.weights.add(model.layer, fused_delta(keys, values, kept, keep))
        rel = _share(_ask(model, [edit.prompt for edit in sample]), [normalise(edit.target) for edit in sample])
        loc, near = (_share(_ask(model, prompts), expected[name]) for name, prompts in asked.items())
        words = (
            "merge with keep %s: %.2f of a sample of the edits right, %.2f of the unrelated kept, %.2f of neighbours"
        )
        log.info(words, keep, rel, loc, near)
        found.append((overall_performance(rel, loc, near) or 0.0, keep))
        model.weights.load(before)
    best = max(found)[1]
    model.weights.add(model.layer, fused_delta(keys, values, kept, best))
    return best


def neighbours(model: PackedModel, edits: Sequence[Edit], step: int) -> list[str]:
    """The question of each edit about the subject of another, some `step` after it, where the routed model leaves that
    to the base."""
    named = [(edit.prompt, edit.subject) for edit in edits if edit.subject and edit.subject in edit.prompt]
    others = [named[(i + step) % len(named)][1] for i in range(len(named))]
    pairs = zip(named, others, strict=True)
    prompts = [prompt.replace(subject, other) for (prompt, subject), other in pairs if subject != other]
    memory = model.choose(prompts).memory.tolist()
    return [prompt for prompt, shard in zip(prompts, memory, strict=True) if shard == BASE]


def _share(found: Sequence[str], expected: Sequence[str]) -> float:
    """How many are as expected; all of none."""
    return sum(map(eq, found, expected)) / len(expected) if expected else 1.0


def _said(model: PackedModel, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """A(x) (N, F) where the edits' target tokens are read, and what their shards add there (N, D)."""
    rows = [model.forms.encode(edit.prompt, edit.target) for edit in edits]
    found = []
    for edit, row, capture in zip(edits, rows, model.captures([row.ids for row in rows]), strict=True):
        key = capture.activations[len(row.prompt) - 1 : len(row.ids) - 1].float()
        owner = model.ledger.owner_of(edit.id)
        nothing = key.new_zeros(len(key), model.memory.shape[0])  # an earlier merge wrote it into W_v
        found.append((key, nothing if owner in (None, BASE) else model.memory[owner].product(key)))
    keys, values = map(torch.cat, zip(*found, strict=True))
    return keys, values


def _ask(model: PackedModel, prompts: Sequence[str]) -> list[str]:
    nobody = torch.full((len(prompts),), BASE)
    return [normalise(text) for text in answers(model, prompts, nobody, max_new_tokens=16)]


def report_lines(report: dict[str, Any], to: Path) -> list[str]:
    """What an export says to a person."""
    edits = counted(report["live_edits"], "edit")
    if report["kind"] == "peft":
        adapters = f"{counted(report['adapters'], 'LoRA adapter')}, rank {report['rank']:,} at most"
        lines = [f"{to}: {adapters}, {report['bytes']:,} bytes, with {edits}; {ROUTER_FILE} says who takes which"]
        larger = report["larger_than_dense"]
        return lines + [f"larger than their dense matrices: {larger:,}, for their rank"] * bool(larger)
    if report["kind"] != "merged":
        return [f"{to}: the base with {edits}; repair_lightning.load_edited('{to}') needs no more"]
    asked = ", ".join(counted(report["asked"][of], noun) for of, noun in ASKED.items())
    shares = 100 * pd.DataFrame([report["routed"], report["merged"]], ["routed", "merged"], dtype=float)
    return [
        f"{to}: a plain Hugging Face checkpoint with {edits} in one matrix",
        f"free generation, {asked}, in per cent:",
        shares[list(KINDS)].rename(columns=str.capitalize).to_string(float_format="{:.1f}".format, na_rep="-"),
    ]
