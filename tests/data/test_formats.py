"""Each format's converter against records written by hand, and against the real sets where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repair_lightning.data.formats import FORMATS, convert, get_format, guess_format
from repair_lightning.errors import ConfigError, FieldError

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = {
    "zsre": "zsre/zsre_mend_edit.json",
    "counterfact": "counterfact/counterfact_edit_3k.json",
    "hallucination": "hallucination/hallucination-edit.json",
    "temporal": "temporal/temporal-edit.json",
}

SOURCES = {
    "jsonl": {
        "id": "a1",
        "subject": "Rome",
        "prompt": " Where is Rome? ",
        "target": "Italy\n",
        "rephrases": ["Rome is in"],
        "locality": [{"prompt": "Who wrote Faust?", "answer": "Goethe"}],
        "near": ["Where is Oslo?"],
        "note": "extra fields are ignored",
    },
    "zsre": {
        "subject": "Rome",
        "src": "Where is Rome?",
        "pred": "France",
        "rephrase": "Rome is where?",
        "alt": "Italy",
        "answers": ["Latium"],
        "loc": "nq question: who wrote faust",
        "loc_ans": "Goethe",
    },
    "counterfact": {
        "case_id": 0,
        "prompt": "Rome is in",
        "target_new": "Spain",
        "subject": "Rome",
        "ground_truth": "Italy",
        "rephrase_prompt": "The city of Rome lies in",
        "locality_prompt": "Milan is in",
        "locality_ground_truth": "Italy",
    },
    "wikibigedit": {
        "tag": "20240201_20240220",
        "subject": "Rome",
        "update": "Where is Rome?",
        "ans": "Italy",
        "rephrase": "Rome is where?",
        "personas": "Ahoy, where be Rome?",
        "mhop": "Where is the city of the Colosseum?",
        "mhop_ans": "Italy",
        "loc": "Where is Oslo?",
        "loc_ans": "Norway",
    },
    "hallucination": {
        "prompt": "This is a Wikipedia passage about Rome.",
        "target_new": "It is in Italy.",
        "subject": "Rome",
        "locality_prompt": "Description Map of South Ameri",
        "locality_ground_truth": "ca.",
    },
    "temporal": {
        "prompt": "Rome,",
        "target_new": "the capital of Italy",
        "subject": "Rome",
        "ood_rephrase": "Rome, which lies on the Tiber,",
        "locality_prompt": "Description",
        "locality_ground_truth": "Map",
    },
}

ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "In {x} the mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle {Darrieux}",
    },
    "paraphrase_prompts": ["A. Danielle, a native", "B. She speaks"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of", "Montesquieu spoke"],
    "generation_prompts": ["Danielle was born in"],
}


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def probe(prompt: str, answer: str | None) -> dict:
    return {"prompt": prompt, "answer": answer}


def test_jsonl_strips_texts_and_takes_plain_prompts_as_probes():
    assert convert(SOURCES["jsonl"], "jsonl") == {
        "id": "a1",
        "subject": "Rome",
        "prompt": "Where is Rome?",
        "target": "Italy",
        "rephrases": ["Rome is in"],
        "locality": [probe("Who wrote Faust?", "Goethe")],
        "near": [probe("Where is Oslo?", None)],
    }


def test_zsre_keeps_the_locality_prompt_as_it_stands():
    assert convert(SOURCES["zsre"], "zsre") == {
        "id": None,
        "subject": "Rome",
        "prompt": "Where is Rome?",
        "target": "Italy",
        "rephrases": ["Rome is where?"],
        "locality": [probe("nq question: who wrote faust", "Goethe")],
        "near": [],
    }


def test_flat_counterfact_counts_its_neighbour_as_both():
    record = convert(SOURCES["counterfact"], "counterfact")
    assert record["locality"] == record["near"] == [probe("Milan is in", "Italy")]
    assert record["locality"] is not record["near"]
    assert (record["id"], record["target"]) == ("0", "Spain")
    assert record["rephrases"] == ["The city of Rome lies in"]


def test_nested_counterfact_fills_the_subject_in_and_ignores_its_braces():
    neighbours = [probe("Michel Rocard is a native speaker of", "French"), probe("Montesquieu spoke", "French")]
    assert convert(ROME, "counterfact") == {
        "id": "7",
        "subject": "Danielle {Darrieux}",
        "prompt": "In {x} the mother tongue of Danielle {Darrieux} is",
        "target": "English",
        "rephrases": ["A. Danielle, a native", "B. She speaks"],
        "locality": neighbours,
        "near": neighbours,
    }


def test_wikibigedit_reads_the_persona_as_a_rephrase_and_leaves_the_hop_out():
    record = convert(SOURCES["wikibigedit"], "wikibigedit")
    assert record["rephrases"] == ["Rome is where?", "Ahoy, where be Rome?"]
    assert record["locality"] == [probe("Where is Oslo?", "Norway")]
    assert "Colosseum" not in json.dumps(record)


def test_wikibigedit_needs_only_question_and_answer():
    record = convert({"update": "Where is Rome?", "ans": "Italy", "loc": None, "rephrase": ""}, "wikibigedit")
    assert (record["rephrases"], record["locality"], record["subject"]) == ([], [], None)


def test_hallucination_and_temporal():
    record = convert(SOURCES["hallucination"], "hallucination")
    assert (record["rephrases"], record["near"]) == ([], [])
    assert record["locality"] == [probe("Description Map of South Ameri", "ca.")]
    assert convert(SOURCES["temporal"], "temporal")["rephrases"] == ["Rome, which lies on the Tiber,"]


def test_an_empty_locality_answer_is_no_answer():
    record = convert({**SOURCES["hallucination"], "locality_ground_truth": " "}, "hallucination")
    assert record["locality"][0]["answer"] is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_is_recognised_and_every_other_format_names_it(name):
    """Where another format refuses the record, it says which one it looks like."""
    assert guess_format(SOURCES[name]) == name
    others = [other for other in FORMATS.values() if not other.fits(SOURCES[name])]
    assert others
    for other in others:
        with pytest.raises(FieldError, match=f"not in format '{other.name}'.*look like format '{name}'"):
            convert(SOURCES[name], other.name)


def test_the_nested_layout_is_recognised_too():
    with pytest.raises(FieldError, match="look like format 'counterfact'"):
        convert(ROME, "zsre")


@pytest.mark.parametrize("name", FORMATS)
def test_a_converter_is_pure(name):
    before = json.dumps(SOURCES[name])
    assert convert(SOURCES[name], name) == convert(SOURCES[name], name)
    assert json.dumps(SOURCES[name]) == before


def test_fields_of_no_format_are_listed():
    with pytest.raises(FieldError, match="needs the fields src, alt; found: frage, antwort"):
        convert({"frage": "?", "antwort": "!"}, "zsre")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zrse", r"^unknown data format 'zrse': did you mean 'zsre'\? known: jsonl, zsre, counterfact, "),
        ("xyzzy", r"^unknown data format 'xyzzy': known: jsonl, "),
        ("", r"^unknown data format '': known: "),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        get_format(name)


@pytest.mark.parametrize(
    ("name", "change", "field", "problem"),
    [
        ("jsonl", {"target": ""}, "target", "is empty"),
        ("jsonl", {"target": " \n"}, "target", "is empty"),
        ("jsonl", {"target": None}, "target", "is missing"),
        ("jsonl", {"target": 2006}, "target", "is a number, not a text"),
        ("jsonl", {"target": True}, "target", "is true or false, not a text"),
        ("jsonl", {"prompt": ["a"]}, "prompt", "is a list, not a text"),
        ("jsonl", {"prompt": "\ud800"}, "prompt", "holds a broken character at position 0"),
        ("jsonl", {"subject": {}}, "subject", "is an object, not a text"),
        ("jsonl", {"id": 1.5}, "id", "is a number, not a text"),
        ("jsonl", {"id": True}, "id", "is true or false"),
        ("jsonl", {"id": ""}, "id", "is empty"),
        ("jsonl", {"rephrases": 3}, "rephrases", "is a number, not a list of texts"),
        ("jsonl", {"rephrases": ["a", ""]}, "rephrases[1]", "is empty"),
        ("jsonl", {"rephrases": ["a", None]}, "rephrases[1]", "is missing"),
        ("jsonl", {"locality": "Who?"}, "locality", "is a text, not a list"),
        ("jsonl", {"locality": [7]}, "locality[0].prompt", "is a number, not a text"),
        ("jsonl", {"near": [{"prompt": "a"}, {"answer": "b"}]}, "near[1].prompt", "is missing"),
        ("jsonl", {"near": [{"prompt": "a", "answer": ["b"]}]}, "near[0].answer", "is a list, not a text"),
        ("zsre", {"alt": ["Italy"]}, "alt", "is a list, not a text"),
        ("zsre", {"loc_ans": 3}, "loc_ans", "is a number, not a text"),
        ("counterfact", {"rephrase_prompt": [1]}, "rephrase_prompt[0]", "is a number, not a text"),
        ("wikibigedit", {"personas": {}}, "personas", "is an object, not a list of texts"),
    ],
)
def test_a_bad_field_is_named_as_the_source_names_it(name, change, field, problem):
    with pytest.raises(FieldError) as caught:
        convert({**SOURCES[name], **change}, name)
    assert caught.value.field == field
    assert caught.value.problem.startswith(problem)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"target_new": {"id": "Q1"}}, "requested_rewrite.target_new.str"),
        ({"target_new": {"str": 3}}, "requested_rewrite.target_new.str"),
        ({"target_true": {"str": []}}, "requested_rewrite.target_true.str"),
        ({"prompt": None}, "requested_rewrite.prompt"),
        ({"subject": ""}, "requested_rewrite.subject"),
    ],
)
def test_a_bad_field_inside_the_nested_layout(change, field):
    with pytest.raises(FieldError) as caught:
        convert({**ROME, "requested_rewrite": {**ROME["requested_rewrite"], **change}}, "counterfact")
    assert caught.value.field == field


def test_a_rewrite_that_is_no_object():
    with pytest.raises(FieldError, match=r"field 'requested_rewrite\.subject': is missing"):
        convert({"requested_rewrite": "The mother tongue"}, "counterfact")


@pytest.mark.parametrize("field", ["prompt", "target"])
def test_a_missing_field_of_the_right_format_is_missing_not_foreign(field):
    with pytest.raises(FieldError, match=f"^field '{field}': is missing; give "):
        convert(without(SOURCES["jsonl"], field), "jsonl")


@pytest.mark.parametrize(("wrong", "right"), [("rephrase", "rephrases"), ("Subject", "subject"), ("ID", "id")])
def test_a_misspelt_field_of_our_own_format_is_refused(wrong, right):
    record = {**without(SOURCES["jsonl"], right), wrong: SOURCES["jsonl"][right]}
    with pytest.raises(FieldError, match=f"^field '{wrong}': is not a field.*did you mean '{right}'"):
        convert(record, "jsonl")


@pytest.mark.parametrize(("value", "kind"), [(None, "null"), ([], "a list"), ("x", "a text"), (3, "a number")])
def test_a_record_must_be_an_object(value, kind):
    with pytest.raises(FieldError, match=f"^is {kind}, not an object"):
        convert(value, "zsre")


@pytest.mark.parametrize("name", REAL)
def test_every_real_record_is_recognised_and_converted(name):
    path = SHARED / REAL[name]
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    records = json.loads(path.read_text(encoding="utf-8"))
    assert {guess_format(record) for record in records} == {name}
    assert all(convert(record, name)["locality"] for record in records)
