"""A run's report: whole in one file, safe whatever the data say, and alive in a real browser."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import chromium

from repair_lightning.__main__ import main
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import RepairError
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import RUN_CHARTS
from repair_lightning.reports.html_report import try_report, write_report
from repair_lightning.reports.report import (
    EDITS_SHOWN,
    ROWS_SHOWN,
    check_failed,
    edits_table,
    event_table,
    further_frame,
    loop_words,
    merge_table,
    not_measured,
    problems,
)
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, Edit, EditReport


class Page(HTMLParser):
    """A page's elements, their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside not in ("script", "style") else ""

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(hard_run) -> str:
    return (hard_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_a_run_leaves_it_and_the_verb_makes_it_again(copied_run, html, monkeypatch, capsys):
    (copied_run / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["repair-lightning", "report", "--run", str(copied_run)])
    main()
    assert capsys.readouterr().out.strip() == str(copied_run / "report.html")
    again = (copied_run / "report.html").read_text(encoding="utf-8")
    assert again.replace(str(copied_run), "runs/hard") == html


def test_its_figures_are_those_of_the_metrics(hard_run, page):
    metrics = json.loads((hard_run / "metrics.json").read_text())
    for protocol in ("autoregressive", "teacher_forced"):
        for stage in ("pre_edit", "before_merge", "final", "oracle_routing"):
            assert f"{100 * metrics[stage][protocol]['op']:.1f}" in page.text
    assert "The edits, and why some failed" in page.text
    assert "6 of 12 edits failed; 6 quarantined, so the base answers" in page.text
    assert "quarantined: still wrong after 2 attempts" in page.text
    run = Artefacts.read(hard_run)
    assert set(problems(run)) == {row["id"] for row in run.final if row["kind"] == "edit" and not row["correct"]}


def test_it_asks_nothing_of_the_network(html, page):
    (policy,) = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; ")
    sources = [a[name] for _, a in page.elements for name in ("src", "href", "data-src") if name in a]
    assert {source.partition(":")[0] if ":" in source else source[0] for source in sources} == {"data", "#"}
    assert "@import" not in html
    assert len(html) < 1 << 20


def test_markup_in_the_data_is_text(html, page):
    assert len(page.of("script")) == 1  # ours
    assert "<script>document.title = 'taken'</script>" in page.text
    assert "<script>document.title" not in html
    assert "<b>w0001</b>" in page.text
    assert "<b>w0" not in html


def test_every_picture_has_its_words_and_its_numbers(hard_run, page):
    images = {image["id"]: image for image in page.of("img")}
    assert set(images) == {f"plot-{name}" for name in RUN_CHARTS}
    for name, make in RUN_CHARTS.items():
        assert make(Artefacts.read(hard_run)).words in images[f"plot-{name}"]["alt"]  # type: ignore[union-attr]
        assert any(table.get("id") == f"table-{name}" for table in page.of("table"))


def test_a_damaged_run_and_no_run_are_one_line(copied_run, tmp_path, monkeypatch, capsys):
    with open(copied_run / "generations.jsonl", "a") as file:
        file.write('{"stage": "fin')
    with pytest.raises(RepairError, match=r"generations.jsonl', line \d+ is damaged"):
        write_report(copied_run)
    monkeypatch.setattr(sys, "argv", ["repair-lightning", "report", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: '{tmp_path}' holds no finished run")


def test_a_report_that_cannot_be_made_costs_nothing_and_says_so(copied_run, caplog):
    (copied_run / "report.html").unlink()
    (copied_run / "edits.parquet").write_bytes(b"no table")
    with caplog.at_level(logging.WARNING):
        assert try_report(copied_run) is None
    assert "report.html could not be made (LedgerError" in caplog.text
    assert not (copied_run / "report.html").exists()


def test_an_older_run_has_a_report_without_what_it_lacks_and_undone_edits_are_said(copied_run):
    for name in ("curves.jsonl", "features.json", "journal.sqlite", "config.yaml"):
        (copied_run / name).unlink()
    shutil.rmtree(copied_run / "pack")
    ledger = Ledger.from_parquet(copied_run / "edits.parquet")
    found = [edits_table(Artefacts.read(copied_run)).frame.set_index("edit")]
    ledger.undo(["w0005"], "undone")
    ledger.to_parquet(copied_run / "edits.parquet")
    text = Page(write_report(copied_run).read_text()).text
    found.append(edits_table(Artefacts.read(copied_run)).frame.set_index("edit"))
    said, told = (frame.loc["w0005"] for frame in found)
    for name in ("says", "now", "answered by"):
        assert told[name] == f"before it was taken back: {said[name]}"
    assert told["status"] == "undone"
    assert found[0].drop("w0005").sort_index().equals(found[1].drop("w0005").sort_index())
    assert "Left out: live: needs live scores of two windows" in text
    assert "Left out: features: no features.json" in text
    assert "1 edit was taken back after the run" in text


def enlarged(run: Path, number: int) -> None:
    """The run with as many edits, copies of its own, with a wrong answer to the last."""
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    right = next(row for row in rows if row["stage"] == "final" and row["kind"] == "edit" and row["correct"])
    ledger = Ledger()
    edits = [Edit(f"many-{i}", f"{right['prompt']} {i} {'x' * 300}", right["expected"]) for i in range(number)]
    ledger.arrive(edits, 0)
    ledger.written([EditReport(edit.id, 0, 0.1, 0.0, 3) for edit in edits])
    ledger.to_parquet(run / "edits.parquet")
    answers = [right | {"id": edit.id, "prompt": edit.prompt, "memory": 0, "correct": True} for edit in edits]
    answers[-1] |= {"correct": False, "answer": "nonsense", "memory": 7}
    (run / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    metrics = json.loads((run / "metrics.json").read_text()) | {"n_edits": number, "edits": ledger.counts()}
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_thousands_of_edits(copied_run):
    """What is shown has limits, the limits are said, and what failed comes first."""
    enlarged(copied_run, 5000)
    html = write_report(copied_run).read_text()
    table = edits_table(Artefacts.read(copied_run))
    assert len(table.frame) == EDITS_SHOWN > ROWS_SHOWN
    assert table.frame.iloc[0, 0] == "many-4999"
    assert "The first 2,000 of 5,000; the others are in edits.parquet" in html
    assert len(html) < 4 << 20


TURNS = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Where was Mara Quill born?"},
]
SCORES = {"rel": 0.5, "gen": None, "loc": 0.5, "near": None, "op": None}
FORMS = {
    "bare": {"rel": 0.5, "contains": 0.75, "fires": 0.625, "garbled": 0.0},
    "chat": dict.fromkeys(("rel", "contains", "fires", "garbled")),
}


def test_prompts_that_are_messages_are_shown_as_turns_and_edits_in_other_forms_where_they_were_asked(tmp_path):
    row = {"stage": "final", "id": "e", "kind": "edit", "prompt": dialogue.dump(TURNS), "expected": "Oslo"}
    row |= {"answer": "Bergen", "base_answer": "Perth", "correct": False, "memory": 1, "score": 0.9, "threshold": 0.5}
    other = {"stage": "further", "kind": "same_subject", "id": "e", "prompt": "Who taught Mara Quill?", "memory": 1}
    asked = [row, row | {"kind": "locality"}, other | {"answer": "Oslo", "base_answer": "Ilse", "kept": False}]
    asked.append(other | {"prompt": "Is it kept?", "answer": "Ilse", "base_answer": "Ilse", "kept": True})
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    stages = {stage: {"autoregressive": SCORES, "teacher_forced": SCORES} for stage in ("pre_edit", "final")}
    about = {"forms": FORMS, "same_subject": {"asked": 40, "fires": 0.05, "changed": 0.025}}
    about |= {"op_interval": {"low": 0.25, "high": 0.75}}
    about |= {"portability": {"all": {"asked": 8, "with_leak": 0.25, "without_leak": None}}, "multi_hop": None}
    about |= {"age": [{"edits": 1, "rel": rel, "gen": None} for rel in (0.5, 1.0, 1.0, 0.0, 1.0)]}
    metrics = {"base": {"name": "org/small"}, "n_edits": 1, "seconds": {"edit": 2.0}, **stages}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"final": stages["final"] | about}))
    html = write_report(tmp_path).read_text()
    text = Page(html).text
    said = "user: Hello there!\nassistant: Good day.\nuser: Where was Mara Quill born?"
    assert text.count(said) == 2  # the edit, and another prompt
    assert '"role"' not in text
    assert "1 correction of small" in text
    assert "1 correction was written into small." in text
    assert "1 of 40other questions about edited subjects that changed" in text
    assert "<td>Who taught Mara Quill?</td><td>Ilse</td><td>Oslo</td><td>shard 1</td>" in html
    assert "<td>Is it kept?</td><td>Ilse</td><td>the same</td><td>shard 1</td>" in html
    assert "40 other questions about edited subjects: a shard answers 5.0 %, 2.5 % of the answers changed" in text
    assert "Were the edits drawn again, OP would lie between 25.0 % and 75.0 % in 95 of 100 cases." in text
    assert "<td>bare</td>" in html
    assert '<td>portability</td><td class="number">25.0</td>' in html
    assert "<td>Rel by age, oldest fifth first</td><td>50.0 100.0 100.0 0.0 100.0</td>" in html
    about["age"][1] = {"edits": 0, "rel": None, "gen": None}
    assert not further_frame(about)["score"].str.contains("by age").any()
    assert "several hops" not in html  # what no record asks
    assert "<td>chat</td>" not in html  # a form that the base does not have is left out


