"""What holds fine-tuning back: the norm ball, and the elastic penalty."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.editors import make_editor
from repair_lightning.editors.ft import into_ball, rounded_into_ball
from repair_lightning.errors import ConfigError


class TestFT:
    def test_no_coordinate_leaves_the_ball(self, editor_of, write, edits):
        """Over several windows: it is around the base's own matrix, and some coordinates stand at its edge."""
        editor = editor_of("llama", "ft", lr=0.01, norm_constraint=0.02)
        original = editor.edited.weights.matrix(editor.layer)
        for start in (0, 4):
            write(editor, edits[start : start + 4])
            moved = (editor.edited.weights.matrix(editor.layer) - original).abs()
            assert float(moved.max()) == pytest.approx(0.02, abs=1e-6)

    def test_the_end_is_earlier_where_the_loss_is_low(self, editor_of, write, edits):
        free = {"lr": 0.02, "steps": 60, "norm_constraint": None}
        (early,) = write(editor_of("llama", "ft", stop_loss=0.5, **free), edits[:1])
        (late,) = write(editor_of("llama", "ft", stop_loss=None, **free), edits[:1])
        assert early.steps < late.steps == 60
        assert late.loss < early.loss < 0.5

    def test_the_nearest_point_of_the_ball(self):
        centre = torch.tensor([1.0, 1.0, 1.0])
        assert torch.allclose(into_ball(torch.tensor([0.0, 1.1, 5.0]), centre, 0.5), torch.tensor([0.5, 1.1, 1.5]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_rounding_does_not_leave_it(self, dtype):
        """Plain rounding does, in either direction: near 1 the numbers of bfloat16 lie 2^-8 or 2^-7 apart."""
        centre = (torch.randn(4096) * 0.5).to(dtype)
        weight = into_ball(centre.float() + torch.randn(4096), centre.float(), 0.01)
        found = rounded_into_ball(weight, centre, 0.01)
        assert found.dtype == dtype
        assert float((found.double() - centre.double()).abs().max()) <= 0.01
        if dtype == torch.bfloat16:
            assert float((weight.to(dtype).double() - centre.double()).abs().max()) > 0.01

    def test_a_base_in_bfloat16_stays_in_the_ball(self, folder_of, irrelevant, write, edits):
        editor = make_editor("ft", {"base": str(folder_of("llama")), "precision": "bfloat16", "norm_constraint": 0.003})
        editor.load()
        editor.prepare(irrelevant[:8], irrelevant[8:])
        original = editor.edited.weights.matrix(editor.layer)
        write(editor, edits[:4])
        moved = (editor.edited.weights.matrix(editor.layer) - original).abs()
        assert 0 < float(moved.max()) <= 0.003

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"lr": 0.0}, "lr must be positive, got 0.0"),
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"norm_constraint": -1.0}, "norm_constraint must be positive, or null for none, got -1.0"),
        ],
    )
    def test_bad_options(self, options, words):
        with pytest.raises(ConfigError, match=words):
            make_editor("ft", options)
