"""What every editing method is: a LightningModule that owns a frozen base and writes batches of edits.

A new method is one file: subclass `Editor`, implement :meth:`Editor.write`, say what it can do in the class attributes,
and the stream, the ledger, the scoring, the pack and the report work with it.
"""

from __future__ import annotations

import difflib
import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, get_type_hints

from repair_lightning.editors.adapt import Adapted
from repair_lightning.editors.windows import WindowModule
from repair_lightning.errors import ConfigError
from repair_lightning.types import Edit, EditBatch, EditReport

SAMPLED = 64
"""So many irrelevant prompts say how large the base's states are, where nothing else is asked of them."""
KEPT = 256
"""To so many irrelevant prompts the base's own answers are taken: with them, some thousands of tokens."""


class Editor(WindowModule):
    """A frozen base under correction: the contract of every method.

    A method must `write` and `forget`, and may `prepare` on irrelevant prompts, finish a window, take edits back
    (`undo`), limit its batches, keep a state of its own (`own_state`), and build another memory or router. See
    `HeldModel` for what every editor takes, and for the class attributes that say what a method can do.
    """

    background_prompts: tuple[str, ...] = ()
    held_out_prompts: tuple[str, ...] = ()
    adapted: Adapted | None = None
    """What was found for the options that were `auto`."""

    @classmethod
    def arguments(cls) -> list[str]:
        """The names of the constructor's arguments; `**common` stands for those that every editor has."""
        own = inspect.signature(cls).parameters
        named = [name for name, found in own.items() if found.kind is not inspect.Parameter.VAR_KEYWORD]
        common = list(inspect.signature(Editor).parameters) if len(named) < len(own) else []
        return list(dict.fromkeys([*common, *named]))

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types; an editor keeps each under its name or as `<name>_option`."""
        found: dict[str, Any] = {}
        for name in self.arguments():
            value = getattr(self, f"{name}_option" if hasattr(self, f"{name}_option") else name)
            found[name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        return json.loads(json.dumps(found))

    @property
    def reads_background(self) -> bool:
        """Whether writing needs the states of all irrelevant prompts."""
        return False

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Take in irrelevant prompts: `background` for losses and centring, `held_out` for thresholds."""
        self.background_prompts, self.held_out_prompts = tuple(background), tuple(held_out)
        reads = self.router.reads_states or self.reads_background
        self.background = self._shared_queries(background if reads else background[:SAMPLED])
        self.held_out = self._shared_queries(held_out) if self.router.reads_states else self._asked(held_out)
        if self.router.needs_space:
            self.router.space = self._relation_space()  # type: ignore[attr-defined]
        self.router.fit(self.background if self.router.reads_states else self._asked(background))

    def batch_limit(self, edits: Sequence[Edit]) -> int:
        """Most edits of this kind in one batch."""
        return len(edits) if self.batchable else 1

    @abstractmethod
    def write(self, batch: EditBatch) -> list[EditReport]:
        """Write one batch into the memory; one report per edit."""

    @abstractmethod
    def forget(self, ids: Iterable[str]) -> None:
        """Stop answering for edits, as far as the method can; the base answers their prompts."""

    def undo(self, ids: Sequence[str]) -> list[str]:
        """Take edits back, ledger included; returns the ids of other edits that had to be written anew for it."""
        if not self.can_undo:
            raise ConfigError(
                f"the editor {self.editor_name} cannot take edits back; a new run without the record can"  # type: ignore[attr-defined]
            )
        self.ledger.undo(ids, "taken back on request")
        self.forget(ids)
        self.finish_window()
        return []

    def finish_window(self) -> None:
        """Called when a window's last batch is written, before anything is evaluated."""

    def figures(self) -> dict[str, Any]:
        """What the method has to say of its result, in plain types, for `metrics.json`."""
        deviations = self.edited.weights.deviations()
        return {"deviation": {str(layer): value for layer, value in deviations.items()}} if deviations else {}


REGISTRY: dict[str, type[Editor]] = {}


def register(name: str) -> Callable[[type[Editor]], type[Editor]]:
    """Class decorator: make an editor known by name."""

    def add(editor: type[Editor]) -> type[Editor]:
        REGISTRY[name] = editor
        editor.editor_name = name  # type: ignore[attr-defined]
        return editor

    return add


def editor_class(name: str) -> type[Editor]:
    """An editor's class by name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in REGISTRY:
        close = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f" did you mean '{close[0]}'?" if close else ""
        own = "one of your own must be imported first (undo: --import MODULE)"
        raise ConfigError(f"unknown editor '{name}';{hint} known: {', '.join(REGISTRY)}; {own}")
    return REGISTRY[name]


def make_editor(name: str, options: Mapping[str, Any]) -> Editor:
    """An editor by name, from its :meth:`Editor.options`.

    Raises:
        ConfigError: unknown name.
        TypeError: an option that the editor does not know.
    """
    kind = editor_class(name)
    types = get_type_hints(kind.__init__)
    nested = {
        key: types[key](**{name: tuple(item) if isinstance(item, list) else item for name, item in value.items()})
        for key, value in options.items()
        if is_dataclass(types.get(key))
    }
    return kind(**{**options, **nested})
