"""MEND: the gradient's factors, the hypernetwork over them, its training, and what may be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_runs import REPOSITORY, world_stream, write_edits

from repair_lightning.editors import make_editor
from repair_lightning.editors.inner_loop import TargetRows
from repair_lightning.editors.mend import apart
from repair_lightning.edits.records import load_irrelevant, load_records
from repair_lightning.errors import ConfigError
from repair_lightning.functional import target_cross_entropy
from repair_lightning.types import Edit, EditBatch, Probe
from repair_lightning.world import irrelevant_path

WORLD = str(REPOSITORY / "repair_lightning" / "world" / "edits.jsonl")
QUICK = {"train_data": WORLD, "steps": 0, "rank": 16, "layers": 2, "batch": 4, "check_every": 10}


@pytest.fixture
def few(tmp_path):
    """A file of the first 40 edits of the embedded world."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(Path(WORLD).read_text().splitlines(keepends=True)[:40]))
    return str(path)


def gradients_by_autograd(editor, edits):
    """Of the sum of the edits' mean token losses, by W_v, through the whole model and one edit at a time."""
    weights = [editor.edited.weights.parameter(layer) for layer in editor.written_layers]
    total = [torch.zeros_like(editor.edited.weights.matrix(layer)) for layer in editor.written_layers]
    for weight in weights:
        weight.requires_grad_()
    for edit in edits:
        row = editor.encode(edit)
        logits = editor.base.model(input_ids=torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target))
        found = torch.autograd.grad(loss, weights)
        oriented = [g.T if g.shape != t.shape else g for g, t in zip(found, total, strict=True)]
        total = [t + g for t, g in zip(total, oriented, strict=True)]
    for weight in weights:
        weight.requires_grad_(False)
    return total


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_untrained_it_is_the_plain_gradient_step(editor_of, edits, few, model):
    """The factors add up to the gradient. The blocks begin as the identity; without moments the matrix moves by
    `-alpha` times the gradient."""
    editor = editor_of(model, "mend", **QUICK | {"train_data": few, "normalise": False, "alpha": 0.05})
    _, factors = editor.factors(TargetRows.of(editor.edited, [editor.encode(edit) for edit in edits[:2]]))
    before = [editor.edited.weights.matrix(layer) for layer in editor.written_layers]
    wanted = gradients_by_autograd(editor, edits[:2])
    assert len(factors) == len(wanted) == 2
    editor.write(EditBatch(tuple(edits[:2])))
    for layer, old, gradient, (keys, deltas) in zip(editor.written_layers, before, wanted, factors, strict=True):
        torch.testing.assert_close(deltas.flatten(0, 1).T @ keys.flatten(0, 1), gradient, rtol=1e-3, atol=1e-5)
        moved = editor.edited.weights.matrix(layer) - old
        torch.testing.assert_close(moved, -0.05 * gradient, rtol=1e-3, atol=1e-6)


LEARNS = {"steps": 20, "lr": 3e-4, "lr_steps": 1e-3, "alpha": 1e-4, "batch": 8, "c_edit": 1.0}


def test_held_out_edits_are_said_better(few):
    """Both the loss and what it is for: one write of an edit that was never seen makes its target likely, which the
    untrained step does not."""
    unseen = load_records(WORLD).edits[200]
    losses = []
    for steps in (20, 0):
        editor = make_editor("mend", {"base": "world", **QUICK, "train_data": few, **LEARNS, "steps": steps})
        editor.load()
        editor.prepare(load_irrelevant(str(irrelevant_path()))[:16], ["why do cats sleep"])
        editor.write(EditBatch((unseen,)))
        losses.append(loss_of(editor, unseen))
        if steps:
            figures = editor.training_figures
            assert figures["loss"] < 0.2 * figures["loss_before"]
            assert (figures["edits"], figures["held_out"], figures["left_out"]) == (36, 4, 0)
    assert losses[0] < 0.7, "more likely than not"
    assert losses[0] < 0.2 * losses[1]


def loss_of(editor, edit):
    row = editor.encode(edit)
    with torch.no_grad():
        logits = editor.base.model(input_ids=torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1]
    return float(target_cross_entropy(logits[:, None], torch.tensor(row.target)[:, None]).mean())


class TestData:
    def test_what_the_stream_asks_is_left_out(self, tmp_path):
        asked = Edit("7", "Who leads Arvo?", "Ann", "Arvo", ("Arvo is led by",), near=(Probe("Who leads Bex?", "Bo"),))
        stream = world_stream(write_edits(tmp_path / "edits.jsonl", [asked]))
        given = [
            Edit("7", "Where is Oslo?", "Norway"),
            Edit("a", "who  leads arvo?", "Cy"),
            Edit("b", "Arvo's river is", "Dee", "ARVO"),
            Edit("c", "Its head is", "Eve", None, ("Arvo is led by",)),
            Edit("d", "Who leads Bex?", "Flo"),
            Edit("e", "Who leads Cato?", "Gus", "Cato"),
        ]
        assert [edit.id for edit in apart(given, stream, "jsonl")] == ["e"]

    def test_without_train_data_it_learns_from_what_the_stream_leaves(self, few, irrelevant):
        editor = make_editor("mend", {"base": "world", **QUICK, "train_data": ""})
        editor.load()
        with pytest.raises(ConfigError, match=r"give --model\.train_data a file of edits"):
            editor.prepare(irrelevant[:8], irrelevant[8:])
        editor.stream = world_stream(few, max_edits=10)
        editor.prepare(irrelevant[:8], irrelevant[8:])
        figures = editor.training_figures
        assert figures["left_out"] >= 10
        assert figures["edits"] + figures["held_out"] + figures["left_out"] == len(load_records(few).edits)
