"""What the base says by itself, as token ids."""

from __future__ import annotations

from types import SimpleNamespace

from repair_lightning.models import sampling


def test_an_answer_ends_with_whatever_ends_it_and_holds_no_padding(monkeypatch):
    """Ends are the tokenizer's and the model's; an answer that is cut has none."""
    said = [[7, 7, 5, 2, 0, 0], [7, 7, 9, 0, 0, 0], [7, 7, 5, 5, 5, 5], [7, 7, 2, 0, 0, 0]]
    monkeypatch.setattr(sampling, "_continued", lambda *_: said)
    tokenizer = lambda texts: {"input_ids": [[7, 7] for _ in texts]}  # noqa: E731
    tokenizer.eos_token_id = 2
    for stops in ([2, 9], 9):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=stops))
        rows = sampling.greedy_rows(model, tokenizer, ["a"] * 4, length=4)
        assert rows == [((7, 7), (5, 2)), ((7, 7), (9,)), ((7, 7), (5, 5, 5, 5)), ((7, 7), (2,))]
