"""What a base and its edited model answer to the same prompts, which memory answered, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repair_lightning.edits.records import read_rows
from repair_lightning.errors import ConfigError, FieldError, RecordError, RepairError, counted
from repair_lightning.models.edited import Prompts, prompts_of
from repair_lightning.packs.pack import PackedModel, changed_weights, open_pack, read_pack
from repair_lightning.scoring.continuations import longest_text
from repair_lightning.scoring.protocols import answers
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, Edit, Route

_PLAIN_TEXT = ("", ".txt", ".md")
_FIELDS = ("prompt", "question", "messages")


@dataclass(frozen=True, slots=True)
class Reply:
    """One prompt's two answers.

    Attributes:
        prompt: as it was asked, messages as their JSON.
        base: the base's answer, with its own weights.
        edited: the edited model's.
        route: which memory gave it, and why.
        nearest: the edit that the router weighed the prompt against, where it knows it.
        in_base: edits that a merge wrote into the base's own weights.
    """

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
        if self.route.memory != BASE:
            return f"shard {self.route.memory}"
        return f"base, with {counted(self.in_base, 'edit')} written into it" if self.in_base else "base"

    def lines(self) -> list[str]:
        """For a person."""
        asked = dialogue.shown(self.prompt)
        found = [asked, f"  base     {self.base}", f"  edited   {self.edited}", f"  memory   {self.memory}"]
        if self.nearest is not None:
            found += [f"  nearest  {self.nearest.id}: {dialogue.shown(self.nearest.prompt)} -> {self.nearest.target}"]
        return [*found, f"  reason   {self.route.reason}"]

    def as_dict(self) -> dict[str, Any]:
        """In plain types; messages as messages."""
        known = self.nearest
        nearest = {"id": known.id, "prompt": _plain(known.prompt), "target": known.target} if known else None
        route = {name: value for name, value in asdict(self.route).items() if name != "nearest"}
        return {"prompt": _plain(self.prompt), "base": self.base, "edited": self.edited, **route, "nearest": nearest}


def _plain(prompt: str) -> Any:
    return dialogue.parse(prompt) or prompt


class Pair:
    """A base and its edited model, which are one model with two sets of weights for the matrices that were changed.

    Args:
        model: of a pack, its base still with its own weights.
        changed: each W_v that writing or a merge has left, by layer; none where the base's own still hold.
        max_new_tokens: most tokens of an answer.

    Raises:
        ConfigError: no tokens at all.
    """

    def __init__(
        self, model: PackedModel, changed: Mapping[int, Tensor] | None = None, max_new_tokens: int = 32
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model, self.changed, self.max_new_tokens = model, dict(changed or {}), max_new_tokens

    @classmethod
    def open(cls, pack: str | Path, base: str | None = None, precision: str = "auto", max_new_tokens: int = 32) -> Pair:
        """From a pack and the base that it was made with; see :func:`repair_lightning.packs.pack.load_edited`.

        Raises:
            RepairError: the pack is damaged or belongs to another base.
        """
        config, tensors = read_pack(pack)
        return cls(open_pack(pack, config, tensors, base, precision), changed_weights(tensors), max_new_tokens)

    def ask(self, asked: Prompts) -> list[Reply]:
        """Both answers to each prompt. A prompt that no shard answers is asked once: its answers are the same bits.

        Args:
            asked: texts, messages, or several of either.

        Raises:
            RepairError: a prompt is longer than the base reads, or has no words.
        """
        prompts = prompts_of(asked)
        self._check(prompts)
        routes = self.model.route(prompts)
        memory = torch.tensor([route.memory for route in routes], dtype=torch.long)
        by_base = self._answers(prompts, torch.full_like(memory, BASE))
        again = [i for i, route in enumerate(routes) if route.memory != BASE or self.changed]
        with self._edited():
            said = dict(zip(again, self._answers([prompts[i] for i in again], memory[again]), strict=True))
        ledger, in_base = self.model.ledger, len(self.model.ledger.owned_by(BASE))
        return [
            Reply(prompt, by_base[i], said.get(i, by_base[i]), route, _edit(ledger, route.nearest), in_base)
            for i, (prompt, route) in enumerate(zip(prompts, routes, strict=True))
        ]

    def _check(self, prompts: Sequence[str]) -> None:
        if not all(dialogue.question_of(prompt).strip() for prompt in prompts):
            raise ConfigError("a prompt is empty; give a question")
        limit = longest_text(self.model)
        rows = [self.model.forms.ids(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) + self.max_new_tokens > limit:
                raise ConfigError(
                    f"prompt '{dialogue.shown(prompt)[:40]}...' has {counted(len(row), 'token')}, with "
                    f"{self.max_new_tokens} for the answer more than the {limit:,} that the base reads; shorten it"
                )

    def _answers(self, prompts: Sequence[str], memory: Tensor) -> list[str]:
        return answers(self.model, prompts, memory, self.max_new_tokens)

    @contextmanager
    def _edited(self) -> Iterator[None]:
        """Inside, the base has the weights that writing or a merge gave it."""
        self.model.weights.load(self.changed)
        try:
            yield
        finally:
            self.model.weights.restore()


def _edit(ledger: Any, id: str | None) -> Edit | None:
    return ledger.edit(id) if id is not None and id in ledger else None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, as they are written there: one a line of plain text, or records.

    A record is a text or messages, or has one of them as `prompt`, `question` or `messages`. A line of plain text loses
    the blanks around it, and may be messages as JSON.

    Raises:
        RecordError: for the first record without one.
        RepairError: the file cannot be read, or holds no prompt.
    """
    file = Path(path).expanduser()
    if file.is_file() and file.suffix.lower() in _PLAIN_TEXT:
        rows: list[Any] = _read_lines(file)
    else:
        rows = read_rows(path)
        rows = [rows] if dialogue.is_messages(rows) else rows  # a file that is one dialogue
    found = [_prompt(str(path), number, row) for number, row in enumerate(rows, 1)]
    if not found:
        raise RepairError(f"{path}: holds no prompts; write one a line")
    return found


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # other signs may stand inside a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise RepairError(f"{file}: cannot be read as UTF-8 text ({error}); give one prompt a line") from error
    return [line.strip() for line in lines if line.strip()]


