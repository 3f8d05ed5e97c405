"""An edited model that takes corrections between two calls, with the records, the ledger and the checks of a run.

A correction is written, calibrated, asked back, and on the disk, where there is a store, before anyone is told of it.
What goes wrong on the way leaves everything as it was.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from repair_lightning.commands.undo import check
from repair_lightning.editors import Editor, editor_class, make_editor
from repair_lightning.edits.ledger import FINAL, EditStatus, LedgerEntry
from repair_lightning.edits.records import (
    RecordSet,
    check_lengths,
    checked_records,
    load_irrelevant,
    same_question_key,
)
from repair_lightning.edits.stream import Joined, apply, join
from repair_lightning.errors import ConfigError, RepairError, counted
from repair_lightning.models.architectures import resolve_layer
from repair_lightning.models.base import Base, in_memory, load_base
from repair_lightning.models.edited import EditedModel
from repair_lightning.packs.pack import CONFIG_FILE, restore_editor, save_pack
from repair_lightning.scoring.correctness import correctness
from repair_lightning.scoring.protocols import answers
from repair_lightning.serving.store import Store
from repair_lightning.types import Edit, EditBatch
from repair_lightning.world import irrelevant_path

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Writes of an edit that is not answered right before it is given up."""
MAX_FIRED = 0.02
"""Highest share of irrelevant prompts that the shards of new edits may answer."""
GUARDS = 256
"""Most irrelevant prompts that are asked about."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one correction: its id and status, why, and what the model says to its prompt now."""

    id: str
    status: str
    reason: str = ""
    answer: str | None = None


