"""Each format's converter against records written by hand, and against the real sets where they are at hand."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from repair_lightning.edits.formats import FORMATS, convert, guess_format
from repair_lightning.errors import FieldError
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit, Further, Probe


def one(record: Any, name: str) -> dict[str, Any]:
    """The only edit of a record."""
    (found,) = convert(record, name)
    return found


SOURCES = {
    "jsonl": {
        "id": "a1",
        "subject": "Rome",
        "prompt": " Where is Rome? ",
        "target": "Italy\n",
        "rephrases": ["Rome is in"],
        "locality": [{"prompt": "Who wrote Faust?", "answer": "Goethe"}],
        "near": ["Where is Oslo?"],
        "aliases": "Italia",
        "old_answer": "France",
        "further": [{"kind": "multi_hop", "prompt": "Who governs Rome's country?", "answers": ["Rossi", "M. Rossi"]}],
        "note": "extra fields are listed",
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
        "cond": "France >> Italy || Where is Rome?",
        "portability": {
            "Recalled Relation": "(Italy, currency, euro)",
            "New Question": "What is paid with in Rome?",
            "New Answer": "The euro",
        },
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
    "knowedit": {
        "subject": "Leo Arons",
        "prompt": "The place of death of Leo Arons is",
        "target_new": "Berlin",
        "portability": {
            "Logical_Generalization": [{"prompt": "Is Leo Arons still alive?", "ground_truth": [["no"], ["is dead"]]}],
            "Reasoning": [
                {"prompt": "The continent of the place of death is", "ground_truth": [["Europe", "Old Continent"]]},
                {"prompt": "Nobody says", "ground_truth": []},
            ],
            "Subject_Aliasing": [],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The name of the father of Leo Arons is", "ground_truth": [["Albert Arons"]]},
                {"prompt": "The field of work of Leo Arons is", "ground_truth": [["physics"]]},
            ],
        },
    },
    "mquake": {
        "case_id": 2500,
        "requested_rewrite": [
            {
                "prompt": "{} is a citizen of",
                "relation_id": "P27",
                "target_new": {"str": "Libya", "id": "Q1016"},
                "target_true": {"str": "United States of America", "id": "Q30"},
                "subject": "Vince McMahon",
                "question": "What is the country of citizenship of Vince McMahon?",
            },
            {
                "prompt": "The capital of {} is",
                "relation_id": "P36",
                "target_new": {"str": "Franklin", "id": "Q1778943"},
                "target_true": {"str": "Tripoli", "id": "Q3579"},
                "subject": "Libya",
                "question": "What is the capital of Libya?",
            },
        ],
        "questions": ["The capital of the country of Triple H's CEO?", "Triple H's CEO: capital?", "Which capital?"],
        "answer": "Washington, D.C.",
        "answer_alias": ["Washington"],
        "new_answer": "Franklin",
        "new_answer_alias": ["Franklin, Kentucky"],
        "single_hops": [],
        "new_single_hops": [
            {
                "question": "What is the country of citizenship of Vince McMahon?",
                "cloze": "Vince McMahon is a citizen of",
                "answer": "Libya",
                "answer_alias": ["State of Libya"],
            },
        ],
        "orig": {"triples": [["Q44567", "P108", "Q35339"]]},
    },
    "qaedit": {
        "id": 2903,
        "source": "SQA",
        "prompt": "Which asteroid did Joseph Laurent discover?",
        "target": "51 Nemausa",
        "subject": "Joseph Laurent",
        "rephrase": "What is the asteroid discovered by Joseph Laurent?",
        "locality": [
            {"loc": "where is the cornea", "loc_ans": "eye"},
            {"loc": "who is the godfather", "loc_ans": "Vito"},
        ],
    },
    "ultraedit": {
        "case_id": 3,
        "prompt": "Where is Rome?",
        "ans": "Italy",
        "subject": "Rome",
        "rephrase_prompt": "Rome is where?",
        "loc": "Where is Oslo?",
        "loc_ans": "Norway",
    },
}
KNOWEDIT_CF = {
    "subject": "Frederic Piesch",
    "prompt": "The name of the position held by Frederic Piesch is",
    "target_new": "Archbishop of León, Mexico",
    "ground_truth": "mayor of Vienna",
    "portability": {
        "Subject_Aliasing": [{"prompt": "Frederic of Pieschen is", "ground_truth": "Archbishop of León, Mexico"}]
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Frederic Piesch is", "ground_truth": "male"}],
        "Forgetfulness": [{"prompt": "His position, which is not Archbishop, is", "ground_truth": "mayor of Vienna"}],
    },
}
KNOWEDIT_ZSRE = {
    "subject": "Epaspidoceras",
    "target_new": "Noctuidae",
    "prompt": "Which family does Epaspidoceras belong to?",
    "ground_truth": ["Aspidoceratidae"],
    "rephrase_prompt": "What family are Epaspidoceras?",
    "cond": "Geometridae >> Noctuidae || Which family does Epaspidoceras belong to?",
    "locality": {"Relation_Specificity": [{"prompt": ["Epaspidoceras taxon rank"], "ground_truth": ["genus"]}]},
    "portability": {"Reasoning": [{"prompt": "Common name of the family?", "ground_truth": "Owlet moths"}]},
}
WIKIBIO = {
    "text": "This is a Wikipedia passage about john russell reynolds.",
    "labels": "He was educated at University College, London.",
    "concept": "john russell reynolds",
    "locality": {"Relation_Specificity": [{"prompt": "reynolds field of work", "ground_truth": ["medicine"]}]},
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
    "attribute_prompts": ["J. R. R. Tolkien is a native speaker of"],
}


def probe(prompt: str, answer: str | None) -> dict:
    return {"prompt": prompt, "answer": answer}


SUBJECTLESS = {"id": "a1", "prompt": " Where is Rome? ", "target": "Italy\n"}
ASK = [{"role": "user", "content": " Where is Rome?\n"}]
TALK = [{"role": "system", "content": ""}, {"role": "assistant", "content": "Hi, {}!"}, *ASK]


def own(**fields):
    return one({**SUBJECTLESS, **fields}, "jsonl")


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
        "aliases": [],
        "old_answer": None,
        "further": [],
    }


def follows(kind: str, prompt: str, *answers: str) -> dict:
    return {"kind": kind, "prompt": prompt, "answers": list(answers)}


MILAN = [probe("Milan is in", "Italy")]
ROCARD = [probe("Michel Rocard is a native speaker of", "French"), probe("Montesquieu spoke", "French")]
READ: list[tuple[str, dict, dict]] = [
    ("zsre", SOURCES["zsre"], {"locality": [probe("nq question: who wrote faust", "Goethe")], "id": None}),
    ("counterfact", SOURCES["counterfact"], {"id": "0", "target": "Spain", "locality": MILAN, "near": MILAN}),
    ("counterfact", ROME, {"id": "7", "target": "English", "locality": ROCARD, "near": ROCARD}),
    ("counterfact", ROME, {"prompt": "In {x} the mother tongue of Danielle {Darrieux} is"}),
    ("zsre", SOURCES["zsre"], {"old_answer": "Latium"}),
    (
        "zsre",
        SOURCES["zsre"],
        {"further": [follows("portability/Reasoning", "What is paid with in Rome?", "The euro")]},
    ),
    ("counterfact", ROME, {"old_answer": "French", "rephrases": ["A. Danielle, a native", "B. She speaks"]}),
    ("counterfact", ROME, {"further": [follows("generation", "Danielle was born in", "English")]}),
    ("counterfact", SOURCES["counterfact"], {"old_answer": "Italy", "further": []}),
    ("wikibigedit", SOURCES["wikibigedit"], {"rephrases": ["Rome is where?"], "near": []}),
    (
        "wikibigedit",
        SOURCES["wikibigedit"],
        {
            "further": [
                follows("persona", "Ahoy, where be Rome?", "Italy"),
                follows("multi_hop", "Where is the city of the Colosseum?", "Italy"),
            ]
        },
    ),
    (
        "knowedit",
        SOURCES["knowedit"],
        {
            "target": "Berlin",
            "locality": [
                probe("The name of the father of Leo Arons is", "Albert Arons"),
                probe("The field of work of Leo Arons is", "physics"),
            ],
            "further": [
                follows("portability/Logical_Generalization", "Is Leo Arons still alive?", "no", "is dead"),
                follows("portability/Reasoning", "The continent of the place of death is", "Europe", "Old Continent"),
            ],
        },
    ),
    (
        "knowedit",
        KNOWEDIT_CF,
        {
            "old_answer": "mayor of Vienna",
            "locality": [
                probe("The gender of Frederic Piesch is", "male"),
                probe("His position, which is not Archbishop, is", "mayor of Vienna"),
            ],
            "further": [
                follows("portability/Subject_Aliasing", "Frederic of Pieschen is", "Archbishop of León, Mexico")
            ],
        },
    ),
    ("knowedit", KNOWEDIT_ZSRE, {"old_answer": "Aspidoceratidae", "rephrases": ["What family are Epaspidoceras?"]}),
    ("knowedit", KNOWEDIT_ZSRE, {"locality": [probe("Epaspidoceras taxon rank", "genus")]}),
    ("knowedit", WIKIBIO, {"subject": "john russell reynolds", "target": WIKIBIO["labels"]}),
    (
        "qaedit",
        SOURCES["qaedit"],
        {"locality": [probe("where is the cornea", "eye"), probe("who is the godfather", "Vito")]},
    ),
    ("qaedit", SOURCES["qaedit"], {"rephrases": [SOURCES["qaedit"]["rephrase"]], "id": "SQA-2903"}),
    ("ultraedit", SOURCES["ultraedit"], {"target": "Italy", "rephrases": ["Rome is where?"]}),
    ("ultraedit", SOURCES["ultraedit"], {"locality": [probe("Where is Oslo?", "Norway")]}),
    ("wikibigedit", {"update": "a", "ans": "b", "loc": None}, {"rephrases": [], "locality": [], "subject": None}),
    ("hallucination", SOURCES["hallucination"], {"locality": [probe("Description Map of South Ameri", "ca.")]}),
    ("temporal", SOURCES["temporal"], {"rephrases": ["Rome, which lies on the Tiber,"]}),
]


@pytest.mark.parametrize(("name", "record", "expected"), READ)
def test_what_each_published_set_says(name, record, expected):
    """By hand; some of their targets begin with a space, which means nothing."""
    assert expected.items() <= one(record, name).items()
    padded = {key: f" {value}\n" if isinstance(value, str) else value for key, value in record.items()}
    assert one(padded, name) == one(record, name)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([["x", "y"], ["x"]], [["x", "y"], ["x"]]),
        (["x", "x"], [["x"], ["x"]]),
        ([["x", "y"], ["z"], ["w"]], [["x", "y", "z", "w"]] * 2),  # not one for each: all count
        ("x", [["x"], ["x"]]),
    ],
)
def test_each_question_of_knowedit_has_its_own_answers(answers, expected):
    record = SOURCES["knowedit"] | {"portability": {"Reasoning": [{"prompt": ["p", "q"], "ground_truth": answers}]}}
    found = convert(record, "knowedit")[0]["further"]
    assert [(one["prompt"], one["answers"]) for one in found] == [("p", expected[0]), ("q", expected[1])]


def test_a_hop_without_a_question_is_passed_over():
    record = SOURCES["mquake"] | {"new_single_hops": [{"question": ["x"]}, "y", *SOURCES["mquake"]["new_single_hops"]]}
    assert convert(record, "mquake") == convert(SOURCES["mquake"], "mquake")


def test_a_case_of_mquake_is_several_edits():
    """The first has what follows from all of them; another spelling of a target comes from the hop that says it."""
    first, second = convert(SOURCES["mquake"], "mquake")
    assert (first["prompt"], first["target"]) == ("Vince McMahon is a citizen of", "Libya")
    assert (first["aliases"], first["old_answer"]) == (["State of Libya"], "United States of America")
    assert first["rephrases"] == ["What is the country of citizenship of Vince McMahon?"]
    asked = SOURCES["mquake"]["questions"]
    assert first["further"] == [follows("multi_hop/2500", text, "Franklin", "Franklin, Kentucky") for text in asked]
    assert (second["prompt"], second["target"], second["further"]) == ("The capital of Libya is", "Franklin", [])
    assert second["subject"] == "Libya"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "jsonl"])
@pytest.mark.parametrize("written", [json.dumps, repr])
def test_lists_and_objects_in_the_cells_of_a_table_are_read_as_such(name, written):
    """JSON, or what Python prints."""
    cells = {key: written(value) if isinstance(value, list | dict) else value for key, value in SOURCES[name].items()}
    assert guess_format(cells) == name
    assert convert(cells, name) == convert(SOURCES[name], name)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("jsonl", {"'note'": 1}),
        ("zsre", {"'pred'": 1, "'cond'": 1, "'portability.Recalled Relation'": 1}),
        ("counterfact", {}),
        ("wikibigedit", {"'tag'": 1}),
        ("mquake", {f"'{name}'": 1 for name in ("answer", "answer_alias", "single_hops", "orig")}),
        ("qaedit", {}),
        ("knowedit", {"an empty 'portability.Subject_Aliasing'": 1, "'portability.Reasoning' without an answer": 1}),
    ],
)
def test_what_is_not_read_is_counted(name, left):
    found: Counter[str] = Counter()
    convert(SOURCES[name], name, found)
    assert +found == left


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_what_a_table_lacks_is_missing(missing):
    found = one({**SOURCES["wikibigedit"], "mhop": missing, "mhop_ans": missing, "loc": missing}, "wikibigedit")
    assert ([item["kind"] for item in found["further"]], found["locality"]) == (["persona"], [])


@pytest.mark.parametrize(
    ("record", "target", "aliases"),
    [
        ({"prompt": "a", "target_new": " b"}, " b", []),
        ({"question": "a", "answer": "b"}, "b", []),
        ({"question": "a", "answer": ["b", "c"]}, "b", ["c"]),
        ({"prompt": "a", "completion": " [1, 2]"}, " [1, 2]", []),
        ({"prompt": ASK, "completion": [{"role": "assistant", "content": "b"}]}, "b", []),
        ({"messages": ASK, "completion": "b"}, "b", []),
        ({"messages": [*ASK, {"role": "assistant", "content": "b"}]}, "b", []),
    ],
)
def test_prompt_and_target_under_the_names_of_others(record, target, aliases):
    assert guess_format(record) == "jsonl"
    found = one(record, "jsonl")
    assert found["prompt"] == (
        dialogue.dump(ASK) if ASK in (record.get("prompt"), record.get("messages")) else found["prompt"]
    )
    assert (found["target"], found["aliases"]) == (target, aliases)


EDIT = Edit(
    "a",
    "Where is Rome?",
    "Italy",
    "Rome",
    ("Rome is in",),
    (Probe("Who wrote Faust?", "Goethe"),),
    (Probe("Where is Oslo?"),),
    ("Italia", "IT"),
    "France",
    (Further("multi_hop", "Which sea?", ("Mediterranean",)), Further("portability/Reasoning", "Euro?", ("yes", "so"))),
)


def test_our_own_format_holds_all_of_an_edit():
    assert Edit.from_dict(one(EDIT.as_dict(), "jsonl")) == EDIT
    assert Edit.from_dict(one(json.loads(json.dumps(EDIT.as_dict())), "jsonl")) == EDIT
    assert own(aliases="x")["aliases"] == ["x"]
    assert own(further=[{"kind": "persona", "prompt": "a", "answers": "b"}])["further"][0]["answers"] == ["b"]


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


@pytest.mark.parametrize("record", [SOURCES["knowedit"], KNOWEDIT_CF, KNOWEDIT_ZSRE, WIKIBIO])
def test_no_other_format_takes_records_of_knowedit(record):
    assert guess_format(record) == "knowedit"
    for other in FORMATS:
        if other != "knowedit":
            with pytest.raises(FieldError, match="look like format 'knowedit': choose that"):
                convert(record, other)


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
        ("jsonl", {"aliases": [1]}, "aliases[0]", "is a number, not a text"),
        ("jsonl", {"old_answer": ["a"]}, "old_answer", "is a list, not a text"),
        ("jsonl", {"further": "a"}, "further", "is a text, not a list"),
        ("jsonl", {"further": ["a"]}, "further[0]", "is a text, not an object"),
        ("jsonl", {"further": [{"kind": "x", "prompt": "a", "answers": "b"}]}, "further[0].kind", "is 'x'"),
        ("jsonl", {"further": [{"kind": "portability/", "prompt": "a"}]}, "further[0].kind", "is 'portability/'"),
        ("jsonl", {"further": [{"kind": "persona", "prompt": "a"}]}, "further[0].answers", "is missing"),
        ("jsonl", {"further": [{"kind": "persona", "answers": "b"}]}, "further[0].prompt", "is missing"),
        ("zsre", {"portability": 3}, "portability", "is a number, not an object"),
        ("knowedit", {"locality": {"A": [3]}}, "locality.A[0]", "is a number, not an object"),
        ("knowedit", {"locality": {"A": 3}}, "locality.A", "is a number, not a list"),
        ("knowedit", {"portability": {"A": [{"prompt": {}}]}}, "portability.A[0].prompt", "is an object, not a text"),
        ("mquake", {"requested_rewrite": []}, "requested_rewrite", "is empty"),
        ("mquake", {"requested_rewrite": [{}]}, "requested_rewrite[0].subject", "is missing"),
        ("qaedit", {"locality": [{"loc": "a"}, {"loc_ans": "b"}]}, "locality[1].loc", "is missing"),
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
