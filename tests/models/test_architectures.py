"""The table of architectures on real (tiny, random) models, and how the edited layer is found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from repair_lightning.errors import ConfigError
from repair_lightning.models.architectures import ARCHITECTURES, architecture_of, resolve_layer, value_shape

D_MODEL, D_FFN, DEPTH = 32, 64, 3
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_value_matrix_is_the_down_projection(tiny, model_type):
    model = tiny(model_type)
    arch = architecture_of(model)
    assert len(arch.decoder_layers(model)) == DEPTH
    for layer in range(DEPTH):
        module = arch.value_module(model, layer)
        assert value_shape(module) == (D_MODEL, D_FFN)
        assert module(torch.zeros(2, D_FFN)).shape == (2, D_MODEL)


def test_a_close_name_is_proposed():
    model = SimpleNamespace(config=SimpleNamespace(model_type="lama"))
    with pytest.raises(ConfigError, match=r"unsupported architecture 'lama': did you mean 'llama'\? known: llama, "):
        architecture_of(model)


@pytest.mark.parametrize(
    ("model_type", "options", "why"),
    [
        ("mixtral", {"num_local_experts": 4}, "each token goes to other experts"),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16}, "each token goes to other experts"),
        ("gemma3", {}, "it reads images too; give a base for text alone"),
    ],
)
def test_what_cannot_be_edited_says_why_and_what_can(tiny, model_type, options, why):
    if model_type == "gemma3":
        config = AutoConfig.for_model("gemma3", text_config=tiny("gemma3_text").config.to_dict(), vision_config=VISION)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny(model_type, **options)
    with pytest.raises(ConfigError, match=f"unsupported architecture '{model_type}': {why}.* known: llama, mistral, "):
        architecture_of(model)


def of_depth(model_type: str, depth: int) -> nn.Module:
    """Just enough of a causal LM for its depth: a real module tree with empty layers."""
    place = nn.ModuleList(nn.Module() for _ in range(depth))
    for name in reversed(ARCHITECTURES[model_type].layers.split(".")):
        inner, place = place, nn.Module()
        setattr(place, name, inner)
    place.config = SimpleNamespace(model_type=model_type)
    return place


@pytest.mark.parametrize(
    ("model_type", "depth", "layer", "expected"),
    [
        pytest.param("llama", 32, None, 29, id="published"),
        pytest.param("qwen2", 28, None, 23, id="published too"),
        pytest.param("llama", 12, None, 11, id="else the last"),
        pytest.param("gpt2", 1, None, 0, id="the only one"),
        pytest.param("llama", 12, 0, 0, id="given"),
        pytest.param("llama", 12, -3, 9, id="from the end"),
    ],
)
def test_which_layer(model_type, depth, layer, expected):
    assert resolve_layer(of_depth(model_type, depth), layer) == expected


@pytest.mark.parametrize("layer", [12, -13])
def test_a_layer_that_there_is_not(layer):
    with pytest.raises(ConfigError, match=rf"layer must be in \[-12, 11\] for a base of 12 layers, got {layer}"):
        resolve_layer(of_depth("llama", 12), layer)
