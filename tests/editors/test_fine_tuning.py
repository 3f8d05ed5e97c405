"""What holds fine-tuning back: the norm ball, and the elastic penalty."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.editors.ft import rounded_into_ball
from repair_lightning.functional import target_cross_entropy
from repair_lightning.models.architectures import architecture_of


class TestFT:
    def test_no_coordinate_leaves_the_ball(self, editor_of, write, edits):
        """Over several windows: it is around the base's own matrix, and some coordinates stand at its edge."""
        editor = editor_of("llama", "ft", lr=0.01, norm_constraint=0.02)
        original = editor.edited.weights.matrix(editor.layer)
        for start in (0, 4):
            write(editor, edits[start : start + 4])
            moved = (editor.edited.weights.matrix(editor.layer) - original).abs()
            assert float(moved.max()) == pytest.approx(0.02, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_rounding_does_not_leave_it(self, dtype):
        """Plain rounding does, in either direction: near 1 the numbers of bfloat16 lie 2^-8 or 2^-7 apart."""
        centre = (torch.randn(4096) * 0.5).to(dtype)
        weight = (centre.float() + torch.randn(4096)).clamp(centre.float() - 0.01, centre.float() + 0.01)
        found = rounded_into_ball(weight, centre, 0.01)
        assert found.dtype == dtype
        assert float((found.double() - centre.double()).abs().max()) <= 0.01
        if dtype == torch.bfloat16:
            assert float((weight.to(dtype).double() - centre.double()).abs().max()) > 0.01


class TestFTEWC:
    @pytest.mark.parametrize(("model_type", "layer"), [("llama", 1), ("llama", 2), ("gpt2", 1)])
    def test_the_fisher_diagonal(self, editor_of, edits, model_type, layer):
        """Against the gradient of each text alone, by autograd through the whole model."""
        editor = editor_of(model_type, "ft_ewc", layer=layer)
        texts = [editor.encode(edit) for edit in edits[:3]]
        weight = architecture_of(editor.base.model).value_module(editor.base.model, layer).weight
        wanted = torch.zeros_like(editor.background_fisher)
        weight.requires_grad_()
        for text in texts:
            with torch.enable_grad(), editor.edited.forced(None):
                logits = editor.base.model(input_ids=torch.tensor([text.ids])).logits[0, len(text.prompt) - 1 : -1]
                loss = target_cross_entropy(logits[:, None], torch.tensor(text.target)[:, None]).sum()
            (gradient,) = torch.autograd.grad(loss, weight)
            wanted += (gradient.T if model_type == "gpt2" else gradient).square() / len(texts)
        weight.requires_grad_(False)
        torch.testing.assert_close(editor.fisher_of(texts), wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))

    def test_what_is_held_moves_less(self, editor_of, write, edits):
        """Weighted by F; the plain distance may well be longer."""
        moved = []
        for weight in (0.0, 100.0):
            editor = editor_of("llama", "ft_ewc", weight=weight, steps=30, stop_margin=None)
            write(editor, edits[:3])
            shift = editor.edited.weights.matrix(editor.layer) - editor.edited.weights.original(editor.layer)
            moved.append(float((editor.background_fisher * shift.square()).sum()))
        assert moved[1] < 0.5 * moved[0]

    def test_windows_that_are_over_stay_too(self, editor_of, write, edits):
        editor = editor_of("llama", "ft_ewc", accumulate=True)
        write(editor, edits[:2])
        matrix = editor.edited.weights.matrix(editor.layer)
        assert torch.equal(editor.learnt["anchor"], matrix)
        own = editor.fisher_of([editor.encode(edit) for edit in edits[:2]])
        torch.testing.assert_close(editor.fisher, editor.background_fisher + own)
        assert editor_of("llama", "ft_ewc").own_state() == {}
