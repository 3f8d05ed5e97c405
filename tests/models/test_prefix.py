"""The prefix cache is exact: bit for bit what the whole model computes, on every architecture and padding side.

"Exact" is against the same padded batch run whole. Sequences run alone meet other matrix shapes, whose sums may round
differently: there the bound is 1e-5.
"""

from __future__ import annotations

import pytest
import torch

from repair_lightning.models.architectures import ARCHITECTURES
from repair_lightning.models.prefix import SplitModel, pad_left

CASES = [(name, {}) for name in ARCHITECTURES]
CASES += [("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1})]
CASES += [("mistral", {"sliding_window": 3}), ("gemma2", {"sliding_window": 3}), ("gemma3_text", {"sliding_window": 3})]
NAMES = [name + ("-sliding" if more else "") for name, more in CASES]
LENGTHS = [9, 4, 1, 6]
each_case = pytest.mark.parametrize(("model_type", "more"), CASES, ids=NAMES)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.randint(3, 512, (n,)).tolist() for n in LENGTHS]
    ids, mask = pad_left(rows)
    if side == "right":
        width = ids.shape[1]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = mask.flip(1)
    return ids, mask


def whole(split: SplitModel, ids, mask, keep=0):
    """The model run from end to end, with what passes the layer's input, the value matrix's input and the head's."""
    seen = {}

    def note(name):
        def hook(_, args, kwargs):
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    head = split.model.get_output_embeddings()
    places = {"hidden": split.layers[split.index], "activations": split.value, "features": head}
    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in places.items()]
    with torch.no_grad():
        logits = split.model(**split.inputs(ids, mask), logits_to_keep=keep).logits
    for handle in handles:
        handle.remove()
    return logits, seen


@each_case
@pytest.mark.parametrize(("side", "layer"), [("left", 0), ("right", 1), ("left", 2)])
def test_capture_and_tail(tiny, model_type, more, side, layer):
    """What enters the head is equal bit for bit. The logits may differ in the last bit: `tail` hands the head a
    contiguous tensor where the model hands it a slice, and the product of a slice may be summed in another order.
    """
    split = SplitModel(tiny(model_type, **more), layer)
    ids, mask = padded(side)
    logits, seen = whole(split, ids, mask, 4)
    captured = split.capture(ids, mask)
    assert torch.equal(captured.hidden, seen["hidden"])
    assert torch.equal(captured.activations, seen["activations"].reshape(captured.activations.shape))
    with torch.no_grad(), split.skipping():
        found, features = split.tail(ids, mask, captured.hidden, 4)
    assert torch.equal(features, seen["features"])
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


@each_case
def test_the_last_logits_of_left_padded_rows_are_the_rows_own(tiny, model_type, more):
    """Padding must not leak: each row alone, without padding, gives the same logits up to rounding."""
    split = SplitModel(tiny(model_type, **more), 1)
    ids, mask = padded("left")
    captured = split.capture(ids, mask)
    with torch.no_grad(), split.skipping():
        logits, _ = split.tail(ids, mask, captured.hidden, 1)
    for row, n in enumerate(LENGTHS):
        with torch.no_grad():
            alone = split.model(ids[row : row + 1, -n:]).logits[:, -1]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)


NORMALISED_BEHIND = {
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
}  # the feed-forward network's output is normalised before it is added


@each_case
class TestTheLastLayer:
    """Where a value output is only added to what leaves the last layer, single positions can be read out alone."""

    def test_readout(self, tiny, model_type, more):
        """Against the logits of the whole model at the same positions; its rows are read one position at a time."""
        split = SplitModel(tiny(model_type, **more), 2)
        ids, mask = padded("left")
        logits, seen = whole(split, ids, mask, 1)
        hidden = split.capture(ids, mask).hidden
        with torch.no_grad():
            with split.skipping():
                leaving = split.layer_output(ids, mask, hidden)[:, -1]
            with split.skipping(whole=True):
                found, features = split.readout(leaving)
        torch.testing.assert_close(features, seen["features"][:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, logits[:, 0], rtol=1e-5, atol=1e-5)

    def test_where_it_adds_up_a_push_may_be_added_behind_the_layer(self, tiny, model_type, more):
        """The whole model with a hook on the value matrix against the read-out of the output plus the same push."""
        split = SplitModel(tiny(model_type, **more), 2)
        ids, mask = padded("left")
        hidden = split.capture(ids, mask).hidden
        push = torch.randn(32)
        with torch.no_grad():
            with split.skipping():
                leaving = split.layer_output(ids, mask, hidden)[:, -1]
            with split.skipping(whole=True):
                short, _ = split.readout(leaving + push)
            split.value.register_forward_hook(lambda _, __, output: output + push)
            long, _ = whole(split, ids, mask, 1)
        close = torch.allclose(short, long[:, 0], rtol=1e-4, atol=1e-4)
        assert split.adds_up() == close == (model_type not in NORMALISED_BEHIND)


def test_no_hook_stays(tiny):
    split = SplitModel(tiny("llama"), 1)
    ids, mask = padded("left")
    captured = split.capture(ids, mask)
    with split.skipping():
        split.tail(ids, mask, captured.hidden, 2)
        with pytest.raises(RuntimeError):
            split.tail(ids, mask, captured.hidden[..., :-1], 2)
    with pytest.raises(IndexError):
        split.capture(torch.full_like(ids, 10_000), mask)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in split.model.modules()]
    assert not any(hooks)
