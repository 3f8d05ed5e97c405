"""Scoring from a pack alone, in another process, on the same or other records: `evaluate.py`, and its command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from repair_lightning.commands.cli import only_errors
from repair_lightning.commands.parsing import Parser, parse
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.records import load_records
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.packs.pack import Pack
from repair_lightning.reports.report import print_report, verdict
from repair_lightning.scoring.forms import form_scores, same_subject
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.storage.files import write_json, write_rows
from repair_lightning.types import BASE, Edit
from repair_lightning.world import WORLD, edits_path


def main(argv: Sequence[str], prog: str) -> None:
    """Score an edited model: load a pack and its base, ask every prompt of some records, and print the table."""
    parser = Parser(prog=prog, description=main.__doc__)
    parser.add_argument("--pack", required=True, help="the pack's folder")
    parser.add_argument("--data.path", default=WORLD, help="records: a file, a hub name or 'world'")
    parser.add_argument("--data.format", default="jsonl", help="their format")
    parser.add_argument("--data.max_edits", type=int | None, default=None, help="take the first so many")
    parser.add_argument("--data.on_bad_record", default="stop", choices=["stop", "skip"], help="as in training")
    parser.add_argument("--base", default=None, help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", default="auto", help="of the base")
    parser.add_argument("--out", default=None, help="write the figures to this JSON file")
    parser.add_argument(
        "--generations", default=None, help="write every prompt with every answer to this JSON Lines file"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors, and the score in one last line")
    options = parse(parser, argv)
    data = options.data
    if options.quiet:
        only_errors()
    given = (data.path, data.format, data.max_edits, options.base, options.precision, data.on_bad_record)
    metrics = evaluate_pack(options.pack, *given, generations=options.generations)
    if options.out:
        write_json(Path(options.out), metrics)
    if options.quiet:
        Console().print(verdict(metrics, options.pack), markup=False, highlight=False, soft_wrap=True)
    else:
        print_report(metrics, None)


def evaluate_pack(
    pack: str | Path,
    path: str,
    format: str = "jsonl",
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
    edits = load_records(str(edits_path()) if path == WORLD else path, format, max_edits, on_bad_record).edits  # type: ignore[arg-type]
    model = content.open(base, precision).to("cuda" if torch.cuda.is_available() else "cpu")
    model.prefixes = PrefixCache(model.split)  # prompts come again
    loaded = time.perf_counter() - started
    scorer = Scorer(model, edits)
    owners = _owners(content.ledger, edits, scorer)
    before = scorer.by_base("pre_edit")
    perplexity = scorer.perplexity(scorer.nobody) if format == "hallucination" else None
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


def _owners(ledger: Ledger, edits: Sequence[Edit], scorer: Scorer) -> Tensor:
    """The shard that should answer each of the scorer's questions."""
    known = {(ledger.edit(id).prompt, ledger.edit(id).target): ledger.owner_of(id) for id in ledger}
    shards = {edit.id: known.get((edit.prompt, edit.target)) for edit in edits}
    found = [shards[question.edit] for question in scorer.questions]
    return torch.tensor([BASE if shard is None else shard for shard in found], dtype=torch.long)
