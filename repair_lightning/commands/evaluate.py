"""Scoring from a pack alone, in another process, on the same or other records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repair_lightning.edits.formats import AUTO
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.records import load_records
from repair_lightning.edits.stream import with_locality
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.packs.pack import Pack
from repair_lightning.scoring.forms import form_scores, same_subject
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.storage.files import write_rows
from repair_lightning.types import BASE, Edit
from repair_lightning.world import WORLD, edits_path


def evaluate_pack(
    pack: str | Path,
    path: str,
    format: str = AUTO,
    max_edits: int | None = None,
    base: str | None = None,
    precision: str = "auto",
    on_bad_record: str = "stop",
    generations: str | Path | None = None,
) -> dict[str, Any]:
    """The figures of `metrics.json` that a finished model has; those of the run that made it stay there.

    An edit of the records is the pack's own where prompt and target agree with the ledger's; others have no owner.
    Every prompt with its answers goes to `generations`, a JSON Lines file.
    """
    started = time.perf_counter()
    content = Pack.read(pack)
    found = load_records(str(edits_path()) if path == WORLD else path, format, max_edits, on_bad_record)  # type: ignore[arg-type]
    edits = as_in_training(found.edits, content.ledger)
    model = content.open(base, precision).to("cuda" if torch.cuda.is_available() else "cpu")
    model.prefixes = PrefixCache(model.split)  # prompts come again
    loaded = time.perf_counter() - started
    scorer = Scorer(model, edits)
    owners = _owners(content.ledger, edits, scorer)
    before = scorer.by_base("pre_edit")
    perplexity = scorer.perplexity(scorer.nobody) if found.format == "hallucination" else None
    model.weights.load(content.weights)  # only now: the base's own answers are what must be kept
    changed = bool(content.weights)
    final = scorer.score("final", choice := scorer.choose(), owners, changed)
    oracle = scorer.by_oracle(owners, changed)
    forms, rows = form_scores(model, edits)
    if generations is not None:
        write_rows(Path(generations), [*before.rows, *final.rows, *rows])
    metrics: dict[str, Any] = {
        "editor": content.config["editor"],
        "base": {key: content.config["base"][key] for key in ("name", "sha256")},
        "n_edits": len(edits),
        "shards": len(model.memory),
        "pre_edit": before.scores,
        "final": final.scores | {"forms": forms, "same_subject": same_subject(model, edits, changed)},
        "routing": final.routing,
        "oracle_routing": oracle.scores,
        "provenance": content.config["provenance"],
    }
    if changed:
        metrics["method"] = {"deviation": {str(layer): d for layer, d in model.weights.deviations().items()}}
    if perplexity is not None:
        metrics["perplexity"] = {"pre": perplexity, "final": scorer.perplexity(choice.memory)}
    seconds = time.perf_counter() - started
    return metrics | {"seconds": {"load": loaded, "evaluate": seconds - loaded, "total": seconds}}


def as_in_training(edits: Sequence[Edit], ledger: Ledger) -> tuple[Edit, ...]:
    """The edits with the subject and locality prompts that their run gave them; others without the latter are asked
    those of the pack's edits."""
    known = {(edit.prompt, edit.target): edit for edit in map(ledger.edit, ledger)}
    pairs = [(edit, known.get((edit.prompt, edit.target), edit)) for edit in edits]
    found = [replace(e, subject=e.subject or own.subject, locality=e.locality or own.locality) for e, own in pairs]
    others = list(dict.fromkeys(probe.prompt for edit in known.values() for probe in edit.locality))
    return with_locality(found, others) if others else tuple(found)


def _owners(ledger: Ledger, edits: Sequence[Edit], scorer: Scorer) -> Tensor:
    """The shard that should answer each of the scorer's questions."""
    known = {(ledger.edit(id).prompt, ledger.edit(id).target): ledger.owner_of(id) for id in ledger}
    shards = {edit.id: known.get((edit.prompt, edit.target)) for edit in edits}
    found = [shards[question.edit] for question in scorer.questions]
    return torch.tensor([BASE if shard is None else shard for shard in found], dtype=torch.long)
