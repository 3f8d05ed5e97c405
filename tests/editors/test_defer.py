"""DEFER: what is trained on, and who is handed over."""

from __future__ import annotations

import torch

from repair_lightning.memory.routers.gate import fitted_gate

FAST = {"lr": 0.02, "steps": 20, "stop_margin": None}


def test_the_gate_is_the_minimum():
    """Of the mean loss of both sides, with the ridge: the gradient there is zero."""
    inside, outside = torch.randn(6, 3) + 1, torch.randn(20, 3)
    gate = fitted_gate(inside, outside, 0.1).requires_grad_()
    right = torch.nn.functional.logsigmoid(inside @ gate[:3] + gate[3]).mean()
    wrong = torch.nn.functional.logsigmoid(-(outside @ gate[:3] + gate[3])).mean()
    loss = -(right + wrong) / 2 + 0.05 * gate[:3].square().sum()
    (gradient,) = torch.autograd.grad(loss, gate)
    assert float(gradient.abs().max()) < 1e-4


def test_earlier_edits_and_irrelevant_prompts_are_trained_beside_a_batch(editor_of, write, edits):
    """Three earlier ones of four, and two irrelevant prompts with what the base says to them."""
    editor = editor_of("llama", "defer", replay=3, irrelevant=2, **FAST)
    write(editor, edits[:4], 4)
    rows = editor.rows_beside(edits[4:6], 0)
    assert (len(rows), rows.members) == (7, 2)
    said = [row.ids for row in editor.said]
    texts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(rows.ids, rows.mask, strict=True)]
    assert texts[:2] == [editor.encode(edit).ids for edit in edits[4:6]]
    assert set(texts[2:5]) < {editor.encode(edit).ids for edit in edits[:4]}
    assert set(texts[5:]) < set(said)
    assert len(said) == len(editor.background_prompts)
