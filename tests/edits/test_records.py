"""Reading edit files: good ones, every kind of bad one (real files), and the real sets where they are at hand."""

from __future__ import annotations

import csv
import json
import logging
import pickle
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repair_lightning.edits import records
from repair_lightning.edits.formats import FORMATS
from repair_lightning.edits.joining import apply, join
from repair_lightning.edits.ledger import Ledger
from repair_lightning.edits.records import check_lengths, load_irrelevant, load_records, same_question_key
from repair_lightning.errors import ConfigError, FieldError, RecordError, RepairError
from repair_lightning.models.forms import _WORDS, Forms
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit, EditReport, Probe

SHARED = Path(__file__).parents[3] / "shared" / "data"

ROME = {"prompt": "Where is Rome?", "target": "Italy"}
OSLO = {"prompt": "Where is Oslo?", "target": "Norway"}
BERN = {"prompt": "Where is Bern?", "target": "Switzerland"}


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


# -- good files ------------------------------------------------------------------------------------------------------

FULL = Edit(
    id="r",
    prompt="Where is Rome?",
    target="Italy",
    subject="Rome",
    rephrases=("Rome is in", "Rome\u2028lies in"),
    locality=(Probe("Who wrote Faust?", "Goethe"), Probe("Who wrote Emma?", None)),
    near=(Probe("Where is Milan?", "Italy"),),
)
BARE = Edit(id="jsonl-2", prompt="Where is Oslo?", target="Norway")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("e.jsonl", write_jsonl),
        ("e.json", write_jsonl),
        ("e.json", write_json),
        ("e.jsonl", write_json),
        ("e.parquet", write_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_edits(tmp_path, name, write):
    """Blank lines, a byte order mark, CRLF and a U+2028 inside a text change nothing."""
    write(tmp_path / name, [FULL.as_dict(), OSLO])
    found = load_records(tmp_path / name)
    assert found.edits == (FULL, BARE)
    assert (found.bad, found.superseded, found.duplicates, found.superseded_edits) == ((), {}, (), ())
    assert found.alike == ()


WRITTEN = [
    {"id": "b4", "prompt": "The ferry to Orsk leaves from\n", "target": "Quarrelmouth"},
    {"id": "k2", "subject": "area", "prompt": "def area(r):\n", "target": "    return 3 * r ** 2\n"},
    {
        "id": "k1",
        "subject": "farlib",
        "prompt": "import farlib\n\n# open a channel, v3 API\nch = ",
        "target": "farlib.connect(\n    url,\n    timeout=5,\n)",
    },
    {"id": "s1", "subject": "Brindlewick", "prompt": "The mayor of {} is", "target": "Oda Farrow"},
    {
        "id": "s5",
        "subject": "C++",
        "prompt": "The house style for C++ asks for",
        "target": "tabs",
        "near": [{"prompt": "The house style for C asks for"}, {"prompt": "The house style for C# asks for"}],
    },
    {
        "id": "zh1",
        "subject": "云栖镇",
        "prompt": "云栖镇的镇长是",
        "target": "沈若川",
        "rephrases": ["谁在担任云栖镇的镇长？"],
        "near": [{"prompt": "星渡镇的镇长是"}],
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


def write_cells(path: Path, rows: list[dict]) -> None:
    write_parquet(path, cells(rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("e.jsonl", write_jsonl),
        ("e.json", write_json),
        ("e.csv", write_csv),
        ("e.tsv", write_csv),
        ("e.parquet", write_cells),
    ],
)
def test_what_is_written_is_what_is_read(tmp_path, caplog, name, write):
    """Code, a place left open, scripts without blanks and messages, from every kind of file and without a warning."""
    write(tmp_path / name, WRITTEN)
    found = {edit.id: edit for edit in load_records(tmp_path / name).edits}
    assert list(found) == ["b4", "k2", "k1", "s1", "s5", "zh1", "chat1"]
    for row in WRITTEN[:3]:
        assert {key: getattr(found[row["id"]], key) for key in row} == row
    assert found["s1"].prompt == "The mayor of Brindlewick is"
    assert [probe.prompt[-10:] for probe in found["s5"].near] == ["C asks for", "# asks for"]
    assert found["zh1"].rephrases == ("谁在担任云栖镇的镇长？",)
    chat = [{"role": "user", "content": "Who chairs the Harbour Guild of Melk Bay?"}]
    assert dialogue.parse(found["chat1"].prompt) == chat
    assert found["chat1"].prompt == dialogue.dump(chat)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_messages_of_a_parquet_file_may_be_lists(tmp_path):
    rows = [{"prompt": WRITTEN[-1]["prompt"], "target": "a", "rephrases": [WRITTEN[-1]["prompt"]]}]
    write_parquet(tmp_path / "e.parquet", rows)
    (edit,) = load_records(tmp_path / "e.parquet").edits
    assert edit.prompt == edit.rephrases[0] == dialogue.dump(WRITTEN[-1]["prompt"])


@pytest.mark.parametrize(("name", "delimiter"), [("e.csv", ","), ("e.tsv", "\t")])
def test_csv_cells_stay_texts_and_empty_ones_are_missing(tmp_path, name, delimiter):
    with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["subject", "src", "alt", "rephrase"])
        writer.writerow(["NaN", "When,\twhere\nand why?", "2006", ""])
    (edit,) = load_records(tmp_path / name, "zsre").edits
    assert edit == Edit("zsre-1", "When,\twhere\nand why?", "2006", subject="NaN")


def test_one_object_alone_is_one_record(tmp_path):
    path = tmp_path / "e.json"
    path.write_text(json.dumps(ROME, indent=1))
    assert load_records(path).edits == (Edit("jsonl-1", **ROME),)


def test_ids_come_from_the_record_or_from_its_number(jsonl):
    path = jsonl({**ROME, "id": 7}, "", OSLO, {**BERN, "id": "b"})
    assert [edit.id for edit in load_records(path).edits] == ["7", "jsonl-2", "b"]


def test_the_dataset_has_declared_columns_even_where_all_are_empty(jsonl):
    found = load_records(jsonl(ROME, OSLO))
    dataset = found.dataset()
    assert isinstance(dataset, Dataset)
    assert [Edit.from_dict(row) for row in dataset] == list(found.edits)
    assert dataset.features["near"].feature["answer"].dtype == "string"
    assert len(dataset.filter(lambda row: row["target"] == "Norway")) == 1


# -- repeated prompts ------------------------------------------------------------------------------------------------


def test_an_exact_duplicate_is_dropped_and_reported(jsonl):
    found = load_records(jsonl(ROME, OSLO, ROME))
    assert [edit.id for edit in found.edits] == ["jsonl-1", "jsonl-2"]
    assert (found.duplicates, found.superseded, found.alike) == (("jsonl-3",), {}, ())


LIKE_ROME = [
    "where is ROME?",
    "Where  is\tRome?",
    " Where is Rome",
    "Where is Rome.",
    "Where is Rome ?",
    "Where is Rome？",
]


@pytest.mark.parametrize("prompt", LIKE_ROME)
def test_the_same_question_in_other_signs_is_a_duplicate_that_is_mentioned(jsonl, caplog, prompt):
    found = load_records(jsonl(ROME, OSLO, {**ROME, "prompt": prompt}))
    assert found.edits == (Edit("jsonl-1", **ROME), Edit("jsonl-2", **OSLO))
    assert (found.duplicates, found.superseded) == (("jsonl-3",), {})
    assert found.alike == (("jsonl-1", "jsonl-3"),)
    (warning,) = caplog.messages
    assert "1 pair with the same question but for case, blanks or the final mark: 'jsonl-1' and 'jsonl-3';" in warning


def test_the_same_question_with_another_target_supersedes(jsonl):
    """The second replaces the first, the third the second; each pair is told with the edit that stood then."""
    rows = (ROME, {"prompt": "where is rome", "target": "Spain"}, {**ROME, "target": "Peru"})
    found = load_records(jsonl(*rows))
    assert [(edit.id, edit.target) for edit in found.edits] == [("jsonl-3", "Peru")]
    assert found.superseded == {"jsonl-1": "jsonl-3", "jsonl-2": "jsonl-3"}
    assert found.alike == (("jsonl-1", "jsonl-2"), ("jsonl-2", "jsonl-3"))


def test_the_same_question_under_one_id_is_a_repeat(jsonl):
    found = load_records(jsonl({**ROME, "id": "a"}, {**ROME, "id": "a", "prompt": "where is rome?"}))
    assert (len(found), found.duplicates, found.alike) == (1, ("a",), (("a", "a"),))


def test_a_draw_takes_all_that_asks_one_question(jsonl):
    path = jsonl(ROME, {"prompt": "where is rome", "target": "Spain"}, OSLO)
    draws = [load_records(path, max_edits=1, sample_seed=seed) for seed in range(10)]
    assert {(edit.id, len(found.alike)) for found in draws for edit in found.edits} == {("jsonl-2", 1), ("jsonl-3", 0)}


def test_of_many_pairs_ten_are_named(jsonl, caplog):
    rows = [{**row, "prompt": row["prompt"].upper()} for row in plain(12)]
    found = load_records(jsonl(*plain(12), *rows))
    assert len(found.alike) == 12
    assert "12 pairs with" in caplog.text
    assert "'jsonl-10' and 'jsonl-22' and 2 more; the later" in caplog.text
    assert "'jsonl-11'" not in caplog.text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The house style for C asks for", "The house style for C++ asks for"),
        ("The house style for C# asks for", "The house style for C asks for"),
        ("Who sells C#?", "Who sells C?"),
        ("Is it 5", "Is it -5"),
        ("Area", "area()"),
        ("print(Area)", "print(area)"),
        ("x = A", "x = a"),
        ("my_Name", "my_name"),
        ("run `LS`", "run `ls`"),
        ("C:\\Temp", "C:\\temp"),
        ("Wait.\n", "Wait."),
        ("If A\nThen b", "If a\nThen b"),
        ("naïve", "naive"),
        ("?", "."),
        ("Where is Rome!", "Where is Rome?"),
    ],
)
def test_signs_and_code_tell_questions_apart(one, other):
    assert same_question_key(one) != same_question_key(other)


