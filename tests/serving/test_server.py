"""The real server in a process of its own: asked by OpenAI's client, corrected, killed, and asked again."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from helpers_chat import base, chat_folder, system, user
from helpers_runs import world_edits
from helpers_server import Server, key_file

from repair_lightning import edit
from repair_lightning.__main__ import run
from repair_lightning.errors import ConfigError

ASK, EDIT = "ask-0123456789abcdef", "edit-0123456789abcdef"
QUESTION, TARGET = "Where was Mara Kelstrom born?", "Lisbon"
FORMS = (
    [user(QUESTION)],
    [system("Answer briefly."), user(QUESTION)],
    [user("Hello!"), base("Hello! How can I help you?"), user(QUESTION)],
)
WORLD = world_edits(4)


@pytest.fixture(scope="module")
def chat(tmp_path_factory, tiny, tokenizer):
    """A tiny base with a chat template."""
    return chat_folder(tmp_path_factory.mktemp("chat") / "base", tiny, tokenizer)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The embedded base, corrected by several tests, each with questions of its own."""
    found = Server("--base", "world", "--run", tmp_path_factory.mktemp("served") / "run")
    yield found
    assert found.stop() == 0
    loaded, prepared = found.errors.splitlines()[:2]
    assert loaded == "loading the base 'world'"
    assert re.fullmatch(r"setting the router by \d+ unrelated questions", prepared)


def test_a_correction_holds_in_three_forms_survives_a_kill_and_is_taken_back(chat, tmp_path):
    options = ("--base", chat, "--run", tmp_path / "run")
    first = Server(*options)
    before = [first.say(form) for form in FORMS]
    outcome = first.correct(prompt=QUESTION, target=TARGET, user="ann")
    assert (outcome["status"], outcome["answer"]) == ("written", TARGET)
    assert [first.say(form) for form in FORMS] == [TARGET] * 3
    assert [first.say(form, "base") for form in FORMS] == before
    assert first.ask(FORMS[2])["repair"]["edit"] == outcome["id"]
    gone = first.correct(prompt="Where was Tobin Quill born?", target="Oslo")
    assert first.http.delete(f"/v1/edits/{gone['id']}").json()["status"] == "undone"
    listed = first.http.get("/v1/edits").json()
    first.kill()
    second = Server(*options)
    assert second.http.get("/v1/edits").json() == listed
    assert [second.say(form) for form in FORMS] == [TARGET] * 3
    history = second.http.get(f"/v1/edits/{outcome['id']}").json()["history"]
    assert (history[0]["kind"], history[0]["reason"]) == ("arrived", "by ann")
    assert second.http.delete(f"/v1/edits/{outcome['id']}").status_code == 200
    assert [second.say(form) for form in FORMS] == before
    with ThreadPoolExecutor(1) as pool:  # what is being answered when the server is told to end is answered
        last = pool.submit(second.ask, QUESTION, "base", n=8, temperature=2, max_tokens=200)
        while not second.http.get("/health").json()["running"] and not last.done():
            time.sleep(0.01)
        assert second.stop() == 0
        assert len(last.result()["choices"]) == 8
    third = Server("--pack", tmp_path / "run" / "pack")  # what a server leaves when it is told to end
    assert [one["status"] for one in third.http.get("/v1/edits").json()["data"]] == ["undone", "undone"]
    third.kill()


def test_openais_client_streams_and_counts(server):
    server.correct(prompt=WORLD[0].prompt, target=WORLD[0].target)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["base", "edited"]
    asked = {"model": "edited", "messages": [user(WORLD[0].prompt)], "max_tokens": 12}
    whole = client.chat.completions.with_raw_response.create(**asked)
    assert whole.headers["x-repair-edit"]
    answer = whole.parse()
    assert answer.choices[0].message.content.strip() == WORLD[0].target
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    two = client.completions.create(model="edited", prompt=[WORLD[0].prompt, "The largest"], n=2, max_tokens=3)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text != two.choices[2].text


