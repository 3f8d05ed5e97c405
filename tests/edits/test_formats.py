"""Each format's converter against records written by hand, and against the real sets where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repair_lightning.edits.formats import FORMATS, convert, get_format, guess_format
from repair_lightning.errors import ConfigError, FieldError
from repair_lightning.texts import dialogue

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


def test_jsonl_keeps_texts_as_written_and_takes_plain_prompts_as_probes():
    assert convert(SOURCES["jsonl"], "jsonl") == {
        "id": "a1",
        "subject": "Rome",
        "prompt": " Where is Rome? ",
        "target": "Italy\n",
        "rephrases": ["Rome is in"],
        "locality": [probe("Who wrote Faust?", "Goethe")],
        "near": [probe("Where is Oslo?", None)],
    }


SUBJECTLESS = without(SOURCES["jsonl"], "subject", "locality", "near", "rephrases")
ASK = [{"role": "user", "content": " Where is Rome?\n"}]
TALK = [{"role": "system", "content": ""}, {"role": "assistant", "content": "Hi, {}!"}, *ASK]


def own(**fields):
    return convert({**SUBJECTLESS, **fields}, "jsonl")


def test_the_ends_of_every_text_of_ours_are_kept():
    found = own(
        id=" a ",
        subject=" b\n",
        prompt="\tc\n",
        target="    return d\n",
        rephrases=[" e ", "f\r\n"],
        near=[{"prompt": "g\n", "answer": " h"}, " i "],
        locality=[{"prompt": " j", "answer": " \n"}],
    )
    assert found == {
        "id": "a",
        "subject": "b",
        "prompt": "\tc\n",
        "target": "    return d\n",
        "rephrases": [" e ", "f\r\n"],
        "near": [probe("g\n", " h"), probe(" i ", None)],
        "locality": [probe(" j", None)],
    }


def test_the_published_sets_are_stripped():
    """Some of their targets begin with a space, which means nothing."""
    for name in ("zsre", "counterfact", "wikibigedit", "hallucination", "temporal"):
        padded = {key: f" {value}\n" if isinstance(value, str) else value for key, value in SOURCES[name].items()}
        assert convert(padded, name) == convert(SOURCES[name], name)
    rewrite = {
        key: f" {value} " if isinstance(value, str) else value for key, value in ROME["requested_rewrite"].items()
    }
    assert convert({**ROME, "requested_rewrite": rewrite}, "counterfact") == convert(ROME, "counterfact")


@pytest.mark.parametrize(
    ("fields", "prompt", "rephrases"),
    [
        ({"prompt": "The mayor of {} is"}, "The mayor of Orsk is", []),
        ({"prompt": "Orsk, in {}:"}, "Orsk, in {}:", []),
        ({"prompt": "who runs ORSK {}"}, "who runs ORSK {}", []),
        ({"prompt": "In {{}}"}, "In {}", []),
        ({"rephrases": ["Who runs {}?", "Orsk's {}", "{{}}"]}, None, ["Who runs Orsk?", "Orsk's {}", "{}"]),
        ({"rephrases": "Who runs {}?"}, None, ["Who runs Orsk?"]),
    ],
)
def test_the_subject_fills_a_prompt_that_leaves_its_place_open(fields, prompt, rephrases):
    found = own(subject="Orsk", **fields)
    assert (found["prompt"], found["rephrases"]) == (prompt or SUBJECTLESS["prompt"], rephrases)


def test_of_messages_the_last_turn_is_filled():
    found = own(subject="Orsk", prompt=[*TALK[:2], {"role": "user", "content": "Who runs {}?"}])
    assert dialogue.parse(found["prompt"]) == [*TALK[:2], {"role": "user", "content": "Who runs Orsk?"}]


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"prompt": "x = {}"}, "prompt", "give 'subject', or write {{}} for the two signs themselves"),
        ({"prompt": "x = {}", "subject": " "}, "prompt", "give 'subject'"),
        ({"prompt": [{"role": "user", "content": "{}?"}]}, "prompt[0].content", "give 'subject'"),
        ({"rephrases": ["a", "{}"]}, "rephrases[1]", "give 'subject'"),
        ({"rephrases": "{}"}, "rephrases", "give 'subject'"),
        ({"near": ["Who runs {}?"], "subject": "Orsk"}, "near[0].prompt", "write the subject that the probe asks"),
        ({"locality": [{"prompt": "{}"}], "subject": "Orsk"}, "locality[0].prompt", "write the subject"),
    ],
)
def test_an_open_prompt_that_nothing_fills_is_refused(fields, field, remedy):
    with pytest.raises(FieldError) as caught:
        own(**fields)
    assert (caught.value.field, caught.value.problem) == (field, "holds {}, which nothing fills here")
    assert caught.value.remedy.startswith(remedy)
    assert "{{}}" in caught.value.remedy


def test_an_escaped_probe_and_the_signs_of_a_target_stay():
    found = own(near=["x = {{}}"], target="{}", locality=[{"prompt": "a", "answer": "{{}}"}])
    assert (found["near"], found["target"], found["locality"]) == ([probe("x = {}", None)], "{}", [probe("a", "{{}}")])


@pytest.mark.parametrize("messages", [ASK, TALK])
def test_every_prompt_may_be_messages(messages):
    """As a list, as its JSON with other blanks, and with members that are null, as Parquet has them."""
    text = dialogue.dump(messages)
    loose = " " + json.dumps([{**m, "name": None} for m in messages], indent=2)
    for given in (messages, text, loose, [{**m, "name": None} for m in messages]):
        found = own(prompt=given, rephrases=[given, "a"], near=[given, {"prompt": given, "answer": "b"}])
        assert (found["prompt"], found["rephrases"]) == (text, [text, "a"])
        assert found["near"] == [probe(text, None), probe(text, "b")]
    assert dialogue.parse(text) == messages


@pytest.mark.parametrize(
    ("rephrases", "expected"),
    [
        (TALK, [dialogue.dump(TALK)]),
        ([TALK, ASK], [dialogue.dump(TALK), dialogue.dump(ASK)]),
        ([TALK], [dialogue.dump(TALK)]),
        (["a", "b "], ["a", "b "]),
        ("a [b]", ["a [b]"]),
        ("[a]", ["[a]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['a']", ["['a']"]),
        ("[]", []),
        ([], []),
        (" \n", []),
    ],
)
def test_rephrases_are_one_or_several_also_as_json(rephrases, expected):
    """Of a text, what does not parse as a list of texts or messages is one literal rephrase."""
    assert own(rephrases=rephrases)["rephrases"] == expected
    if isinstance(rephrases, list):
        assert own(rephrases=json.dumps(rephrases))["rephrases"] == expected


def test_the_lists_of_published_sets_may_be_json_too():
    assert convert({**SOURCES["zsre"], "rephrase": '["a", " b"]'}, "zsre")["rephrases"] == ["a", "b"]


def test_probes_may_be_json():
    given = [{"prompt": "a", "answer": "b"}, "c", ASK]
    expected = [probe("a", "b"), probe("c", None), probe(dialogue.dump(ASK), None)]
    assert own(near=json.dumps(given))["near"] == own(near=given)["near"] == expected


@pytest.mark.parametrize(
    ("messages", "place", "problem", "remedy"),
    [
        ([], "", "is an empty list", "the user's last"),
        ([{"role": "king", "content": "a"}], "[0].role", "is 'king', no known role", "user, assistant"),
        ([{"role": 3, "content": "a"}], "[0].role", "is 3, no known role", "choose of system"),
        ([{"role": ["user"], "content": "a"}], "[0].role", "is ['user'], no known role", "choose of system"),
        ([{"role": "user"}], "[0].content", "is missing", '"content": "..."'),
        ([{"role": "user", "content": None}], "[0].content", "is missing", '"content": "..."'),
        ([{"role": "user", "content": 7}], "[0].content", "is 7, not a text", "in quotes"),
        ([{"role": "user", "content": [{"type": "text"}]}], "[0].content", "is [{'type': 'text'}], not a", "in quotes"),
        ([*ASK, {"role": "assistant", "content": "a"}], "[1].role", "is 'assistant' in the last turn", "the target"),
        ([*TALK, {"role": "user", "content": " \n"}], "[3].content", "is empty", "give the user's question"),
        ([{"role": "user", "content": "a", "name": "b"}], "[0].name", "is 'b', which is not read", "leave it out"),
        ([*ASK, None], "[1]", "is null, not a message", '"role": "user"'),
        ([*ASK, "a"], "[1]", "is 'a', not a message", '"role": "user"'),
        ([{"role": "user", "content": "\ud800"}], "", "holds a broken character", "UTF-8"),
    ],
)
def test_bad_messages_name_place_value_and_remedy(messages, place, problem, remedy):
    given = [("prompt", {"prompt": messages}), ("near[0].prompt", {"near": [messages]})]
    given += [("rephrases[1]", {"rephrases": [ASK, messages]})]
    given += [("near[0].prompt", {"near": [{"prompt": messages, "answer": "a"}]})]
    if messages and all(isinstance(item, dict) for item in messages):
        given += [("prompt", {"prompt": json.dumps(messages)}), ("rephrases", {"rephrases": messages})]
    for field, fields in given:
        with pytest.raises(FieldError) as caught:
            own(**fields)
        assert caught.value.field == field + place
        assert caught.value.problem.startswith(problem)
        assert remedy in caught.value.remedy


@pytest.mark.parametrize("prompt", ["[1, 2, 3]", "[", '[{"a": 1}]', "[[]]", '["a"]', "[]"])
def test_a_text_in_brackets_that_is_no_messages_is_a_text(prompt):
    assert own(prompt=prompt)["prompt"] == prompt


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
        ("jsonl", {"prompt": ["a"]}, "prompt[0]", "is 'a', not a message"),
        ("jsonl", {"prompt": {"a": 1}}, "prompt", "is an object, not a text"),
        ("zsre", {"src": ["a"]}, "src", "is a list, not a text"),
        ("zsre", {"src": [{"role": "user", "content": "a"}]}, "src", "is a list, not a text"),
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
