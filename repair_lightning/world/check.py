"""Measure what a base model knows of the small world: greedy generation, exact match."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from repair_lightning.world.facts import Fact, World


@dataclass(frozen=True)
class Score:
    """How many of the sampled questions of one kind were answered exactly."""

    kind: str
    required: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of exact answers."""
        return self.correct / self.total


def load_base(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The saved model, its half-precision weights widened to float32, and its tokenizer set up for generation."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def world_questions(world: World) -> dict[str, tuple[float, list[tuple[str, str]]]]:
    """Per kind of question: the required accuracy and all its (prompt, answer) pairs."""
    return {
        "trained": (0.98, _pairs((fact, fact.trained) for fact in world.people)),
        "held out": (0.95, _pairs((fact, fact.held_out) for fact in world.people)),
        "places": (0.98, _pairs((fact, fact.trained) for fact in world.places)),
        "irrelevant": (0.98, _pairs((fact, fact.trained) for fact in world.minerals)),
    }


def check_base(folder: Path, world: World, sample: int, rng: random.Random) -> list[Score]:
    """The scores of the base in ``folder`` on up to ``sample`` questions of every kind."""
    model, tokenizer = load_base(folder)
    scores = []
    for kind, (required, questions) in world_questions(world).items():
        chosen = rng.sample(questions, min(sample, len(questions)))
        answers = generate(model, tokenizer, [prompt for prompt, _ in chosen])
        correct = sum(answer == truth for answer, (_, truth) in zip(answers, chosen, strict=True))
        scores.append(Score(kind, required, correct, len(chosen)))
    return scores


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 256
) -> list[str]:
    """The greedy continuation of each prompt up to EOS, without the space that joins prompt and answer."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)  # type: ignore
        new = output[:, ids.shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def _pairs(asked: Iterable[tuple[Fact, Sequence[str]]]) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of facts and the phrasings to ask them in."""
    return [(fact.ask(phrasing), fact.answer) for fact, phrasings in asked for phrasing in phrasings]
