"""The normalised gradient, by which low-rank shards are written, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repair_lightning.editors.low_rank import NormalizedGradient, Outcome
from repair_lightning.editors.shards import LEAD, OFTEN, OPTIMIZERS, Steps


def stepped(gradient: Tensor, lr: float = 0.1, start: Tensor | None = None) -> Tensor:
    """How far one step moves a parameter with a gradient."""
    parameter = nn.Parameter(torch.zeros_like(gradient) if start is None else start.clone())
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    NormalizedGradient([parameter], lr).step()
    return parameter.detach() - before


class TestNormalizedGradient:
    def test_by_hand(self):
        """Two positions of length 5 and 1.25: the worst moves by the rate, the other by sqrt(1.25 / 5) = 1/2 of it."""
        found = stepped(torch.tensor([[[3.0, 4.0], [0.0, 1.25]]]))
        torch.testing.assert_close(found, torch.tensor([[[-0.06, -0.08], [0.0, -0.05]]]))

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_the_size_of_the_loss_does_not_matter(self, scale):
        gradient = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(stepped(scale * gradient), stepped(gradient))

    def test_positions_without_a_gradient_stay(self):
        """As those past a group's rank do; nothing becomes NaN, not even where there is no gradient at all."""
        gradient = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
        start = torch.ones(2, 2, 2)
        found = stepped(gradient, 0.1, start)
        torch.testing.assert_close(found, torch.tensor([[[0.0, -0.1], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))


class TestWriting:
    def test_who_steps_by_it(self, editor_of, monkeypatch):
        """Low-rank shards of a base that is asked in several forms, unless another is named; else Adam."""
        assert OPTIMIZERS["normalized"] is NormalizedGradient
        editor, marks = editor_of(), object()
        assert editor.stepping == "adam", "without a chat template there is one form"
        monkeypatch.setattr(editor.edited.forms, "marks", marks)
        assert editor.stepping == "normalized"
        assert isinstance(editor.build_optimizer([nn.Parameter(torch.zeros(1))]), NormalizedGradient)
        editor.writing = Steps(optimizer="sgd")
        assert editor.stepping == "sgd"

    def test_it_goes_for_more_than_the_margin(self, editor_of, write, edits):
        """Two and a half times 1.0, looked at every third step; each group on its own."""
        editor = editor_of(writing=Steps(optimizer="normalized", stop_margin=1.0))
        editor.memory.int8 = False  # neither rounded nor shortened
        reports = write(editor, edits[:4])
        for edit, report in zip(edits[:4], reports, strict=True):
            assert report.steps % OFTEN == 0
            assert report.steps < 150
            row = editor.encode(edit)
            with torch.no_grad(), editor.edited.forced(report.shard):
                logits = editor.base.model(torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1]
            at = torch.arange(len(row.target)), torch.tensor(row.target)
            rivals = logits.clone()
            rivals[at] = -torch.inf
            assert float((logits[at] - rivals.amax(-1)).amin()) >= LEAD * 1.0 - 1e-3


class TestShortened:
    def test_the_least_rank_that_leaves_out_a_share(self):
        """Of sizes 10, 3 and 1, whose squares are 90.9, 8.2 and 0.9 %."""
        left, right = torch.eye(5)[:, :3] * torch.tensor([10.0, 3.0, 1.0]), torch.eye(7)[:3]
        whole = Outcome(left, right, 4, 0.5).turned()
        for spared, rank in ((0.1, 1), (0.05, 2), (0.005, 3)):
            found = whole.without(spared)
            assert (len(found.right), found.left.shape[1]) == (rank, rank)
            lost = (found.left @ found.right - left @ right).square().sum() / (left @ right).square().sum()
            assert float(lost) <= spared

    @pytest.mark.parametrize(("d", "f", "rank"), [(4, 6, 3), (3, 9, 5), (9, 3, 5), (2, 2, 7)])
    def test_more_pairs_than_the_matrix_is_wide(self, d, f, rank):
        """Also of what is zero, and where nothing may be left out."""
        left, right = torch.randn(d, rank), torch.randn(rank, f)
        for whole in (Outcome(left, right, 1, 0.0), Outcome(0 * left, right, 1, 0.0)):
            found = whole.turned().without(1e-9)
            assert found.left.shape[1] == len(found.right) <= rank
            torch.testing.assert_close(found.left @ found.right, whole.left @ whole.right, atol=1e-4, rtol=1e-4)

    def test_edits_keep_their_margin_in_every_form(self, prepared, chat_folder, write, edits):
        """Asked by the shards as they are kept; most of them need fewer pairs than they have target tokens."""
        editor = prepared(chat_folder, writing=Steps(stop_margin=0.1))
        write(editor, edits[:4])
        shorter = 0
        for edit in edits[:4]:
            rows = [editor.encode(edit), *(row for _, row in editor.variants([edit]))]
            shard = editor.memory[editor.ledger.owner_of(edit.id)]
            shorter += len(shard.right) < sum(len(row.target) for row in rows)
            for row in rows:
                with torch.no_grad(), editor.edited.forced(editor.ledger.owner_of(edit.id)):
                    logits = editor.base.model(torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1]
                at = torch.arange(len(row.target)), torch.tensor(row.target)
                rivals = logits.clone()
                rivals[at] = -torch.inf
                assert float((logits[at] - rivals.amax(-1)).amin()) > 0.09, "but for what a byte rounds off"
        assert shorter > 2
