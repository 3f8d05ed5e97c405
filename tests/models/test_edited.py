"""The edited model as a causal LM: exact where the base answers, and its choice held while a sequence grows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Choice, Query, canonical_ids
from repair_lightning.memory.routers import Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.architectures import ARCHITECTURES
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix import pad_left, positions
from repair_lightning.models.prefix_cache import PrefixCache
from repair_lightning.types import BASE

NEW = 7
ROUTED = {"Mara": 0, "Tobin": 1}
PROMPTS = [
    "Mara Kelstrom was born in",
    "how many legs does a spider have",
    "Tobin Quill",
    "where do penguins live in winter, and why do they not fly at all?",
    "Mara Quill plays the",
]
OWNERS = [0, BASE, 1, BASE, 0]


class FirstWordRouter(Router):
    """Routes by the tokens of the prompt's first word, and remembers what it was asked."""

    name = "first-word"
    reads_all_tokens = True

    def __init__(self, shards: Mapping[tuple[int, ...], int]) -> None:
        self.shards = shards
        self.asked: list[Query] = []

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """There is nothing to learn."""

    def route(self, query: Query, memory: SideMemory) -> Choice:
        self.asked.append(query)
        chosen = torch.tensor([self._owner(words) for words in query.words.tolist()])
        return Choice(chosen, torch.ones(len(query)), torch.zeros(len(query)), (None,) * len(query))

    def _owner(self, words: list[int]) -> int:
        return next((shard for name, shard in self.shards.items() if tuple(words[: len(name)]) == name), BASE)

    def options(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def edited(request, tiny, tokenizer) -> EditedModel:
    memory = SideMemory((32, 64))
    for shard in (0, 1):
        memory.open_shard()
        memory[shard].delta.data.copy_(torch.randn(32, 64))
    shards = {tuple(canonical_ids(tokenizer, [name])[0].tolist()): shard for name, shard in ROUTED.items()}
    return EditedModel(tiny(request.param), tokenizer, memory, FirstWordRouter(shards), 1)


def batch(edited: EditedModel, prompts: Sequence[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    return pad_left(edited.tokenizer(list(prompts))["input_ids"])


def base_logits(edited: EditedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return edited.base(input_ids=ids, attention_mask=mask).logits


def told(edited: EditedModel, output: Tensor, width: int) -> list[list[int]]:
    """The new tokens of each row up to the first end of sequence."""
    rows = output[:, width:].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in rows]


def greedy(edited: EditedModel, prompts: Sequence[str], **options: Any) -> list[list[int]]:
    ids, mask = batch(edited, prompts)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return told(edited, edited.generate(ids, mask, **settings), ids.shape[1])


class TestForward:
    def test_rows_of_the_base_keep_their_bits_and_others_change(self, edited):
        ids, mask = batch(edited)
        expected = base_logits(edited, ids, mask)
        with torch.no_grad():
            found = edited(ids, mask).logits
        for row, owner in enumerate(OWNERS):
            own = mask[row].bool()
            assert torch.equal(found[row, own], expected[row, own]) == (owner == BASE), PROMPTS[row]

    def test_a_batch_of_the_bases_prompts(self, edited):
        ids, mask = batch(edited, [p for p, owner in zip(PROMPTS, OWNERS, strict=True) if owner == BASE])
        with torch.no_grad():
            assert torch.equal(edited(ids, mask).logits, base_logits(edited, ids, mask))

    def test_a_shard_is_its_delta_added_to_the_value_matrix(self, edited):
        """The reference writes W_v + delta into the base itself."""
        ids, mask = batch(edited, [PROMPTS[0], PROMPTS[4]])
        with torch.no_grad():
            found = edited(ids, mask).logits
            weight = edited.split.value.weight
            delta = edited.memory[0].delta
            weight.data.add_(delta if weight.shape == delta.shape else delta.T)
            expected = base_logits(edited, ids, mask)
            own = mask.bool()
            torch.testing.assert_close(found[own], expected[own], rtol=1e-4, atol=1e-4)

    def test_without_a_mask_every_token_counts(self, edited):
        ids = torch.tensor([edited.tokenizer(PROMPTS[0])["input_ids"]])
        with torch.no_grad():
            assert torch.equal(edited(ids).logits, edited(ids, torch.ones_like(ids)).logits)

    def test_the_router_sees_the_prompt_and_not_the_target(self, edited):
        """Scoring prompt and target in one pass: the target's words and states are masked from the router."""
        prompt, target = "Tobin Quill was", " Mara spider born"
        n = len(edited.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([edited.tokenizer(prompt + target)["input_ids"]])
        prompt_mask = (torch.arange(ids.shape[1]) < n).long()[None]
        with torch.no_grad():
            edited(ids, prompt_mask=prompt_mask)
            (query,) = edited.router.asked
            edited(ids[:, :n])
        alone = edited.router.asked[-1]
        assert torch.equal(query.words, alone.words)
        assert query.mask.sum() == n
        torch.testing.assert_close(query.last_hidden(), alone.last_hidden())

    def test_the_base_alone_is_untouched(self, edited):
        ids, mask = batch(edited)
        before = base_logits(edited, ids, mask)
        weights = {name: value.clone() for name, value in edited.base.state_dict().items()}
        edited(ids, mask).logits.sum().backward()
        greedy(edited, PROMPTS)
        with pytest.raises(RepairError):
            edited(ids, torch.zeros_like(mask))
        assert torch.equal(base_logits(edited, ids, mask), before)
        assert all(torch.equal(value, weights[name]) for name, value in edited.base.state_dict().items())
        assert not any(p.requires_grad for p in edited.base.parameters())
        assert not any(p.grad is not None for p in edited.base.parameters())
        assert all(edited.memory[shard].delta.grad is not None for shard in (0, 1))

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_a_prompt_without_tokens(self, edited, call):
        ids, mask = batch(edited)
        mask[1] = 0
        with pytest.raises(RepairError, match="a prompt without tokens cannot be routed"):
            getattr(edited, call)(ids, mask)

    def test_no_tokens_from_a_tokenizer_without_a_start(self, edited, monkeypatch):
        plain = copy.deepcopy(edited.tokenizer)
        plain.backend_tokenizer.post_processor = None
        edited.tokenizer = plain
        assert plain("")["input_ids"] == []
        for prompts in ("", ["Mara", ""]):
            with pytest.raises(RepairError, match="a prompt without tokens"):
                edited.route(prompts)


class TestCache:
    def test_a_cache_continues_its_choice(self, edited):
        """Token by token through the cache equals one pass over the whole text with that shard forced."""
        ids, mask = batch(edited)
        more = torch.randint(3, 512, (len(ids), 3))
        with torch.no_grad():
            output = edited(ids, mask, position_ids=positions(mask), use_cache=True)
            grown = mask
            for step in range(3):
                grown = torch.cat([grown, torch.ones(len(ids), 1, dtype=torch.long)], 1)
                output = edited(
                    more[:, step : step + 1],
                    grown,
                    past_key_values=output.past_key_values,
                    position_ids=positions(grown)[:, -1:],
                    use_cache=True,
                )
            choice = Choice(torch.tensor(OWNERS), torch.zeros(5), torch.zeros(5), (None,) * 5)
            with edited.forced(choice):
                all_ids = torch.cat([ids, more], 1)
                whole = edited.base(all_ids, attention_mask=grown, position_ids=positions(grown)).logits
        assert len(edited.router.asked) == 1
        torch.testing.assert_close(output.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("own_cache", [True, False])
    def test_two_conversations_in_turn(self, edited, own_cache):
        """Each cache goes on with the choice of its own prompt, whatever was asked in between."""
        token = torch.tensor([[50]])
        expected, caches = [], []
        with torch.no_grad():
            for prompt in (PROMPTS[0], PROMPTS[1]):
                ids, mask = batch(edited, [prompt])
                given = {"past_key_values": DynamicCache(config=edited.config)} if own_cache else {}
                first = edited(ids, mask, use_cache=True, **given)
                caches.append(first.past_key_values)
                alone = copy.deepcopy(first.past_key_values)
                expected.append(edited(token, torch.ones(1, ids.shape[1] + 1), past_key_values=alone).logits)
            for prompt, cache, logits in zip(PROMPTS, caches, expected, strict=False):
                width = len(edited.tokenizer(prompt)["input_ids"]) + 1
                assert torch.equal(edited(token, torch.ones(1, width), past_key_values=cache).logits, logits)
        assert len(edited.router.asked) == 2

    def test_a_new_prompt_is_a_new_choice(self, edited):
        with torch.no_grad():
            for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0]):
                edited(*batch(edited, [prompt]), use_cache=True)
        assert len(edited.router.asked) == 3


class TestGenerate:
    def test_the_bases_prompts_get_the_bases_text_and_others_do_not(self, edited):
        ids, mask = batch(edited)
        with edited.forced(None):
            base = edited.base.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        found = greedy(edited, PROMPTS)
        same = [a == b for a, b in zip(found, told(edited, base, ids.shape[1]), strict=True)]
        assert same == [owner == BASE for owner in OWNERS]
        assert torch.equal(
            edited.base.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0), base
        )

    def test_a_mixed_batch_equals_one_by_one(self, edited):
        together = greedy(edited, PROMPTS)
        assert len(edited.router.asked) == 1, "one decision, at the prompt"
        assert together == [greedy(edited, [prompt])[0] for prompt in PROMPTS]

    def test_with_and_without_a_cache(self, edited):
        assert greedy(edited, PROMPTS, use_cache=False) == greedy(edited, PROMPTS, use_cache=True)
        assert len(edited.router.asked) == 2

    @pytest.mark.parametrize("row", range(len(PROMPTS)))
    def test_the_choice_is_held_for_every_token(self, edited, row):
        """Each token is the argmax of a full pass, without a cache, with the prompt's shard forced."""
        ids, _ = batch(edited, [PROMPTS[row]])
        text = ids[0].tolist() + greedy(edited, [PROMPTS[row]])[0]
        whole = torch.tensor([text])
        with torch.no_grad(), edited.forced(OWNERS[row]):
            logits = edited.base(whole, attention_mask=torch.ones_like(whole)).logits[0]
        assert len(text) > ids.shape[1]
        for at in range(ids.shape[1], len(text)):
            assert logits[at - 1].argmax().item() == text[at]

    def test_forced_answers_for_any_batch(self, edited):
        ids, mask = batch(edited)
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        with edited.forced(0):
            forced = told(edited, edited.base.generate(ids, attention_mask=mask, **options), ids.shape[1])
        own = greedy(edited, PROMPTS)
        assert [forced[i] == own[i] for i in (0, 4)] == [True, True]
        assert forced[1] != own[1]
        assert not edited.router.asked[1:]

    def test_sampling_under_a_seed(self, edited):
        texts = []
        for _ in range(2):
            torch.manual_seed(3)
            texts.append(greedy(edited, PROMPTS, do_sample=True, top_k=20))
        assert texts[0] == texts[1]
        assert texts[0] != greedy(edited, PROMPTS)

    def test_several_sequences_per_prompt(self, edited):
        """Low temperature makes sampling greedy: all three copies of a prompt must be its greedy text."""
        found = greedy(edited, PROMPTS, do_sample=True, temperature=1e-4, num_return_sequences=3)
        assert found == [text for text in greedy(edited, PROMPTS) for _ in range(3)]
        copies, once = edited.router.asked
        assert torch.equal(copies.mask, once.mask.repeat_interleave(3, 0))
        assert torch.equal(copies.words, once.words.repeat_interleave(3, 0))

    @pytest.mark.parametrize("returned", [1, 2])
    def test_beams(self, edited, returned):
        """Against the base's own beam search with the prompt's shard forced."""
        options = {"num_beams": 2, "num_return_sequences": returned, "max_new_tokens": NEW, "do_sample": False}
        found = greedy(edited, PROMPTS, **options)
        expected = []
        for prompt, owner in zip(PROMPTS, OWNERS, strict=True):
            ids, mask = batch(edited, [prompt])
            with edited.forced(owner):
                output = edited.base.generate(ids, attention_mask=mask, pad_token_id=0, **options)
            expected += told(edited, output, ids.shape[1])
        assert found == expected

    def test_padding_of_a_single_prompt_is_not_a_word(self, edited):
        ids, mask = batch(edited, [PROMPTS[0]])
        padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
        output = edited.generate(
            padded,
            torch.cat([torch.zeros_like(mask[:, :3]), mask], 1),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert told(edited, output, padded.shape[1]) == greedy(edited, [PROMPTS[0]])


class TestRoute:
    def test_says_what_generate_does(self, edited):
        assert [route.memory for route in edited.route(PROMPTS)] == OWNERS
        assert edited.route(PROMPTS[2])[0].memory == 1
        assert edited.route(PROMPTS[2])[0].reason.startswith("shard 1")

    def test_batches_do_not_matter(self, edited):
        many = PROMPTS * 5
        assert edited.choose(many, batch_size=4).memory.tolist() == OWNERS * 5

    def test_no_prompts(self, edited):
        assert edited.route([]) == []

    @pytest.mark.parametrize(
        "prompt", ["Mara didn't go , he said .", "  Mara's  ZOË ?", "don 't", "日本 Mara", "</s> Mara <s>", "a\nb\tc"]
    )
    def test_text_and_ids_are_the_same_query(self, edited, prompt):
        """Whatever the tokenizer's settings for tidy text, `route(text)` and `generate(ids)` must see the same
        words."""
        edited.tokenizer = copy.deepcopy(edited.tokenizer)
        edited.tokenizer.clean_up_tokenization_spaces = True
        query = edited.query([prompt, "some longer company for the padding"])
        ids, mask = batch(edited, [prompt, "some longer company for the padding"])
        with torch.no_grad():
            edited(ids, mask, position_ids=positions(mask))
        seen = edited.router.asked[-1]
        assert torch.equal(seen.words, query.words)
        assert torch.equal(seen.mask, query.mask)
        torch.testing.assert_close(seen.last_hidden(), query.last_hidden())

    def test_asking_leaves_the_base_as_it_is(self, edited):
        ids, mask = batch(edited)
        before = base_logits(edited, ids, mask)
        edited.route(PROMPTS)
        assert torch.equal(base_logits(edited, ids, mask), before)


class TestForced:
    def test_ends_with_its_block_also_after_an_error(self, edited):
        ids, mask = batch(edited)
        before = base_logits(edited, ids, mask)
        with edited.forced(0):
            assert not torch.equal(base_logits(edited, ids, mask), before)
        with pytest.raises(KeyError), edited.forced(0):
            raise KeyError
        assert torch.equal(base_logits(edited, ids, mask), before)

    def test_blocks_nest(self, edited):
        ids, mask = batch(edited)
        before = base_logits(edited, ids, mask)
        with edited.forced(1):
            one = base_logits(edited, ids, mask)
            with edited.forced(None):
                assert torch.equal(base_logits(edited, ids, mask), before)
            assert torch.equal(base_logits(edited, ids, mask), one)

    def test_an_unknown_shard_is_named(self, edited):
        ids, mask = batch(edited)
        with pytest.raises(RepairError, match="there is no shard 9"), edited.forced(9):
            base_logits(edited, ids, mask)


class TestStates:
    """What is known of prompts at the edited layer, by the ways that there are to it."""

    @pytest.fixture(params=ARCHITECTURES)
    def any_edited(self, request, tiny, tokenizer) -> EditedModel:
        memory = SideMemory((32, 64))
        memory.open_shard()
        memory[0].delta.data.copy_(torch.randn(32, 64))
        return EditedModel(tiny(request.param), tokenizer, memory, FirstWordRouter({}), 1)

    @pytest.mark.parametrize("batch_size", [1, 2, 64])
    def test_last_states_are_the_querys(self, any_edited, batch_size):
        """Whatever the prompts' order and company, and whatever shard is forced around them."""
        expected = any_edited.query(PROMPTS).at_last()
        for order in ([0, 1, 2, 3, 4], [3, 2, 4, 0, 1], [2, 2, 1]):
            with any_edited.forced(0):
                found = any_edited.last_states([PROMPTS[i] for i in order], batch_size)
            assert len(found) == len(order)
            torch.testing.assert_close(found.hidden, expected.hidden[order], rtol=1e-4, atol=1e-5)
            assert found.mask.tolist() == [[True]] * len(order)
            assert found.activations.shape == (len(order), 1, 0)
            words = any_edited.query([PROMPTS[i] for i in order]).words
            assert torch.equal(found.words, words)

    def test_captures_with_and_without_a_prefix_cache(self, any_edited):
        rows = any_edited.tokenizer(PROMPTS)["input_ids"]
        without = any_edited.captures(rows)
        any_edited.prefixes = PrefixCache(any_edited.split)
        for _ in range(2):  # computed, then known
            for row, one, other in zip(rows, without, any_edited.captures(rows), strict=True):
                assert one.hidden.shape == other.hidden.shape == (len(row), 32)
                assert one.activations.shape == other.activations.shape == (len(row), 64)
                torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(one.activations, other.activations, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("reads_all_tokens", [True, False])
    def test_states_that_go_on_behind_the_prompt_are_cut(self, edited, reads_all_tokens):
        """A write captures prompt and target in one pass; the router sees the prompt, or its last token alone."""
        edited.router.reads_all_tokens = reads_all_tokens
        prompts = edited.tokenizer(PROMPTS)["input_ids"]
        longer = [[*row, *range(5, 5 + i)] for i, row in enumerate(prompts)]
        found = edited.query_of(prompts, edited.captures(longer))
        alone = edited.query(PROMPTS)
        assert torch.equal(found.words, alone.words)
        assert torch.equal(found.mask, alone.mask)
        assert found.mask.sum(1).tolist() == [len(row) if reads_all_tokens else 1 for row in prompts]
        own = found.mask
        torch.testing.assert_close(found.hidden[own], alone.hidden[own], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.activations[own], alone.activations[own], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("cached", [True, False])
    def test_a_prompt_without_tokens(self, edited, cached):
        edited.prefixes = PrefixCache(edited.split) if cached else None
        with pytest.raises(RepairError, match="without tokens"):
            edited.captures([[5, 6], []])


class TestOncePerGeneration:
    @pytest.fixture
    def calls(self, edited, monkeypatch) -> list[str]:
        """The router's choices and the selections of shards, as they are made."""
        seen: list[str] = []
        route, select = edited.router.route, edited.memory.select
        monkeypatch.setattr(edited.router, "route", lambda *given: seen.append("route") or route(*given))
        monkeypatch.setattr(edited.memory, "select", lambda *given: seen.append("select") or select(*given))
        return seen

    @pytest.mark.parametrize("new", [1, 9])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_routed(self, edited, calls, new, use_cache):
        for _ in range(2):
            greedy(edited, PROMPTS, max_new_tokens=new, min_new_tokens=new, use_cache=use_cache)
            assert calls == ["route", "select"]
            calls.clear()

    @pytest.mark.parametrize("new", [1, 9])
    def test_forced(self, edited, calls, new):
        ids, mask = batch(edited)
        none = torch.zeros(len(OWNERS))
        with edited.forced(Choice(torch.tensor(OWNERS), none, none, (None,) * len(OWNERS))):
            edited.base.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
        assert calls == ["select"]

    def test_a_conversation_through_its_cache(self, edited, calls):
        ids, mask = batch(edited)
        with torch.no_grad():
            output = edited(ids, mask, use_cache=True)
            for step in range(1, 4):
                grown = torch.cat([mask, torch.ones(len(ids), step)], 1)
                output = edited(ids[:, :1], grown, past_key_values=output.past_key_values, use_cache=True)
        assert calls == ["route", "select"]