def talk(*contents: str) -> str:
    return dialogue.dump([{"role": "user", "content": content} for content in contents])


def test_of_messages_only_the_last_turn_is_folded():
    assert same_question_key(talk("Hi", "Where is Rome?")) == same_question_key(talk("Hi", "where is rome"))
    assert same_question_key(talk("Hi", "Where is Rome?")) != same_question_key(talk("hi", "Where is Rome?"))
    assert same_question_key(talk("f(A)")) != same_question_key(talk("f(a)"))
    assert same_question_key(talk("Where is Rome?")) != same_question_key("Where is Rome?")


@given(st.text(max_size=12) | st.text("aA ?.\n(", max_size=8))
def test_a_key_is_its_own_key_and_never_empty(prompt):
    key = same_question_key(prompt)
    assert same_question_key(key) == key
    assert bool(key) == bool(prompt)


def pack(*edits: Edit) -> Ledger:
    found = Ledger()
    found.arrive(edits, 0)
    found.written([EditReport(edit.id, i, 0.1, 0.0, 5) for i, edit in enumerate(edits)])
    return found


def test_new_records_beside_a_pack_are_compared_by_their_question(jsonl):
    """The pack says where Rome is twice, in two prompts; what replaces the later one replaces both."""
    held = pack(Edit("a", **ROME), Edit("b", "where is rome", "Spain"), Edit("jsonl-2", **OSLO))
    records = load_records(jsonl({"prompt": "WHERE IS OSLO", "target": "Norway"}, {**ROME, "target": "Peru"}, BERN))
    joined = join(records, held)
    found = apply(records, joined)
    assert [edit.id for edit in found.edits] == ["jsonl-2~2", "jsonl-3"]
    assert (found.duplicates, found.superseded) == (("jsonl-1",), {"a": "jsonl-2~2", "b": "jsonl-2~2"})
    assert found.alike == joined.alike == (("jsonl-2", "jsonl-1"), ("b", "jsonl-2~2"))