class LiveModel:
    """A base with its corrections: asked like any Hugging Face causal LM, corrected by :meth:`add` and :meth:`undo`.

    Any number of threads may call it. A correction waits until the calls under way have ended, and calls that come
    after it wait for it: each sees all of it or nothing. Whatever the edited model has (`config`, `device`,
    `tokenizer`, `route`, `generation_config`) is here too.

    Args:
        editor: with a loaded base, prepared.
        store: where corrections become durable; None keeps them in memory.
    """

    def __init__(self, editor: Editor, store: Store | None = None) -> None:
        self.editor, self.store = editor, store
        self._calls = Calls()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "editor" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.editor.edited, name)

    @property
    def model(self) -> EditedModel:
        """The edited model itself, without the waiting: nothing may be corrected while it is used."""
        return self.editor.edited

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The edited model's `forward`."""
        with self._calls.shared():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The edited model's `generate`: texts, messages or token ids, see :meth:`PackedModel.generate`."""
        with self._calls.shared():
            return self.model.generate(*args, **kwargs)

    def add(self, edits: Sequence[Mapping[str, Any]] | Mapping[str, Any], by: str = "") -> list[Outcome]:
        """Write corrections: records as in a `jsonl` file, `{"prompt": ..., "target": ...}` at the least, or one.

        What a correction says already is not written again; one that contradicts an earlier one takes its place once it
        holds. `by` is kept in the history. Returns what became of each, in their order.

        Raises:
            RepairError: a record is wrong, or does not fit into what the base reads: nothing is written then.
        """
        rows = [edits] if isinstance(edits, Mapping) else list(edits)
        with self._calls.alone(), self.model.lock:
            rows = self._named(rows)
            found, joined = self._checked(rows)
            if found.edits:
                self._write_all(found, by)
            return self._outcomes([self._entry_of(row, joined) for row in rows])

    def undo(self, ids: Sequence[str] | str) -> list[str]:
        """Take corrections back: the base answers their prompts again. Returns the ids of others that were written
        again for it. RepairError where one is unknown, undone or superseded: nothing has changed then."""
        ids = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
        with self._calls.alone(), self.model.lock:
            check(self.editor, ids)
            with self._whole():
                return self.editor.undo(ids)

    def edits(self, q: str = "", subject: str = "") -> list[dict[str, Any]]:
        """The corrections with their status, the oldest first; `q` must stand in one's id, prompt or target, `subject`
        in its subject, whatever the case."""
        return [described(entry) for entry in self.editor.ledger.entries() if _holds(entry.edit, q, subject)]

    def one(self, id: str) -> dict[str, Any]:
        """A correction with its status. UnknownEditError."""
        return described(self.editor.ledger.entry(id))

    def history(self, id: str) -> list[dict[str, Any]]:
        """All that became of a correction, where there is a store; else its last state alone. UnknownEditError."""
        entry = self.editor.ledger.entry(id)
        if self.store is None:
            return [{"time": None, "kind": str(entry.status), "status": str(entry.status), "reason": entry.reason}]
        return [{name: event[name] for name in ("time", "kind", "status", "reason")} for event in self.store.events(id)]

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write a pack that `load_edited` reads; returns the folder."""
        with self._calls.shared():
            return save_pack(self.editor, save_directory, {"command": "repair_lightning.edit"})

    def _outcomes(self, entries: Sequence[LedgerEntry]) -> list[Outcome]:
        """What became of corrections, and what is said to their prompts now: what is written was asked back."""
        found = []
        for entry in entries:
            status = str(entry.status)
            said = entry.edit.target if entry.status is EditStatus.WRITTEN else self._answer(entry.edit)
            found.append(Outcome(entry.edit.id, status, entry.reason, said))
        return found

    def _entry_of(self, row: Mapping[str, Any], joined: Joined) -> LedgerEntry:
        """Where the correction of a row is: under its own id, another, or that of one that says the same."""
        ledger, id = self.editor.ledger, str(row["id"])
        id = joined.known.get(id) or joined.renamed.get(id) or id
        if id in ledger:
            return ledger.entry(id)
        (edit,) = checked_records("edits", [row]).edits  # another row of the same request says it too
        key = same_question_key(edit.prompt)
        return [
            e for e in ledger.entries() if same_question_key(e.edit.prompt) == key and e.edit.target == edit.target
        ][-1]

    @torch.inference_mode()
    def _answer(self, edit: Edit) -> str:
        limit = len(self.editor.encode(edit).target) + 4
        return answers(self.model, [edit.prompt], self.editor.choose_for([edit]).memory, limit)[0]

    def close(self) -> None:
        """Let go of the store."""
        if self.store is not None:
            self.store.close()

    def _named(self, rows: list[Any]) -> list[Any]:
        """The rows; those without an id get one that no other correction has."""
        taken, number, found = set(self.editor.ledger), len(self.editor.ledger), []
        for row in rows:
            if isinstance(row, Mapping) and row.get("id") is None:
                number += 1
                while f"edit-{number}" in taken:
                    number += 1
                row = {**row, "id": f"edit-{number}"}
            found.append(row)
        return found

    def _checked(self, rows: list[Any]) -> tuple[RecordSet, Joined]:
        """The corrections that are to be written, and how they follow those that are here."""
        if not rows:
            raise ConfigError('no correction is given; give records such as {"prompt": "...", "target": "..."}')
        found = checked_records("edits", rows)
        too_long = check_lengths(found.edits, self.model.forms, self.model.longest)
        if too_long:
            raise RepairError(next(iter(too_long.values())))
        joined = join(found, self.editor.ledger)
        return apply(found, joined), joined

    def _write_all(self, found: RecordSet, by: str) -> None:
        """Write corrections; one that cannot be made to hold leaves the one that it contradicts as it was."""
        refused: dict[str, str] = {}
        while True:
            try:
                with self._whole():
                    return self._write(found, by, refused)
            except _GivenUp as error:
                refused |= error.lost

    def _write(self, found: RecordSet, by: str, refused: Mapping[str, str]) -> None:
        editor, ledger = self.editor, self.editor.ledger
        window = max((entry.window + 1 for entry in ledger.values()), default=0)
        ledger.arrive([*found.superseded_edits, *found.edits], window, f"by {by}" if by else "")
        for id, reason in refused.items():
            ledger.quarantine([id], reason)
        replaced = {old: newer for old, newer in found.superseded.items() if newer not in refused}
        earlier = replaced.keys() - {edit.id for edit in found.superseded_edits}
        for old, newer in replaced.items():
            ledger.supersede(old, newer)
        editor.forget(earlier)
        fired = self._fired()
        new = {edit.id: edit for edit in found.edits if edit.id not in refused}
        waiting = list(new.values())
        for attempt in range(1, MAX_ATTEMPTS + 1):
            size = max(1, editor.batch_limit(waiting)) if attempt == 1 else 1
            for at in range(0, len(waiting), size):
                ledger.written(editor.write(EditBatch(tuple(waiting[at : at + size]))))
            editor.finish_window()
            written = [edit for edit in waiting if ledger.owner_of(edit.id) is not None]
            ledger.evaluated(correctness(editor, written), 1.0)
            waiting = [e for e in new.values() if ledger.entry(e.id).status is not EditStatus.WRITTEN]
            if not waiting:
                break
            editor.forget(edit.id for edit in waiting)
            if attempt < MAX_ATTEMPTS:
                ledger.requeue([e.id for e in waiting if ledger.entry(e.id).shard is not None], "not said yet")
        lost = {edit.id: f"still wrong after {MAX_ATTEMPTS} attempts" for edit in waiting}
        if self._fired() > max(fired, MAX_FIRED):
            lost = dict.fromkeys(new, "it answers questions that have nothing to do with it")
        if any(replaced[old] in lost for old in earlier):
            raise _GivenUp(lost)
        for id, reason in lost.items():
            ledger.quarantine([id], reason)
        if lost:
            log.warning("%s given up: %s", counted(len(lost), "correction"), next(iter(lost.values())))
            editor.forget(lost)
            editor.finish_window()

    def _fired(self) -> float:
        """The share of irrelevant prompts that a shard answers."""
        asked = list(self.editor.guard_prompts[:GUARDS])
        return float((self.editor.choose(asked).memory >= 0).float().mean()) if asked else 0.0

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is done inside is done and on the disk at the end, or has never happened."""
        editor = self.editor
        before, entries = editor.snapshot(), list(editor.ledger.values())
        point = self.store.point if self.store else 0
        try:
            with torch.inference_mode(False):
                yield
            if self.store is not None:
                self.store.save(editor)
        except BaseException:
            editor.rollback(before)
            editor.ledger.go_back(entries)
            if self.store is not None:
                self.store.rewind(point)
            raise


