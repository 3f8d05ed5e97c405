"""The base's own value matrices where edits are written into them: changed in place, put back bit by bit.

Matrices are taken and given as (D, F) in float32, whatever the base's storage order and type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from repair_lightning.models.architectures import architecture_of


class BaseWeights:
    """The value matrices W_v of a causal LM, by layer. The original of each is kept from its first change on."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._arch = architecture_of(model)
        self._originals: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether any matrix was changed and not put back."""
        return bool(self._originals)

    def parameter(self, layer: int) -> Tensor:
        """The matrix itself, in its storage order."""
        return self._arch.value_module(self._model, layer).weight  # type: ignore[return-value]

    def matrix(self, layer: int) -> Tensor:
        """A copy of the matrix as it is, (D, F) in float32."""
        return self._oriented(layer, self.parameter(layer).detach().float()).clone()

    def original(self, layer: int) -> Tensor:
        """A copy of the base's own matrix, (D, F) in float32."""
        kept = self._originals.get(layer, self.parameter(layer).detach())
        return self._oriented(layer, kept.float()).clone()

    def put(self, layer: int, matrix: Tensor) -> None:
        """Make a matrix (D, F) the layer's."""
        self._take(layer, self._oriented(layer, matrix))

    def add(self, layer: int, delta: Tensor) -> None:
        """Add a delta (D, F) to a layer's matrix."""
        self.put(layer, self.matrix(layer) + delta.to(self.parameter(layer).device, torch.float32))

    def deviations(self) -> dict[int, float]:
        """How far each changed matrix is from the base's own, `||W - W_0|| / ||W_0||` in the Frobenius norm."""
        return {
            layer: float((self.parameter(layer).float() - kept.float()).norm() / kept.float().norm())
            for layer, kept in sorted(self._originals.items())
        }

    def fingerprint(self) -> str:
        """A hash of what the changed matrices hold; empty where none is."""
        state = {str(layer): value for layer, value in self.state().items()}
        return hashlib.sha256(save(state)).hexdigest() if state else ""

    def state(self) -> dict[int, Tensor]:
        """Copies of the changed matrices in their storage order, to go back to with :meth:`load`."""
        return {layer: self.parameter(layer).detach().clone() for layer in sorted(self._originals)}

    def load(self, state: Mapping[int, Tensor]) -> None:
        """Go back to a :meth:`state`, bit by bit, else to the base's own. ValueError where a shape is another."""
        for layer, value in state.items():
            found = self.parameter(layer).shape
            if value.shape != found:
                raise ValueError(f"W_v of layer {layer} is {tuple(found)}, got {tuple(value.shape)}")
        for layer in self._originals.keys() - state.keys():
            self.parameter(layer).data.copy_(self._originals.pop(layer))
        for layer, value in state.items():
            self._take(layer, value)

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

    def _take(self, layer: int, value: Tensor) -> None:
        parameter = self.parameter(layer)
        self._originals.setdefault(layer, parameter.detach().clone())
        parameter.data.copy_(value.to(parameter.device, parameter.dtype))

    def _oriented(self, layer: int, matrix: Tensor) -> Tensor:
        """(D, F) from the storage order or into it: GPT-2's `Conv1D` stores (F, D)."""
        return matrix.T if hasattr(self._arch.value_module(self._model, layer), "nf") else matrix
