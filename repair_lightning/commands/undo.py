"""Taking edits back: the base answers their prompts again, everything else stays, and it is measured that it does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from repair_lightning.commands.run_dir import METRICS_FILE, RunDirectory
from repair_lightning.editors import Editor
from repair_lightning.edits.journal import FILE as JOURNAL
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.packs.pack import JOURNAL_FILE, read_pack, restore_editor, save_pack
from repair_lightning.reports.report import not_measured, percent
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, KINDS, answers
from repair_lightning.scoring.scorer import Scorer
from repair_lightning.types import BASE, Edit

BEGUN, DONE = "undo", "undo done"


def undo(
    run_dir: str | Path,
    ids: Sequence[str],
    base: str | None = None,
    precision: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Take edits of a finished run back: in its pack, its ledger and its journal. Until the pack is replaced it has not
    happened, and the same command does it again.

    `base` and `precision` None are the pack's; `provenance` are further words for it on how it came about.

    Returns:
        `undone`, `as_base` (share of their prompts that are answered as by the base), `rebuilt` (ids of edits written
        again), `untouched` (of the `shards` that are left, how many are bitwise identical) and the scores of the
        `remaining` edits that the pack still holds, `before` and `after`: those of the undone ones are in neither.

    Raises:
        RepairError: no finished run there, an id is unknown, undone or superseded, or was merged into the base.
    """
    run = RunDirectory(run_dir)
    if not (run.path / METRICS_FILE).is_file():
        raise RepairError(f"'{run_dir}' holds no finished run; finish it with the command that began it, then undo")
    run.hold()
    run.journal = Journal(run.path / JOURNAL)
    with closing(run):
        return _undo(run, list(dict.fromkeys(ids)), base, precision, provenance or {})


def _undo(
    run: RunDirectory, ids: list[str], base: str | None, precision: str | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    pack = run.path / "pack"
    editor = restore_editor(pack, base, precision)
    if settle(run.journal, editor.ledger):
        editor.ledger.to_parquet(run.path / "edits.parquet")
    check(editor, ids)
    rest = [id for id in editor.ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED) if id not in set(ids)]
    scorer = Scorer(editor.edited, [editor.ledger.edit(id) for id in rest])
    with editor.edited.weights.originals():
        _ = scorer.base  # what must be kept is what the base said before anything was written into it
    before, bits = _scores(scorer, editor), _fingerprints(editor)
    start = run.journal.last
    run.journal.note(BEGUN, json.dumps(ids))
    editor.ledger.journal = run.journal
    try:
        rebuilt = editor.undo(ids)
    except RepairError:
        run.journal.rewind(start, "an undo was refused")
        raise
    kept = _fingerprints(editor)
    config, _ = read_pack(pack)
    save_pack(editor, pack, {**config["provenance"], **provenance}, {JOURNAL_FILE: run.journal.to_parquet})
    run.journal.note(DONE, json.dumps(ids))
    editor.ledger.to_parquet(run.path / "edits.parquet")
    return {
        "undone": ids,
        "as_base": _as_base(editor, [editor.ledger.edit(id) for id in ids]),
        "rebuilt": rebuilt,
        "untouched": sum(bits.get(shard) == content for shard, content in kept.items()),
        "shards": len(kept),
        "remaining": len(rest),
        "before": before,
        "after": _scores(scorer, editor),
    }


def check(editor: Editor, ids: Sequence[str]) -> None:
    """Refuse, where one of these edits cannot be taken back, and say what is possible."""
    if not editor.can_undo:
        name = editor.editor_name  # type: ignore[attr-defined]
        raise ConfigError(f"the editor {name} cannot take edits back; a new run without the record can")
    for id in ids:
        entry = editor.ledger.entry(id)
        if entry.status is EditStatus.UNDONE:
            raise ConfigError(f"edit {id!r} is undone already; a new record with its prompt writes it again")
        if entry.status is EditStatus.SUPERSEDED:
            raise ConfigError(f"edit {id!r} was {entry.reason}: nothing of it is left; undo its successor instead")
        if entry.shard == BASE and not editor.writes_base:
            words = "a new run without its record is what is possible (merge.target side keeps edits apart)"
            raise ConfigError(f"edit {id!r} was merged into the base's own weights, with all others: {words}")


def settle(journal: Journal, ledger: Ledger) -> bool:
    """Finish or take back what a killed undo left: the pack has its ledger, or it did not happen. Returns whether one
    was finished; refuses where journal and pack tell different stories."""
    seq, kind = journal.last_note(BEGUN, DONE) or (0, DONE)
    finished = kind == BEGUN and journal.rebuild() == ledger
    if finished:
        journal.note(DONE, "the pack was there")
    elif kind == BEGUN:
        journal.rewind(seq - 1, "an undo was killed")
    if journal.rebuild() != ledger:
        raise RepairError(f"'{journal.path}' and the pack beside it differ; restore both from the same copy")
    return finished


def report_lines(report: dict[str, Any]) -> list[str]:
    """What an undo says to a person."""
    whose, rebuilt = "its" if len(report["undone"]) == 1 else "their", len(report["rebuilt"])
    share = f"{percent(report['as_base'])} of {whose} prompts"
    lines = [f"undone: {', '.join(report['undone'])}; {share} are answered as by the base"]
    if not report["remaining"]:
        return [*lines, "the pack holds no other edit: there is nothing to score"]
    again = f"; written again: {counted(rebuilt, 'edit')}" * bool(rebuilt)
    measured = [kind for kind in KINDS if report["before"][kind] is not None]
    lines += [
        f"the other edits' shards: {report['untouched']} of {report['shards']} unchanged, bit by bit{again}",
        f"scores before and after, of the {counted(report['remaining'], 'edit')} that the pack still holds (the run's "
        "own are of all its edits), free generation, in per cent:",
        "        " + "".join(f"{kind.capitalize():>8}" for kind in measured),
    ]
    for moment in ("before", "after"):
        lines.append(f"  {moment:<6}" + "".join(f"{100 * report[moment][kind]:8.1f}" for kind in measured))
    return [*lines, *not_measured(report["before"])]


def _scores(scorer: Scorer, editor: Editor) -> dict[str, float | None]:
    owners = editor.owner_choice([question.edit for question in scorer.questions])
    return scorer.score("undo", scorer.choose(), owners, editor.base_changed).scores[AUTOREGRESSIVE]


def _fingerprints(editor: Editor) -> dict[int, str]:
    return {shard: editor.memory[shard].fingerprint() for shard in editor.memory.ids}


def _as_base(editor: Editor, edits: Sequence[Edit]) -> float:
    """The share of the edits' prompts and rephrases that are answered as by the base."""
    prompts = [prompt for edit in edits for prompt in (edit.prompt, *edit.rephrases)]
    with editor.edited.weights.originals():
        plain = answers(editor.edited, prompts, torch.full((len(prompts),), BASE), 32)
    routed = answers(editor.edited, prompts, editor.choose(prompts).memory, 32)
    return sum(a == b for a, b in zip(plain, routed, strict=True)) / len(prompts)
