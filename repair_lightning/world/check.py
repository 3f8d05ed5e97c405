"""Measure what a base model knows of the small world: greedy generation, exact match."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from repair_lightning.world.facts import World


class Score(NamedTuple):
    """How many of the sampled questions of one kind were answered exactly."""

    kind: str
    required: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of exact answers."""
        return self.correct / self.total


def check_base(folder: Path, world: World, sample: int, rng: random.Random) -> list[Score]:
    """The scores of the base in ``folder``, in float32, on up to ``sample`` questions of every kind."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    scores = []
    for kind, required, asked in (
        ("trained", 0.98, [(fact, fact.trained) for fact in world.people]),
        ("held out", 0.95, [(fact, fact.held_out) for fact in world.people]),
        ("places", 0.98, [(fact, fact.trained) for fact in world.places]),
        ("irrelevant", 0.98, [(fact, fact.trained) for fact in world.minerals]),
    ):
        questions = [(fact.ask(phrasing), fact.answer) for fact, phrasings in asked for phrasing in phrasings]
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
