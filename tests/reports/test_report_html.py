"""A run's report: whole in one file, safe whatever the data say, and alive in a real browser."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from repair_lightning.__main__ import main
from repair_lightning.edits.ledger import Ledger, LedgerEntry
from repair_lightning.errors import RepairError
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.html_report import context, try_report, write_report
from repair_lightning.reports.report_tables import EDITS_SHOWN, problems, why_wrong
from repair_lightning.types import BASE, Edit, EditReport

MIB = 1 << 20


class Page(HTMLParser):
    """A page's elements, their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(hard_run) -> str:
    return (hard_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_it_and_the_verb_makes_it_anew(copied_run, html, monkeypatch, capsys):
    (copied_run / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["repair-lightning", "report", "--run", str(copied_run)])
    main()
    assert capsys.readouterr().out.strip() == str(copied_run / "report.html")
    again = (copied_run / "report.html").read_text(encoding="utf-8")
    assert again.replace(str(copied_run), "runs/hard") == html


def test_it_says_what_was_asked_and_what_came_out(hard_run, page):
    metrics = json.loads((hard_run / "metrics.json").read_text())
    for words in ("12 corrections of world", "edits.jsonl", "train.py --config", "autoregressive", "teacher forced"):
        assert words in page.text
    for protocol in ("autoregressive", "teacher_forced"):
        for stage in ("pre_edit", "before_merge", "final", "oracle_routing"):
            assert f"{100 * metrics[stage][protocol]['op']:.1f}" in page.text
    assert "quarantined: still wrong after 2 attempts" in page.text
    assert "6 of 12 edits failed; 6 of them were quarantined" in page.text
    assert "tau_correct: 0.85" in page.text  # the configuration is there
    assert "pruned" in page.text  # and so is what the loop did


def test_it_asks_nothing_of_the_network(html, page):
    (policy,) = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; ")
    assert [a for _, a in page.elements if "src" in a or "data-src" in a] == []
    assert {link["href"] for link in page.of("link")} == {"data:,"}
    assert all(anchor["href"].startswith("#") for anchor in page.of("a"))
    assert "@import" not in html


def test_plotly_lies_in_it_once_and_the_file_stays_small(html, page):
    packed = [script for script in page.of("script") if script.get("id") == "data-plotly"]
    assert len(packed) == 1
    assert 1 * MIB < len(html) < 3 * MIB


def test_markup_in_the_data_is_text(html, page):
    assert len(page.of("script")) == 4  # ours: figures, edits, plotly, and what runs
    assert "<script>document.title = 'taken'</script>" in page.text
    assert "<script>document.title" not in html
    assert "<b>w0001</b>" in page.text
    assert "<b>w0" not in html


def test_every_figure_has_its_words_and_its_numbers(hard_run, page):
    charts = context(Artefacts.read(hard_run))["charts"]
    assert {chart["name"] for chart in charts} == {"separation", "answered_by", "live", "retention", "cost", "features"}
    for chart in charts:
        (plot,) = [div for div in page.of("div") if div.get("id") == f"plot-{chart['name']}"]
        assert plot["role"] == "img"
        assert chart["words"] in plot["aria-label"]
        assert any(table.get("id") == f"table-{chart['name']}" for table in page.of("table"))


def test_figures_are_plotly_figures(hard_run):
    """As Plotly's own schema has it, but for colours that the page looks up."""
    for name, figure in context(Artefacts.read(hard_run))["figures"].items():
        plain = json.loads(re.sub(r"var\(--\w+\)", "#123456", json.dumps(figure)))
        assert len(go.Figure(plain).data) > 0, name


# -- why an edit failed ------------------------------------------------------------------------------------------------

ROW = {"kind": "edit", "memory": BASE, "score": 0.4, "threshold": 0.7, "nearest": "e9", "correct": False}
ENTRY = LedgerEntry(Edit("e1", "Who?", "She"), 0, 0, shard=3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "no shard answered: score 0.40, needed 0.70"),
        ({"score": 0.9}, "no shard answered: the nearest edit's shard would not say its target here"),
        ({"score": -1.0, "threshold": None}, "no shard answered: it names nothing that an edit is about"),
        ({"threshold": None}, "no shard answered"),
        ({"memory": 3, "score": 0.9}, "its own shard answered, in other words than the target"),
        ({"memory": 5, "score": 0.9}, "another edit's shard answered: 5 (score 0.90, needed 0.70, nearest edit e9)"),
        (
            {"kind": "near", "memory": 5, "score": 0.9},
            "shard 5 answered in place of the base (score 0.90, needed 0.70, nearest edit e9)",
        ),
        ({"kind": "locality"}, "the base answered, and its own weights have changed"),
    ],
)
def test_why(row, words):
    assert why_wrong(ROW | row, ENTRY) == words


