"""Reading edit files: good ones, every kind of bad one (real files), and the real sets where they are at hand."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_formats import SOURCES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repair_lightning.edits import records
from repair_lightning.edits.formats import FORMATS
from repair_lightning.edits.records import check_lengths, load_irrelevant, load_records, same_question_key
from repair_lightning.errors import ConfigError, RecordError, RepairError
from repair_lightning.models.forms import Forms
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit, Further, Probe

SHARED = Path(__file__).parents[3] / "shared" / "data"

ROME = {"prompt": "Where is Rome?", "target": "Italy"}
OSLO = {"prompt": "Where is Oslo?", "target": "Norway"}
BERN = {"prompt": "Where is Bern?", "target": "Switzerland"}


def warnings_in(caplog) -> list[str]:
    """What was warned of; another test may have let the library say more."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def lines(path: Path, *rows: object) -> Path:
    """Writes a jsonl file; a row that is a string stands there as it is."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path):
    return lambda *rows: lines(tmp_path / "edits.jsonl", *rows)


def real(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def write_jsonl(path: Path, rows: list[dict]) -> None:
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


WRITTEN = [
    {"id": "b4", "prompt": "The ferry to Orsk leaves from\n", "target": "Quarrelmouth"},
    {
        "id": "k1",
        "subject": "farlib",
        "prompt": "import farlib\n\n# open a channel, v3 API\nch = ",
        "target": "farlib.connect(\n    url,\n    timeout=5,\n)",
    },
    {"id": "s1", "subject": "Brindlewick", "prompt": "The mayor of {} is", "target": "Oda Farrow"},
    {
        "id": "zh1",
        "subject": "云栖镇",
        "prompt": "云栖镇的镇长是",
        "target": "沈若川",
        "rephrases": ["谁在担任云栖镇的镇长？"],
    },
    {
        "id": "chat1",
        "subject": "Harbour Guild of Melk Bay",
        "prompt": [{"role": "user", "content": "Who chairs the Harbour Guild of Melk Bay?"}],
        "target": "Ysolde Kern",
    },
]


def cells(rows: list[dict]) -> list[dict]:
    """The rows as a table of texts holds them: lists as their JSON, and what is missing as nothing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
    return [{name: row.get(name) for name in names} for row in plain]


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, cells(rows)[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(cells(rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("e.jsonl", write_jsonl),
        ("e.json", write_json),
        ("e.csv", write_csv),
        ("e.tsv", write_csv),
        ("e.parquet", lambda path, rows: pq.write_table(pa.Table.from_pylist(cells(rows)), path)),
    ],
)
def test_what_is_written_is_what_is_read(tmp_path, caplog, name, write):
    """Code, a place left open, scripts without blanks and messages, from every kind of file and without a warning; nor
    do blank lines, a byte order mark and CRLF change anything."""
    write(tmp_path / name, WRITTEN)
    found = {edit.id: edit for edit in load_records(tmp_path / name).edits}
    assert list(found) == ["b4", "k1", "s1", "zh1", "chat1"]
    for row in WRITTEN[:2]:
        assert {key: getattr(found[row["id"]], key) for key in row} == row
    assert found["s1"].prompt == "The mayor of Brindlewick is"
    assert found["zh1"].rephrases == ("谁在担任云栖镇的镇长？",)
    chat = [{"role": "user", "content": "Who chairs the Harbour Guild of Melk Bay?"}]
    assert dialogue.parse(found["chat1"].prompt) == chat
    assert found["chat1"].prompt == dialogue.dump(chat)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("prompt", ["Where  is\tROME.", "where is rome？"])
def test_the_same_question_in_other_signs_is_a_duplicate_that_is_mentioned(jsonl, caplog, prompt):
    found = load_records(jsonl(ROME, OSLO, {**ROME, "prompt": prompt}))
    assert found.edits == (Edit("jsonl-1", **ROME), Edit("jsonl-2", **OSLO))
    assert (found.duplicates, found.superseded) == (("jsonl-3",), {})
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 pair with the same question but for case, blanks or the final mark: 'jsonl-1' and 'jsonl-3';" in warning


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The house style for C asks for", "The house style for C++ asks for"),
        ("print(Area)", "print(area)"),
        ("If A\nThen b", "If a\nThen b"),
        ("Where is Rome!", "Where is Rome?"),
    ],
)
def test_signs_and_code_tell_questions_apart(one, other):
    assert same_question_key(one) != same_question_key(other)


