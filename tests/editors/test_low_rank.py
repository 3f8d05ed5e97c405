"""The normalised gradient, by which low-rank shards are written, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repair_lightning.editors.low_rank import LEAD, OFTEN, REACH, NormalizedGradient
from repair_lightning.editors.repair import OPTIMIZERS, Writing
from repair_lightning.models.prefix import pad_left


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

    def test_each_group_has_its_own_worst_position(self):
        """The second group's gradients are a thousandth of the first's, and it moves as far."""
        gradient = torch.tensor([[[3.0, 4.0], [0.0, 1.25]], [[0.003, 0.004], [0.0, 0.00125]]])
        found = stepped(gradient)
        torch.testing.assert_close(found[0], found[1])

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_the_size_of_the_loss_does_not_matter(self, scale):
        gradient = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(stepped(scale * gradient), stepped(gradient))

    def test_the_direction_is_the_gradients(self):
        """Adam's first step would move each coordinate alike: values leave the span of what is asked for."""
        gradient = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
        found = stepped(gradient, lr=0.3)
        cosine = torch.nn.functional.cosine_similarity(found, gradient, dim=-1)
        torch.testing.assert_close(cosine, -torch.ones(1, 4))
        sizes = gradient.norm(dim=-1)
        torch.testing.assert_close(found.norm(dim=-1), 0.3 * (sizes / sizes.amax()).sqrt())
        assert float(found.norm(dim=-1).amax()) == pytest.approx(0.3)

    def test_positions_without_a_gradient_stay(self):
        """As those past a group's rank do; nothing becomes NaN, not even where there is no gradient at all."""
        gradient = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
        start = torch.ones(2, 2, 2)
        found = stepped(gradient, 0.1, start)
        torch.testing.assert_close(found, torch.tensor([[[0.0, -0.1], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))

    def test_a_single_position_moves_by_the_rate(self):
        torch.testing.assert_close(stepped(torch.tensor([0.0, 0.02]), 0.5), torch.tensor([0.0, -0.5]))

    def test_what_has_no_gradient_is_left_alone(self):
        parameter = nn.Parameter(torch.ones(2, 2))
        NormalizedGradient([parameter], 0.1).step()
        assert torch.equal(parameter.detach(), torch.ones(2, 2))

    def test_a_closure_says_the_loss(self):
        parameter = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer = NormalizedGradient([parameter], 0.5)

        def closure() -> Tensor:
            with torch.enable_grad():
                loss = parameter.square().sum() / 2
                loss.backward()
            return loss

        assert optimizer.step(closure).item() == 12.5
        torch.testing.assert_close(parameter.detach(), torch.tensor([[2.7, 3.6]]))


class TestWriting:
    def test_who_steps_by_it(self, editor_of, monkeypatch):
        """Low-rank shards of a base that is asked in several forms, unless another is named; else Adam."""
        assert OPTIMIZERS["normalized"] is NormalizedGradient
        editor, marks = editor_of(), object()
        assert editor.stepping == "adam", "without a chat template there is one form"
        monkeypatch.setattr(editor.edited.forms, "marks", marks)
        assert editor.stepping == "normalized"
        assert isinstance(editor.build_optimizer([nn.Parameter(torch.zeros(1))]), NormalizedGradient)
        editor.writing = Writing(optimizer="sgd")
        assert editor.stepping == "sgd"
        editor.writing = Writing("dense")
        assert editor.stepping == "adam"

    @pytest.mark.parametrize("lr", [1.0, 0.5])
    def test_a_first_step_is_a_share_of_the_states_it_moves(self, editor_of, write, edits, lr):
        """On the last layer what leaves it is moved: its mean length over the target tokens, from a plain pass of the
        base, times a tenth of the rate, is how long the longest column of the left factor is after one step."""
        editor = editor_of(writing=Writing(optimizer="normalized", lr=lr, steps=1, stop_margin=None))
        row = editor.encode(edits[0])
        ids, mask = pad_left([row.ids])
        with torch.no_grad(), editor.edited.forced(None):
            layers = editor.base.model.model.layers
            seen: list[Tensor] = []
            hook = layers[editor.layer].register_forward_hook(
                lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            editor.base.model.model(ids, attention_mask=mask)
            hook.remove()
        states = seen[0].reshape(1, ids.shape[1], -1)[0, len(row.prompt) - 1 : -1]
        (report,) = write(editor, edits[:1])
        left = editor.memory[report.shard].left
        assert float(left.norm(dim=0).amax()) == pytest.approx(lr * REACH * float(states.norm(dim=-1).mean()), rel=1e-4)

    def test_a_state_that_is_not_finite_spoils_no_other_edit(self, editor_of, write, answers, edits):
        """The length of a step is taken from what is finite."""
        editor = editor_of(writing=Writing(optimizer="normalized"))
        editor.edited.captures([editor.encode(edits[2]).ids])[0].hidden.fill_(torch.nan)
        reports = write(editor, edits[:4])
        assert [bool(report.error) for report in reports] == [False, False, True, False]
        good = [edit for i, edit in enumerate(edits[:4]) if i != 2]
        said = answers(editor.edited, editor.tokenizer, [edit.prompt for edit in good])
        assert said == [edit.target for edit in good]

    def test_it_goes_for_more_than_the_margin(self, editor_of, write, edits):
        """Two and a half times 1.0, looked at every third step; each group on its own."""
        editor = editor_of(writing=Writing(optimizer="normalized", stop_margin=1.0))
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