def small_run(folder: Path, final: dict[str, Any], **metrics: Any) -> Page:
    """The report of a run of one edit that is answered right."""
    row = {"stage": "final", "id": "e", "kind": "edit", "prompt": "Where?", "expected": "Oslo", "answer": "Oslo"}
    row |= {"base_answer": "Perth", "correct": True, "memory": 1, "score": 0.9, "threshold": 0.5}
    (folder / "generations.jsonl").write_text(json.dumps(row) + "\n")
    stages = {stage: {"autoregressive": SCORES, "teacher_forced": SCORES} for stage in ("pre_edit", "final")}
    found = {"base": {"name": "org/small"}, "n_edits": 1, "shards": 1, "seconds": {"edit": 2.0}, **stages, **metrics}
    (folder / "metrics.json").write_text(json.dumps(found | {"final": stages["final"] | final}))
    return Page(write_report(folder).read_text())


def test_a_run_without_failures_has_none_in_its_headings_and_no_row_of_zeros(tmp_path):
    loop = {"windows": 1, "rolled_back": 0, "pruned": 0, "retriggered": 0, "quarantined": 0}
    merge = {"accepted": False, "reason": "this editor cannot merge", "merges": []}
    about = {"same_subject": {"asked": 12, "fires": 0.0, "changed": 0.0}}
    page = small_run(tmp_path, about, closed_loop=loop, merge=merge)
    assert "No edit failed." in page.text
    for words in ("why some failed", "Failed ones", "answered wrong", "0 rolled", " 0.0 %", "before merge", "oracle"):
        assert words not in page.text, words
    assert "Closed loop: 1 window, nothing rolled back, pruned or written again. Merge: not applied (this" in page.text
    assert "12 other questions about edited subjects: a shard answers none, and no answer changed." in page.text
    assert "(1 shard at the end)" in page.text
    assert not {"event-table", "merge-table", "others-table", "changed-table"} & {t.get("id") for t in page.of("table")}
    assert loop_words({"closed_loop": loop | {"pruned": 1, "quarantined": 2}, "merge": merge}).startswith(
        "Closed loop: 1 window, 1 shard pruned, 2 edits quarantined. "
    )


