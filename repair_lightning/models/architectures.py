"""Where each supported architecture keeps its decoder layers and the value matrix of its feed-forward network.

One row per `config.model_type`; a new architecture is one more row.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from repair_lightning.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Attribute paths: `layers` from the causal LM, `value` (down-projection) from one decoder layer.

    `published` maps a number of layers to the layer that the paper edited in the base of that size.
    """

    layers: str
    value: str
    published: Mapping[int, int] = field(default_factory=dict)

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The list of decoder layers of a causal LM."""
        return attrgetter(self.layers)(model)

    def value_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module that multiplies by W_v in one layer: `nn.Linear`, or the transposed `Conv1D` of GPT-2."""
        return attrgetter(self.value)(self.decoder_layers(model)[layer])


_LLAMA_LIKE = Architecture("model.layers", "mlp.down_proj")
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("model.layers", "mlp.down_proj", {32: 29}),
    **dict.fromkeys(("mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _LLAMA_LIKE),
    **dict.fromkeys(("olmo2", "olmo3", "smollm3", "granite"), _LLAMA_LIKE),
    "qwen2": Architecture("model.layers", "mlp.down_proj", {28: 23}),
    "gpt2": Architecture("transformer.h", "mlp.c_proj"),
    "gptj": Architecture("transformer.h", "mlp.fc_out"),
    "gpt_neox": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "opt": Architecture("model.decoder.layers", "fc2"),
}
_EXPERTS = "each token goes to other experts, so there is no one value matrix to edit"
_NOT: Mapping[str, str] = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"), _EXPERTS),
    **dict.fromkeys(("gemma3", "gemma3n", "mllama", "llama4"), "it reads images too; give a base for text alone"),
}
"""What is asked for and cannot be edited -> why."""


def architecture_of(model: nn.Module) -> Architecture:
    """The table's row for a loaded causal LM; ConfigError where it is not in the table."""
    model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]
    if model_type not in ARCHITECTURES:
        close = difflib.get_close_matches(model_type, ARCHITECTURES, n=1)
        hint = f" did you mean '{close[0]}'?" if close else ""
        hint = f" {_NOT[model_type]};" if model_type in _NOT else hint
        raise ConfigError(f"unsupported architecture '{model_type}':{hint} known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def resolve_layer(model: nn.Module, layer: int | None) -> int:
    """The index of the layer to edit; negative numbers count from the end.

    None takes the layer that the paper published for a base of this architecture and depth, else the last.
    """
    arch = architecture_of(model)
    depth = len(arch.decoder_layers(model))
    if layer is None:
        return arch.published.get(depth, depth - 1)
    if not -depth <= layer < depth:
        raise ConfigError(f"layer must be in [{-depth}, {depth - 1}] for a base of {depth} layers, got {layer}")
    return layer % depth


def value_shape(module: nn.Module) -> tuple[int, int]:
    """The (d_model, d_ffn) of a value module, whatever its storage order."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx  # type: ignore[return-value]
