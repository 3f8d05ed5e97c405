"""An edited model as EleutherAI's lm-evaluation-harness asks one. Only this file needs `lm_eval` to be imported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from repair_lightning.errors import ConfigError
from repair_lightning.models.edited import EditedModel
from repair_lightning.scoring.continuations import completions, log_likelihoods, route_contexts
from repair_lightning.types import BASE

log = logging.getLogger(__name__)

MAX_GEN_TOKS = 256
"""Most tokens of an answer where the task does not say, as the harness has it; half of what a short base reads."""


class EditedLM(TemplateLM):
    """An edited model, or with `routed` False the base below it, for `lm_eval.simple_evaluate(model=..., ...)`.

    A request's memory is chosen from its context alone; a request without context gets the base. `requests` counts
    those that were answered, `by_shards` those of them that a shard answered.
    """

    def __init__(self, model: EditedModel, routed: bool = True, batch_size: int = 16) -> None:
        super().__init__()
        self.edited, self.tokenizer, self.routed, self.batch_size = model, model.tokenizer, routed, batch_size
        self.requests = self.by_shards = 0
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; answers end at each of `Forms.stops`."""
        return self.edited.forms.bare_end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The longest text that the base reads, in tokens."""
        return self.edited.longest

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as a part of a file name."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text that may go on: without the end of sequence that some tokenizers put behind it.

        What the chat template has rendered has its control tokens, and no beginning of a text but the template's own.
        """
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False)["input_ids"]
        forms = self.edited.forms
        return list(forms.rendered(string)[0] if forms.is_rendered(string) else forms.bare(string))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A dialogue keeps the blanks that its template ends with: there the answer begins."""
        if not self.edited.forms.is_rendered(context):
            return super()._encode_pair(context, continuation)
        ids, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return ids, whole[len(ids) :]
        return ids, self.tok_encode(continuation, add_special_tokens=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as the base's chat template writes it; where that has no place for a system message, without.
        Raises `ConfigError` where there is no template, or one that does not take the dialogue."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("the base's tokenizer has no chat template; leave --apply_chat_template out")
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt  # the answer is begun already
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                reason = " ".join(str(error).split())
                raise ConfigError(f"the base's chat template does not take a task's dialogue ({reason})") from error
        log.warning("the base's chat template has no place for a system message: it is left out")
        return self.apply_chat_template(others, add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list:
        contexts = [context or [self.prefix_token_id] for _, context, _ in requests]
        then = [continuation for _, _, continuation in requests]
        return log_likelihoods(self.edited, contexts, then, self._memory(contexts), self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, by the base: every token is scored, so none is left that may choose."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = [
            (i, *make_disjoint_window(window))
            for i, ids in enumerate(texts)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        ]
        self.requests += len(requests)
        base = torch.full((len(windows),), BASE)
        found = log_likelihoods(self.edited, [w[1] for w in windows], [w[2] for w in windows], base, self.batch_size)
        sums = [0.0] * len(texts)
        for (i, *_), (value, _) in zip(windows, found, strict=True):
            sums[i] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of its task's stop strings."""
        asked = [(self.tok_encode(request.args[0]) or [self.prefix_token_id], request.args[1]) for request in requests]
        memory, found = self._memory([context for context, _ in asked]), [""] * len(asked)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, (_, options) in enumerate(asked):
            known = normalize_gen_kwargs(options, min(MAX_GEN_TOKS, self.max_length // 2))
            if known.get("do_sample"):
                raise ConfigError("a task asks for sampled answers; set do_sample: false in its generation_kwargs")
            until = tuple(handle_stop_sequences(known.get("until"), eos=None))
            alike.setdefault((known["max_gen_toks"], until), []).append(i)
        for (new, until), index in alike.items():
            contexts = [asked[i][0] for i in index]
            texts = completions(self.edited, contexts, memory[index], until, new, self.batch_size)
            for i, text in zip(index, texts, strict=True):
                found[i] = text
        return found

    def _memory(self, contexts: Sequence[list[int]]) -> Tensor:
        memory = route_contexts(self.edited, contexts) if self.routed else torch.full((len(contexts),), BASE)
        self.requests += len(memory)
        self.by_shards += int((memory >= 0).sum())
        return memory