def test_what_was_not_measured_is_said(tmp_path):
    said = "Not measured: Gen (no record has rephrases), Near (no record has neighbours). Without Gen there is no OP."
    assert said in small_run(tmp_path, {}).text
    assert list(not_measured(SCORES | {"gen": 0.5})) == ["Not measured: Near (no record has neighbours)."]
    assert list(not_measured(dict.fromkeys(SCORES, 1.0))) == []


def test_over_the_line_a_shard_answers_unless_a_check_failed(hard_run):
    """On a real run: the score and the checks that are kept say of every prompt who answered it."""
    final = Artefacts.read(hard_run).final
    for row in final:
        over = row["threshold"] is not None and row["score"] > row["threshold"]
        assert (row["memory"] != BASE) == (over and check_failed(row) is None), row
    assert {row["memory"] != BASE for row in final} == {True, False}, "the premise"
    assert any(row["checks"] for row in final)


MERGES = [
    {"shards": [0, 1], "into": 2, "rule": "ties", "weights": {"0": 0.25, "1": 0.75}, "before": 0.9, "after": 0.875,
     "accepted": True, "reason": "guard score 0.900 -> 0.875: within 0.06"},
    {"shards": [3, 4], "into": None, "rule": "ties", "weights": {"3": 0.5, "4": 0.5}, "before": 0.9, "after": 0.5,
     "accepted": False, "reason": "guard score 0.900 -> 0.500: costs 0.400, more than 0.06"},
    {"shards": [5], "into": -1, "rule": "ties", "weights": {"5": 1.0}, "before": 1.0, "after": 1.0, "accepted": True,
     "reason": "guard score 1.000 -> 1.000: within 0.06"},
]  # fmt: skip


