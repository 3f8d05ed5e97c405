"""The small world keeps its promises: disjoint domains, unseen rephrases, a base that knows its facts."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from repair_lightning.world import base_dir, edits_path, irrelevant_path
from repair_lightning.world.__main__ import main
from repair_lightning.world.base import (
    Example,
    Recipe,
    build_model,
    collate,
    curriculum,
    encode_world,
    epoch_batches,
    learning_rate_factor,
    save_base,
    train_model,
    train_tokenizer,
)
from repair_lightning.world.check import check_base
from repair_lightning.world.edits import make_edits, make_irrelevant, read_jsonl, write_jsonl
from repair_lightning.world.facts import Fact, World, build_world
from repair_lightning.world.muon import Muon, orthogonalise

TINY = Recipe(
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    kv_heads=1,
    epochs=4,
    batch_size=32,
    learning_rate=1e-2,
    bfloat16=False,
)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def small_world(world: World) -> World:
    return World(world.people[:60], world.places[:20], world.minerals[:20])


def prompts(facts: tuple[Fact, ...]) -> dict[str, Fact]:
    """Every prompt, trained on or held out, with the fact it asks for."""
    return {fact.ask(phrasing): fact for fact in facts for phrasing in fact.trained + fact.held_out}


def trained_prompts(facts: tuple[Fact, ...]) -> set[str]:
    return {fact.ask(phrasing) for fact in facts for phrasing in fact.trained}


class Case(NamedTuple):
    """A file of edits with what is needed to judge it."""

    edits: list[dict[str, Any]]
    people: dict[str, Fact]
    places: dict[str, Fact]
    trained: set[str]


@pytest.fixture(scope="module", params=["shipped", "generated", "another seed"])
def case(request: pytest.FixtureRequest) -> Case:
    seed = 7 if request.param == "another seed" else 0
    world = build_world(seed)
    edits = read_jsonl(edits_path()) if request.param == "shipped" else make_edits(world, seed)
    return Case(edits, prompts(world.people), prompts(world.places), trained_prompts(world.facts))


@pytest.fixture(scope="module", params=["shipped", "generated"])
def irrelevant(request: pytest.FixtureRequest, world: World) -> list[dict[str, str]]:
    return read_jsonl(irrelevant_path()) if request.param == "shipped" else make_irrelevant(world)


class TestFacts:
    def test_same_seed_same_world(self, world: World):
        assert build_world(0) == world
        assert build_world(1) != world

    def test_global_random_state_is_untouched(self):
        before = random.getstate()
        make_edits(build_world(3), 3)
        assert random.getstate() == before

    @pytest.mark.parametrize(
        ("domain", "subjects", "relations", "phrasings"),
        [("people", 1_000, 6, 8), ("places", 200, 4, 3), ("minerals", 200, 3, 3)],
    )
    def test_sizes(self, world: World, domain: str, subjects: int, relations: int, phrasings: int):
        facts = getattr(world, domain)
        assert len({fact.subject for fact in facts}) >= subjects
        assert len({fact.relation.name for fact in facts}) >= relations
        assert len({fact.key for fact in facts}) == len(facts)
        assert all(len(set(fact.trained + fact.held_out)) >= phrasings for fact in facts)

    def test_people_hold_out_three_phrasings_each(self, world: World):
        assert {(len(fact.trained), len(fact.held_out)) for fact in world.people} == {(5, 3)}
        assert all(set(fact.trained + fact.held_out) == set(fact.relation.phrasings) for fact in world.people)

    def test_every_phrasing_is_trained_on_with_somebody(self, world: World):
        trained = {phrasing for fact in world.people for phrasing in fact.trained}
        assert trained == {phrasing for fact in world.people for phrasing in fact.relation.phrasings}

    def test_answers_come_from_closed_lists_and_are_short(self, world: World):
        assert all(fact.answer in fact.relation.objects for fact in world.facts)
        assert all(1 <= len(answer.split()) <= 3 for fact in world.facts for answer in fact.relation.objects)
        assert all(len(set(fact.relation.objects)) == len(fact.relation.objects) >= 20 for fact in world.facts)

    def test_a_prompt_names_its_subject_and_ends_without_space(self, world: World):
        for prompt, fact in prompts(world.facts).items():
            assert fact.subject in prompt
            assert prompt == prompt.strip()

    def test_no_two_facts_share_a_prompt(self, world: World):
        assert len(prompts(world.facts)) == sum(len(fact.trained + fact.held_out) for fact in world.facts)

    def test_domains_share_no_subject(self, world: World):
        domains = [{fact.subject for fact in facts} for facts in (world.people, world.places, world.minerals)]
        assert len(set.union(*domains)) == sum(map(len, domains))

    def test_held_out_prompts_are_in_no_training_text(self, world: World):
        texts = set(world.texts())
        for fact in world.people:
            assert not any(f"{fact.ask(phrasing)} {fact.answer}" in texts for phrasing in fact.held_out)


class TestEdits:
    def test_fields(self, case: Case):
        assert len(case.edits) >= 2_000
        assert len({edit["id"] for edit in case.edits}) == len(case.edits)
        for edit in case.edits:
            assert set(edit) == {"id", "subject", "prompt", "target", "rephrases", "locality", "near"}
            assert len(set(edit["rephrases"])) == 2
            assert edit["locality"]
            assert edit["near"]

    def test_an_edit_changes_a_known_fact_to_another_object_of_its_relation(self, case: Case):
        for edit in case.edits:
            fact = case.people[edit["prompt"]]
            assert edit["prompt"] in case.trained
            assert edit["subject"] == fact.subject
            assert edit["target"] in fact.relation.objects
            assert edit["target"] != fact.answer

    def test_a_fact_is_edited_at_most_once(self, case: Case):
        assert len({case.people[edit["prompt"]].key for edit in case.edits}) == len(case.edits)

    def test_rephrases_are_held_out_phrasings_of_the_same_fact(self, case: Case):
        for edit in case.edits:
            fact = case.people[edit["prompt"]]
            assert set(edit["rephrases"]) <= set(map(fact.ask, fact.held_out))

    def test_rephrases_are_never_trained_on(self, case: Case):
        assert case.trained.isdisjoint(rephrase for edit in case.edits for rephrase in edit["rephrases"])

    def test_locality_asks_for_true_facts_about_places(self, case: Case):
        probes = [probe for edit in case.edits for probe in edit["locality"]]
        assert all(case.places[probe["prompt"]].answer == probe["answer"] for probe in probes)
        assert case.trained.issuperset(probe["prompt"] for probe in probes)

    def test_locality_prompts_vary(self, case: Case):
        assert len({probe["prompt"] for edit in case.edits for probe in edit["locality"]}) >= 2_000

    def test_near_asks_the_same_of_somebody_never_edited(self, case: Case):
        edited = {case.people[edit["prompt"]].key for edit in case.edits}
        for edit in case.edits:
            [probe] = edit["near"]
            fact = case.people[probe["prompt"]]
            assert fact.key not in edited
            assert probe["answer"] == fact.answer
            assert probe["prompt"] in case.trained
            assert probe["prompt"].replace(fact.subject, "{}") == edit["prompt"].replace(edit["subject"], "{}")

    def test_order_mixes_relations(self, case: Case):
        assert len({case.people[edit["prompt"]].relation.name for edit in case.edits[:60]}) == 6

    def test_shipped_file_is_what_the_generator_yields(self, world: World, tmp_path: Path):
        write_jsonl(make_edits(world), tmp_path / "edits.jsonl")
        assert (tmp_path / "edits.jsonl").read_bytes() == edits_path().read_bytes()

    def test_another_seed_gives_other_edits(self, world: World):
        assert make_edits(world, 0) != make_edits(world, 1)

    @pytest.mark.parametrize("count", [0, -1, 3_001])
    def test_impossible_count_is_refused(self, world: World, count: int):
        with pytest.raises(ValueError, match=rf"count={count}: must be between 1 and 3000"):
            make_edits(world, count=count)


class TestIrrelevant:
    def test_records_are_true_and_distinct(self, world: World, irrelevant: list[dict[str, str]]):
        asked = prompts(world.minerals)
        assert len(irrelevant) >= 600
        assert len({record["question"] for record in irrelevant}) == len(irrelevant)
        for record in irrelevant:
            assert set(record) == {"question", "answer"}
            assert asked[record["question"]].answer == record["answer"]

    def test_no_question_occurs_in_the_edits(self, irrelevant: list[dict[str, str]]):
        edits = edits_path().read_text(encoding="utf-8")
        assert not any(json.dumps(record["question"], ensure_ascii=False) in edits for record in irrelevant)

    def test_shipped_file_is_what_the_generator_yields(self, world: World):
        assert read_jsonl(irrelevant_path()) == make_irrelevant(world)


class TestBase:
    def test_folder_holds_what_transformers_needs(self):
        names = {path.name for path in base_dir().iterdir()}
        assert names >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert sum(path.stat().st_size for path in base_dir().iterdir()) <= 16 * 2**20

    def test_shape_and_precision(self):
        config = AutoConfig.from_pretrained(base_dir())
        assert config.model_type == "llama"
        assert config.num_hidden_layers >= 12
        with safe_open(base_dir() / "model.safetensors", "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118

    def test_special_tokens_agree(self):
        tokenizer, config = AutoTokenizer.from_pretrained(base_dir()), AutoConfig.from_pretrained(base_dir())
        generation = GenerationConfig.from_pretrained(base_dir())
        ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert ids == (0, 1, 2)
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids
        assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == ids

    def test_tokenizer_is_the_one_the_world_yields(self, world: World):
        shipped, fresh = AutoTokenizer.from_pretrained(base_dir()), train_tokenizer(world, Recipe.vocab_size)
        assert shipped.get_vocab() == fresh.get_vocab()
        assert 2_000 <= len(shipped) <= 4_096

    def test_tokenizer_prepends_bos_and_round_trips(self):
        tokenizer = AutoTokenizer.from_pretrained(base_dir())
        text = "Where was Zoë “Q” O'Neil born? 東京"
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_prompt_tokens_do_not_depend_on_the_answer(self, world: World):
        tokenizer = AutoTokenizer.from_pretrained(base_dir())
        for fact in random.Random(0).sample(world.facts, 200):
            prompt = fact.ask(fact.trained[0])
            whole = tokenizer(f"{prompt} {fact.answer}")["input_ids"]
            assert whole[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]

    def test_it_knows_its_world(self, world: World):
        for score in check_base(base_dir(), world, sample=300, rng=random.Random(1)):
            assert score.accuracy >= score.required, score


class TestTraining:
    def test_collate_pads_and_weights(self):
        ids, weights = collate([Example([1, 5, 6, 2], 2), Example([1, 7, 2], 2)], prompt_weight=0.25)
        assert ids.tolist() == [[1, 5, 6, 2], [1, 7, 2, 0]]
        assert weights.tolist() == [[0.25, 0.25, 1, 1], [0.25, 0.25, 1, 0]]

    def test_learning_rate_warms_up_and_decays(self):
        factors = [learning_rate_factor(step, 100, warmup=0.1) for step in range(100)]
        assert factors[0] == pytest.approx(0.1)
        assert factors[10] == pytest.approx(1.0)
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert factors[-1] < 0.01

    def test_an_epoch_asks_each_fact_once(self):
        facts = [[Example([1, fact, phrasing, 2], 2) for phrasing in range(3, 6)] for fact in range(10, 60)]
        batches = list(epoch_batches(facts, batch_size=8, rng=random.Random(0)))
        assert sorted(example.ids[1] for batch in batches for example in batch) == list(range(10, 60))
        assert max(map(len, batches)) == 8

    def test_curriculum_doubles_from_an_eighth_to_all(self):
        epochs = [curriculum(range(80), epoch, doubling_epochs=2) for epoch in range(9)]
        assert {len(facts) for facts in epochs} == {80}
        assert [len(set(facts)) for facts in epochs] == [10, 10, 20, 20, 40, 40, 80, 80, 80]

    @pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
    def test_orthogonalised_matrix_has_singular_values_near_one(self, shape: tuple[int, int]):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        singular = torch.linalg.svdvals(orthogonalise(matrix))
        assert singular.min() > 0.5
        assert singular.max() < 1.3

    def test_muon_descends(self):
        matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = Muon([matrix], lr=0.2)
        before = matrix.square().sum().item()
        for _ in range(20):
            optimizer.zero_grad()
            matrix.square().sum().backward()
            optimizer.step()
        assert matrix.square().sum().item() < 0.5 * before

    def test_training_reduces_the_loss(self, small_world: World):
        torch.manual_seed(0)
        tokenizer = train_tokenizer(small_world, 500)
        model = build_model(TINY, tokenizer)
        history = train_model(model, encode_world(small_world, tokenizer), TINY, random.Random(0))
        assert history[-1] < 0.9 * history[0]

    def test_saving_replaces_a_folder_as_a_whole(self, small_world: World, tmp_path: Path):
        tokenizer = train_tokenizer(small_world, 500)
        folder = tmp_path / "base-model"
        folder.mkdir()
        (folder / "stale.txt").touch()
        save_base(build_model(TINY, tokenizer), tokenizer, folder)
        assert (folder / "model.safetensors").exists()
        assert not (folder / "stale.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["base-model"]


class TestCommandLine:
    def test_check_prints_a_table(self, capsys: pytest.CaptureFixture[str]):
        assert main(["check", "--sample", "20"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line[:12].strip() for line in lines] == ["questions", "trained", "held out", "places", "irrelevant"]

    def test_build_writes_everything_and_check_refuses_an_untrained_base(self, tmp_path: Path):
        assert main(["build", "--out", str(tmp_path), "--epochs", "0"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"base-model", "edits.jsonl", "irrelevant.jsonl"}
        assert main(["check", "--dir", str(tmp_path / "base-model"), "--sample", "20"]) == 1

    def test_a_command_is_needed(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit):
            main([])
        assert "build" in capsys.readouterr().err