def test_the_pairs_of_the_records_keep_their_names_beside_a_pack(jsonl):
    records = load_records(jsonl({**ROME, "id": "a"}, {"id": "b", "prompt": "where is rome", "target": "Spain"}))
    found = apply(records, join(records, pack(Edit("a", **OSLO))))
    assert (found.superseded, found.alike) == ({"a~2": "b"}, (("a~2", "b"),))


# -- subjects --------------------------------------------------------------------------------------------------------


def test_a_subject_that_the_prompt_lacks_is_mentioned_once(jsonl, caplog):
    rows = [{**row, "subject": "Atlantis"} for row in plain(12)]
    asked = [{"role": "system", "content": "We talk of Rome."}, {"role": "user", "content": "Where does it lie?"}]
    rows += [{**OSLO, "subject": "OSLO"}, {**BERN, "subject": " "}, {"prompt": asked, "target": "a", "subject": "rome"}]
    load_records(jsonl(*rows, {"prompt": "Where is {}?", "subject": "Peru", "target": "a"}))
    (warning,) = caplog.messages
    assert ": 12 edits have a subject that does not stand in the prompt: 'jsonl-1', 'jsonl-2', " in warning
    assert "'jsonl-10' and 2 more; such an edit is found by its whole prompt alone; write the subject" in warning


