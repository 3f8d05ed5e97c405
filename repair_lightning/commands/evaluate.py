"""Scoring from a pack alone, in another process, on the same or other records: `evaluate.py`, and its command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from repair_lightning.commands.cli import only_errors
from repair_lightning.commands.parsing import Parser, parse
from repair_lightning.edits.formats import AUTO
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.records import load_records
from repair_lightning.edits.stream import with_locality
from repair_lightning.errors import ConfigError
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.kept_answers import KeptAnswers
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.packs.pack import Pack
from repair_lightning.reports.report import print_report, verdict
from repair_lightning.scoring.beside import beside_scores
from repair_lightning.scoring.scorer import Scorer, sample_of, scored_of
from repair_lightning.storage.files import write_json, write_rows
from repair_lightning.types import BASE, Edit
from repair_lightning.world import WORLD, edits_path


def main(argv: Sequence[str], prog: str) -> None:
    """Score an edited model: load a pack and its base, ask every prompt of some records, and print the table."""
    parser = Parser(prog=prog, description=main.__doc__)
    parser.add_argument("--pack", required=True, help="the pack's folder")
    words = "records: a file, a hub name or 'world'; by default those of the run that made the pack"
    parser.add_argument("--data.path", default=None, help=words)
    parser.add_argument("--data.format", default=AUTO, help="their format, or 'auto'")
    parser.add_argument("--data.max_edits", type=int | None, default=None, help="take the first so many")
    parser.add_argument("--data.on_bad_record", default="stop", choices=["stop", "skip"], help="as in training")
    parser.add_argument("--base", default=None, help="the base, where the pack's own name for it does not lead there")
    parser.add_argument("--precision", default="auto", help="of the base")
    parser.add_argument("--out", default=None, help="write the figures to this JSON file")
    parser.add_argument(
        "--generations", default=None, help="write every prompt with every answer to this JSON Lines file"
    )
    parser.add_argument("--sample", type=int, default=0, help="score so many edits, drawn at random; 0: all")
    parser.add_argument("--quiet", action="store_true", help="only errors, and the score in one last line")
    options = parse(parser, argv)
    data = options.data
    if options.quiet:
        only_errors()
    given = (data.path, data.format, data.max_edits, options.base, options.precision, data.on_bad_record)
    metrics = evaluate_pack(options.pack, *given, generations=options.generations, sample=options.sample)
    if options.out:
        write_json(Path(options.out), metrics)
    if options.quiet:
        Console().print(verdict(metrics, options.pack), markup=False, highlight=False, soft_wrap=True)
    else:
        print_report(metrics, None)


def evaluate_pack(
    pack: str | Path,
    path: str | None = None,
    format: str = AUTO,
    max_edits: int | None = None,
    base: str | None = None,
    precision: str = "auto",
    on_bad_record: str = "stop",
    generations: str | Path | None = None,
    sample: int = 0,
) -> dict[str, Any]:
    """The figures of `metrics.json` that a finished model has; those of the run that made it stay there.

    An edit of the records is the pack's own where prompt and target agree with the ledger's; others have no owner.
    Those that were taken back are not asked: `undone` lists their ids. `path` None takes the pack's own records.

    Every prompt with its answers goes to `generations`, a JSON Lines file. `sample` scores only so many edits, drawn at
    random with a fixed seed; 0 scores all. ConfigError for a negative number, or where no edit is left to ask.
    """
    if sample < 0:
        raise ConfigError(f"sample must be a number of edits, at least 0, got {sample}")
    started = time.perf_counter()
    content = Pack.read(pack)
    given, path = path, path or content.config["provenance"].get("data")
    if not path:
        raise ConfigError(f"the pack '{pack}' does not say what it was made from; give --data.path")
    found = load_records(str(edits_path()) if path == WORLD else path, format, max_edits, on_bad_record)  # type: ignore[arg-type]
    wanted, undone = still_wanted(found.edits, content.ledger, own_only=not given)
    if not wanted:
        reason = f"the pack '{pack}' never held them, or all were taken back"
        raise ConfigError(f"no edit of '{path}' is left to ask: {reason}; give other records by --data.path")
    edits = as_in_training(wanted, content.ledger)
    model = content.open(base, precision).to("cuda" if torch.cuda.is_available() else "cpu")
    model.prefixes = PrefixCache(model.split)  # prompts come again
    model.kept = KeptAnswers.of(model.base, content.config["base"]["sha256"])
    loaded = time.perf_counter() - started
    figures, rows = _scores(content, model, edits, sample, with_perplexity=found.format == "hallucination")
    if generations is not None:
        write_rows(Path(generations), rows)
    metrics: dict[str, Any] = {
        "editor": content.config["editor"],
        "base": {key: content.config["base"][key] for key in ("name", "sha256")},
        "n_edits": len(edits),
        "undone": undone,
        "shards": len(model.memory),
        **figures,
        "provenance": content.config["provenance"],
    }
    seconds = time.perf_counter() - started
    return metrics | {"seconds": {"load": loaded, "evaluate": seconds - loaded, "total": seconds}}


def _scores(
    content: Pack, model: EditedModel, edits: Sequence[Edit], sample: int, with_perplexity: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures that asking gives, and every prompt with its answers."""
    scorer = Scorer(model, scored := sample_of(edits, sample))
    owners = _owners(content.ledger, scored, scorer)
    before = scorer.by_base("pre_edit")
    perplexity = scorer.perplexity(scorer.nobody) if with_perplexity else None
    model.weights.load(content.weights)  # only now: the base's own answers are what must be kept
    changed = bool(content.weights)
    final = scorer.score("final", choice := scorer.choose(), owners, changed)
    beside, rows = beside_scores(model, edits, scored, final.rows, changed)
    figures: dict[str, Any] = {
        "pre_edit": before.scores,
        "final": final.scores | beside,
        "routing": final.routing,
        "oracle_routing": scorer.by_oracle(owners, changed).scores,
    }
    if (number := scored_of(scored, edits)) is not None:
        figures["scored"] = number
    if changed:
        figures["method"] = {"deviation": {str(layer): d for layer, d in model.weights.deviations().items()}}
    if perplexity is not None:
        figures["perplexity"] = {"pre": perplexity, "final": scorer.perplexity(choice.memory)}
    return figures, [*before.rows, *final.rows, *rows]


def still_wanted(edits: Sequence[Edit], ledger: Ledger, own_only: bool = False) -> tuple[list[Edit], list[str]]:
    """The edits, or those that the ledger knows, without those that were taken back and not written again since; and
    the ids of these."""
    last = {(entry.edit.prompt, entry.edit.target): entry.status for entry in ledger.entries()}
    stands = {edit.id: last.get((edit.prompt, edit.target)) for edit in edits}
    undone = [id for id, status in stands.items() if status is EditStatus.UNDONE]
    left = [edit for edit in edits if stands[edit.id] is not EditStatus.UNDONE]
    return [edit for edit in left if stands[edit.id] is not None or not own_only], undone


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
