"""What a checkpoint holds once per edit, made when it is looked at: a run's journal asks for the new rows alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, KeysView, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Rows(Mapping[int, Mapping[str, Tensor]], Generic[T]):
    """Rows by number.

    Args:
        found: by number, what each row is made from; not changed while the rows are in use.
        row: makes one.
    """

    def __init__(self, found: dict[int, T], row: Callable[[T], Mapping[str, Tensor]]) -> None:
        self._found, self._row = found, row

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:
        return self._row(self._found[number])

    def __iter__(self) -> Iterator[int]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def keys(self) -> KeysView[int]:
        """The numbers."""
        return self._found.keys()

    def __reduce__(self) -> tuple[Any, ...]:
        """A checkpoint of a trainer without a journal holds them all, in a type that `weights_only` reads."""
        return OrderedDict, ([(number, dict(row)) for number, row in self.items()],)
