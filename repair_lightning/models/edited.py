"""A base with its side memory: called and asked to generate like any Hugging Face causal LM.

The base's parameters, names and code stay as they are, and prompts that no shard answers get the base's own bits. The
choice is made once per turn of a dialogue and held while the key-value cache grows; as soon as what was said leaves the
edit's target, the base answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.errors import RepairError, counted
from repair_lightning.models.prefix import pad_left
from repair_lightning.models.routed import Prompts, RoutedModel, Turn, prompts_of
from repair_lightning.models.telling import told, told_to_use
from repair_lightning.types import READS

ROOM = 64
"""Positions that stay free for an answer where a prompt is put after other texts."""
_NO_CACHE = "the base reads edits before this prompt: ask it without a cache and without labels"
_HELD = "_repair_turn"  # the attribute of a key-value cache that remembers which memory its sequences chose


class EditedModel(RoutedModel):
    """A routed model that answers."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **options: Any
    ) -> Any:
        """The base's forward pass over ids (B, T), each sequence answered by its memory.

        A filled cache goes on with the choice of the prompt that filled it, until the user's next turn.
        """
        if self.is_disabled:
            with self.forced(None):
                return self.base(input_ids, attention_mask, past_key_values=past_key_values, **options)
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.router.prefaces:
            return self._forward_after_prefaces(input_ids, given, past_key_values, options)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            attention_mask = given  # where a cache is filled, no mask stands for all of it and these tokens
        turn = self._turn_of(past_key_values, _real(input_ids, given[:, -input_ids.shape[1] :]))
        with self.during(turn):
            output = self.base(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **options
            )
        cache = past_key_values if past_key_values is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _HELD, turn)
        return output

    def _turn_of(self, cache: Any, rows: list[list[int]]) -> Turn:
        """The turn that tokens belong to: the cache's own, which they go on with, or a new one."""
        held = getattr(cache, _HELD, None) if cache is not None and cache.get_seq_length() > 0 else None
        if held is None or len(held.rows) != len(rows):
            return self._new_turn(rows)
        known, held.rows = held.rows, [[*before, *now] for before, now in zip(held.rows, rows, strict=True)]
        return self._new_turn(held.rows) if any(map(self.forms.asks_again, known, held.rows)) else held

    def _new_turn(self, rows: list[list[int]], texts: Sequence[str] | None = None) -> Turn:
        choice = self.choose_rows(rows, texts)
        targets = self.targets(choice.memory, choice.nearest, rows) if self.router.vouches else []
        rest = [None if row is None else row.target for row in targets]
        return Turn(choice.memory.clone(), rest, rows, quotes=self.router.quotes)  # type: ignore[arg-type]

    @torch.no_grad()
    def generate(
        self, inputs: Prompts | None = None, attention_mask: Tensor | None = None, input_ids: Any = None, **options: Any
    ) -> Tensor:
        """Generate as the base does, every sequence with the memory that what it asks chose.

        Args:
            inputs: token ids (B, T), a text, texts, messages or several dialogues; texts are put as the base is asked.
            attention_mask: (B, T), by default all ones.
            input_ids: the same as `inputs`.
            options: of `transformers`; by default it stops where it was taught to end its answers.

        RepairError where nothing is asked, or a prompt leaves no room for an answer in what the base reads.
        """
        asked = inputs if input_ids is None else input_ids
        ids, mask = self._inputs(asked, attention_mask)
        texts = None if isinstance(asked, Tensor) else [self.forms.asked(prompt) for prompt in prompts_of(asked)]
        rows = _real(ids, mask)
        options = {"eos_token_id": list(self.forms.stops), "pad_token_id": self.padding} | options
        if self.is_disabled:
            with self.forced(None):
                return self.base.generate(input_ids=ids, attention_mask=mask, **options)
        turn = self._new_turn(rows, texts)
        goes_on = options.get("past_key_values") is not None and not self.router.prefaces
        read = rows if goes_on else self.read(rows, turn.memory)  # type: ignore[arg-type]
        if options.get("num_beams", 1) != 1:
            turn.rest = []  # beams change places, and nothing says how
        if read != rows:
            return self._generate_after(read, turn, ids, options)
        with self.during(turn):
            output = self.base.generate(input_ids=ids, attention_mask=mask, **options)
        cache: Any = options.get("past_key_values")
        sequences = output if isinstance(output, Tensor) else output.sequences
        if cache is not None and len(sequences) == len(rows):
            said = sequences[:, ids.shape[1] : cache.get_seq_length()].tolist()  # the last token was not fed
            turn.rows = [[*row, *new] for row, new in zip(rows, said, strict=True)]
            setattr(cache, _HELD, turn)
        return output

    def _generate_after(self, read: list[list[int]], turn: Turn, ids: Tensor, options: dict[str, Any]) -> Any:
        """What is generated after prompts as the base reads them, behind the ids (B, T) that were given."""
        if options.get("past_key_values") is not None:
            raise RepairError(_NO_CACHE)
        padded, seen = pad_left(read, self.padding, self.device)
        added = padded.shape[1] - ids.shape[1]
        longer = {name: options[name] + added for name in ("max_length", "min_length") if options.get(name)}
        options = options | longer
        with self.during(turn):
            output = self.base.generate(input_ids=padded, attention_mask=seen, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        given = ids.repeat_interleave(len(sequences) // len(ids), 0)
        sequences = torch.cat([given, sequences[:, padded.shape[1] :]], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _inputs(self, asked: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, T) of what is asked."""
        if asked is None:
            raise RepairError("nothing is asked: give token ids, texts or messages")
        if not isinstance(asked, Tensor):
            ids, mask = pad_left([*map(self.forms.ids, prompts_of(asked))], self.padding, self.device)
        else:
            ids, mask = asked, torch.ones_like(asked) if mask is None else mask
        tokens = int(mask.sum(-1).max()) if len(mask) else 0
        if tokens >= self.longest:
            raise RepairError(
                f"a prompt has {counted(tokens, 'token')}, and the base reads {self.longest:,} with its answer: at "
                f"most {self.longest - 1:,} may be asked; shorten it"
            )
        return ids, mask

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], memory: Tensor) -> list[list[int]]:
        """Prompts, given as token ids, as the base reads them: after the edits that their memory (B,) puts before them.

        Edits for which there is no room beside an answer are left out, the least important first.
        """
        wanted = self.router.prefaces or (self.router.in_text and bool((memory == READS).any()))
        if not wanted:
            return [list(row) for row in rows]
        prefaces = self.router.preface(self._seen([self.forms.asked_in(row) for row in rows], rows), memory.tolist())
        return [self._after(row, ids) for row, ids in zip(rows, prefaces, strict=True)]

    def _after(self, row: Sequence[int], ids: Sequence[str]) -> list[int]:
        put = told if self.router.prefaces else told_to_use
        edits = [edit for edit in map(self.edit_of, ids) if edit is not None]
        facts = [(self.forms.asked(edit.prompt), edit.target) for edit in edits]
        for first in range(len(facts)):
            found = put(self.forms, row, facts[first:])
            if len(found) <= self.longest - ROOM:
                return found
        return list(row)

    def _forward_after_prefaces(self, ids: Tensor, mask: Tensor, cache: Any, options: dict[str, Any]) -> Any:
        """The forward pass where something stands before the prompts; its logits are those of the given tokens."""
        if cache is not None or options.get("labels") is not None:
            raise RepairError(_NO_CACHE)
        rows = _real(ids, mask)
        read = self.read(rows, self.choose_rows(rows).memory)
        with self.forced(None):  # what nothing stands before keeps the base's own bits
            output = self.base(input_ids=ids, attention_mask=mask, **{**options, "use_cache": False})
            for i, (row, whole) in enumerate(zip(rows, read, strict=True)):
                if row != whole:
                    logits = self.base(torch.tensor([whole], device=self.device), use_cache=False).logits[0]
                    output.logits[i, mask[i].bool()] = logits[-len(row) :]
        return output


def _real(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows without what the mask hides."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