def test_every_failed_edit_has_its_reason(hard_run):
    run = Artefacts.read(hard_run)
    why = problems(run)
    wrong = {row["id"] for row in run.rows["final"] if row["kind"] == "edit" and not row["correct"]}
    assert set(why) == wrong
    assert len(wrong) == 6
    for reason in why.values():
        assert reason.startswith("quarantined: still wrong after 2 attempts (its loss")
        assert reason.endswith("; the base answers it")


# -- runs that are not as they should be -------------------------------------------------------------------------------


def test_a_damaged_run_is_one_line(copied_run):
    with open(copied_run / "generations.jsonl", "a") as file:
        file.write('{"stage": "fin')
    with pytest.raises(RepairError, match=r"generations.jsonl', line \d+ is damaged"):
        write_report(copied_run)


def test_no_run_is_one_line(tmp_path, monkeypatch, capsys):
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
    assert f"repair-lightning report --run {copied_run}" in caplog.text
    assert not (copied_run / "report.html").exists()


def test_an_older_run_has_a_report_without_what_it_lacks(copied_run):
    for name in ("curves.jsonl", "features.json", "journal.sqlite", "config.yaml"):
        (copied_run / name).unlink()
    shutil.rmtree(copied_run / "pack")
    text = Page(write_report(copied_run).read_text()).text
    assert "Left out: live: no live scores" in text
    assert "Left out: features: no features.json" in text
    assert "6 of 12 edits failed" in text


def test_undone_edits_are_said(copied_run):
    ledger = Ledger.from_parquet(copied_run / "edits.parquet")
    ledger.undo(["w0005"], "undone")
    ledger.to_parquet(copied_run / "edits.parquet")
    text = Page(write_report(copied_run).read_text()).text
    assert "1 of the edits were taken back after the run" in text


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
    page = context(Artefacts.read(copied_run))
    assert "another edit's shard answered: 7" in Page(html).text
    assert len(page["edits"]["rows"]) == EDITS_SHOWN
    assert page["edits"]["rows"][0][0] == "many-4999"
    assert "The table holds the first 2,000 of them" in page["edits_words"]
    assert max(len(str(cell)) for row in page["edits"]["rows"] for cell in row) <= 480
    assert len(html) < 4 * MIB


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    """A real headless Chromium that keeps its console and its requests."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        pytest.skip("no chromium with its driver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync disable-dev-shm-usage"
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(paths["chromedriver"]))
    yield driver
    driver.quit()


def opened(browser: Any, file: Path, width: int, theme: str) -> Any:
    """The report, drawn, in a window of a width for a reader with a theme."""
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme_of = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", theme_of)
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)  # what was said before is not the report's
    browser.get(file.resolve().as_uri())
    browser.execute_script("localStorage.clear()")
    drawn = "return document.documentElement.dataset.drawn === 'yes'"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(drawn))
    return browser


COLOUR = "return getComputedStyle(document.body).backgroundColor"
INK = "return getComputedStyle(document.querySelector('#plot-live .xtick text')).fill"


@pytest.mark.parametrize("width", [1400, 390])
def test_it_lives_in_a_browser(browser, hard_run, width):
    """No errors, no requests, all pictures drawn, nothing wider than the window, and no script of the data's runs."""
    driver = opened(browser, hard_run / "report.html", width, "light")
    messages = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert messages == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in sent} <= {"file", "data", "blob"}
    assert driver.execute_script("return document.querySelectorAll('.plot .main-svg').length") >= 6
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.title == "12 corrections of world"


