"""The words of the system as frozen dataclasses: plain types inside, no tensors, no behaviour beyond conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

BASE = -1
"""The memory id of the base model: no shard answers."""
READS = -2
"""The memory id of the base model after it has read edits, about whose subject a text is asked for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question that an edit must leave alone. `answer` is the data set's, where it gives one."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Further:
    """A question that follows from an edit, for scoring alone; each of `answers` counts as right.

    `kind` is `multi_hop` or, where an edit has several cases, `multi_hop/CASE`; `persona`; `generation` (a text about
    the subject is asked for); or `portability/SORT`.
    """

    kind: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """One correction: `prompt` must be answered by `target`.

    `rephrases`, `locality` (unrelated prompts), `near` (neighbours: same relation, other subject), `aliases` (other
    spellings of the target), `old_answer` (what the target replaces) and `further` are for scoring alone; no writer,
    router or threshold may read them.
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    near: tuple[Probe, ...] = ()
    aliases: tuple[str, ...] = ()
    old_answer: str | None = None
    further: tuple[Further, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The edit as one record of the project's own `jsonl` format."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: [*map(_plain, value)] if isinstance(value, tuple) else value for name, value in named.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Edit:
        """The inverse of :meth:`as_dict`; expects a record that was already checked."""
        locality, near = (tuple(Probe(**probe) for probe in record.get(name) or ()) for name in ("locality", "near"))
        id, prompt, target = (record[name] for name in ("id", "prompt", "target"))
        further = tuple(
            Further(one["kind"], one["prompt"], tuple(one["answers"])) for one in record.get("further") or ()
        )
        rephrases, aliases = (tuple(record.get(name) or ()) for name in ("rephrases", "aliases"))
        subject, old_answer = record.get("subject"), record.get("old_answer")
        return cls(id, prompt, target, subject, rephrases, locality, near, aliases, old_answer, further)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else asdict(value)


@dataclass(frozen=True, slots=True)
class EditBatch:
    """A homogeneous group of edits that is written together into one shard; its first member is the teacher."""

    edits: tuple[Edit, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the members, teacher first."""
        return tuple(edit.id for edit in self.edits)


@dataclass(frozen=True, slots=True)
class EditReport:
    """What writing did to one edit: the shard, its last loss and distillation loss (nats), and the steps taken."""

    id: str
    shard: int
    loss: float
    kd: float
    steps: int
    residual: bool = False
    """True where the distillation loss stayed high: the edit waits for other company."""
    error: str | None = None
    """Why the write was rolled back, if it was."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which memory answers a prompt and why: `memory` is a shard id, which fires where `score > threshold`, `BASE` or
    `READS`."""

    memory: int
    score: float
    threshold: float
    nearest: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """A yes or no with the sentence that goes to the log; true where the answer is yes."""

    yes: bool
    reason: str

    def __bool__(self) -> bool:
        return self.yes