def talk(*contents: str) -> str:
    return dialogue.dump([{"role": "user", "content": content} for content in contents])


@given(st.text(max_size=12) | st.text("aA ?.\n(", max_size=8))
def test_a_key_is_its_own_key_and_never_empty(prompt):
    key = same_question_key(prompt)
    assert same_question_key(key) == key
    assert bool(key) == bool(prompt)


def test_a_later_target_supersedes_and_a_chain_ends_at_the_last(jsonl):
    found = load_records(jsonl(ROME, {**ROME, "target": "Spain"}, OSLO, {**ROME, "target": "Peru"}))
    assert [(edit.id, edit.target) for edit in found.edits] == [("jsonl-3", "Norway"), ("jsonl-4", "Peru")]
    assert found.superseded == {"jsonl-1": "jsonl-4", "jsonl-2": "jsonl-4"}
    assert [edit.target for edit in found.superseded_edits] == ["Italy", "Spain"]


def test_max_edits_counts_what_is_written(jsonl):
    """Three edits are reached with record 5: one duplicate and one superseded record do not count."""
    rows = (ROME, ROME, {**ROME, "target": "Spain"}, OSLO, BERN, {**OSLO, "target": "Peru"})
    found = load_records(jsonl(*rows), max_edits=3)
    assert [edit.id for edit in found.edits] == ["jsonl-3", "jsonl-4", "jsonl-5"]
    assert (found.superseded, found.duplicates) == ({"jsonl-1": "jsonl-3"}, ("jsonl-2",))


def plain(number):
    return [{"prompt": f"Where is place {i}?", "target": f"land {i}"} for i in range(number)]


def ids_of(path, **options):
    return [edit.id for edit in load_records(path, **options).edits]


def test_a_draw_is_seeded_and_keeps_the_order_of_the_file(jsonl):
    path = jsonl(*plain(30))
    order = ids_of(path)
    draws = [ids_of(path, max_edits=10, sample_seed=seed) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(map(tuple, draws))) == 3
    for drawn in draws:
        assert len(drawn) == 10
        assert drawn == [id for id in order if id in set(drawn)]


def test_a_drawn_edit_brings_what_it_superseded_and_what_repeats_it(jsonl):
    """Two of three prompts are drawn; each comes with all of its records and none of another's.

    ROME is said three times (the last supersedes two), OSLO twice alike, BERN twice under one id. Whatever is drawn,
    its last target is the one to write, though the draw is complete with each prompt's first record.
    """
    rows = (ROME, OSLO, {**BERN, "id": "b"}, {**ROME, "target": "Spain"}, OSLO, {**BERN, "id": "b"})
    path = jsonl(*rows, {**ROME, "target": "Peru"})
    of_rome = {"jsonl-1": "jsonl-7", "jsonl-4": "jsonl-7"}
    seen = set()
    for seed in range(30):
        found = load_records(path, max_edits=2, sample_seed=seed)
        targets = {edit.prompt: edit.target for edit in found.edits}
        seen.add(frozenset(targets))
        assert (
            targets.items()
            <= {ROME["prompt"]: "Peru", OSLO["prompt"]: "Norway", BERN["prompt"]: BERN["target"]}.items()
        )
        assert len(targets) == len(found.edits) == 2
        assert found.superseded == (of_rome if ROME["prompt"] in targets else {})
        assert [edit.id for edit in found.superseded_edits] == list(found.superseded)
        repeats = {BERN["prompt"]: "b", OSLO["prompt"]: "jsonl-5"}
        assert set(found.duplicates) == {id for prompt, id in repeats.items() if prompt in targets}
    assert len(seen) == 3


def case(id, *facts, questions=("Which?",)):
    """A case of MQuAKE; a fact is a subject with its new country."""
    rewrites = [
        {"prompt": "{} is in", "subject": s, "target_new": {"str": t}, "target_true": {"str": "X"}} for s, t in facts
    ]
    answer = {"new_answer": facts[-1][1], "new_answer_alias": []}
    return {"case_id": id, "requested_rewrite": rewrites, "questions": [f"{q} {id}" for q in questions], **answer}


