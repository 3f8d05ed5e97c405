"""A model around a base of `transformers`, which passes for one of its models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Wrapper(nn.Module):
    """Has what its `base` has, unless it has its own: `config`, `dtype`, `can_generate`, ..."""

    base: Any

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # it is not there yet
                raise
            return getattr(self.base, name)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    @property
    def generation_config(self) -> Any:
        """The base's, which its `generate` reads; what is set here is set there."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base.generation_config = value