def test_merges_are_listed_with_their_weights_and_what_they_cost():
    found = merge_table({"merge": {"merges": MERGES}}).frame.values.tolist()
    assert [row[:7] for row in found] == [
        ["0, 1", "shard 2", "ties", "0.25, 0.75", "90.0", "87.5", "yes"],
        ["3, 4", "-", "ties", "0.50, 0.50", "90.0", "50.0", "no"],
        ["5", "the base's own weights", "ties", "1.00", "100.0", "100.0", "yes"],
    ]
    assert found[1][7].endswith("costs 0.400, more than 0.06")
    assert len(merge_table({"merge": {"accepted": False}}).frame) == 0, "an older run's"


def test_what_was_written_again_and_given_up_says_why_and_which(hard_run):
    """Every second of the twelve edits can never be right: it is written twice, and then given up."""
    rows = event_table(Artefacts.read(hard_run)).frame.to_dict("records")
    given_up = [row for row in rows if row["what"] == "quarantined"]
    assert sum(row["edits"] for row in given_up) == 6
    assert {(row["why"], row["written in the end"]) for row in given_up} == {("still wrong after 2 attempts", 0)}
    again = [row for row in rows if row["what"] == "requeued"]
    assert all(row["why"] for row in again)
    assert sum(row["edits"] - row["written in the end"] for row in again) == 6
    assert all("w0" in row["which"] for row in rows), "and nothing is told of no edit"
    assert {row["arrived in window"] for row in rows} == {1, 2, 3}, "as `log` counts"


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    """A real headless Chromium that keeps its console and its requests."""
    with chromium(tmp_path / "chromium", browser="ALL", performance="ALL") as driver:
        yield driver


def test_it_lives_in_a_browser(browser, copied_run):
    """No errors, no requests, all pictures drawn, nothing wider than the window; tables sort and can be searched."""
    enlarged(copied_run, 60)
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(write_report(copied_run).resolve().as_uri())
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    ours = [request for request in sent if not request["documentURL"].startswith("chrome:")]  # not the start page's
    assert {request["request"]["url"].split(":")[0] for request in ours} == {"file", "data"}
    drawn = "return [...document.querySelectorAll('img.plot')].filter(plot => plot.naturalWidth > 100).length"
    assert browser.execute_script(drawn) == len(RUN_CHARTS)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    boxes = "return [...document.querySelectorAll('.scroll')].filter(box => box.checkVisibility())"
    wide = browser.execute_script(f"{boxes}.map(box => [box.getBoundingClientRect().right, box.scrollWidth])")
    assert wide
    assert all(right <= 390 for right, _ in wide), "a table scrolls inside its own box"
    stacked = browser.execute_script(f"{boxes}.filter(box => box.querySelector('.stack')).map(box => box.scrollWidth)")
    assert stacked
    assert max(stacked) <= 390, "and long texts are stacked"
    named = "return getComputedStyle(document.querySelector('#all-edits td:nth-child(3)'), '::before').content"
    assert "should say" in browser.execute_script(
        "return document.querySelector('#all-edits td:nth-child(3)').dataset.name"
    )
    assert browser.execute_script(named) != "none"
    rows = "return [...document.querySelectorAll('#all-edits tbody tr')].filter(row => !row.hidden)"
    ids = f"{rows}.map(row => row.cells[0].textContent)"
    assert browser.execute_script(ids)[0] == "many-59"  # what failed comes first
    browser.execute_script("document.querySelectorAll('#all-edits th button')[0].click()")
    assert browser.execute_script(ids) == [f"many-{i}" for i in range(60)]  # numbers in ids count as numbers
    search = (
        "const box = document.querySelector('input'); box.value = 'NONSENSE'; box.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(search)
    assert browser.execute_script(ids) == ["many-59"]