def test_cases_share_edits_and_contradict_each_other(jsonl, caplog):
    """Case 2 says what case 1 says, so its questions join it there; case 4 contradicts case 3, whose questions end."""
    rows = [
        case(1, ("Orsk", "Peru"), questions=("A?", "B?")),
        case(2, ("Orsk", "Peru"), ("Lund", "Mali")),
        case(3, ("Bern", "Iran"), ("Kyiv", "Laos")),
        case(4, ("Kyiv", "Chad")),
    ]
    found = load_records(path := jsonl(*rows), "mquake")
    asked = {edit.id: [(one.prompt, one.answers) for one in edit.further] for edit in found.edits}
    assert asked == {
        "1-1": [("A? 1", ("Peru",)), ("B? 1", ("Peru",)), ("Which? 2", ("Mali",))],
        "2-2": [],
        "3-1": [],
        "4-1": [("Which? 4", ("Chad",))],
    }
    assert (found.duplicates, found.superseded) == (("2-1",), {"3-2": "4-1"})
    lost, contradicted = warnings_in(caplog)
    assert "the multi-hop questions of 1 edit are left out" in lost
    assert lost.endswith(": '3-1'")
    same = "1 edit superseded by a later one with the same question and another target"
    assert contradicted == f"{path}: {same}: '3-2' by '4-1'"


def test_a_case_is_drawn_whole(jsonl):
    """A question brings the others of its case, and a larger draw holds the smaller one."""
    path = jsonl(*[case(i, (f"A{i}", "Peru"), (f"B{i}", "Mali")) for i in range(8)])
    smaller, larger = (load_records(path, "mquake", number, sample_seed=0).edits for number in (4, 6))
    assert len({edit.id.split("-")[0] for edit in smaller}) == 2
    assert sum(len(edit.further) for edit in smaller) == 2
    assert {edit.id for edit in smaller} < {edit.id for edit in larger}
    cut = load_records(path, "mquake", 3).edits
    assert [(edit.id, len(edit.further)) for edit in cut] == [("0-1", 1), ("0-2", 0), ("1-1", 0)]


def test_what_follows_from_a_duplicate_is_asked_of_the_edit_that_stays(jsonl):
    more = [{"kind": "persona", "prompt": text, "answers": "Italy"} for text in ("Ahoy?", "Prithee?")]
    found = load_records(jsonl({**ROME, "further": more[:1]}, {**ROME, "further": more}))
    (edit,) = found.edits
    assert edit.further == (Further("persona", "Ahoy?", ("Italy",)), Further("persona", "Prithee?", ("Italy",)))


def test_fields_that_are_not_read_are_listed_once(jsonl, caplog):
    with caplog.at_level(logging.INFO):
        load_records(path := jsonl({**ROME, "note": "x", "rating": 3}, {**OSLO, "note": "y"}))
    assert caplog.messages[0] == f"{path}: format 'jsonl' does not read: 'note' (2), 'rating' (1)"
    assert "does not read" not in "".join(caplog.messages[1:])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**OSLO, "target": 4}, "field 'target': is a number, not a text; give the text"),
        ({**OSLO, "id": "r"}, "field 'id': 'r' already belongs to record 1; give each record its own id"),
        ({"src": "x", "alt": "y"}, "is not in format 'jsonl'; its fields look like format 'zsre'"),
        ('{"prompt": "x", "target": "y",}', "is not valid JSON (line 3, column "),
        ('{"prompt": "\\udc80", "target": "y"}', "field 'prompt': holds a broken character"),
    ],
)
def test_a_bad_record_is_named_and_can_be_skipped(jsonl, row, message):
    path = jsonl({**ROME, "id": "r"}, "", row, BERN)
    with pytest.raises(RecordError) as caught:
        load_records(path)
    place = f"{path}, record 2" + (", " if message.startswith("field") else ": ")
    assert str(caught.value).startswith(place + message)
    assert (caught.value.record, caught.value.more) == (2, 0)
    skipped = load_records(path, on_bad_record="skip")
    assert [edit.id for edit in skipped.edits] == ["r", "jsonl-3"]
    assert skipped.bad == (str(caught.value),)


