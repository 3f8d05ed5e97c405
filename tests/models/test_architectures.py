"""The table of architectures on real (tiny, random) models, and how the edited layer is found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from repair_lightning.errors import ConfigError
from repair_lightning.models.architectures import ARCHITECTURES, architecture_of, resolve_layer, value_shape

D_MODEL, D_FFN, DEPTH = 32, 64, 3


@pytest.mark.parametrize("model_type", ARCHITECTURES)
class TestEveryArchitecture:
    def test_the_value_matrix_is_the_down_projection(self, tiny, model_type):
        model = tiny(model_type)
        arch = architecture_of(model)
        assert len(arch.decoder_layers(model)) == DEPTH
        for layer in range(DEPTH):
            module = arch.value_module(model, layer)
            assert value_shape(module) == (D_MODEL, D_FFN)
            assert module(torch.zeros(2, D_FFN)).shape == (2, D_MODEL)

    def test_the_value_matrix_feeds_the_residual_stream(self, tiny, model_type):
        """Its output takes part in the logits of that layer's model, and its input is the FFN's inner activation."""
        model = tiny(model_type)
        seen = []
        module = architecture_of(model).value_module(model, 1)
        handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        ids = torch.randint(3, 512, (2, 5))
        with torch.no_grad():
            before = model(ids).logits
            handle.remove()
            module.weight.data.add_(0.1)
            assert not torch.equal(model(ids).logits, before)
        (activations, output), *more = seen
        assert not more
        assert activations.shape[-1] == D_FFN
        assert output.shape[-1] == D_MODEL


def test_gpt2_is_transposed(tiny):
    model = tiny("gpt2")
    module = architecture_of(model).value_module(model, 0)
    assert module.weight.shape == (D_FFN, D_MODEL)
    assert value_shape(module) == (D_MODEL, D_FFN)


def test_a_linear_layer():
    assert value_shape(nn.Linear(7, 3)) == (3, 7)


class TestUnknown:
    def test_a_close_name_is_proposed(self):
        model = SimpleNamespace(config=SimpleNamespace(model_type="lama"))
        close = r"unsupported architecture 'lama': did you mean 'llama'\? known: llama, "
        with pytest.raises(ConfigError, match=close):
            architecture_of(model)

    def test_no_configuration_at_all(self):
        with pytest.raises(ConfigError, match="unsupported architecture '': known: llama, "):
            architecture_of(nn.Linear(2, 2))


def of_depth(model_type: str, depth: int) -> nn.Module:
    """Just enough of a causal LM for its depth: a real module tree with empty layers."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type=model_type)
    place = model
    *path, last = ARCHITECTURES[model_type].layers.split(".")
    for name in path:
        setattr(place, name, nn.Module())
        place = getattr(place, name)
    setattr(place, last, nn.ModuleList(nn.Module() for _ in range(depth)))
    return model


class TestResolveLayer:
    @pytest.mark.parametrize(("model_type", "depth", "expected"), [("llama", 32, 29), ("qwen2", 28, 23)])
    def test_published(self, model_type, depth, expected):
        assert resolve_layer(of_depth(model_type, depth), None) == expected

    @pytest.mark.parametrize(("model_type", "depth"), [("llama", 12), ("mistral", 32), ("qwen2", 24), ("gpt2", 1)])
    def test_else_the_last(self, model_type, depth):
        assert resolve_layer(of_depth(model_type, depth), None) == depth - 1

    @pytest.mark.parametrize(("layer", "expected"), [(0, 0), (11, 11), (-1, 11), (-12, 0), (-3, 9)])
    def test_given(self, layer, expected):
        assert resolve_layer(of_depth("llama", 12), layer) == expected

    @pytest.mark.parametrize("layer", [12, -13, 100])
    def test_outside(self, layer):
        with pytest.raises(ConfigError, match=rf"layer must be in \[-12, 11\] for a base of 12 layers, got {layer}"):
            resolve_layer(of_depth("llama", 12), layer)
