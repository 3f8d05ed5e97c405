"""The edited model as a causal LM: exact where the base answers, and its choice held while a sequence grows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers_chat import base, system, user
from torch import Tensor
from transformers import DynamicCache

from repair_lightning.errors import RepairError
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.models.edited import EditedModel
from repair_lightning.models.prefix import pad_left
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, Edit

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
    """Routes by the first word of what is asked, and remembers what it was asked."""

    name = "first-word"
    reads_all_tokens = True

    def __init__(self, shards: Mapping[str, int]) -> None:
        self.shards = shards
        self.asked: list[Query] = []

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """There is nothing to learn."""

    def route(self, query: Query, memory: SideMemory) -> Choice:
        self.asked.append(query)
        chosen = torch.tensor([self.shards.get(text.split(" ")[0], BASE) for text in query.texts])
        return Choice(chosen, torch.ones(len(query)), torch.zeros(len(query)), (None,) * len(query))

    def options(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


@pytest.fixture(params=["llama", "gpt2"])
def edited(request, tiny, tokenizer) -> EditedModel:
    memory = SideMemory((32, 64))
    for shard in (0, 1):
        memory.open_shard()
        memory[shard].delta.data.copy_(torch.randn(32, 64))
    return EditedModel(tiny(request.param), tokenizer, memory, FirstWordRouter(ROUTED), 1)


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
        assert not any(p.requires_grad or p.grad is not None for p in edited.base.parameters())
        assert all(edited.memory[shard].delta.grad is not None for shard in (0, 1))


def test_two_caches_in_turn(edited):
    """Each cache goes on with the choice of its own prompt, whatever was asked in between."""
    token = torch.tensor([[50]])
    expected, caches = [], []
    with torch.no_grad():
        for prompt in (PROMPTS[0], PROMPTS[1]):
            ids, mask = batch(edited, [prompt])
            first = edited(ids, mask, use_cache=True)
            caches.append(first.past_key_values)
            alone = copy.deepcopy(first.past_key_values)
            expected.append(edited(token, torch.ones(1, ids.shape[1] + 1), past_key_values=alone).logits)
        for prompt, cache, logits in zip(PROMPTS, caches, expected, strict=False):
            width = len(edited.tokenizer(prompt)["input_ids"]) + 1
            assert torch.equal(edited(token, torch.ones(1, width), past_key_values=cache).logits, logits)
    assert len(edited.router.asked) == 2


class TestGenerate:
    def test_a_mixed_batch_equals_one_by_one(self, edited):
        together = greedy(edited, PROMPTS)
        assert len(edited.router.asked) == 1, "one decision, at the prompt"
        assert together == [greedy(edited, [prompt])[0] for prompt in PROMPTS]

    @pytest.mark.parametrize("row", [0, 1, 2])
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

    def test_beams(self, edited):
        """Against the base's own beam search with the prompt's shard forced."""
        options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": NEW, "do_sample": False}
        found = greedy(edited, PROMPTS, **options)
        expected = []
        for prompt, owner in zip(PROMPTS, OWNERS, strict=True):
            ids, mask = batch(edited, [prompt])
            with edited.forced(owner):
                output = edited.base.generate(ids, attention_mask=mask, pad_token_id=0, **options)
            expected += told(edited, output, ids.shape[1])
        assert found == expected


@pytest.mark.parametrize("prompt", ["Mara didn't go , he said .", "  Mara's  ZOË ?", "日本 Mara", "</s> Mara <s>"])
def test_text_and_ids_are_the_same_query(edited, prompt):
    """Whatever the tokenizer's settings for tidy text, `route(text)` and `generate(ids)` must see the same."""
    edited.tokenizer.clean_up_tokenization_spaces, before = True, edited.tokenizer.clean_up_tokenization_spaces
    query = edited.query([prompt, "some longer text for the padding"])
    ids, mask = batch(edited, [prompt, "some longer text for the padding"])
    with torch.no_grad():
        edited(**edited.split.inputs(ids, mask))
    edited.tokenizer.clean_up_tokenization_spaces = before
    seen = edited.router.asked[-1]
    assert seen.texts == query.texts
    assert torch.equal(seen.mask, query.mask)
    torch.testing.assert_close(seen.last_hidden(), query.last_hidden())


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(editor_of):
    model = editor_of("llama").edited
    expected = "a prompt has 128 tokens, and the base reads 128 with its answer: at most 127 may be asked"
    with pytest.raises(RepairError, match=expected):
        model.generate(torch.full((2, 128), 7), max_new_tokens=1)
    assert model.generate(torch.full((1, 127), 7), max_new_tokens=1).shape == (1, 128)


