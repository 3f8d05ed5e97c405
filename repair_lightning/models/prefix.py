"""The prefix cache: layers below the edited one never change, so they run once per text.

Legend for shapes: B sequences, T tokens, D = d_model, F = d_ffn, V vocabulary.

`capture` runs the model up to the edited layer and stops there; `tail` runs the edited layer and those above it from a
stored hidden state. The model's own code still builds masks, position embeddings, the final norm and the head, so both
are exact on every architecture of the table: the lower layers are swapped for pass-through modules in the same slots,
and a pre-hook feeds the stored state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from repair_lightning.models.architectures import architecture_of


class _Stop(Exception):
    """Ends a forward pass."""


class _PassThrough(nn.Module):
    """Stands in a lower layer's slot and hands its input on, in the form that the architecture's loop expects."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


@dataclass(frozen=True, slots=True)
class Capture:
    """What one prefix pass yields: `hidden` (B, T, D) where it enters the layer, `activations` (B, T, F) = A(x)."""

    hidden: Tensor
    activations: Tensor


class SplitModel:
    """A causal LM cut at the input of the edited layer: `capture` runs what is below, `tail` the rest."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model, self.index = model, layer
        self.arch = architecture_of(model)
        self.layers = self.arch.decoder_layers(model)
        self.value = self.arch.value_module(model, layer)
        self._as_tuple = model.config.model_type == "gptj"  # type: ignore[union-attr]

    def inputs(self, ids: Tensor, mask: Tensor, past: Any = None) -> dict[str, Any]:
        """Keyword arguments of a forward pass over rows (B, T) padded on either side, without a key-value cache, or
        behind one, `past`: then the mask (B, S + T) is of its tokens too."""
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]  # real tokens alone are counted
        cached = {"use_cache": False} if past is None else {"past_key_values": past, "use_cache": True}
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cached}

    def capture(self, ids: Tensor, mask: Tensor, past: Any = None) -> Capture:
        """Run layers 0..L over rows (B, T), behind a key-value cache where there is one, see :meth:`inputs`."""
        entering, activations, _ = self.through(ids, mask, None, self.index, past)
        return Capture(entering[0], activations[0])

    @contextmanager
    def skipping(self, whole: bool = False) -> Iterator[None]:
        """Inside, the layers below the edited one (or all) are pass-throughs; they are put back however it ends."""
        originals = list(self.layers if whole else self.layers[: self.index])
        for i in range(len(originals)):
            self.layers[i] = _PassThrough(self._as_tuple)
        try:
            yield
        finally:
            for i, original in enumerate(originals):
                self.layers[i] = original

    def tail(
        self, ids: Tensor, mask: Tensor, hidden: Tensor | None, keep: int, past: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Run layers L.. from `hidden` (B, T, D), inside :meth:`skipping`; for None the whole model, outside of it.

        Returns logits (B, keep, V) of the last positions, and the features (B, keep, D) that enter the head.
        """
        return self._run(self.index, hidden, self.inputs(ids, mask, past), keep)

    def readout(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, V) and head inputs (M, D) of states (M, D) that leave the last layer; inside :meth:`skipping` the
        whole."""
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        inputs = self.inputs(ids, torch.ones_like(ids))
        # No layer reads the mask; with four dimensions it is taken as it is, unread: a look waits for the device.
        inputs["attention_mask"] = torch.ones_like(ids)[:, None, None]
        logits, features = self._run(0, hidden[:, None], inputs, 1)
        return logits[:, 0], features[:, 0]

    def layer_output(self, ids: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        """What leaves the edited layer, (B, T, D), from what enters it."""
        return self.through(ids, mask, hidden, self.index)[2]

    @torch.no_grad()
    def through(
        self, ids: Tensor, mask: Tensor, hidden: Tensor | None, upto: int, past: Any = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Run the layers from the edited one to `upto` from what enters the first, (B, T, D), or for None from the ids.

        Returns what enters each, (B, T, D); what enters its value matrix, (B, T, F); what leaves the last one.
        """
        entering: list[Tensor] = []
        activations: list[Tensor] = []
        left: list[Tensor] = []

        def at_layer(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            entering.append(args[0] if args else kwargs["hidden_states"])
            left[:] = [output[0] if isinstance(output, tuple) else output]
            if layer is self.layers[upto]:
                raise _Stop

        def at_value(_: nn.Module, args: tuple) -> None:
            activations.append(args[0].reshape(*ids.shape, -1))

        lower = nullcontext() if hidden is None else self.skipping()
        with suppress(_Stop), lower, ExitStack() as hooks:
            for i in range(self.index, upto + 1):
                hooks.enter_context(self.layers[i].register_forward_hook(at_layer, with_kwargs=True))
                hooks.enter_context(self.arch.value_module(self.model, i).register_forward_pre_hook(at_value))
            self.tail(ids, mask, hidden, 1, past)
        return entering, activations, left[0]

    @torch.no_grad()
    def adds_up(self) -> bool:
        """Whether the edited layer is the last one and its value matrix's output is simply added to what leaves it.

        Then a shard's effect on the logits needs only the positions that are read. Measured: some architectures
        normalise after the feed-forward network.
        """
        if self.index != len(self.layers) - 1:
            return False
        ids = torch.arange(4, device=next(self.model.parameters()).device)[None]
        mask = torch.ones_like(ids)
        hidden = self.capture(ids, mask).hidden
        push = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device) * float(hidden.abs().max())
        push = push.to(hidden.dtype)
        before = self.layer_output(ids, mask, hidden)
        with self.value.register_forward_hook(lambda _, __, output: output + push):
            after = self.layer_output(ids, mask, hidden)
        tolerance = 8 * torch.finfo(hidden.dtype).eps * (before.abs() + push.abs().max())
        return bool(((after.float() - before.float() - push.float()).abs() <= tolerance.float()).all())

    def _run(self, at: int, hidden: Tensor | None, inputs: dict[str, Any], keep: int) -> tuple[Tensor, Tensor]:
        """Logits and head inputs of a pass in which layer `at` is fed `hidden`, or for None what comes from below."""
        features: list[Tensor] = []

        def at_head(_: nn.Module, args: tuple) -> tuple:
            features.append(args[0].contiguous())  # a slice of the sequence would cost the head a batched product
            return (features[0], *args[1:])

        def feed(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if hidden is None:
                return None
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        fed = self.layers[at].register_forward_pre_hook(feed, with_kwargs=True)
        with fed, head.register_forward_pre_hook(at_head):
            logits = self.model(**inputs, logits_to_keep=keep).logits
        return logits, features[0]


def pad_left(sequences: Sequence[Sequence[int]], fill: int = 0, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the left with `fill`, and their attention mask (B, T)."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[fill] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def stack_left(rows: Sequence[Tensor]) -> Tensor:
    """Rows (T_i, ...) padded on the left with zeros to (B, max T, ...)."""
    return pad_sequence(list(rows), batch_first=True, padding_side="left")
