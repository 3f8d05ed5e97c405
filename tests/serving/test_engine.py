"""Continuous batching: whoever asks beside whom, and whenever, each gets the answer that it gets alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from repair_lightning.memory.routers import make_router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.architectures import ARCHITECTURES, architecture_of, value_shape
from repair_lightning.models.edited import EditedModel
from repair_lightning.serving import engine as module
from repair_lightning.serving.engine import Asked, BusyError, Engine, Sampling

PROMPTS = [
    "Where was Mara Kelstrom born?",
    "The employer of Tobin Quill was",
    "who",
    "what do you call a baby kangaroo",
]


@pytest.fixture
def model(tiny, tokenizer):
    def make(model_type: str = "llama", **more) -> EditedModel:
        base = tiny(model_type, **more)
        shape = value_shape(architecture_of(base).value_module(base, 1))
        return EditedModel(base, tokenizer, SideMemory(shape), make_router("nobody"), 1).eval()

    return make


class Listener:
    """Asks, and waits for the end."""

    def __init__(self, model, prompt, sampling, edited=None):
        self.pieces, self.end = [], threading.Event()
        row = list(model.forms.bare(prompt))
        self.asked = Asked(row, prompt, sampling, model.forms, edited, self.told)

    def told(self, piece):
        self.pieces.append(piece)
        if piece.finish or piece.error:
            self.end.set()

    def answer(self):
        assert self.end.wait(60)
        assert self.pieces[-1].error is None, self.pieces[-1].error
        return "".join(piece.text for piece in self.pieces), self.pieces[-1].finish


def plain(model, prompt, limit):
    ids = torch.tensor([model.forms.bare(prompt)])
    stops = list(model.forms.stops)
    with torch.no_grad():
        out = model.base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=stops
        )
    said = out[0, ids.shape[1] :].tolist()
    ended = said[-1] in stops
    text = model.tokenizer.decode(said[:-1] if ended else said, skip_special_tokens=True)
    return text, "stop" if ended else "length"


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("mistral", {"sliding_window": 3}),
        ("gemma3_text", {"sliding_window": 3}),
    ],
)
def test_each_gets_what_it_gets_alone(model, model_type, more):
    """They join one after the other, between the others' tokens, and end at different times."""
    model = model(model_type, **more)
    engine = Engine(model, max_batch=3)
    listeners = []
    for i, prompt in enumerate(PROMPTS * 2):
        listeners.append((prompt, 3 + 4 * (i % 4), Listener(model, prompt, Sampling(3 + 4 * (i % 4)))))
        engine.ask([listeners[-1][2].asked])
        time.sleep(0.01)
    found = [listener.answer() for _, _, listener in listeners]
    engine.stop()
    assert found == [plain(model, prompt, limit) for prompt, limit, _ in listeners]


def test_jobs_come_between_passes_and_their_errors_are_their_askers(model):
    model = model()
    engine = Engine(model)
    listener = Listener(model, PROMPTS[0], Sampling(40))
    engine.ask([listener.asked])
    assert engine.do(lambda: 7).result(60) == 7
    with pytest.raises(ZeroDivisionError):
        engine.do(lambda: 1 // 0).result(60)
    assert listener.answer() == plain(model, PROMPTS[0], 40)
    engine.stop()
    with pytest.raises(BusyError, match="shutting down"):
        engine.ask([listener.asked])
    with pytest.raises(BusyError, match="shutting down"):
        engine.do(lambda: 7)


def test_too_many_are_refused_and_a_cancelled_one_makes_room(model):
    model = model()
    engine = Engine(model, max_batch=1)
    first = Listener(model, PROMPTS[0], Sampling(400, temperature=2.0, seed=1))
    engine.ask([first.asked])
    waiting = [Listener(model, "who", Sampling(1)) for _ in range(module.MAX_WAITING)]
    engine.ask([one.asked for one in waiting])
    with pytest.raises(BusyError, match="ask again later"):
        engine.ask([Listener(model, "who", Sampling(1)).asked] * 2)
    first.asked.cancelled = True
    assert {one.answer() for one in waiting} == {plain(model, "who", 1)}
    engine.stop()


def test_a_pass_that_fails_is_told_and_the_next_is_answered(model):
    model = model()
    engine = Engine(model)
    broken = Listener(model, "who", Sampling(4))
    broken.asked.row = [10**6]  # no such token
    engine.ask([broken.asked])
    assert broken.end.wait(60)
    assert isinstance(broken.pieces[-1].error, IndexError)
    fine = Listener(model, "who", Sampling(4))
    engine.ask([fine.asked])
    assert fine.answer() == plain(model, "who", 4)
    engine.stop()


def test_stops_that_come_in_pieces_are_never_shown(model):
    model = model()
    engine = Engine(model)
    text, _ = plain(model, PROMPTS[1], 24)
    stop = text[6:12]
    listener = Listener(model, PROMPTS[1], Sampling(24, stop=(stop, "never said")))
    engine.ask([listener.asked])
    assert listener.answer() == (text[: text.index(stop)], "stop")
    engine.stop()