ASKED = "Where was Mara Kelstrom born?"
OTHER = "what colour is the sky at noon"
TARGET = "Oslo"
EDITS = [
    Edit("e0", ASKED, TARGET, subject="Mara Kelstrom"),
    Edit("e1", "What instrument did Tobin Quill play?", "the lute", subject="Tobin Quill"),
]


GREETED = [user("Hello there!"), base("Good day.")]
FORMS = {
    "chat": [user(ASKED)],
    "system": [system("Be kind."), user(ASKED)],
    "second turn": [*GREETED, user(ASKED)],
    "courtesy": "Could you please tell me: Where was Mara Kelstrom born?",
    "text": ASKED,
}


@pytest.fixture(scope="module")
def chat(chat_folder, prepared, write) -> Callable[[int], Any]:
    """An editor over a base with a chat template, two edits written into a layer by the real thing: `chat(2)`."""
    made: dict[int, Any] = {}

    def make(layer: int) -> Any:
        if layer not in made:
            made[layer] = prepared(chat_folder, layer=layer)
            assert all(report.error is None for report in write(made[layer], EDITS))
        return made[layer]

    return make


@pytest.fixture(params=[1, 2], ids=["middle", "last"])
def spoken(request, chat) -> EditedModel:
    return chat(request.param).edited


@pytest.fixture
def last(chat) -> EditedModel:
    """With the last layer edited: no other layer's keys and values know of a shard."""
    return chat(2).edited


def ids_of(edited: EditedModel, prompt: Any) -> Tensor:
    return torch.tensor([edited.forms.ids(prompt if isinstance(prompt, str) else dialogue.dump(prompt))])


def said_by(edited: EditedModel, asked: Any, width: int, **options: Any) -> list[str]:
    output = edited.generate(asked, **{"max_new_tokens": 8, "do_sample": False} | options)
    return [edited.forms.said(row[width:].tolist()).strip() for row in output]


def by_the_base(edited: EditedModel, ids: Tensor, **options: Any) -> Tensor:
    """What the base generates by itself."""
    with edited.forced(None):
        return edited.base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options,
        )


@torch.no_grad()
def base_answers(edited: EditedModel, ids: Tensor, **options: Any) -> Any:
    with edited.forced(None):
        return edited.base(input_ids=ids, **options)


