"""What a base and its edited model answer to the same prompts, which memory answered, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from repair_lightning.edits.records import read_rows
from repair_lightning.errors import ConfigError, FieldError, RecordError, RepairError, counted
from repair_lightning.models.edited import Prompts, prompts_of
from repair_lightning.packs.pack import Pack
from repair_lightning.scoring.protocols import answers
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, READS, Edit, Route


@dataclass(frozen=True, slots=True)
class Reply:
    """One prompt, messages as their JSON, and its two answers: which memory gave the edited model's, and why; the edit
    that the router weighed the prompt against; how many edits a merge wrote into the base's own weights."""

    prompt: str
    base: str
    edited: str
    route: Route
    nearest: Edit | None = None
    in_base: int = 0

    @property
    def differs(self) -> bool:
        """Whether the edited model says anything else than the base."""
        return self.base != self.edited

    @property
    def memory(self) -> str:
        """Who answered, in words."""
        base = f"base, with {counted(self.in_base, 'edit')} written into it" if self.in_base else "base"
        if self.route.memory == READS:
            return f"{base}, after it has read edits"
        return base if self.route.memory == BASE else f"shard {self.route.memory}"

    def lines(self) -> list[str]:
        """For a person."""
        asked = dialogue.shown(self.prompt)
        found = [asked, f"  base     {self.base}", f"  edited   {self.edited}", f"  memory   {self.memory}"]
        if self.nearest is not None:
            found += [f"  nearest  {self.nearest.id}: {dialogue.shown(self.nearest.prompt)} -> {self.nearest.target}"]
        return [*found, f"  reason   {self.route.reason}"]

    def as_dict(self) -> dict[str, Any]:
        """In plain types; messages as messages."""
        known, route = self.nearest, asdict(self.route)
        nearest = {"id": known.id, "prompt": _plain(known.prompt), "target": known.target} if known else None
        said = {"prompt": _plain(self.prompt), "base": self.base, "edited": self.edited}
        return said | route | {"nearest": nearest}


def _plain(prompt: str) -> Any:
    return dialogue.parse(prompt) or prompt


class Pair:
    """A base and its edited model, which are one model with two sets of weights for the matrices that were changed.

    `pack`, `base` and `precision` are those of `load_edited`; an answer has at most `max_new_tokens`.
    """

    def __init__(
        self, pack: str | Path, base: str | None = None, precision: str = "auto", max_new_tokens: int = 32
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        content = Pack.read(pack)
        self.model, self.changed = content.open(base, precision), content.weights

    def ask(self, asked: Prompts) -> list[Reply]:
        """Both answers to each prompt: texts, messages, or several of either. Raises `RepairError` where one is longer
        than the base reads, or has no words. What no shard answers is asked once: the answers are the same bits."""
        model, prompts = self.model, prompts_of(asked)
        for prompt in prompts:
            if not dialogue.question_of(prompt).strip():
                raise ConfigError("a prompt is empty; give a question")
            length, limit = len(model.forms.ids(prompt)), model.longest
            if length + self.max_new_tokens > limit:
                raise ConfigError(
                    f"prompt '{dialogue.shown(prompt)[:40]}...' has {counted(length, 'token')}, with "
                    f"{self.max_new_tokens} for the answer more than the {limit:,} that the base reads; shorten it"
                )
        routes = model.route(prompts)
        memory = torch.tensor([route.memory for route in routes], dtype=torch.long)
        by_base = answers(model, prompts, torch.full_like(memory, BASE), self.max_new_tokens)
        again = [i for i, route in enumerate(routes) if route.memory != BASE or self.changed]
        model.weights.load(self.changed)
        try:
            said = answers(model, [prompts[i] for i in again], memory[again], self.max_new_tokens)
        finally:
            model.weights.restore()
        changed = dict(zip(again, said, strict=True))
        ledger, in_base, found = model.ledger, len(model.ledger.owned_by(BASE)), []
        for i, (prompt, answer, route) in enumerate(zip(prompts, by_base, routes, strict=True)):
            known = route.nearest is not None and route.nearest in ledger
            nearest = ledger.edit(str(route.nearest)) if known else None
            found.append(Reply(prompt, answer, changed.get(i, answer), route, nearest, in_base))
        return found


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: one a line of plain text, or records, each a text or messages, or with one of them as
    `prompt`, `question` or `messages`. Raises `RepairError` where it cannot be read, or has no prompt."""
    file = Path(path).expanduser()
    if file.is_file() and file.suffix.lower() in ("", ".txt", ".md"):
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # other signs may stand inside a prompt
        except (OSError, UnicodeDecodeError) as error:
            raise RepairError(f"{file}: cannot be read as UTF-8 text ({error}); give one prompt a line") from error
        rows: list[Any] = [line.strip() for line in lines if line.strip()]
    else:
        rows = read_rows(path)
        rows = [rows] if dialogue.is_messages(rows) else rows  # a file that is one dialogue
    found = []
    for number, row in enumerate(rows, 1):
        name = None
        if isinstance(row, Mapping):
            name = next((name for name in ("prompt", "question", "messages") if row.get(name)), "prompt")
            row = row.get(name)
        try:
            if isinstance(row, FieldError):
                raise row
            found.append(given_prompt(row, name))
        except FieldError as error:
            raise RecordError.at(str(path), number, error) from None
    if not found:
        raise RepairError(f"{path}: holds no prompts; write one a line")
    return found


def given_prompt(value: Any, field: str | None = None) -> str:
    """What somebody gave as a prompt: a text as it is, or messages, also as the text of their JSON. Raises
    `FieldError` where it is neither, or asks nothing."""
    messages = dialogue.given(value, field or "messages")
    if messages is not None:
        return dialogue.dump(messages)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(field or "prompt", "is missing or no text", 'write {"prompt": "..."}')
    return value


def difference_lines(replies: Sequence[Reply], to: Path | None = None) -> list[str]:
    """What a comparison says to a person: the prompts that are answered differently, unless the file `to` lists them
    already, and how many there are."""
    differing = [reply for reply in replies if reply.differs]
    listed = [] if to else [line for reply in differing for line in (*reply.lines(), "")]
    fired = sum(reply.route.memory >= 0 for reply in replies)
    share = 100 * len(differing) / max(len(replies), 1)
    words = f"{len(differing)} of {counted(len(replies), 'prompt')} answered differently ({share:.1f} %)"
    words += f"; a shard answered {fired}, the base {len(replies) - fired}"
    return [*listed, f"{words}; {to}" if to else words]
