"""The small world keeps its promises: disjoint domains, unseen rephrases, a base that knows its facts."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from repair_lightning.world import base_dir, edits_path, irrelevant_path
from repair_lightning.world.__main__ import main
from repair_lightning.world.base import Recipe, build_model, encode_world, save_base, train_model, train_tokenizer
from repair_lightning.world.check import check_base
from repair_lightning.world.edits import make_edits, make_irrelevant, write_jsonl
from repair_lightning.world.facts import Fact, World, build_world, read_jsonl

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1}
TINY = Recipe(**SHAPE, epochs=4, batch_size=32, learning_rate=1e-2, bfloat16=False)


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


@pytest.fixture(scope="module", params=["shipped", "another seed"])
def case(request: pytest.FixtureRequest) -> Case:
    seed = 7 if request.param == "another seed" else 0
    world = build_world(seed)
    edits = read_jsonl(edits_path()) if request.param == "shipped" else make_edits(world, seed)
    return Case(edits, prompts(world.people), prompts(world.places), trained_prompts(world.facts))


class TestFacts:
    def test_domains_share_no_subject(self, world: World):
        domains = [{fact.subject for fact in facts} for facts in (world.people, world.places, world.minerals)]
        assert len(set.union(*domains)) == sum(map(len, domains))

    def test_held_out_prompts_are_in_no_training_text(self, world: World):
        texts = set(world.texts())
        for fact in world.people:
            assert not any(f"{fact.ask(phrasing)} {fact.answer}" in texts for phrasing in fact.held_out)


class TestEdits:
    def test_an_edit_changes_a_known_fact_to_another_object_of_its_relation(self, case: Case):
        for edit in case.edits:
            fact = case.people[edit["prompt"]]
            assert edit["prompt"] in case.trained
            assert edit["subject"] == fact.subject
            assert edit["target"] in fact.relation.objects
            assert edit["target"] != fact.answer

    def test_a_fact_is_edited_at_most_once(self, case: Case):
        assert len({case.people[edit["prompt"]].key for edit in case.edits}) == len(case.edits)

    def test_rephrases_are_held_out_phrasings_of_the_same_fact_and_never_trained_on(self, case: Case):
        for edit in case.edits:
            fact = case.people[edit["prompt"]]
            assert set(edit["rephrases"]) <= set(map(fact.ask, fact.held_out))
            assert case.trained.isdisjoint(edit["rephrases"])

    def test_locality_asks_for_true_facts_about_places(self, case: Case):
        probes = [probe for edit in case.edits for probe in edit["locality"]]
        assert all(case.places[probe["prompt"]].answer == probe["answer"] for probe in probes)
        assert case.trained.issuperset(probe["prompt"] for probe in probes)

    def test_near_asks_the_same_of_somebody_never_edited(self, case: Case):
        edited = {case.people[edit["prompt"]].key for edit in case.edits}
        for edit in case.edits:
            [probe] = edit["near"]
            fact = case.people[probe["prompt"]]
            assert fact.key not in edited
            assert probe["answer"] == fact.answer
            assert probe["prompt"] in case.trained
            assert probe["prompt"].replace(fact.subject, "{}") == edit["prompt"].replace(edit["subject"], "{}")

    def test_shipped_file_is_what_the_generator_yields(self, world: World, tmp_path: Path):
        write_jsonl(make_edits(world), tmp_path / "edits.jsonl")
        assert (tmp_path / "edits.jsonl").read_bytes() == edits_path().read_bytes()


class TestIrrelevant:
    def test_records_are_true_and_distinct(self, world: World):
        asked, irrelevant = prompts(world.minerals), read_jsonl(irrelevant_path())
        assert len(irrelevant) >= 600
        assert len({record["question"] for record in irrelevant}) == len(irrelevant)
        for record in irrelevant:
            assert set(record) == {"question", "answer"}
            assert asked[record["question"]].answer == record["answer"]

    def test_no_question_occurs_in_the_edits(self):
        edits = edits_path().read_text(encoding="utf-8")
        asked = [record["question"] for record in read_jsonl(irrelevant_path())]
        assert not any(json.dumps(question, ensure_ascii=False) in edits for question in asked)

    def test_shipped_file_is_what_the_generator_yields(self, world: World):
        assert read_jsonl(irrelevant_path()) == make_irrelevant(world)


class TestBase:
    def test_it_knows_its_world(self, world: World):
        for score in check_base(base_dir(), world, sample=100, rng=random.Random(1)):
            assert score.accuracy >= score.required, score


class TestTraining:
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
    def test_build_writes_everything_and_check_refuses_an_untrained_base(self, tmp_path: Path):
        assert main(["build", "--out", str(tmp_path), "--epochs", "0"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"base-model", "edits.jsonl", "irrelevant.jsonl"}
        assert main(["check", "--dir", str(tmp_path / "base-model"), "--sample", "20"]) == 1