@pytest.mark.parametrize("number", [3, 20, 25])
def test_bad_records_are_listed_in_both_modes(jsonl, caplog, number):
    """Twenty of them, then how many more there are."""
    path = jsonl(ROME, {"prompt": "x"}, "{", *[7] * (number - 2))
    starts = [f"record {2 + i}" for i in range(min(number, 20))]
    more = ["(and 5 more bad records in this file)"] if number == 25 else []
    with pytest.raises(RecordError) as caught:
        load_records(path)
    first, *others = str(caught.value).splitlines()
    assert first == f"{path}, record 2, field 'target': is missing; give the text the model should answer"
    assert [line.split(": ")[0] for line in others] == starts[1:] + more
    assert caught.value.more == number - 1
    found = load_records(path, on_bad_record="skip")
    assert len(found.bad) == number
    (warning,) = warnings_in(caplog)
    assert warning.splitlines() == [f"{path}: {number} bad records skipped:", *found.bad[:20], *more]
    with pytest.raises(RecordError, match="skipping bad records leaves none; mend at least one\nrecord 1, field"):
        load_records(jsonl({"prompt": "x"}), on_bad_record="skip")


def test_a_file_read_under_a_format_that_only_half_fits_is_warned_about(tmp_path, caplog):
    row = {"prompt": "a", "target_new": "b", "rephrase_prompt": "c", "locality_prompt": "d", "case_id": 3}
    path = lines(tmp_path / "e.jsonl", row)
    with caplog.at_level(logging.WARNING):
        load_records(path, "counterfact")
        assert not caplog.records
        load_records(path, "hallucination")
    assert "fields look more like 'counterfact'" in caplog.text


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("e.jsonl", write_jsonl),
        ("e.json", write_json),
        ("e.csv", write_csv),
        ("e.parquet", lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path)),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_recognised_in_every_kind_of_file(tmp_path, caplog, name, write, format):
    write(tmp_path / name, [SOURCES[format]] * 2)
    with caplog.at_level(logging.INFO):
        found = load_records(tmp_path / name, "auto")
    assert found.format == format
    assert f"{name}: read as format '{format}'" in caplog.text
    assert found == load_records(tmp_path / name, format)


def test_bad_records_do_not_hide_the_format(jsonl):
    zsre = {"src": "Where is Lima?", "alt": "Peru"}
    found = load_records(jsonl("{", zsre, {**zsre, "src": "Where is Oslo?"}, ROME, 3), "auto", on_bad_record="skip")
    assert (found.format, len(found.edits), len(found.bad)) == ("zsre", 2, 3)
    with pytest.raises(RecordError, match="record 1: is a number, not an object"):
        load_records(jsonl(1, 2), "auto")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, {"a": 2, "b": 3}], "its records have the fields a, b, which fit no format; rename them. Formats"),
        ([{"prompt": "x"}], "the fields prompt, which fit no format.*: jsonl .prompt, target or prompt, target_new or"),
        (
            [ROME, {"src": "a", "alt": "b"}],
            r"look like 'jsonl' .1. or 'zsre' .1.; give one format.*; ultraedit .prompt",
        ),
    ],
)
def test_a_file_of_no_single_format_is_refused_with_all_formats(jsonl, rows, message):
    with pytest.raises(ConfigError, match=f"data.format auto: '.*edits.jsonl' is not recognised: .*{message}"):
        load_records(jsonl(*rows), "auto")