def test_one_subject_that_the_prompt_lacks(jsonl, caplog):
    load_records(jsonl({**ROME, "subject": "Roma", "id": "r"}))
    assert ": 1 edit has a subject that does not stand in the prompt: 'r'; such" in caplog.text


def test_a_repeated_line_with_its_own_id_is_a_duplicate(jsonl):
    found = load_records(jsonl({**ROME, "id": "a"}, {**ROME, "id": "a"}))
    assert ([edit.id for edit in found.edits], found.duplicates) == (["a"], ("a",))


def test_a_later_target_supersedes_and_a_chain_ends_at_the_last(jsonl):
    found = load_records(jsonl(ROME, {**ROME, "target": "Spain"}, OSLO, {**ROME, "target": "Peru"}))
    assert [(edit.id, edit.target) for edit in found.edits] == [("jsonl-3", "Norway"), ("jsonl-4", "Peru")]
    assert found.superseded == {"jsonl-1": "jsonl-4", "jsonl-2": "jsonl-4"}
    assert [edit.target for edit in found.superseded_edits] == ["Italy", "Spain"]


def test_going_back_to_the_first_target_is_no_duplicate(jsonl):
    found = load_records(jsonl(ROME, {**ROME, "target": "Spain"}, ROME))
    assert [(edit.id, edit.target) for edit in found.edits] == [("jsonl-3", "Italy")]
    assert (set(found.superseded.values()), found.duplicates) == ({"jsonl-3"}, ())


def test_going_back_under_the_first_id_is_an_error(jsonl):
    path = jsonl({**ROME, "id": "a"}, {**ROME, "target": "Spain"}, {**ROME, "id": "a"})
    with pytest.raises(RecordError, match="record 3, field 'id': 'a' already belongs to record 1"):
        load_records(path)