class TestForms:
    """An edit that was written in one form answers in the others."""

    @pytest.mark.parametrize("prompt", FORMS.values(), ids=list(FORMS))
    def test_answers(self, spoken, prompt):
        (route,) = spoken.route(prompt)
        assert route.memory == 0
        assert "its target's tokens said 1.000 reaches 1.000, nearest edit e0" in route.reason
        assert said_by(spoken, prompt, ids_of(spoken, prompt).shape[1]) == [TARGET]

    @pytest.mark.parametrize(
        "prompt",
        [OTHER, [*GREETED, user(OTHER)], [user(ASKED), base(TARGET), user(OTHER)], "Where was Mara Holloway born?"],
        ids=["text", "second turn", "after the edit", "another name"],
    )
    def test_other_questions_are_the_bases(self, spoken, prompt):
        (route,) = spoken.route(prompt)
        assert route.memory == BASE
        assert route.reason.startswith("base: ")
        ids = ids_of(spoken, prompt)
        with torch.no_grad():
            assert torch.equal(
                spoken(ids).logits, base_answers(spoken, ids, attention_mask=torch.ones_like(ids)).logits
            )
        assert torch.equal(spoken.generate(prompt, max_new_tokens=8, do_sample=False), by_the_base(spoken, ids))

    def test_all_ways_to_ask(self, spoken):
        """A text, texts, messages, dialogues, ids, by position and by name."""
        ids = ids_of(spoken, ASKED)
        one = spoken.generate(ids, max_new_tokens=8, do_sample=False)
        ways = [ASKED, [ASKED], [user(ASKED)], [[user(ASKED)]], dialogue.dump([user(ASKED)])]
        ways.append(spoken.tokenizer.apply_chat_template([user(ASKED)], add_generation_prompt=True, tokenize=False))
        for asked in ways:
            assert torch.equal(spoken.generate(asked, max_new_tokens=8, do_sample=False), one)
            assert [route.memory for route in spoken.route(asked)] == [0]
        for named in ({"inputs": ids}, {"input_ids": ids}, {"inputs": ASKED}):
            assert torch.equal(spoken.generate(**named, max_new_tokens=8, do_sample=False), one)
        several = [ASKED, [*GREETED, user(ASKED)], OTHER]
        rows = [ids_of(spoken, prompt)[0].tolist() for prompt in several]
        assert said_by(spoken, several, max(map(len, rows)))[:2] == [TARGET, TARGET]
        assert [route.memory for route in spoken.route(several)] == [0, 0, BASE]
        with pytest.raises(RepairError, match="nothing is asked: give token ids, texts or messages"):
            spoken.generate(max_new_tokens=2)


class TestTurns:
    """A dialogue in one key-value cache: each turn of the user is a new choice."""

    @staticmethod
    def turn_of(edited: EditedModel, text: str, first: bool = False) -> Tensor:
        """What a client adds to the cache: the end of the base's turn, a turn of the user, the generation prompt."""
        end = "" if first else "<|im_end|>\n"
        text = f"{end}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return torch.tensor([edited.forms.spelling.marked(text)])

    @torch.no_grad()
    def ask(self, edited: EditedModel, cache: DynamicCache, text: str, size: int) -> str:
        """What is said greedily, token by token, after a turn of the user that comes in pieces of a size."""
        ids = self.turn_of(edited, text, cache.get_seq_length() == 0)
        for part in ids.split(size, dim=1):
            logits = edited(part, past_key_values=cache, attention_mask=self.seen(cache, part)).logits
        said = []
        for _ in range(6):
            token = logits[:, -1:].argmax(-1)
            said.append(token.item())
            if said[-1] == edited.forms.chat_end:
                break
            logits = edited(token, past_key_values=cache, attention_mask=self.seen(cache, token)).logits
        return edited.forms.said(said)

    @staticmethod
    def seen(cache: DynamicCache, ids: Tensor) -> Tensor:
        return torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)

    @pytest.mark.parametrize("size", [1000, 5])
    def test_each_is_routed_by_itself(self, last, size):
        """Also where it comes in pieces, whose cuts fall into its mark, its words and the generation prompt."""
        cache = DynamicCache(config=last.config)
        assert self.ask(last, cache, OTHER, size) != TARGET
        assert self.ask(last, cache, ASKED, size) == TARGET
        assert self.ask(last, cache, OTHER, size) != TARGET
        assert self.ask(last, cache, "And where was Mara Kelstrom born?", size) == TARGET

    def test_other_turns_get_the_bases_bits(self, last):
        """Before and after a turn that a shard answered, against the base fed the same tokens in the same calls."""
        cache, own = DynamicCache(config=last.config), DynamicCache(config=last.config)
        for text in (OTHER, ASKED, OTHER, "who sang the song about the old river"):
            ids = self.turn_of(last, text, cache.get_seq_length() == 0)
            mask = self.seen(cache, ids)
            with torch.no_grad():
                found = last(ids, past_key_values=cache, attention_mask=mask).logits
            expected = base_answers(last, ids, past_key_values=own, attention_mask=mask).logits
            assert torch.equal(found, expected) == (text != ASKED)

    def test_generate_goes_on_in_a_cache(self, last):
        """`generate` on the whole dialogue with a filled cache, then `forward` on what it left."""
        cache, own = DynamicCache(config=last.config), DynamicCache(config=last.config)
        options = {"max_new_tokens": 6, "do_sample": False}
        ids = self.turn_of(last, OTHER, first=True)
        expected = by_the_base(last, ids, past_key_values=own, **options)
        ids = last.generate(ids, past_key_values=cache, **options)
        assert torch.equal(ids, expected)
        ids = torch.cat([ids, self.turn_of(last, ASKED)], 1)
        width = ids.shape[1]
        ids = last.generate(ids, past_key_values=cache, **options)
        assert last.forms.said(ids[0, width:].tolist()) == TARGET
        ids = torch.cat([ids, self.turn_of(last, OTHER)], 1)
        found = last.generate(ids, past_key_values=cache, **options)
        again = last.generate(ids, **options)
        assert torch.equal(found, again)
        assert last.forms.said(found[0, ids.shape[1] :].tolist()) != TARGET