class _GivenUp(Exception):
    """Corrections cannot be made to hold, and one of them contradicts one that does."""

    def __init__(self, lost: Mapping[str, str]) -> None:
        super().__init__(f"given up: {', '.join(lost)}")
        self.lost = lost


class Calls:
    """Calls that run side by side, and corrections that run alone: one that waits goes before calls that come later."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._running: Counter[int] = Counter()  # calls of each thread, one inside the other
        self._waiting = 0
        self._alone: int | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside other calls, with no correction but one's own."""
        me = threading.get_ident()
        with self._free:
            if me not in self._running and self._alone != me:
                self._free.wait_for(lambda: self._alone is None and not self._waiting)
            self._running[me] += 1
        try:
            yield
        finally:
            with self._free:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._free.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Beside nothing. RepairError inside a call, or inside another correction: it would wait for itself."""
        me = threading.get_ident()
        with self._free:
            if me in self._running or self._alone == me:
                raise RepairError("a correction cannot be made from inside a call; make it when the call has ended")
            self._waiting += 1
            try:
                self._free.wait_for(lambda: self._alone is None and not self._running)
                self._alone = me
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._free:
                self._alone = None
                self._free.notify_all()


def described(entry: LedgerEntry) -> dict[str, Any]:
    """A correction in plain types."""
    edit = entry.edit
    said = {"id": edit.id, "prompt": edit.prompt, "target": edit.target, "subject": edit.subject}
    return said | {"status": str(entry.status), "live": entry.status not in FINAL, "reason": entry.reason}


def _holds(edit: Edit, q: str, subject: str) -> bool:
    texts = (edit.id, edit.prompt, edit.target)
    return (
        any(q.casefold() in text.casefold() for text in texts) and subject.casefold() in (edit.subject or "").casefold()
    )


def edit(
    base: str | Path | PreTrainedModel,
    edits: Sequence[Mapping[str, Any]] | Mapping[str, Any] = (),
    tokenizer: Any = None,
    editor: str = "keyed",
    run: str | Path | None = None,
    irrelevant: str | Path | None = None,
    **options: Any,
) -> LiveModel:
    """A model with corrections, which takes more of them while it is in use.

    Args:
        base: a base as `--model.base` takes it, the folder of a pack to go on from, or a loaded model, which is frozen
            and keeps its weights; then with its `tokenizer`.
        edits: the first corrections, see :meth:`LiveModel.add`.
        editor: the method by its registered name; a pack has its own.
        run: a folder in which corrections become durable, and from which they are there again; None keeps them in
            memory.
        irrelevant: a file of unrelated questions, as `--data.irrelevant` takes it; None takes the embedded ones.
        options: of the editor, as on the command line: `layer`, `precision`, ...

    Raises:
        RepairError: the base, an option or a correction cannot be used, or the folder holds something else.
    """
    if not isinstance(base, PreTrainedModel) and (Path(base).expanduser() / CONFIG_FILE).is_file():
        if options or editor != "keyed":
            raise ConfigError(f"'{base}' is a pack, which has its own editor and options; leave them out")
        live = resumed(Path(base).expanduser(), None, run)
    else:
        found = in_memory(base, tokenizer) if isinstance(base, PreTrainedModel) else str(base)
        live = begun(found, editor, options, run, irrelevant)
    if edits:
        live.add(edits)
    return live


def begun(
    base: Base | str,
    editor: str,
    options: Mapping[str, Any],
    run: str | Path | None = None,
    irrelevant: str | Path | None = None,
) -> LiveModel:
    """A live model around a plain base, or what its store holds."""
    kind = editor_class(editor)
    if unknown := [name for name in options if name not in kind.arguments() or name == "base"]:
        raise ConfigError(f"the editor {editor} has no option '{unknown[0]}'; known: {', '.join(kind.arguments())}")
    loaded = load_base(base, str(options.get("precision", "auto"))) if isinstance(base, str) else base
    made = make_editor(editor, {**options, "base": loaded.name})
    layer = None if isinstance(made.layer_option, str) else made.layer_option
    made.build(loaded, resolve_layer(loaded.model, layer))
    settings = {"base": loaded.sha256, "editor": editor, "options": dict(options)}
    texts = load_irrelevant(irrelevant or irrelevant_path())
    _prepare(made, texts[::2], texts[1::4], texts[3::4])
    return _opened(made, run, settings)


def resumed(pack: Path, base: Base | str | None, run: str | Path | None = None, precision: str = "auto") -> LiveModel:
    """A live model around a pack, with what was corrected since, where there is a `run`."""
    if run is not None and (Path(run) / "pack").resolve() == pack.resolve():
        raise ConfigError(f"'{run}' holds the pack '{pack}' itself; give the corrections another folder")
    editor = restore_editor(pack, base, precision)
    if editor.base_changed:
        words = f"pack '{pack}' has its edits in the base's own weights"
        raise ConfigError(f"{words}; `repair-lightning export --merged` makes a plain checkpoint of it")
    editor.guard_prompts = editor.held_out_prompts  # a pack keeps no others
    return _opened(editor, run, {"pack": _identity(pack)})


def _identity(pack: Path) -> str:
    return str(json.loads((pack / CONFIG_FILE).read_text(encoding="utf-8"))["config_sha256"])


def _prepare(editor: Editor, background: Sequence[str], held_out: Sequence[str], guard: Sequence[str]) -> None:
    if editor.learnt_beforehand or not editor.can_undo:
        raise ConfigError(
            f"the editor {editor.editor_name} cannot correct a model in use: it cannot take edits back"  # type: ignore[attr-defined]
        )
    editor.guard_prompts = guard
    log.info("setting the router by %s", counted(len(background) + len(held_out), "unrelated question"))
    editor.prepare(background, held_out)


def _opened(editor: Editor, run: str | Path | None, settings: Mapping[str, Any]) -> LiveModel:
    """A live model of a prepared editor, with what the folder of its store holds, where it has one."""
    editor.eval()
    store = None if run is None else Store(run, settings)
    if store is not None:
        store.load(editor)
    return LiveModel(editor, store)
