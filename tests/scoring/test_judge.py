"""A judge behind a real HTTP server: what it is asked, what its replies count for, and what its failure costs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers_runs import fit, world_editor, world_edits, world_stream, write_edits

from callbacks import Scoreboard
from repair_lightning.errors import ConfigError
from repair_lightning.scoring.judge import KEY, Judge, verdict
from repair_lightning.types import Edit

EDITS = [Edit("a", "Where is Orsk?", "Oslo"), Edit("b", "Who led Orsk?", "Ulla")]
ROWS = [
    {"id": id, "kind": kind, "prompt": f"{kind} of {id}", "expected": target, "answer": answer}
    for id, kind, target, answer in [
        ("a", "edit", "Oslo", "It is in Oslo."),
        ("a", "rephrase", "Oslo", "Lima"),
        ("a", "near", "Oslo", "Oslo"),
        ("b", "edit", "Ulla", "perhaps Ulla"),
        ("b", "rephrase", "Ulla", "Ulla"),
        ("c", "edit", "x", "x"),
    ]
]


def chat(reply: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": reply}}]}


@pytest.fixture
def judged() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Starts an endpoint that answers a text by `reply`, (status, body): its address, and what it was sent."""
    servers = []

    def start(reply: Callable[[str], tuple[int, Any]]) -> tuple[str, list[Any]]:
        seen: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, self.headers.get("Authorization"), sent))
                status, body = reply(sent["messages"][0]["content"])
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def fair(text: str) -> tuple[int, Any]:
    """Yes where the target stands in the answer, no where it does not, and nothing clear of what says `perhaps`."""
    target, answer = (text.split(f"{name}: ")[1].split("\n")[0] for name in ("Reference answer", "Answer to judge"))
    if "perhaps" in answer:
        return 200, chat("Hard to tell.")
    return 200, chat("<think>no doubt</think> Yes." if target in answer else "No.")


def test_the_figures_are_the_judges(judged, monkeypatch, caplog):
    """By hand: of the edits one is right and one unclear, of the rephrases one of two; what is of no edit, or a
    neighbour's, is not judged."""
    monkeypatch.setenv(KEY, "secret")
    url, seen = judged(fair)
    found, rows = Judge(f"{url}/", "small").score(EDITS, ROWS)
    assert found is not None
    assert (found["rel"], found["gen"], found["asked"], found["unclear"]) == (1.0, 0.5, 4, 1)
    assert found["model"] == "small"
    assert {(path, key, sent["model"]) for path, key, sent in seen} == {
        ("/v1/chat/completions", "Bearer secret", "small")
    }
    asked = {sent["messages"][0]["content"] for _, _, sent in seen}
    assert found["prompt"].format(question="edit of a", target="Oslo", answer="It is in Oslo.") in asked
    assert [(row["id"], row["kind"], row["right"]) for row in rows] == [
        ("a", "edit", True),
        ("a", "rephrase", False),
        ("b", "edit", None),
        ("b", "rephrase", True),
    ]
    assert rows[2]["reply"] == "Hard to tell."
    assert "neither yes nor no of 1 answer" in caplog.text


def test_without_a_key_none_is_sent(judged, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    url, seen = judged(fair)
    Judge(url, "small").score(EDITS, ROWS)
    assert {key for _, key, _ in seen} == {None}


def test_a_busy_endpoint_is_asked_again(judged):
    """The first request of each text is turned away."""
    known: set[str] = set()

    def busy(text: str) -> tuple[int, Any]:
        if text in known:
            return fair(text)
        known.add(text)
        return 429, {"error": "slow down"}

    url, seen = judged(busy)
    found, _ = Judge(url, "small").score(EDITS, ROWS)
    assert found is not None
    assert found["gen"] == 0.5
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ((401, {"error": "no key"}), "HTTPError: HTTP Error 401"),
        ((200, {"error": "what?"}), "no choices"),
        ((200, b"<html>"), "JSONDecodeError"),
    ],
)
def test_an_endpoint_that_fails_gives_a_warning(judged, caplog, reply, why):
    url, _ = judged(lambda text: reply)
    assert Judge(url, "small").score(EDITS, ROWS) == (None, [])
    assert f"the judge at {url} fails" in caplog.text
    assert why in caplog.text


def test_a_run_is_judged_or_goes_on_without(judged, tmp_path, caplog):
    """The answers are those of the final model; with nobody at the address the run ends as it would."""
    path = write_edits(tmp_path / "edits.jsonl", world_edits(2))
    url, seen = judged(fair)
    for place in (url, "http://127.0.0.1:9/v1"):
        board = Scoreboard(live=0, forms=0, further=0, judge=place, judge_model="small")
        fit(world_editor(), world_stream(path), [board], tmp_path)
        rows = [row for row in board.results["final"].rows if row["kind"] in ("edit", "rephrase")]
        if place == url:
            assert board.beside["judge"]["asked"] == len(rows) == 6
            assert board.beside["judge"]["rel"] == board.results["final"].scores["autoregressive"]["contains"]
            judged_rows = [row for row in board.beside_rows if row["kind"] != "same_subject"]
            assert [row["answer"] for row in judged_rows] == [row["answer"] for row in rows]
            assert len(seen) == 6
    assert board.beside["judge"] is None
    assert {row["kind"] for row in board.beside_rows} <= {"same_subject"}
    assert "the judge at http://127.0.0.1:9/v1 fails (URLError" in caplog.text


def test_replies():
    assert verdict("Yes") is True
    assert verdict(" **No**, it is not.") is False
    assert verdict("<think>yes, yes</think>\n\nno") is False
    assert verdict("nothing") is None
    assert verdict("") is None


def test_what_is_no_endpoint_is_refused():
    with pytest.raises(ConfigError, match=r"scoreboard\.judge must be where .* begins, such as .*, got 'file:///etc'"):
        Scoreboard(judge="file:///etc", judge_model="small")
    with pytest.raises(ConfigError, match=r"scoreboard\.judge needs scoreboard\.judge_model"):
        Scoreboard(judge="http://127.0.0.1:8000/v1")
