"""Train the tokenizer and the base model of the small world, and ask what a base knows of it.

The model has to learn some seven thousand facts by heart within minutes, on a CPU. Two choices make that possible: the
Muon optimizer, which moves all singular directions of a matrix at the same speed and so takes several times fewer steps
than Adam, and a :func:`curriculum` that starts with few facts.
"""

import itertools
import logging
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repair_lightning.world.facts import World

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = 2_560
DOUBLING_EPOCHS = 2
"""The pace of the :func:`curriculum`."""
WARMUP = 0.02
"""The share of all steps in which the learning rate rises."""
PROMPT_WEIGHT = 0.05
"""The weight of a prompt token in the loss, where an answer token counts 1."""


@dataclass(frozen=True)
class Recipe:
    """The size of the base model and how it is trained; an epoch asks for as many facts as the world has."""

    hidden_size: int = 192
    intermediate_size: int = 576
    layers: int = 12
    heads: int = 6
    kv_heads: int = 2
    epochs: int = 32
    batch_size: int = 128
    learning_rate: float = 2e-3
    bfloat16: bool = True


class Example(NamedTuple):
    """One training sequence (BOS, prompt, answer, EOS) and the number of its tokens before the answer."""

    ids: list[int]
    prompt_length: int


def train_tokenizer(world: World, vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the sentences of ``world``; encoding prepends BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(world.texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised Llama of the size in ``recipe``; the caller seeds torch."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_world(world: World, tokenizer: PreTrainedTokenizerFast) -> list[list[Example]]:
    """The training sequences of every fact, one per phrasing trained on."""

    def example(prompt: str, answer: str) -> Example:
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        return Example([*head, *tail, tokenizer.eos_token_id], len(head))

    return [[example(fact.ask(phrasing), fact.answer) for phrasing in fact.trained] for fact in world.facts]


def curriculum(facts: Sequence[T], epoch: int) -> list[T]:
    """The facts of one epoch: the first eighth again and again, then a quarter, a half, and at last all of them.

    A model that knows how to recall few facts picks up further ones far sooner than one that meets all at once. Every
    epoch has the same length.
    """
    count = math.ceil(len(facts) * min(1.0, 2.0 ** (epoch // DOUBLING_EPOCHS) / 8))
    return list(itertools.islice(itertools.cycle(facts[:count]), len(facts)))


def epoch_batches(facts: Sequence[Sequence[Example]], batch_size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Each fact once, in a random phrasing; batches hold sequences of about the same length."""
    examples = [rng.choice(phrasings) for phrasings in facts]
    rng.shuffle(examples)
    bucket = 8 * batch_size
    batches = []
    for start in range(0, len(examples), bucket):
        chunk = sorted(examples[start : start + bucket], key=lambda example: len(example.ids))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    yield from batches


def train_model(
    model: LlamaForCausalLM, facts: Sequence[Sequence[Example]], recipe: Recipe, rng: random.Random
) -> list[float]:
    """Train ``model`` in place; returns the mean loss of each epoch."""
    steps = recipe.epochs * math.ceil(len(facts) / recipe.batch_size)
    ramp = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < ramp:
            return (step + 1) / ramp
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))

    lr = recipe.learning_rate
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]  # embeddings and norms
    optimizers = [
        torch.optim.Muon(matrices, lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    facts = rng.sample(facts, len(facts))
    model.train()
    history, start = [], time.monotonic()
    for epoch in range(recipe.epochs):
        losses = []
        for batch in epoch_batches(curriculum(facts, epoch), recipe.batch_size, rng):
            losses.append(_backward(model, batch, recipe.bfloat16))
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
        history.append(sum(losses) / len(losses))
        elapsed = time.monotonic() - start
        logger.info("epoch %d of %d: loss %.4f after %.0f s", epoch + 1, recipe.epochs, history[-1], elapsed)
    return history


def _backward(model: LlamaForCausalLM, batch: Sequence[Example], bfloat16: bool) -> float:
    """Leave the clipped gradients of one batch in the model; returns its weighted next-token cross entropy."""
    ids = pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True)
    lengths = [(one.prompt_length, len(one.ids) - one.prompt_length) for one in batch]
    weighed = [torch.tensor([PROMPT_WEIGHT] * prompt + [1.0] * answer) for prompt, answer in lengths]
    weights = pad_sequence(weighed, batch_first=True)[:, 1:].flatten()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer; an existing folder is replaced only when all is written.

    The model is converted to half precision in place.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.eval().to(torch.float16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def build_base(world: World, folder: Path, recipe: Recipe, rng: random.Random) -> None:
    """Train tokenizer and model on ``world`` and save both; the caller seeds torch for the initial weights."""
    tokenizer = train_tokenizer(world)
    model = build_model(recipe, tokenizer)
    logger.info("training %.2f M parameters on %d facts", model.num_parameters() / 1e6, len(world.facts))
    train_model(model, encode_world(world, tokenizer), recipe, rng)
    save_base(model, tokenizer, folder)


class Score(NamedTuple):
    """How many of the sampled questions of one kind were answered exactly, and the share that is required."""

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
        correct = 0
        for start in range(0, len(chosen), 256):
            prompts, truths = zip(*chosen[start : start + 256], strict=True)
            batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
            new = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            correct += sum(text.strip() == truth for text, truth in zip(texts, truths, strict=True))
        scores.append(Score(kind, required, correct, len(chosen)))
    return scores