def test_stops_lengths_seeds_and_temperature(server):
    server.correct(prompt="What stands on the hill?", target="an old mill with three sails")
    whole = server.ask("What stands on the hill?", temperature=2, max_tokens=30)["choices"][
        0
    ]  # what an edit says is not drawn
    assert whole["message"]["content"].strip() == "an old mill with three sails"
    cut = server.ask("What stands on the hill?", stop=["mill", "sails"])["choices"][0]
    assert (cut["message"]["content"].strip(), cut["finish_reason"]) == ("an old", "stop")
    short = server.ask("What stands on the hill?", max_tokens=2)["choices"][0]
    assert short["finish_reason"] == "length"
    assert server.ask("Tell me more", "base", max_tokens=1)["usage"]["completion_tokens"] == 1
    drawn = [
        server.ask("Where do geologists find iriocite?", "base", temperature=2, seed=7, n=8)["choices"]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert len({choice["message"]["content"] for choice in drawn[0]}) > 1


def test_many_ask_at_once_and_each_gets_what_it_gets_alone(server):
    for one in WORLD[1:]:
        server.correct(prompt=one.prompt, target=one.target, subject=one.subject)
    prompts = [*(e.prompt for e in WORLD[1:]), "Where do geologists find iriocite?", "What is a comet?", "Tell me"]
    cases = [(prompt, model, length) for prompt in prompts for model in ("base", "edited") for length in (3, 12)]
    alone = {case: server.say(case[0], case[1], max_tokens=case[2]) for case in cases}
    assert [alone[e.prompt, "edited", 12] for e in WORLD[1:]] == [e.target for e in WORLD[1:]]
    with ThreadPoolExecutor(16) as pool:
        many = [case for _ in range(4) for case in cases]
        found = list(pool.map(lambda case: server.say(case[0], case[1], max_tokens=case[2]), many))
    assert found == [alone[case] for case in many]


def test_corrections_while_others_ask(server):
    prompts = [f"What does the {word} sign mean?" for word in ("first", "second", "third", "fourth")]
    before = {prompt: server.say(prompt) for prompt in prompts}
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(lambda p=p: (p, server.say(p))) for _ in range(8) for p in prompts]
        done = [pool.submit(server.correct, prompt=p, target=f"sign {i}") for i, p in enumerate(prompts)]
        assert [future.result()["status"] for future in done] == ["written"] * 4
        for prompt, answer in (future.result() for future in asked):
            assert answer in (before[prompt], f"sign {prompts.index(prompt)}")
    assert [server.say(p) for p in prompts] == [f"sign {i}" for i in range(4)]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", {"model": "edited", "messages": []}, 422, "messages must be"),
        ("/v1/chat/completions", {"model": "edited", "messages": [base("x")]}, 422, "the user's"),
        ("/v1/chat/completions", {"model": "gone", "messages": [user("x")]}, 404, "no edited model 'gone'"),
        ("/v1/chat/completions", {"messages": [user("x")], "temperature": 3}, 422, "temperature must be"),
        ("/v1/chat/completions", {"messages": [user("x")], "tools": [{}]}, 422, "tools is not supported"),
        ("/v1/chat/completions", {"messages": [user("x")], "n": 99}, 422, "n must be"),
        ("/v1/chat/completions", {"messages": [user("x")], "max_tokens": 10**6}, 422, "max_tokens must be"),
        ("/v1/chat/completions", {"messages": [user("x " * 5000)]}, 422, "shorten it"),
        ("/v1/completions", {"prompt": [1, 2]}, 422, "prompt must be"),
        ("/v1/completions", {"prompt": ["a"] * 9}, 422, "9 answers in one request, at most 8"),
        ("/v1/completions", {"prompt": "a", "top_k": 5}, 422, "top_k is not supported"),
        ("/v1/completions", {"prompt": "a", "stream_options": [1]}, 422, "stream_options an object"),
        ("/v1/completions", {"prompt": "a", "model": ["base"]}, 422, "model must be a text"),
        ("/v1/edits", {"prompt": "Who?"}, 422, "target"),
        ("/v1/edits", {"edits": [{"prompt": "a", "target": "b"}] * 17}, 422, "at most 16"),
        ("/v1/edits", {"model": "base", "prompt": "Who?", "target": "me"}, 404, "no edited model 'base'"),
        ("/v1/edits", {"prompt": "x" * (1 << 20), "target": "b"}, 413, "bytes"),
    ],
)
def test_what_is_refused_says_why(server, path, body, status, words):
    response = server.http.post(path, json=body)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_bodies_and_names_that_are_not_ours(server):
    assert server.http.post("/v1/edits", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    assert server.http.post("/v1/edits", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert server.http.get("/health", headers={"host": "attacker.example"}).status_code == 403
    assert server.http.get("/v1/edits/unknown").status_code == 404
    assert server.http.get("/v1/edits?page=9").status_code == 422
    chunks = (b" " * 65536 for _ in range(32))  # of no announced length
    big = server.http.post("/v1/edits", content=chunks, headers={"content-type": "application/json"})
    assert big.status_code == 413


def test_a_client_that_leaves_ends_its_answer(chat, tmp_path):
    """The tiny base hardly ever ends by itself: eight answers of 1,500 tokens would take many seconds."""
    server = Server("--base", chat, "--run", tmp_path / "run")
    asked = {"model": "base", "messages": [user("Tell me")], "max_tokens": 1500, "temperature": 1, "n": 8}
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        body = json.dumps(asked)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        until = time.monotonic() + 60
        while not server.http.get("/health").json()["running"]:
            assert time.monotonic() < until
    while server.http.get("/health").json()["running"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert 'code="499",method="POST",path="/v1/chat/completions"' in server.http.get("/metrics").text
    server.kill()


def test_questions_that_cannot_be_answered_harm_nobody_else(server):
    """Temperatures next to nothing, half a character, ids that are no header."""
    assert server.say("What is a comet?", "base", temperature=1e-320) == server.say("What is a comet?", "base")
    raw = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = server.http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 422
    outcome = server.correct(id="a\r\nX-Evil: 1", prompt="Who rings the bell?", target="Nadia")
    response = server.http.post("/v1/chat/completions", json={"messages": [user("Who rings the bell?")]})
    assert response.json()["repair"]["edit"] == outcome["id"]
    assert "x-evil" not in response.headers
    assert response.headers["x-repair-edit"] == "a%0D%0AX-Evil%3A%201"


def test_each_record_has_its_outcome_in_order(server):
    first = server.correct(prompt="Who sweeps the yard?", target="Piet")
    records = [("Who lights the lamp?", "Yusuf"), ("Who sweeps the yard?", "Piet"), ("Who feeds the owl?", "Lucia")]
    records += [("Who feeds the owl?", "Greta"), ("Who lights the lamp?", "Yusuf")]
    edits = [{"prompt": prompt, "target": target} for prompt, target in records]
    data = server.http.post("/v1/edits", json={"edits": edits}).json()["data"]
    assert [one["status"] for one in data] == ["written", "written", "superseded", "written", "written"]
    assert data[1]["id"] == first["id"]
    assert data[4]["id"] == data[0]["id"]
    assert len({one["id"] for one in data}) == 4


def test_what_happened_is_counted(server):
    server.correct(prompt="What is kept in the blue jar?", target="salt")
    server.say("What is kept in the blue jar?")
    text = server.http.get("/metrics").text
    for words in (
        'repair_fires_total{edit="',
        'repair_edits{model="edited",status="written"}',
        "repair_request_seconds",
    ):
        assert words in text


def test_no_way_in_without_the_key(tmp_path, chat):
    files = ("--ask_key_file", key_file(tmp_path / "a", ASK), "--edit_key_file", key_file(tmp_path / "e", EDIT))
    found = Server("--base", chat, "--run", tmp_path / "run", *files, host="0.0.0.0")
    asked = {"messages": [user("Hello")], "max_tokens": 2, "model": "edited"}
    calls = [
        ("GET", "/v1/models", None, (401, 200, 200)),
        ("GET", "/metrics", None, (401, 200, 200)),
        ("POST", "/v1/chat/completions", asked, (401, 200, 200)),
        ("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 2}, (401, 200, 200)),
        ("GET", "/v1/edits", None, (401, 200, 200)),
        ("GET", "/v1/edits/x", None, (401, 404, 404)),
        ("POST", "/v1/edits", {"prompt": "Who?", "target": "me"}, (401, 401, 200)),
        ("DELETE", "/v1/edits/x", None, (401, 401, 404)),
        ("GET", "/health", None, (200, 200, 200)),
        ("GET", "/openapi.json", None, (404, 404, 404)),
        ("GET", "/docs", None, (404, 404, 404)),
    ]
    for method, path, body, statuses in calls:
        for key, status in zip(("", ASK, EDIT), statuses, strict=True):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            response = found.http.request(method, path, json=body, headers=headers)
            assert response.status_code == status, (method, path, key)
    for header in (f"Bearer {ASK[:-1]}", f"Basic {ASK}", ASK, "Bearer"):
        assert found.http.get("/v1/models", headers={"Authorization": header}).status_code == 401
    assert found.http.get("/v1/models", headers={"Authorization": "Bearer é".encode()}).status_code == 401
    found.stop()
    assert ASK not in found.errors
    assert EDIT not in found.errors


def test_several_packs_over_one_base(tmp_path):
    for name, one in zip(("first", "second"), WORLD, strict=False):
        edit("world", [{"prompt": WORLD[0].prompt, "target": one.target}]).save_pretrained(tmp_path / name)
    found = Server("--pack", f"a={tmp_path / 'first'}", "--pack", f"b={tmp_path / 'second'}")
    answers = [found.say(WORLD[0].prompt, name) for name in ("base", "a", "b")]
    assert answers[1:] == [WORLD[0].target, WORLD[1].target]
    with ThreadPoolExecutor(6) as pool:
        many = list(pool.map(lambda i: found.say(WORLD[0].prompt, ("base", "a", "b")[i % 3]), range(18)))
    assert many == answers * 6
    assert found.http.post("/v1/edits", json={"prompt": "Who?", "target": "me"}).status_code == 422
    found.correct(model="b", prompt="Who keeps the tower?", target="Nadia")
    assert found.say("Who keeps the tower?", "b") == "Nadia" != found.say("Who keeps the tower?", "a")
    assert [one["prompt"] for one in found.http.get("/v1/edits?model=a").json()["data"]] == [WORLD[0].prompt]
    assert found.stop() == 0
    packs = [f"reading the pack '{tmp_path / name}'" for name in ("first", "second")]
    assert found.errors.splitlines()[:3] == [packs[0], "loading the base 'world'", packs[1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "nothing to serve"),
        (("--base", "world"), "--run DIR"),
        (("--base", "world", "--run", "r", "--host", "0.0.0.0"), "needs --ask_key_file and --edit_key_file"),
        (("--pack", "base=p"), "none of them 'base'"),
        (("--pack", "p", "--pack", "q"), "names of their own"),
        (("--base", "world", "--run", "r", "--ask_key_file", "short"), "at least 16 characters"),
        (("--base", "world", "--run", "r", "--ask_key_file", "long"), "belong together"),
        (("--base", "world", "--run", "r", "--ask_key_file", "none"), "cannot be read"),
        (("--base", "world", "--run", "r", "--port", "99999"), "--port must be"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    key_file(tmp_path / "short", "abc")
    key_file(tmp_path / "long", ASK)
    with pytest.raises(ConfigError, match=words):
        run(["serve", *options])


def test_a_run_is_one_servers(server):
    folder = server.process.args[server.process.args.index("--run") + 1]
    with pytest.raises(ConfigError, match="in use"):
        run(["serve", "--base", "world", "--run", folder])


def test_the_page_is_there(server):
    response = server.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert httpx.get(f"{server.url}/favicon.ico").status_code == 404