def _prompt(source: str, number: int, row: Any) -> str:
    name = None
    if isinstance(row, Mapping):
        name = next((name for name in _FIELDS if row.get(name)), "prompt")
        row = row.get(name)
    try:
        if isinstance(row, FieldError):
            raise row
        return given_prompt(row, name)
    except FieldError as error:
        raise RecordError.at(source, number, error) from None


def given_prompt(value: Any, field: str | None = None) -> str:
    """What somebody gave as a prompt: a text as it is, or messages, also as the text of their JSON.

    Raises:
        FieldError: it is neither, or asks nothing.
    """
    messages = dialogue.given(value, field or "messages")
    if messages is not None:
        return dialogue.dump(messages)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(field or "prompt", "is missing or no text", 'write {"prompt": "..."}')
    return value


def difference_lines(replies: Sequence[Reply], to: Path | None = None) -> list[str]:
    """What a comparison says to a person: the prompts that are answered differently, and how many there are.

    Args:
        replies: to all prompts.
        to: the file that lists them already.
    """
    differing = [reply for reply in replies if reply.differs]
    listed = [] if to else [line for reply in differing for line in (*reply.lines(), "")]
    fired = sum(reply.route.memory != BASE for reply in replies)
    share = 100 * len(differing) / max(len(replies), 1)
    words = (
        f"{len(differing)} of {counted(len(replies), 'prompt')} answered differently ({share:.1f} %); "
        f"a shard answered {fired}, the base {len(replies) - fired}"
    )
    return [*listed, f"{words}; {to}" if to else words]
