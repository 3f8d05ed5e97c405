"""Steps that see an edit's rivals alone go where the whole vocabulary would send them, which alone says what is
written."""

from __future__ import annotations

import pytest
import torch

from repair_lightning.editors.inner_loop import TargetTail
from repair_lightning.editors.repair import Writing
from repair_lightning.editors.rivals import MOST, rivals_of
from repair_lightning.types import Edit

EVERY = 3
LARGE = {"vocabulary": 8192}
each_base = pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "phi3"])


@pytest.fixture
def written(prepared, folder_of, edits):
    """An editor over a base of many tokens, a write's rows, and what gives their logits."""

    def make(model_type: str = "llama", **more):
        editor = prepared(folder_of(model_type, **LARGE | more))
        rows = editor._rows(edits[:3])
        return editor, rows, TargetTail(editor.edited.split, rows, editor.tail)

    return make


@each_base
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(written, model_type):
    """Just after a look the loss is the same; what the other tokens' weights would add to the gradient is small."""
    _, rows, tail = written(model_type)
    if tail.kind != "positions":
        assert rivals_of(tail, EVERY) is None
        return
    pushed = torch.zeros_like(tail.out, requires_grad=True)
    found = {}
    with tail.cut():
        logits = tail(lambda _: pushed)[0]
        rivals = rivals_of(tail, EVERY)
        for name, losses in {
            "whole": rows.losses(logits),
            "rivals": rivals.losses(0, logits.detach(), lambda: tail(lambda _: pushed)[0]),
        }.items():
            (gradient,) = torch.autograd.grad(losses.sum(), pushed)
            found[name] = losses.detach(), gradient
        again = tail(lambda _: pushed)[0]
    torch.testing.assert_close(found["rivals"][0], found["whole"][0], rtol=1e-5, atol=1e-5)
    alike = torch.cosine_similarity(found["rivals"][1], found["whole"][1], dim=-1)
    assert float(alike.min()) > 0.95
    assert again.shape == (len(rows.labels), LARGE["vocabulary"])  # the head is back


def test_the_head_is_back_after_an_error(written):
    editor, _, tail = written()
    head = editor.base.model.get_output_embeddings()
    with tail.cut():
        logits = tail(lambda _: torch.zeros_like(tail.out))[0]
        with pytest.raises(ZeroDivisionError):
            rivals_of(tail, EVERY).losses(0, logits, lambda: 1 / 0)
    assert editor.base.model.get_output_embeddings() is head


def test_one_edit_that_is_not_finite_spoils_no_other(written):
    _, rows, tail = written()
    pushed = torch.zeros_like(tail.out)
    pushed[rows.edit == 1] = torch.nan
    with tail.cut():
        logits = tail(lambda _: pushed)[0]
        losses = rivals_of(tail, EVERY).losses(0, logits, lambda: tail(lambda _: pushed)[0])
    assert losses.isnan().tolist() == (rows.edit == 1).tolist()


def test_a_small_vocabulary_is_seen_whole(prepared, folder_of, edits):
    editor = prepared(folder_of("llama"))
    assert rivals_of(TargetTail(editor.edited.split, editor._rows(edits[:2]), editor.tail), EVERY) is None
    assert MOST < 512


def test_an_edit_whose_targets_would_leave_no_room_sees_the_whole_vocabulary(prepared, folder_of):
    editor = prepared(folder_of("llama", **LARGE | {"max_position_embeddings": 512}))
    words = " ".join(str(number) for number in range(100))
    rows = editor._rows([Edit("long", "Count", words)])
    assert int(rows.edit.bincount().max()) > MOST / 2
    assert rivals_of(TargetTail(editor.edited.split, rows, editor.tail), EVERY) is None


@pytest.mark.parametrize("options", [{"name": "keyed"}, {"name": "repair", "writing": Writing(optimizer="normalized")}])
def test_what_is_written_holds(prepared, folder_of, write, edits, options):
    editor = prepared(folder_of("llama", **LARGE), **options)
    reports = write(editor, edits[:4])
    for edit, report in zip(edits[:4], reports, strict=True):
        row = editor.encode(edit)
        with torch.no_grad(), editor.edited.forced(report.shard):
            said = editor.base.model(torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1].argmax(-1)
        assert tuple(said.tolist()) == row.target
