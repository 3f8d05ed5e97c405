"""Each format's converter against records written by hand, and against the real sets where they are at hand."""

from __future__ import annotations

import json

import pytest

from repair_lightning.edits.formats import FORMATS, convert, guess_format
from repair_lightning.errors import FieldError
from repair_lightning.texts import dialogue

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


def probe(prompt: str, answer: str | None) -> dict:
    return {"prompt": prompt, "answer": answer}


SUBJECTLESS = {"id": "a1", "prompt": " Where is Rome? ", "target": "Italy\n"}
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


MILAN = [probe("Milan is in", "Italy")]
ROCARD = [probe("Michel Rocard is a native speaker of", "French"), probe("Montesquieu spoke", "French")]
READ: list[tuple[str, dict, dict]] = [
    ("zsre", SOURCES["zsre"], {"locality": [probe("nq question: who wrote faust", "Goethe")], "id": None}),
    ("counterfact", SOURCES["counterfact"], {"id": "0", "target": "Spain", "locality": MILAN, "near": MILAN}),
    ("counterfact", ROME, {"id": "7", "target": "English", "locality": ROCARD, "near": ROCARD}),
    ("counterfact", ROME, {"prompt": "In {x} the mother tongue of Danielle {Darrieux} is"}),
    ("wikibigedit", SOURCES["wikibigedit"], {"rephrases": ["Rome is where?", "Ahoy, where be Rome?"], "near": []}),
    ("wikibigedit", {"update": "a", "ans": "b", "loc": None}, {"rephrases": [], "locality": [], "subject": None}),
    ("hallucination", SOURCES["hallucination"], {"locality": [probe("Description Map of South Ameri", "ca.")]}),
    ("temporal", SOURCES["temporal"], {"rephrases": ["Rome, which lies on the Tiber,"]}),
]


@pytest.mark.parametrize(("name", "record", "expected"), READ)
def test_what_each_published_set_says(name, record, expected):
    """By hand; some of their targets begin with a space, which means nothing."""
    assert expected.items() <= convert(record, name).items()
    padded = {key: f" {value}\n" if isinstance(value, str) else value for key, value in record.items()}
    assert convert(padded, name) == convert(record, name)


@pytest.mark.parametrize(
    ("fields", "prompt", "rephrases"),
    [
        ({"prompt": "The mayor of {} is"}, "The mayor of Orsk is", []),
        ({"prompt": "Orsk, in {}:"}, "Orsk, in {}:", []),
        ({"prompt": "In {{}}"}, "In {}", []),
        ({"rephrases": ["Who runs {}?", "Orsk's {}", "{{}}"]}, None, ["Who runs Orsk?", "Orsk's {}", "{}"]),
    ],
)
def test_the_subject_fills_a_prompt_that_leaves_its_place_open(fields, prompt, rephrases):
    found = own(subject="Orsk", **fields)
    assert (found["prompt"], found["rephrases"]) == (prompt or SUBJECTLESS["prompt"], rephrases)


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"prompt": "x = {}"}, "prompt", "give 'subject', or write {{}} for the two signs themselves"),
        ({"prompt": [{"role": "user", "content": "{}?"}]}, "prompt[0].content", "give 'subject'"),
        ({"near": ["Who runs {}?"], "subject": "Orsk"}, "near[0].prompt", "write the subject that the probe asks"),
    ],
)
def test_an_open_prompt_that_nothing_fills_is_refused(fields, field, remedy):
    with pytest.raises(FieldError) as caught:
        own(**fields)
    assert (caught.value.field, caught.value.problem) == (field, "holds {}, which nothing fills here")
    assert caught.value.remedy.startswith(remedy)
    assert "{{}}" in caught.value.remedy


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
        (["a", "b "], ["a", "b "]),
        ("[a]", ["[a]"]),
        (" \n", []),
    ],
)
def test_rephrases_are_one_or_several_also_as_json(rephrases, expected):
    """Of a text, what does not parse as a list of texts or messages is one literal rephrase."""
    assert own(rephrases=rephrases)["rephrases"] == expected
    if isinstance(rephrases, list):
        assert own(rephrases=json.dumps(rephrases))["rephrases"] == expected


@pytest.mark.parametrize(
    ("messages", "place", "problem", "remedy"),
    [
        ([], "", "is an empty list", "the user's last"),
        ([{"role": "king", "content": "a"}], "[0].role", "is 'king', no known role", "user, assistant"),
        ([{"role": "user", "content": [{"type": "text"}]}], "[0].content", "is [{'type': 'text'}], not a", "in quotes"),
        ([*ASK, {"role": "assistant", "content": "a"}], "[1].role", "is 'assistant' in the last turn", "the target"),
        ([*TALK, {"role": "user", "content": " \n"}], "[3].content", "is empty", "give the user's question"),
        ([{"role": "user", "content": "a", "name": "b"}], "[0].name", "is 'b', which is not read", "leave it out"),
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


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_is_recognised_and_every_other_format_names_it(name):
    """Where another format refuses the record, it says which one it looks like."""
    assert guess_format(SOURCES[name]) == name
    others = [other for other in FORMATS.values() if not other.fits(SOURCES[name])]
    assert others
    for other in others:
        with pytest.raises(FieldError, match=f"not in format '{other.name}'.*look like format '{name}'"):
            convert(SOURCES[name], other.name)


@pytest.mark.parametrize(
    ("name", "change", "field", "problem"),
    [
        ("jsonl", {"target": ""}, "target", "is empty"),
        ("jsonl", {"target": None}, "target", "is missing"),
        ("zsre", {"src": [{"role": "user", "content": "a"}]}, "src", "is a list, not a text"),
        ("jsonl", {"prompt": "\ud800"}, "prompt", "holds a broken character at position 0"),
        ("jsonl", {"rephrases": ["a", ""]}, "rephrases[1]", "is empty"),
        ("jsonl", {"near": [{"prompt": "a"}, {"answer": "b"}]}, "near[1].prompt", "is missing"),
        ("counterfact", {"rephrase_prompt": [1]}, "rephrase_prompt[0]", "is a number, not a text"),
    ],
)
def test_a_bad_field_is_named_as_the_source_names_it(name, change, field, problem):
    with pytest.raises(FieldError) as caught:
        convert({**SOURCES[name], **change}, name)
    assert caught.value.field == field
    assert caught.value.problem.startswith(problem)
    assert caught.value.remedy


@pytest.mark.parametrize(("wrong", "right"), [("rephrase", "rephrases"), ("Subject", "subject")])
def test_a_misspelt_field_of_our_own_format_is_refused(wrong, right):
    with pytest.raises(FieldError, match=f"^field '{wrong}': is not a field.*did you mean '{right}'"):
        own(**{wrong: "x"})