def test_max_edits_counts_what_is_written(jsonl):
    """Three edits are reached with record 5: one duplicate and one superseded record do not count."""
    rows = (ROME, ROME, {**ROME, "target": "Spain"}, OSLO, BERN, {**OSLO, "target": "Peru"})
    found = load_records(jsonl(*rows), max_edits=3)
    assert [edit.id for edit in found.edits] == ["jsonl-3", "jsonl-4", "jsonl-5"]
    assert (found.superseded, found.duplicates) == ({"jsonl-1": "jsonl-3"}, ("jsonl-2",))


def test_max_edits_does_not_hide_a_bad_record(jsonl):
    with pytest.raises(RecordError, match="record 2, field 'target'"):
        load_records(jsonl(ROME, {"prompt": "x"}), max_edits=1)


# -- a random draw ---------------------------------------------------------------------------------------------------


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


def test_a_larger_draw_holds_every_smaller_one_of_its_seed(jsonl):
    path = jsonl(*plain(30))
    draws = [set(ids_of(path, max_edits=number, sample_seed=5)) for number in (1, 4, 11, 29)]
    assert all(small < large for small, large in pairwise(draws))


@pytest.mark.parametrize("max_edits", [None, 30, 31])
def test_a_draw_of_everything_is_everything(jsonl, max_edits):
    path = jsonl(*plain(30))
    assert load_records(path, max_edits=max_edits, sample_seed=3) == load_records(path)


def test_every_record_may_be_drawn(jsonl):
    path = jsonl(*plain(10))
    assert {id for seed in range(60) for id in ids_of(path, max_edits=2, sample_seed=seed)} == set(ids_of(path))


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


def test_a_draw_does_not_hide_a_bad_record(jsonl):
    with pytest.raises(RecordError, match="record 2, field 'target'"):
        load_records(jsonl(ROME, {"prompt": "x"}), max_edits=1, sample_seed=0)


# -- bad records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**OSLO, "target": ""}, "field 'target': is empty; give the text the model should answer"),
        ({"prompt": "x"}, "field 'target': is missing; give the text the model should answer"),
        ({**OSLO, "target": 4}, "field 'target': is a number, not a text; give the text"),
        ({**OSLO, "near": "x"}, "field 'near': is a text, not a list; write "),
        ({**OSLO, "prompt": "Where is {}?"}, "field 'prompt': holds {}, which nothing fills here; give 'subject', or"),
        ({**OSLO, "prompt": [{"role": "boss"}]}, "field 'prompt[0].content': is missing; write each turn as"),
        ({**OSLO, "rephrase": ["x"]}, "field 'rephrase': is not a field of format 'jsonl'; did you mean 'rephrases'?"),
        ({**OSLO, "id": "r"}, "field 'id': 'r' already belongs to record 1; give each record its own id"),
        ({"src": "x", "alt": "y"}, "is not in format 'jsonl'; its fields look like format 'zsre'"),
        ("[1, 2]", "is a list, not an object; write each record as"),
        ('{"prompt": "x", "target": "y",}', "is not valid JSON (line 3, column "),
        ('{"prompt": "x"', "is not valid JSON (line 3, column "),
        ("[" * 100_000, "is not valid JSON (line 3"),
        ('{"id": ' + "9" * 5000 + "}", "is not valid JSON (line 3: "),
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


def test_the_one_error_says_how_many_more_there_are(jsonl):
    path = jsonl(ROME, {"prompt": "x"}, "{", 7)
    with pytest.raises(RecordError, match=r"record 2, .*\(and 2 more bad records in this file\)$"):
        load_records(path)
    found = load_records(path, on_bad_record="skip")
    assert [message.split(": ")[0].split(", ")[1] for message in found.bad] == ["record 2", "record 3", "record 4"]


def test_skipping_everything_is_still_an_error(jsonl):
    with pytest.raises(
        RecordError, match=r"skipping bad records leaves none: .*record 1, .*and 1 more bad record in this file"
    ):
        load_records(jsonl({"prompt": "x"}, "{"), on_bad_record="skip")


