"""The server's page in a real browser: it asks two models, corrects one, lists and undoes edits, trusts no text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from helpers_browser import chromium

import repair_lightning

PAGE = Path(repair_lightning.__file__).parent / "serving" / "page" / "index.html"
EDITS_A_PAGE = 3
EVIL = """<img src=x onerror="document.title='taken'"><script>document.title='taken'</script>"""
TURNS = [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": "Good day."}]


class Api(ThreadingHTTPServer):
    """What the page is served by: the real server's interface, held in memory, with canned answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.edits: dict[str, dict[str, Any]] = {}
        self.models = ["base", "edited"]
        self.keys: dict[str, str] = {}  # what is asked of "ask" and "edit"
        self.refusal: tuple[int, str] | None = None  # of corrections
        self.asked: list[dict[str, Any]] = []
        self.corrected: list[str] = []  # models
        self.going = threading.Event()  # an answer's second half waits for it
        self.going.set()

    def write(self, prompt: Any, target: str, subject: str | None = None, status: str = "written") -> dict[str, Any]:
        edit = {"id": f"e{len(self.edits) + 1}", "prompt": prompt, "target": target, "subject": subject}
        edit |= {"status": status, "reason": "", "history": [{"time": 1.7e9, "kind": "arrived", "status": "pending"}]}
        edit["history"].append({"time": 1.7e9 + 1, "kind": status, "status": status, "reason": "as it should"})
        self.edits[edit["id"]] = edit
        return edit

    def answer(self, model: str, question: str) -> tuple[str, dict[str, Any]]:
        for edit in reversed(list(self.edits.values())):
            if model != "base" and edit["prompt"] == question and edit["status"] == "written":
                return edit["target"], {"edit": edit["id"], "memory": 0, "reason": "the question is an edit's"}
        memory = 0 if model != "base" and "memory" in question else -1
        return f" Perth, to {question}", {"edit": None, "memory": memory, "reason": ""}

    def found(self, query: dict[str, str]) -> dict[str, Any]:
        edits = [edit for edit in self.edits.values() if query.get("q", "").lower() in json.dumps(edit).lower()]
        page = int(query["page"])
        shown = edits[(page - 1) * EDITS_A_PAGE : page * EDITS_A_PAGE]
        data = [{name: value for name, value in edit.items() if name != "history"} for edit in shown]
        pages = max(1, math.ceil(len(edits) / EDITS_A_PAGE))
        return {"data": data, "page": page, "pages": pages, "total": len(edits)}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Api

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def error(self, status: int, message: str) -> None:
        self.reply({"error": {"message": message, "type": "invalid_request_error"}}, status)

    def allowed(self, what: str) -> bool:
        key = self.server.keys.get(what)
        good = key is None or self.headers.get("Authorization") == f"Bearer {key}"
        if not good:
            self.error(401, f"A key is needed to {what}.")
        return good

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == "/":
            return self.reply(PAGE.read_bytes(), kind="text/html; charset=utf-8")
        if not self.allowed("ask"):
            return None
        if url.path == "/v1/models":
            return self.reply({"object": "list", "data": [{"id": name} for name in self.server.models]})
        if url.path == "/v1/edits":
            return self.reply(self.server.found(query))
        return self.reply(self.server.edits[unquote(url.path.removeprefix("/v1/edits/"))])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            return self.chat(body) if self.allowed("ask") else None
        if not self.allowed("edit"):
            return None
        if self.server.refusal:
            return self.error(*self.server.refusal)
        self.server.corrected.append(body["model"])
        edits = [self.server.write(**edit) for edit in body["edits"]]
        results = [{"id": e["id"], "status": e["status"], "answer": e["target"], "reason": ""} for e in edits]
        return self.reply({"data": results})

    def do_DELETE(self) -> None:
        if self.allowed("edit"):
            edit = self.server.edits[unquote(urlsplit(self.path).path.removeprefix("/v1/edits/"))]
            edit["status"] = "undone"
            self.reply({"id": edit["id"], "status": "undone"})

    def chat(self, body: dict[str, Any]) -> None:
        self.server.asked.append(body)
        text, repair = self.server.answer(body["model"], body["messages"][-1]["content"])
        if text.endswith("too hot?"):
            return self.error(503, "The model is too hot.")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        half = text.find(" ", 1) + 1 or len(text)
        try:
            self.chunk(choices=[{"delta": {"role": "assistant", "content": text[:half]}}])
            self.server.going.wait(10)
            self.chunk(choices=[{"delta": {"content": text[half:]}}])
            if "break" not in text:
                self.chunk(choices=[{"delta": {}, "finish_reason": "stop"}], repair=repair)
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.asked.append({"stopped": body["model"]})

    def chunk(self, **data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


class Browser:
    """The page as the tests use it: elements by CSS selectors, and everything is waited for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, css: str) -> list[str]:
        """The texts of what can be seen."""
        seen = "[...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent)"
        return self.driver.execute_script(f"return {seen}.map(e => e.innerText.trim())", css)

    def until(self, what: Callable[[], Any], seconds: float = 5) -> Any:
        end = time.monotonic() + seconds
        while not (value := what()):
            assert time.monotonic() < end, f"in vain; the page says:\n{self.driver.execute_script(PAGE_TEXT)}"
            time.sleep(0.02)
        return value

    def shows(self, css: str, text: str, count: int = 1) -> None:
        """Waits until so many that can be seen are exactly this text."""
        self.until(lambda: self.all(css).count(text) == count)

    def element(self, css: str) -> Any:
        """The last one that can be seen."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].findLast(e => e.offsetParent || e.matches('body'))"
        )
        return self.until(lambda: self.driver.execute_script(script, css))

    def click(self, css: str) -> None:
        self.element(css).click()

    def type(self, css: str, text: str) -> None:
        self.element(css).send_keys(text)

    def ask(self, question: str) -> None:
        self.until(lambda: self.element("#send").is_enabled())
        self.type("#question", question + "\n")

    def correct(self, target: str) -> None:
        self.click(".wrong")
        self.type(".correct-target", target)
        self.click(".correct-submit")

    def size(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def complaints(self) -> list[str]:
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


PAGE_TEXT = "return document.body.innerText"
RAW = "return [...document.querySelectorAll('.answer .text')].map(text => text.textContent)"


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    """A real headless Chromium that keeps its console."""
    with chromium(tmp_path_factory.mktemp("chromium"), browser="ALL") as found:
        yield found


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.going.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def page(driver, api) -> Browser:
    """The page at its start; `page.driver.refresh()` after what the server is given later."""
    browser = Browser(driver)
    browser.size(1200)
    driver.get(f"http://127.0.0.1:{api.server_port}/")  # a port of its own: an origin of its own, with no keys kept
    browser.complaints()
    return browser


QUESTION = "Where was Mara Quill born?"


def test_both_answers_stream_side_by_side_and_the_last_half_can_be_stopped(page, api):
    api.going.clear()
    page.ask(QUESTION)
    for column in ("base", "edited"):
        page.shows(f".answer.{column} .text", "Perth,")
    assert sorted(body["model"] for body in api.asked) == ["base", "edited"]
    assert all(body["stream"] and body["messages"][-1]["content"] == QUESTION for body in api.asked)
    assert page.all(".wrong") == []  # not before the answer is complete
    assert not page.element("#send").is_enabled()
    api.going.set()
    for column in ("base", "edited"):
        page.shows(f".answer.{column} .text", f"Perth, to {QUESTION}")
    page.shows(".answer.edited .source", "Answered by base")
    assert page.all(".answer.base .source") == []
    assert page.driver.execute_script(RAW) == [f"Perth, to {QUESTION}"] * 2
    page.ask("Is it in memory?")
    page.shows(".answer.edited .source", "Answered by memory 0")
    base, edited = (page.element(f".answer.{column}").rect for column in ("base", "edited"))
    assert base["y"] == edited["y"]
    assert base["x"] + base["width"] <= edited["x"]
    api.going.clear()
    page.ask("And when?")
    page.shows(".answer .text", "Perth,", 2)
    assert [turn["role"] for turn in api.asked[-1]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    page.click("#stop")
    page.shows(".answer .note", "Stopped.", 2)
    assert page.all(".answer .text")[-2:] == ["Perth,", "Perth,"]
    assert page.all("#stop") == []
    assert page.complaints() == []


def test_a_correction_is_written_asked_again_listed_and_undone(page, api):
    api.write("Who taught her?", "Ilse")
    page.ask("Good day!")
    page.shows(".answer.edited .source", "Answered by base")
    page.ask(QUESTION)
    page.until(lambda: len(page.all(".wrong")) == 2)
    page.click(".wrong")
    assert page.element(".correct-question").get_attribute("value") == QUESTION
    page.click(".correct-submit")
    page.shows(".correction .error", "The right answer is missing.")
    page.type(".correct-subject", "Mara Quill")
    page.type(".correct-target", "Oslo\n")
    page.shows(".outcome", "Edit e2: written. It says now: Oslo")
    page.shows(".answer.edited .text", "Oslo")
    page.shows(".answer.edited .source", "Answered by edit e2 (the question is an edit's)")
    page.shows(".again", "Asked again after the correction")
    assert api.edits["e2"]["subject"] == "Mara Quill"
    assert len(api.asked) == 6
    assert [turn["content"] for turn in api.asked[-1]["messages"]] == ["Good day!", " Perth, to Good day!", QUESTION]
    page.ask("Thanks.")  # what was corrected is no part of the conversation any more
    page.until(lambda: len(api.asked) == 8)
    (asked,) = (body for body in api.asked[-2:] if body["model"] == "edited")
    assert [turn["content"] for turn in asked["messages"]][2:] == [QUESTION, "Oslo", "Thanks."]
    page.until(lambda: len(page.all(".wrong")) == 4)

    page.shows("#edits-words", "2 edits")
    assert page.all(".edit .target") == ["→ Ilse", "→ Oslo"]
    page.click(".source .edit-link")
    page.shows("#edits-words", "1 edit")
    assert page.all(".edit .facts") == ["e2 · about Mara Quill"]
    page.until(lambda: len(page.all(".history li")) == 2)
    assert page.all(".history li")[1].endswith(" · written · as it should")
    page.click(".undo")
    page.click(".undo-no")
    assert api.edits["e2"]["status"] == "written"
    page.click(".undo")
    page.shows(".confirm", "Take this edit back?\nUndo it\nKeep it")
    page.click(".undo-yes")
    page.shows("#edits-words", "Edit e2: undone")
    assert api.edits["e2"]["status"] == "undone"
    assert page.all(".edit .status") == ["undone"]
    assert page.all(".undo") == []
    page.click("#all-edits")
    page.shows("#edits-words", "2 edits")
    assert page.complaints() == []


def test_the_list_has_pages_and_a_search(page, api):
    for number in range(7):
        api.write(f"Question {number}?", f"Answer {number}", status="failed" if number == 4 else "written")
    api.write(TURNS, "Hello to you")
    page.driver.refresh()
    page.shows("#page-of", "Page 1 of 3")
    page.click("#next")
    page.shows("#page-of", "Page 2 of 3")
    assert page.all(".edit .prompt") == ["Question 3?", "Question 4?", "Question 5?"]
    assert page.all(".status.bad") == ["failed"]
    page.click("#next")
    page.shows(".edit .prompt", "user: Hello there!\nassistant: Good day.")
    assert not page.element("#next").is_enabled()
    page.type("#q", "answer 5")
    page.shows("#edits-words", "1 edit")
    assert page.all(".edit .target") == ["→ Answer 5"]
    assert page.all("#pages") == []
    page.type("#q", "5")
    page.shows("#edits-words", "No edit has these words.")
    assert page.all(".edit") == []


def test_markup_is_text_whoever_says_it(page, api):
    api.write(EVIL, f"{EVIL} indeed", subject=EVIL, status=EVIL)["history"][0]["reason"] = EVIL
    api.models += [EVIL]
    page.driver.refresh()
    page.shows(".edit .target", f"→ {EVIL} indeed")
    page.click(".show-history")
    page.until(lambda: any(EVIL in line for line in page.all(".history li")))
    page.ask(EVIL)
    page.shows(".question", EVIL)
    page.shows(".answer.base .text", f"Perth, to {EVIL}")
    page.shows(".answer.edited .text", f"Perth, to {EVIL}")
    page.correct(EVIL)
    page.shows(".outcome", f"Edit e2: written. It says now: {EVIL}")
    page.shows(".answer.edited .text", EVIL)
    page.shows(".edit .target", f"→ {EVIL}")
    api.refusal = 422, EVIL
    page.correct("x")
    page.shows(".correction .error", EVIL)
    assert page.driver.title == "REPAIR-Lightning: ask and correct"
    assert page.driver.find_elements("css selector", "img, body script ~ script, main script, section script") == []


def test_a_401_shows_the_key_fields_and_what_waited_goes_on(page, api):
    api.keys = {"ask": "sk-ask", "edit": "sk-edit"}
    page.driver.refresh()
    page.shows("#keys-words", "A key is needed to ask.")
    assert not page.element("#send").is_enabled()
    page.type("#ask-key", "wrong\n")
    page.shows("#keys-words", "A key is needed to ask.")
    page.element("#ask-key").clear()
    page.type("#ask-key", "sk-ask\n")
    page.ask(QUESTION)
    page.shows(".answer.edited .source", "Answered by base")
    page.correct("Oslo")
    page.shows("#keys-words", "A key is needed to edit.")
    page.click("#no-keys")
    page.shows(".correction .error", "A key is needed to edit.")
    page.click(".correct-submit")
    page.type("#edit-key", "sk-edit\n")
    page.shows(".answer.edited .text", "Oslo")
    assert page.all("#keys") == []
    page.driver.refresh()  # this tab keeps them, and nothing else does
    page.shows("#edits-words", "1 edit")
    assert page.driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]


def test_errors_are_said_where_they_happen(page, api):
    page.ask(QUESTION)
    page.shows(".answer.edited .source", "Answered by base")
    api.refusal = 422, "The target has 300 tokens; 64 are allowed."
    page.correct("Oslo")
    page.shows(".correction .error", "The target has 300 tokens; 64 are allowed.")
    assert page.element(".correct-target").get_attribute("value") == "Oslo"
    assert len(api.asked) == 2  # nothing is asked again
    page.ask("Is it too hot?")
    page.shows(".answer .error", "The model is too hot.", 2)
    page.ask("Will it break off?")
    page.shows(".answer .error", "The answer broke off: the server closed the connection.", 2)
    assert page.all(".answer .text")[-1] == "Perth, to Will it break off?"
    page.click("#new")
    assert page.all(".turn") == []
    page.ask("Good day!")
    page.until(lambda: api.asked[-1]["messages"] == [{"role": "user", "content": "Good day!"}])
    page.shows(".answer.edited .source", "Answered by base")
    api.shutdown()
    api.server_close()
    page.ask("Anybody there?")
    page.shows(".answer .error", "The server cannot be reached.", 2)


def test_several_packs_can_be_chosen_and_a_correction_goes_to_the_one_that_answered(page, api):
    assert page.all("#model-choice") == []
    api.models = ["base", "rivers", "people"]
    page.driver.refresh()
    page.until(lambda: page.all("#model") == ["rivers\npeople"])
    page.type("#model", "people")
    page.ask(QUESTION)
    page.shows(".answer.edited h3", "Edited: people")
    page.type("#model", "rivers")
    page.correct("Oslo")
    page.until(lambda: len(page.all(".wrong")) == 2)
    assert api.corrected == ["people"]
    assert [body["model"] for body in api.asked].count("people") == 2
    page.ask("And when?")
    page.shows(".answer.edited h3", "Edited: rivers")


def test_keys_of_the_keyboard_and_a_narrow_window_in_the_dark(page, api):
    from selenium.webdriver.common.keys import Keys

    api.write("long" * 40, "words" * 40)
    page.driver.refresh()
    page.size(390)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    light = page.element("body").value_of_css_property("background-color")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert page.element("body").value_of_css_property("background-color") != light
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.type("#question", f"one{Keys.SHIFT}{Keys.ENTER}{Keys.NULL}two {'x' * 200}")
    assert api.asked == []
    page.type("#question", Keys.ENTER)
    page.until(lambda: len(page.all(".wrong")) == 1)
    assert api.asked[0]["messages"][0]["content"].startswith("one\ntwo xxx")
    page.click(".wrong")
    page.click(".undo")
    base, edited = (page.element(f".answer.{column}").rect for column in ("base", "edited"))
    assert base["y"] + base["height"] <= edited["y"]
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    unnamed = (
        "return [...document.querySelectorAll('input, textarea, select')].filter(e => !e.labels.length && !e.ariaLabel)"
    )
    assert page.driver.execute_script(unnamed) == []


def test_only_this_script_may_run_and_only_this_server_is_asked():
    html = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["script-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|window\.confirm", script
    )
    assert not re.search(r"https?://|@import|url\(", html)