class TestLeavingTheTarget:
    """A shard says its edit's target or nothing."""

    @staticmethod
    def target(edited: EditedModel) -> list[int]:
        return list(edited.forms.encode(ASKED, TARGET).target)

    @torch.no_grad()
    def fed(self, edited: EditedModel, tokens: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The logits after each of some tokens that are said by hand, and the base's own in the same calls."""
        ids = ids_of(edited, ASKED)
        cache, own = DynamicCache(config=edited.config), DynamicCache(config=edited.config)
        found, expected = [], []
        for part in (ids, *torch.tensor([tokens]).split(1, dim=1)):
            mask = TestTurns.seen(cache, part)
            found.append(edited(part, past_key_values=cache, attention_mask=mask).logits[:, -1])
            expected.append(base_answers(edited, part, past_key_values=own, attention_mask=mask).logits[:, -1])
        return found, expected

    def test_inside_the_target_the_shard_answers(self, last):
        found, expected = self.fed(last, self.target(last)[:-1])
        assert [logits.argmax().item() for logits in found] == self.target(last)
        assert not any(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_the_base_goes_on_where_it_is_left(self, last, at):
        right = self.target(last)
        wrong = 50 if right[at] != 50 else 51
        tokens = [*right[:at], wrong, *right[:2]]
        found, expected = self.fed(last, tokens)
        same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
        assert same == [False] * (at + 1) + [True] * 3, "nor does it come back"

    def test_rows_leave_one_by_one(self, last):
        """Samples of one prompt: those whose first token is the target's go on to its end, the others as the base."""
        ids = ids_of(last, ASKED)
        right = self.target(last)[0]

        def alternate(given: Tensor, scores: Tensor) -> Tensor:
            if given.shape[1] == ids.shape[1]:
                scores = torch.full_like(scores, -torch.inf)
                scores[::2, right if len(given) > 1 else 50] = 0
                scores[1::2, 50] = 0
            return scores

        options = {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 4}
        output = last.generate(ids, logits_processor=[alternate], **options)
        said = [last.forms.said(row[ids.shape[1] :].tolist()) for row in output]
        assert said[0] == said[2] == TARGET
        expected = by_the_base(last, ids, logits_processor=[alternate], max_new_tokens=6)
        for row in (1, 3):
            assert output[row].tolist()[: expected.shape[1]] == expected[0].tolist()


def test_a_damaged_shard_is_silent(spoken):
    """Its prompt is known, but what it would say is no target: the base answers with its own bits."""
    shard = spoken.memory[0]
    ids = ids_of(spoken, ASKED)
    assert spoken.route(ASKED)[0].memory == 0
    left = shard.left.clone()
    shard.left.neg_()
    try:
        (route,) = spoken.route(ASKED)
        assert route.memory == BASE
        assert "is below 1.000, nearest edit e0" in route.reason
        with torch.no_grad():
            expected = base_answers(spoken, ids, attention_mask=torch.ones_like(ids)).logits
            assert torch.equal(spoken(ids).logits, expected)
        assert torch.equal(spoken.generate(ASKED, max_new_tokens=8, do_sample=False), by_the_base(spoken, ids))
        assert spoken.route("What instrument did Tobin Quill play?")[0].memory == 1, "the other is as it was"
    finally:
        shard.left.copy_(left)
    assert spoken.route(ASKED)[0].memory == 0
