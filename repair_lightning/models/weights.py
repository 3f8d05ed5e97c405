"""The base's own matrices where edits are written into them: changed in place, put back bit by bit.

A place is a layer's number, for its value matrix W_v, or the name of any linear module. Matrices are taken and given as
(D, F), outputs by inputs, in float32, whatever the base's storage order and type. What is added to a named module is of
low rank, `up @ down`, and is kept as its factors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from repair_lightning.models.architectures import architecture_of, value_shape

Place = int | str
"""A layer, for its W_v, or the name of a linear module."""


class BaseWeights:
    """The matrices of a causal LM, by place. The original of each is kept from its first change on."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._arch = architecture_of(model)
        self._originals: dict[Place, Tensor] = {}
        self._factors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether any matrix was changed and not put back."""
        return bool(self._originals)

    def parameter(self, place: Place) -> Tensor:
        """The matrix itself, in its storage order."""
        return self._module(place).weight  # type: ignore[return-value]

    def matrix(self, place: Place) -> Tensor:
        """A copy of the matrix as it is, (D, F) in float32."""
        return self._oriented(place, self.parameter(place).detach().float()).clone()

    def original(self, place: Place) -> Tensor:
        """A copy of the base's own matrix, (D, F) in float32."""
        kept = self._originals.get(place, self.parameter(place).detach())
        return self._oriented(place, kept.float()).clone()

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """What is added to a named module, `up` (D, r) and `down` (r, F); None where nothing is."""
        if name not in self._factors:
            return None
        up, down = self._factors[name].split(value_shape(self._module(name)))
        return up, down.T

    def put_factors(self, name: str, up: Tensor, down: Tensor) -> None:
        """Make a named module's matrix the base's own plus `up` (D, r) times `down` (r, F)."""
        self._take(name, torch.cat([up, down.T]))

    def put(self, layer: int, matrix: Tensor) -> None:
        """Make a matrix (D, F) the layer's."""
        self._take(layer, self._oriented(layer, matrix))

    def add(self, layer: int, delta: Tensor) -> None:
        """Add a delta (D, F) to a layer's matrix."""
        self.put(layer, self.matrix(layer) + delta.to(self.parameter(layer).device, torch.float32))

    def deviations(self) -> dict[Place, float]:
        """How far each changed matrix is from the base's own, `||W - W_0|| / ||W_0||` in the Frobenius norm."""
        return {
            place: float((self.parameter(place).float() - kept.float()).norm() / kept.float().norm())
            for place, kept in sorted(self._originals.items(), key=_in_order)
        }

    def fingerprint(self) -> str:
        """A hash of what the changed matrices hold; empty where none is."""
        state = {str(place): value for place, value in self.state().items()}
        return hashlib.sha256(save(state)).hexdigest() if state else ""

    def state(self) -> dict[Place, Tensor]:
        """What was changed, to go back to with :meth:`load`: copies of matrices in their storage order; of a named
        module the factors (D + F, r), `up` and below it `down` transposed."""
        return {
            place: self._factors[place] if isinstance(place, str) else self.parameter(place).detach().clone()
            for place, _ in sorted(self._originals.items(), key=_in_order)
        }

    def load(self, state: Mapping[Place, Tensor]) -> None:
        """Go back to a :meth:`state`, bit by bit, else to the base's own. ValueError where a shape is another."""
        for place, value in state.items():
            shape, found = value_shape(self._module(place)), tuple(self.parameter(place).shape)
            wanted = (sum(shape), value.shape[-1]) if isinstance(place, str) else found
            if tuple(value.shape) != wanted:
                what = f"what is added to {place}" if isinstance(place, str) else f"W_v of layer {place}"
                raise ValueError(f"{what} is {wanted}, got {tuple(value.shape)}")
        for place in self._originals.keys() - state.keys():
            self.parameter(place).data.copy_(self._originals.pop(place))
            self._factors.pop(str(place), None)
        for place, value in state.items():
            self._take(place, value)

    def restore(self) -> None:
        """Put the base's own matrices back, bit by bit."""
        self.load({})

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Inside, the base has its own matrices."""
        changed = self.state()
        self.restore()
        try:
            yield
        finally:
            self.load(changed)

    def _take(self, place: Place, value: Tensor) -> None:
        parameter = self.parameter(place)
        own = self._originals.setdefault(place, parameter.detach().clone())
        if isinstance(place, str):
            self._factors[place] = value.detach().to(parameter.device, torch.float32)
            up, down = self.factors(place)  # type: ignore[misc]
            value = own.float() + self._oriented(place, up @ down)
        parameter.data.copy_(value.to(parameter.device, parameter.dtype))

    def _module(self, place: Place) -> Any:
        if isinstance(place, str):
            return self._model.get_submodule(place)
        return self._arch.value_module(self._model, place)

    def _oriented(self, place: Place, matrix: Tensor) -> Tensor:
        """(D, F) from the storage order or into it: GPT-2's `Conv1D` stores (F, D)."""
        return matrix.T if hasattr(self._module(place), "nf") else matrix


def _in_order(item: tuple[Place, Tensor]) -> tuple[str, int]:
    """Names by their letters, layers by their numbers."""
    place = item[0]
    return (place, 0) if isinstance(place, str) else ("", place)