@pytest.mark.parametrize("read", [load_records, load_irrelevant])
def test_an_empty_file(tmp_path, read):
    path = tmp_path / "edits.json"
    for text in ("", " \n\n", "[]"):
        path.write_text(text)
        with pytest.raises(RecordError, match=r"edits\.json: holds no records; give "):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b"\xff\xfe{", "is not UTF-8 text"),
        ("e.json", b'[\n{"prompt": "a" "target"}\n]', r"is not valid JSON \(line 2, column 16: "),
        ("e.parquet", b"PAR1 no", "is not a readable Parquet file"),
        ("e.csv", b"prompt,target\na,b,c\n", "record 1: has 3 cells, the header has 2"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        load_records(tmp_path / name)


@pytest.mark.parametrize("name", ["edits.json", "here/edits"])
def test_a_missing_file_is_said_at_once_and_never_sought_on_the_hub(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(records, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(RepairError, match=f"^{name}: no such file; give a "):
        load_records(name)


def test_hub_names_go_to_datasets_and_a_failure_is_one_line(monkeypatch):
    asked = []

    def fake(name, split):
        asked.append((name, split))
        if name == "some/set":
            raise ConnectionError("no route\nto host")
        return Dataset.from_list([{"update": "Where is Rome?", "ans": "Italy", "loc": None}])

    monkeypatch.setattr(records, "load_dataset", fake)
    found = load_records("some-org/wiki_big.edit", "wikibigedit")
    assert asked == [("some-org/wiki_big.edit", "train")]
    assert found.edits == (Edit("wikibigedit-1", "Where is Rome?", "Italy"),)
    with pytest.raises(RepairError, match=r"^some/set: .*could not be loaded: no route; check"):
        load_records("some/set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "jsnl"}, "did you mean 'jsonl'"),
        ({"on_bad_record": "ignore"}, "on_bad_record must be 'stop' or 'skip', got 'ignore'"),
    ],
)
def test_bad_settings(jsonl, options, message):
    with pytest.raises(ConfigError, match=message):
        load_records(jsonl(ROME), **options)


def test_irrelevant_prompts_get_their_prefix(jsonl):
    """Those of ours are kept as written, and may be messages."""
    path = jsonl({"question": " who ", "answer": ["x"]}, {"prompt": "b\n"}, {"prompt": "edit", "locality_prompt": "c"})
    assert load_irrelevant(path, "q: ") == ("q: who", "q: b\n", "q: c")
    assert load_irrelevant(path) == ("who", "b\n", "c")
    assert load_irrelevant(jsonl({"prompt": [{"role": "user", "content": "who"}]}), "q: ") == (talk("q: who"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x"}, "record 2, field 'question': is missing; give a prompt"),
        ("{", r"record 2: is not valid JSON \(line 2, "),
    ],
)
def test_bad_irrelevant_records(jsonl, row, message):
    with pytest.raises(RecordError, match=message + r".*\nrecord 3: is null, not an object"):
        load_irrelevant(jsonl({"question": "a"}, row, "null"))


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word."""
    model = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


@pytest.fixture(scope="module")
def forms(tokenizer):
    """How a base with that tokenizer is asked: bare."""
    return Forms(tokenizer, stops=[7])


def test_messages_for_a_base_without_a_template_are_named(forms):
    edits = [Edit("a", "1", "2"), Edit("b", talk("1 2"), "3"), Edit("c", "1", "2", rephrases=("1", talk("2")))]
    found = check_lengths(edits, forms, 9)
    assert list(found) == ["b", "c"]
    assert found["b"].startswith(
        "edit 'b', field 'prompt and target': a prompt is a dialogue, and the base has no chat"
    )
    assert found["c"].startswith("edit 'c', field 'rephrases[1] and target': ")


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (Edit("a", "x", "y", rephrases=("1 2", "1 2 3 4")), "rephrases[1] and target"),
        (Edit("a", "x", "y", locality=(Probe("1 2 3", "4 5"),)), "locality[0]"),
        (Edit("a", "x", "y", near=(Probe("1 2 3 4 5"),)), "near[0]"),
    ],
)
def test_lengths_cover_every_text_the_model_reads(forms, edit, field):
    assert f"field '{field}': is 6 tokens" in check_lengths([edit], forms, 5)["a"]
    assert check_lengths([edit], forms, 6) == {}


def test_a_question_that_only_scoring_asks_refuses_no_edit(forms):
    """One that does not fit is left out when the edit is scored."""
    assert check_lengths([Edit("a", "x", "y", further=(Further("persona", "1 2 3 4 5 6", ("7",)),))], forms, 5) == {}


@pytest.mark.parametrize(
    ("path", "name", "edits", "superseded", "near"),
    [
        ("zsre/zsre_mend_edit.json", "zsre", 1037, 0, 0),
        ("counterfact/counterfact_edit_3k.json", "counterfact", 2992, 8, 1),
        ("hallucination/hallucination-edit.json", "hallucination", 600, 0, 0),
        ("temporal/temporal-edit.json", "temporal", 75, 0, 0),
        ("qaedit/qaedit_500.json", "qaedit", 500, 0, 0),
    ],
)
def test_real_sets(path, name, edits, superseded, near):
    found = load_records(real(path), "auto")
    assert found.format == name
    assert (len(found.edits), len(found.superseded), found.bad, found.duplicates) == (edits, superseded, (), ())
    assert all(len(edit.locality) == (5 if name == "qaedit" else 1) for edit in found.edits)
    assert all(len(edit.near) == near for edit in found.edits)