def test_pictures_keep_their_height_when_the_window_changes(browser, hard_run):
    driver = opened(browser, hard_run / "report.html", 1400, "light")
    heights = "return [...document.querySelectorAll('.plot')].map(plot => plot.getBoundingClientRect().height)"
    before = driver.execute_script(heights)
    assert min(before) > 200
    narrower = {"width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrower)
    widths = "return Math.max(...[...document.querySelectorAll('.plot .main-svg')].map(svg => svg.clientWidth))"
    deadline = time.monotonic() + 20
    while driver.execute_script(widths) > 1000:  # Plotly draws anew a moment after the window has changed
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert driver.execute_script(heights) == before


def test_tables_sort(browser, hard_run):
    driver = opened(browser, hard_run / "report.html", 1400, "light")
    read = "return [...document.querySelectorAll('#score-table tbody tr')].map(row => row.cells[2].textContent)"
    click = "document.querySelectorAll('#score-table th button')[2].click()"
    unsorted = [float(value) for value in driver.execute_script(read)]
    driver.execute_script(click)
    assert [float(value) for value in driver.execute_script(read)] == sorted(unsorted)
    driver.execute_script(click)
    assert [float(value) for value in driver.execute_script(read)] == sorted(unsorted, reverse=True)
    heading = "return document.querySelectorAll('#score-table th')[2].getAttribute('aria-sort')"
    assert driver.execute_script(heading) == "descending"


def test_edits_are_searched_and_turned_over(browser, copied_run):
    enlarged(copied_run, 60)
    driver = opened(browser, write_report(copied_run), 1400, "light")
    ids = "return [...document.querySelectorAll('#all-edits tbody tr')].map(row => row.cells[0].textContent)"
    first = driver.execute_script(ids)
    assert (first[0], len(first)) == ("many-59", 25)
    driver.execute_script("document.getElementById('after').click()")
    second = driver.execute_script(ids)
    assert set(first).isdisjoint(second)
    assert driver.execute_script("return document.getElementById('where').textContent") == "26 to 50 of 60"
    type_in = "const box = document.getElementById('{}'); box.value = {!r}; box.dispatchEvent(new Event('{}'))"
    driver.execute_script(type_in.format("search", "nonsense", "input"))
    assert driver.execute_script(ids) == ["many-59"]
    driver.execute_script(type_in.format("search", "", "input"))
    driver.execute_script(type_in.format("only", "wrong", "change"))
    assert driver.execute_script(ids) == ["many-59"]
    driver.execute_script(type_in.format("only", "", "change"))
    driver.execute_script("document.querySelectorAll('#all-edits th button')[0].click()")
    assert driver.execute_script(ids)[:3] == ["many-0", "many-1", "many-2"]  # numbers in ids count as numbers


def test_themes(browser, hard_run):
    """The reader's own, the button's, and the pictures follow."""
    light = opened(browser, hard_run / "report.html", 1400, "light").execute_script(COLOUR)
    driver = opened(browser, hard_run / "report.html", 1400, "dark")
    dark, ink = driver.execute_script(COLOUR), driver.execute_script(INK)
    assert light != dark
    driver.execute_script("document.getElementById('theme').click()")
    assert driver.execute_script(COLOUR) == light
    assert driver.execute_script("return document.getElementById('theme').textContent") == "Dark"
    driver.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    assert driver.execute_script(INK) != ink
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