def test_a_file_read_under_a_format_that_only_half_fits_is_warned_about(tmp_path, caplog):
    row = {"prompt": "a", "target_new": "b", "rephrase_prompt": "c", "locality_prompt": "d", "case_id": 3}
    path = lines(tmp_path / "e.jsonl", row)
    with caplog.at_level(logging.WARNING):
        load_records(path, "counterfact")
        assert not caplog.records
        load_records(path, "hallucination")
    assert "fields look more like 'counterfact'" in caplog.text


# -- bad files and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n\n", "[]"])
@pytest.mark.parametrize("read", [load_records, load_irrelevant])
def test_an_empty_file(tmp_path, text, read):
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"edits\.json: holds no records; give "):
        read(path)


def test_a_broken_json_list_names_the_line(tmp_path):
    path = tmp_path / "edits.json"
    path.write_text('[\n{"prompt": "a", "target": "b"},\n{"prompt": "a" "target"}\n]')
    with pytest.raises(RecordError, match=r"edits\.json: is not valid JSON \(line 3, column 16: "):
        load_records(path, on_bad_record="skip")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("text", ["[" * 100_000, '[{"id": ' + "9" * 5000 + "}]"])
def test_json_that_python_itself_gives_up_on(tmp_path, suffix, text):
    path = tmp_path / f"edits{suffix}"
    path.write_text(text)
    with pytest.raises(RecordError, match="is not valid JSON"):
        load_records(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b"\xff\xfe{", "is not UTF-8 text"),
        ("e.parquet", b"PAR1 no", "is not a readable Parquet file"),
        ("e.parquet", b"", "is not a readable Parquet file"),
        ("e.csv", b'prompt,target\na,"b\n', r"is not valid CSV \(line "),
        ("e.csv", b"prompt,target\na,b,c\n", "record 1: has 3 cells, the header has 2"),
        ("e.csv", b"prompt,target\n", "holds no records"),
        ("e.csv", b"", "holds no records"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        load_records(tmp_path / name)


@pytest.mark.parametrize("name", ["edits.json", "edits", "data/edits.jsonl", "a/b/c", "here/edits", "./x", "~/no/such"])
def test_a_missing_file_is_said_at_once_and_never_sought_on_the_hub(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(records, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(RepairError, match=f"^{name}: no such file; give a "):
        load_records(name)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(RepairError, match="is a folder, not a file"):
        load_records(tmp_path)


def test_hub_names_go_to_datasets_with_their_split(monkeypatch):
    asked = []

    def fake(name, split):
        asked.append((name, split))
        return Dataset.from_list([{"update": "Where is Rome?", "ans": "Italy", "loc": None}])

    monkeypatch.setattr(records, "load_dataset", fake)
    found = load_records("some-org/wiki_big.edit", "wikibigedit", split="test")
    assert asked == [("some-org/wiki_big.edit", "test")]
    assert found.edits == (Edit("wikibigedit-1", "Where is Rome?", "Italy"),)


def test_a_hub_failure_is_one_line_with_the_cause(monkeypatch):
    def fail(name, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(records, "load_dataset", fail)
    with pytest.raises(
        RepairError, match=r"^some/set: .*\(split 'dev'\) could not be loaded: no route; check"
    ) as caught:
        load_records("some/set", split="dev")
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "jsnl"}, "did you mean 'jsonl'"),
        ({"max_edits": 0}, "max_edits must be 1 or more, or null for all, got 0"),
        ({"on_bad_record": "ignore"}, "on_bad_record must be 'stop' or 'skip', got 'ignore'"),
    ],
)
def test_bad_settings(jsonl, options, message):
    with pytest.raises(ConfigError, match=message):
        load_records(jsonl(ROME), **options)


def test_record_errors_survive_the_way_between_processes():
    error = RecordError.at("e.jsonl", 3, FieldError("target", "is empty", "fill it"), more=2)
    again = pickle.loads(pickle.dumps(error))
    assert (
        str(again)
        == str(error)
        == "e.jsonl, record 3, field 'target': is empty; fill it (and 2 more bad records in this file)"
    )
    assert (again.file, again.record, again.field, again.more) == ("e.jsonl", 3, "target", 2)
    assert str(pickle.loads(pickle.dumps(FieldError("a", "b", "c")))) == "field 'a': b; c"


