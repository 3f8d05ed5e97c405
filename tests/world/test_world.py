"""The small world keeps its promises: disjoint domains, unseen rephrases, a base that knows its facts."""

import json
import random
from pathlib import Path

import pytest
import torch

from repair_lightning.world import base_dir, edits_path, irrelevant_path
from repair_lightning.world.__main__ import main
from repair_lightning.world.base import (
    Recipe,
    build_model,
    check_base,
    encode_world,
    save_base,
    train_model,
    train_tokenizer,
)
from repair_lightning.world.facts import Fact, World, build_world, make_edits, make_irrelevant, read_jsonl, write_jsonl

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1}
TINY = Recipe(**SHAPE, epochs=4, batch_size=32, learning_rate=1e-2, bfloat16=False)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


def prompts(facts: tuple[Fact, ...]) -> dict[str, Fact]:
    """Every prompt, trained on or held out, with the fact it asks for."""
    return {fact.ask(phrasing): fact for fact in facts for phrasing in fact.trained + fact.held_out}


@pytest.mark.parametrize("shipped", [True, False], ids=["shipped", "another seed"])
def test_edits(shipped: bool):
    """An edit changes a known fact of a person to another object of its relation, once; rephrases are held out,
    locality asks for true facts about places, near asks the same of somebody who is never edited."""
    world = build_world(0 if shipped else 7)
    edits = read_jsonl(edits_path()) if shipped else make_edits(world, 7)
    people, places = prompts(world.people), prompts(world.places)
    trained = {fact.ask(phrasing) for fact in world.facts for phrasing in fact.trained}
    edited = {people[edit["prompt"]].key for edit in edits}
    assert len(edited) == len(edits)
    for edit in edits:
        fact = people[edit["prompt"]]
        assert edit["prompt"] in trained
        assert edit["subject"] == fact.subject
        assert edit["target"] in set(fact.relation.objects) - {fact.answer}
        assert set(edit["rephrases"]) <= set(map(fact.ask, fact.held_out)) - trained
        for probe in edit["locality"]:
            assert places[probe["prompt"]].answer == probe["answer"]
        [probe] = edit["near"]
        other = people[probe["prompt"]]
        assert other.key not in edited
        assert probe["answer"] == other.answer
        assert {probe["prompt"], *(probe["prompt"] for probe in edit["locality"])} <= trained
        assert probe["prompt"].replace(other.subject, "{}") == edit["prompt"].replace(edit["subject"], "{}")


def test_shipped_files_are_what_the_generator_yields(world: World, tmp_path: Path):
    write_jsonl(make_edits(world), tmp_path / "edits.jsonl")
    assert (tmp_path / "edits.jsonl").read_bytes() == edits_path().read_bytes()
    assert read_jsonl(irrelevant_path()) == make_irrelevant(world)


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


def test_it_knows_its_world(world: World):
    for score in check_base(base_dir(), world, sample=100, rng=random.Random(1)):
        assert score.accuracy >= score.required, score


def test_training_reduces_the_loss(world: World, tmp_path: Path):
    """And saving replaces a folder as a whole."""
    small = World(world.people[:60], world.places[:20], world.minerals[:20])
    torch.manual_seed(0)
    tokenizer, folder = train_tokenizer(small, 500), tmp_path / "base-model"
    model = build_model(TINY, tokenizer)
    history = train_model(model, encode_world(small, tokenizer), TINY, random.Random(0))
    assert history[-1] < 0.9 * history[0]
    folder.mkdir()
    (folder / "stale.txt").touch()
    save_base(model, tokenizer, folder)
    assert (folder / "model.safetensors").exists()
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["base-model"]


def test_build_writes_everything_and_check_refuses_an_untrained_base(tmp_path: Path):
    assert main(["build", "--out", str(tmp_path), "--epochs", "0"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base-model", "edits.jsonl", "irrelevant.jsonl"}
    assert main(["check", "--dir", str(tmp_path / "base-model"), "--sample", "20"]) == 1
