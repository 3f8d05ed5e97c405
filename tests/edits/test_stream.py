"""The stream: windows that never look ahead, sized worklists, and pools that lose nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from helpers_runs import attach, irrelevant_texts, world_editor, world_edits, world_stream, write_edits

from repair_lightning.commands.evaluate import as_in_training
from repair_lightning.editors import Repair
from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.edits.stream import EditStream
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.types import Edit, EditBatch, EditReport, Probe


class Watcher:
    """The real editor; remembers for which edits it was asked for features."""

    shares = False

    def __init__(self, editor: Repair) -> None:
        self.editor = editor
        self.limit: int | None = None
        self.asked: list[tuple[str, ...]] = []

    def batch_limit(self, edits: Any) -> int:
        return self.limit or self.editor.batch_limit(edits)

    def features(self, edits: Any) -> Any:
        self.asked.append(tuple(edit.id for edit in edits))
        return self.editor.features(edits)


@pytest.fixture(scope="module")
def editor() -> Repair:
    found = world_editor()
    texts = irrelevant_texts(20)
    found.prepare(texts[::2], texts[1::2])
    return found


@pytest.fixture
def watcher(editor) -> Watcher:
    return Watcher(editor)


def stream_of(tmp_path, watcher: Any, number: int = 10, **options: Any) -> EditStream:
    path = write_edits(tmp_path / "edits.jsonl", world_edits(number))
    found = attach(world_stream(path, **({"window": 4, "batch_size": 2} | options)), watcher)
    found.setup()
    return found


def ids_of(worklist: list[EditBatch]) -> list[str]:
    return [id for batch in worklist for id in batch.ids]


def write(stream: EditStream, worklist: list[EditBatch], residual: tuple[str, ...] = ()) -> None:
    reports = [EditReport(id, 0, 0.1, 0.5, 1, residual=id in residual) for id in ids_of(worklist)]
    stream.ledger.written(reports)


def test_features_are_asked_for_arrived_edits_alone(tmp_path, watcher):
    stream = stream_of(tmp_path, watcher)
    order = [edit.id for edit in stream.edits]
    for window in range(3):
        worklist = stream.next_window()
        arrived = set(order[: 4 * (window + 1)])
        assert set(watcher.asked[-1]) <= arrived
        assert set(stream.ledger) == arrived  # nor does the ledger know what has not come
        write(stream, worklist)
    assert stream.exhausted
    assert {id for asked in watcher.asked for id in asked} == set(order)
    # and no edit twice: what was written is not regrouped
    assert sum(map(len, watcher.asked)) == 10


@pytest.mark.parametrize(("window", "batch_size"), [(4, 3), (100, 3)])
def test_worklists_are_sized_and_hold_each_arrival_once(tmp_path, watcher, window, batch_size):
    stream = stream_of(tmp_path, watcher, window=window, batch_size=batch_size)
    seen: list[str] = []
    while not stream.exhausted:
        loader = stream.train_dataloader()
        worklist = list(loader)
        assert len(loader) == len(worklist)  # Lightning knows the last batch before it comes
        assert all(1 <= len(batch.edits) <= batch_size for batch in worklist)
        coming = [edit.id for edit in stream.edits[len(seen) : len(seen) + window]]
        assert sorted(ids_of(worklist)) == sorted(coming)
        seen += coming
        write(stream, worklist)
    assert (stream.windows, stream.arrived) == (-(-10 // window), 10)
    assert stream.next_window() == []  # past the end


def test_a_window_is_handed_out_again_as_long_as_nothing_of_it_was_written(tmp_path, watcher):
    """Lightning asks twice when it resumes; that must not merge two windows into one."""
    stream = stream_of(tmp_path, watcher)
    first = list(stream.train_dataloader())
    assert list(stream.train_dataloader()) == first
    assert (stream.windows, stream.arrived) == (1, 4)
    stream.ledger.written([EditReport(first[0].ids[0], 0, 0.1, 0.0, 1)])
    second = list(stream.train_dataloader())
    assert stream.windows == 2
    assert set(ids_of(second)) == {*ids_of(first), *(edit.id for edit in stream.edits[4:8])} - {first[0].ids[0]}


def test_clustering_groups_what_is_alike(tmp_path, watcher):
    """Two pairs that ask the same relation, interleaved: the pairs find each other."""
    edits = world_edits(400)
    of_relation: dict[str, list] = {}
    for edit in edits:
        of_relation.setdefault(edit.prompt.replace(str(edit.subject), "X"), []).append(edit)
    a, b = sorted((group for group in of_relation.values() if len(group) > 1), key=lambda g: g[0].id)[:2]
    path = write_edits(tmp_path / "pairs.jsonl", [a[0], b[0], a[1], b[1]])
    stream = attach(world_stream(path, window=4, batch_size=2), watcher)
    assert {frozenset(batch.ids) for batch in stream.next_window()} == {
        frozenset({a[0].id, a[1].id}),
        frozenset({b[0].id, b[1].id}),
    }


@pytest.mark.parametrize("spoilt", [[0, 3], list(range(6))])
def test_edits_of_which_the_base_makes_nothing_go_alone(tmp_path, watcher, monkeypatch, spoilt):
    """Features that are not finite have no neighbours; the rest of the window is clustered as ever."""
    real = watcher.editor.features

    def features(edits):
        found = real(edits)
        found[spoilt] = float("nan")
        return found

    monkeypatch.setattr(watcher.editor, "features", features)
    stream = stream_of(tmp_path, watcher, 6, window=6, batch_size=6)
    batches = [batch.ids for batch in stream.next_window()]
    ids = [edit.id for edit in stream.edits]
    alone = [(ids[i],) for i in spoilt]
    rest = sorted(set(ids) - {ids[i] for i in spoilt})
    assert batches[: len(alone)] == alone
    assert [sorted(batch) for batch in batches[len(alone) :]] == ([rest] if rest else [])


def test_requeued_and_residual_edits_come_back_with_the_next_arrivals(tmp_path, watcher):
    stream = stream_of(tmp_path, watcher)
    first = [edit.id for edit in stream.edits[:4]]
    write(stream, stream.next_window(), residual=(first[0],))
    stream.ledger.requeue([first[1]], "pruned")
    assert stream.waiting() == first[:2]
    assert not stream.exhausted
    second = ids_of(stream.next_window())
    assert sorted(second) == sorted([*first[:2], *(edit.id for edit in stream.edits[4:8])])


def test_after_max_regroups_an_edit_is_alone(tmp_path, watcher):
    stream = stream_of(tmp_path, watcher, batch_size=8)
    lonely = stream.edits[0].id
    for _ in range(2):
        worklist = stream.next_window()
        assert (lonely,) not in [batch.ids for batch in worklist]
        write(stream, worklist, residual=(lonely,))
    worklist = stream.next_window()
    assert stream.ledger.entry(lonely).regroups == 2
    assert [batch.ids for batch in worklist if lonely in batch.ids] == [(lonely,)]
    assert lonely not in watcher.asked[-1]
    write(stream, worklist)
    assert stream.exhausted


def test_superseded_edits_are_in_the_ledger_and_never_in_a_worklist(tmp_path, watcher):
    edits = world_edits(6)
    newer = replace(edits[1], id="newer", target="Quite Another Firm")
    path = write_edits(tmp_path / "edits.jsonl", [*edits[:4], newer, *edits[4:]])
    stream = attach(world_stream(path, window=3, batch_size=2), watcher)
    seen: list[str] = []
    while not stream.exhausted:
        worklist = stream.next_window()
        write(stream, worklist)
        seen += ids_of(worklist)
    assert sorted(seen) == sorted(["newer", *(edit.id for edit in edits if edit != edits[1])])
    entry = stream.ledger.entry(edits[1].id)
    assert (entry.status, entry.shard, entry.attempts) == (EditStatus.SUPERSEDED, None, 0)
    assert "newer" in entry.reason
    assert stream.ledger.entry("newer").arrival > entry.arrival
    assert len(stream.ledger) == 7


def long_stream(tmp_path, on_bad_record: str) -> EditStream:
    edits = world_edits(4)
    edits[2] = replace(edits[2], prompt="very " * 200 + edits[2].prompt)
    edits.append(replace(edits[0], id="newer", target="very " * 200 + "long"))
    return world_stream(write_edits(tmp_path / "edits.jsonl", edits), on_bad_record=on_bad_record)


def test_an_edit_that_is_too_long_stops_the_run_or_is_left_out(tmp_path, editor):
    """With what it had superseded: the old version is known to be wrong, and the report names both."""
    with pytest.raises(RepairError, match=r"edits.jsonl: edit 'w0003', field '.*': is \d+ tokens long, at most 100 "):
        long_stream(tmp_path, "stop").check_fit(editor.edited.forms, 100)
    with pytest.raises(RepairError, match=r"tokens long, at most 2 fit; .* \(4 such edits in all\)"):
        long_stream(tmp_path, "skip").check_fit(editor.edited.forms, 2)
    stream = attach(long_stream(tmp_path, "skip"), editor)
    stream.check_fit(editor.edited.forms, 100)
    assert [edit.id for edit in stream.edits] == ["w0002", "w0004"]
    assert ["w0003" in stream.records.bad[0], "newer" in stream.records.bad[1]] == [True, True]
    assert "edit 'w0001': its successor 'newer' is too long" in stream.records.bad[2]
    assert stream.records.superseded == {}
    assert sorted(ids_of(stream.next_window())) == ["w0002", "w0004"]


def test_irrelevant_prompts_that_scoring_asks_are_left_out(tmp_path, watcher, editor):
    """Rephrases, locality and near prompts, in any case and spacing, reach no part; the number is kept up."""
    edits = [
        {
            "prompt": "Where was Mara Quill born?",
            "target": "Oslo",
            "rephrases": ["The birthplace of Mara Quill is"],
            "locality": [{"prompt": "who sang the song", "answer": "Perth"}],
            "near": [{"prompt": "Where was Nils Okon born?"}],
        }
    ]
    asked = ["The birthplace of Mara Quill is", "Who  sang the song", "Where was Nils Okon born?"]
    records, unrelated = tmp_path / "records.jsonl", tmp_path / "unrelated.jsonl"
    records.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    texts = [*asked, *(f"unrelated question {i}" for i in range(8))]
    unrelated.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    stream = EditStream(path=str(records), irrelevant=str(unrelated), max_irrelevant=6)
    parts = stream.irrelevant_parts(editor)
    assert [len(part) for part in parts] == [3, 2, 1]
    assert sorted(text for part in parts for text in part) == texts[3:9]
    with pytest.raises(ConfigError, match="at least 4 unrelated prompts are needed, got 3"):
        EditStream(path=str(records), irrelevant=str(unrelated), max_irrelevant=3).irrelevant_parts(editor)


def test_without_irrelevant_prompts_the_base_writes_its_own(tmp_path, watcher, editor):
    stream = stream_of(tmp_path, watcher, irrelevant=None, max_irrelevant=8)
    background, held_out, guard = stream.irrelevant_parts(editor)
    assert 4 <= len({*background, *held_out, *guard}) == len(background + held_out + guard) <= 8


def bare(tmp_path, number: int = 3) -> str:
    """World edits of which the first alone has locality prompts."""
    first, *others = world_edits(number)
    return write_edits(tmp_path / "edits.jsonl", [first, *(replace(edit, locality=(), near=()) for edit in others)])


def test_records_without_locality_are_asked_irrelevant_prompts_in_turn(tmp_path, caplog):
    """Those of a record stay; where nobody gives irrelevant prompts, the embedded ones are free."""
    own = world_edits(1)[0].locality
    for given in ("world", None):
        with caplog.at_level("INFO"):
            stream = world_stream(bare(tmp_path), irrelevant=given)
            first, *others = (edit.locality for edit in stream.edits)
        start = 60 if given else 0
        assert first == own
        assert others == [(Probe(text),) for text in irrelevant_texts(62)[start : start + 2]]
    assert "2 edits without 'locality': Loc asks 2 prompts used for nothing else" in caplog.text


def test_without_a_prompt_to_spare_it_is_said(tmp_path, caplog):
    path = tmp_path / "irrelevant.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in irrelevant_texts(4)))
    assert [len(edit.locality) > 0 for edit in world_stream(bare(tmp_path), irrelevant=str(path)).edits] == [
        True,
        False,
        False,
    ]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "2 edits without 'locality', and data.irrelevant has no prompt to spare: Loc and OP lack them"
    ]


def test_a_pack_is_scored_on_the_questions_of_its_run():
    """Its own edits on those that the run gave them, with their subjects; others in turn; none where it has none."""
    bare = [replace(edit, locality=(), subject=None) for edit in world_edits(3)]
    ledger = Ledger()
    given = [replace(bare[i], locality=(Probe(text),), subject=text) for i, text in ((1, "b"), (2, "c"))]
    ledger.arrive(given, window=0)
    assert [edit.subject for edit in as_in_training(bare, ledger)] == [None, "b", "c"]
    assert [edit.locality for edit in as_in_training(bare, ledger)] == [(Probe("b"),), (Probe("b"),), (Probe("c"),)]
    own = world_edits(1)
    assert as_in_training(own, ledger) == tuple(own)
    assert as_in_training(bare, Ledger()) == tuple(bare)


def test_a_subject_is_proposed_from_the_prompt(tmp_path, caplog):
    """One that is given stays, and a prompt that names nothing has none; it may be turned off."""
    prompts = ["Where was Mara Quill born?", "who bakes the bread", '[{"role": "user", "content": "Is Orsk a town?"}]']
    edits = [Edit(f"e{i}", prompt, "x") for i, prompt in enumerate(prompts)]
    path = write_edits(tmp_path / "edits.jsonl", [*edits, Edit("e3", "The bridge of Lund is", "y", "the bridge")])
    with caplog.at_level("INFO"):
        assert [edit.subject for edit in world_stream(path).edits] == ["Mara Quill", None, "Orsk", "the bridge"]
    said = "2 edits without 'subject', taken from the prompt (data.propose_subjects false leaves them out): "
    assert f"{said}'Mara Quill' (e0), 'Orsk' (e2)" in caplog.messages
    assert [edit.subject for edit in world_stream(path, propose_subjects=False).edits] == [None] * 3 + ["the bridge"]