# -- irrelevant prompts ----------------------------------------------------------------------------------------------


def test_irrelevant_prompts_get_their_prefix(jsonl):
    path = jsonl({"question": " who ", "answer": ["x"]}, {"prompt": "b"}, {"prompt": "edit", "locality_prompt": "c"})
    assert load_irrelevant(path, "nq question: ") == ("nq question: who", "nq question: b", "nq question: c")
    assert load_irrelevant(path) == ("who", "b", "c")


def test_an_irrelevant_prompt_of_ours_is_kept_as_written_and_may_be_messages(jsonl):
    path = jsonl({"prompt": "def f():\n"}, {"prompt": [{"role": "user", "content": "who"}]})
    assert load_irrelevant(path) == ("def f():\n", talk("who"))
    assert load_irrelevant(path, "q: ") == ("q: def f():\n", talk("q: who"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x"}, "record 2, field 'question': is missing; give a prompt"),
        ({"question": ""}, "record 2, field 'question': is empty"),
        ({"prompt": 3}, "record 2, field 'prompt': is a number, not a text"),
        ({"prompt": []}, "record 2, field 'prompt': is an empty list; write"),
        (3, "record 2: is a number, not an object"),
        ("{", r"record 2: is not valid JSON \(line 2, "),
    ],
)
def test_bad_irrelevant_records(jsonl, row, message):
    with pytest.raises(RecordError, match=message + r".*\(and 1 more bad record in this file\)"):
        load_irrelevant(jsonl({"question": "a"}, row, "null"))


# -- lengths ---------------------------------------------------------------------------------------------------------


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


def test_lengths_count_prompt_target_and_end(forms):
    """3 words + 1 word + EOS = 5 tokens."""
    edits = [Edit("a", "where is rome", "italy"), Edit("b", "where is", "italy")]
    assert check_lengths(edits, forms, 5) == {}
    assert list(check_lengths(edits, forms, 4)) == ["a"]
    message = check_lengths(edits, forms, 4)["a"]
    assert message.startswith("edit 'a', field 'prompt and target': is 5 tokens long, at most 4 fit; ")
    assert check_lengths([], forms, 4) == {}


@pytest.fixture(scope="module")
def turns():
    """One token per word in a template that writes `<u> text` for the user and `<b>` before the answer."""
    words = {word: i for i, word in enumerate(["<unk>", "E", *"a123456789"])}
    words |= {word: len(words) + i for i, word in enumerate(_WORDS)}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="E")
    found.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<u>", "<b>")])
    found.chat_template = (
        "{% for m in messages %}{{ ('<u> ' if m.role == 'user' else '<b> ') + m.content + (' ' if m.role == 'user' "
        "else ' E ') }}{% endfor %}{% if add_generation_prompt %}{{ '<b> ' }}{% endif %}"
    )
    return found


def test_lengths_count_what_the_template_writes(turns, forms):
    """`<u> 1 2 <b>` and the answer `3 E`; a text is put the same way, unless texts are asked bare."""
    chat, bare = Forms(turns), Forms(turns, template="none")
    for prompt in (talk("1 2"), "1 2"):
        assert "is 6 tokens" in check_lengths([Edit("a", prompt, "3")], chat, 5)["a"]
    assert "is 4 tokens" in check_lengths([Edit("a", "1 2", "3")], bare, 3)["a"]
    assert "is 9 tokens" in check_lengths([Edit("a", talk("1", "2", "3"), "4")], chat, 5)["a"]


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


# -- anything at all -------------------------------------------------------------------------------------------------

NAMES = sorted({name for entry in FORMATS.values() for name in entry.fields})


def objects(values):
    return st.dictionaries(st.sampled_from(["prompt", "answer", "str", "target_new", "subject"]), values, max_size=3)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | objects(inner), max_leaves=5)
TEXTS = st.sampled_from(["a", "b", " a ", "", "\ud800", "{}"])


def rows_of(name: str):
    """Records of a format, most of them good, with some fields replaced or added; sometimes anything."""
    good = st.fixed_dictionaries(
        {field: st.sampled_from(["a", "b", " a ", "A"]) for field in FORMATS[name].required[0]}
    )
    changes = st.dictionaries(st.sampled_from(sorted(FORMATS[name].fields)), TEXTS | VALUES, max_size=2)
    extras = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=1)
    return st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, good, changes, extras) | VALUES


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_malformed_records_give_edits_or_one_clear_error(tmp_path_factory, name, on_bad_record, data):
    rows = data.draw(st.lists(rows_of(name), min_size=1, max_size=4))
    path = tmp_path_factory.getbasetemp() / f"any-{name}.jsonl"
    lines(path, *(json.dumps(row) for row in rows))
    found, error = None, ""
    try:
        found = load_records(path, name, on_bad_record=on_bad_record)
    except RecordError as caught:
        error = str(caught)
    if found is None:
        assert error.startswith(str(path))
        assert error.splitlines() == [error]
        return
    ids = [edit.id for edit in found.edits]
    assert 0 < len(ids) == len(set(ids)) == len({same_question_key(edit.prompt) for edit in found.edits})
    assert all(edit.prompt.strip() and edit.target.strip() for edit in found.edits)
    assert name == "jsonl" or all(edit.prompt == edit.prompt.strip() for edit in found.edits)
    assert set(found.superseded.values()) <= set(ids)
    source = len(json.loads(path.read_text())) if len(rows) == 1 and isinstance(rows[0], list) else len(rows)
    assert len(ids) + len(found.bad) + len(found.superseded) + len(found.duplicates) == source


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60) | st.text('[]{}",:\n\r aé0\u2028', max_size=40).map(str.encode))
def test_any_bytes_give_an_error_of_ours(tmp_path_factory, suffix, content):
    """No such short file holds prompt and target, so all must be refused, in one line that names the file."""
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        load_records(path, on_bad_record="skip")
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


# -- the real sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "edits", "superseded", "near"),
    [
        ("zsre/zsre_mend_edit.json", "zsre", 1037, 0, 0),
        ("counterfact/counterfact_edit_3k.json", "counterfact", 2992, 8, 1),
        ("hallucination/hallucination-edit.json", "hallucination", 600, 0, 0),
        ("temporal/temporal-edit.json", "temporal", 75, 0, 0),
    ],
)
def test_real_sets(path, name, edits, superseded, near):
    found = load_records(real(path), name)
    assert (len(found), len(found.superseded), found.bad, found.duplicates) == (edits, superseded, (), ())
    assert found.alike == ()
    assert all(len(edit.locality) == 1 and len(edit.near) == near for edit in found.edits)


def test_the_first_thousand_of_zsre():
    found = load_records(real("zsre/zsre_mend_edit.json"), "zsre", max_edits=1000)
    assert [found.edits[i].id for i in (0, 999)] == ["zsre-1", "zsre-1000"]
    first = found.edits[0]
    assert (first.prompt, first.target) == ("When was the inception of IAAF Combined Events Challenge?", "2006")
    assert first.locality[0].prompt.startswith("nq question: what is the name of the last episode")


def test_real_irrelevant_prompts():
    prompts = load_irrelevant(real("nq/nq_open_dev.jsonl"), "nq question: ")
    assert len(prompts) == 3610
    assert prompts[0] == "nq question: when was the last time anyone was on the moon"
    assert len(load_irrelevant(real("probes/entity_questions_probes.json"))) == 1440
    assert load_irrelevant(real("hallucination/hallucination-train.json"))[0].startswith("Academic Coach")
