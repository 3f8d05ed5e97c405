"""The server: OpenAI's interface to a base and its edited models, and an interface for corrections."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from repair_lightning.errors import ConfigError, RepairError, UnknownEditError, first_line
from repair_lightning.models.forms import Forms
from repair_lightning.packs.pack import save_pack
from repair_lightning.serving.engine import Asked, BusyError, Engine, Piece, Sampling
from repair_lightning.serving.live import LiveModel
from repair_lightning.texts import dialogue

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page") / "index.html"
MAX_BODY = 1 << 20
MAX_EDITS = 16
MAX_ANSWERS = 8
MAX_STOPS = 4
DEFAULT_TOKENS = 512
PER_PAGE = 50
MAX_CORRECTIONS_WAITING = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_NOTHING: Sequence[Any] = (None, False, [], {})
_UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    **dict.fromkeys(
        ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "suffix", "echo", "audio"), _NOTHING
    ),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), (None, 0)),
    "repetition_penalty": (None, 1),
    "best_of": (None, 1),
    "top_k": (None, 0, -1),
    "reasoning_effort": (None,),
    "modalities": (None, ["text"]),
    "response_format": (None, {"type": "text"}),
}
"""Fields that would change the answer, with what they may say: nothing."""


@dataclass(frozen=True)
class Keys:
    """Who may do what: both keys or none, which lets everybody. The key to edit is a key to ask too."""

    ask: str | None = None
    edit: str | None = None

    def allows(self, given: str, edits: bool) -> bool:
        """Whether a key may ask, or with `edits` correct; compared in constant time."""
        wanted = self.edit if edits else self.ask
        if wanted is None:
            return True
        known = [key for key in (self.edit, None if edits else self.ask) if key is not None]
        return sum(hmac.compare_digest(given.encode(), key.encode()) for key in known) > 0  # all are compared


@dataclass
class Served:
    """What is served: the live models by name, over one base, with the engine that runs them."""

    models: dict[str, LiveModel]
    keys: Keys = Keys()
    hosts: tuple[str, ...] | None = None
    """Names under which the server may be called; None is any. Without keys a page of another site must not reach it
    through a name of its own."""
    threaded: bool = True
    """Whether the engine has a thread of its own."""
    waiting: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        first = next(iter(self.models.values()))
        self.engine = Engine(first.model, threaded=self.threaded)
        self.forms: Forms = first.model.forms
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("repair_requests", "requests answered", ["method", "path", "code"], registry=own)
        self.seconds = Histogram("repair_request_seconds", "seconds to the answer's end", ["path"], registry=own)
        self.fires = Counter("repair_fires", "answers that an edit gave", ["model", "edit"], registry=own)
        self.tokens = Counter("repair_tokens", "tokens read and said", ["kind"], registry=own)
        self.edits = Gauge("repair_edits", "corrections by status", ["model", "status"], registry=own)
        self.busy = Gauge("repair_sequences", "answers in the making", ["state"], registry=own)

    def live(self, name: str | None) -> LiveModel:
        """An edited model by name; without one, the only one."""
        if name is None and len(self.models) == 1:
            name = next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            said = "no model is named" if name is None else f"there is no edited model '{name}'"
            raise HTTPException(404 if name else 422, f"{said}; give model: {known}")
        return self.models[name]

    def close(self) -> None:
        """Answer what was asked, leave a pack beside each store, and let go."""
        self.engine.stop()
        for live in self.models.values():
            if live.store is not None:
                save_pack(live.editor, live.store.path / "pack", {"command": "repair-lightning serve"})
            live.close()


def make_app(served: Served) -> FastAPI:
    """The application; it closes what it serves when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.close)

    app = FastAPI(title="REPAIR-Lightning", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served = served
    _errors(app)
    app.add_middleware(Limits, served=served)
    _public(app, served)
    _asking(app, served)
    _editing(app, served)
    return app


def error(status: int, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status, headers=headers or None)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http(_: Request, found: HTTPException) -> JSONResponse:
        return error(found.status_code, str(found.detail))

    @app.exception_handler(RepairError)
    async def ours(_: Request, found: RepairError) -> JSONResponse:
        if isinstance(found, BusyError):
            return error(429, str(found), **{"Retry-After": "1"})
        return error(404 if isinstance(found, UnknownEditError) else 422, str(found))

    @app.exception_handler(Exception)
    async def other(_: Request, found: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=found)
        return error(500, "the server could not answer this; its log says why")


class Limits:
    """Refuses bodies that are too large, foreign names of the server, and missing content types; counts requests."""

    def __init__(self, app: Any, served: Served) -> None:
        self.app, self.served = app, served

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        started, code = time.perf_counter(), 500
        path = "/v1/edits/{id}" if scope["path"].startswith("/v1/edits/") else scope["path"]

        async def counted(message: Any) -> None:
            nonlocal code
            code = message.get("status", code)
            await send(message)

        refusal = self._refusal(scope["method"], headers)
        try:
            if refusal is not None:
                await refusal(scope, receive, counted)
            else:
                await self.app(scope, _bounded(receive), counted)
        except _TooLarge:
            await error(413, f"the body has more than {MAX_BODY:,} bytes; send less at once")(scope, receive, counted)
        finally:
            known = path if path in _PATHS else "other"
            self.served.requests.labels(scope["method"], known, str(code)).inc()
            self.served.seconds.labels(known).observe(time.perf_counter() - started)

    def _refusal(self, method: str, headers: Mapping[str, str]) -> JSONResponse | None:
        host = headers.get("host", "")
        name = re.fullmatch(r"\[([0-9a-fA-F:]+)\](?::\d+)?|([^:\[\]]+)(?::\d+)?", host)
        if self.served.hosts is not None and (name is None or (name[1] or name[2]) not in self.served.hosts):
            return error(403, f"this server answers to {', '.join(self.served.hosts)} alone; call it by that name")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return error(413, f"the body has more than {MAX_BODY:,} bytes; send less at once")
        if method == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return error(415, "the body must be JSON; send it with Content-Type: application/json")
        return None


class _TooLarge(Exception):
    """More was sent than was announced."""


def _bounded(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    size = 0

    async def read() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise _TooLarge
        return message

    return read


_PATHS = (
    "/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/edits", "/v1/edits/{id}",
)  # fmt: skip


def _needs(served: Served, edits: bool) -> Any:
    """A dependency: a key that may ask, or correct."""

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not served.keys.allows(given if scheme.lower() == "bearer" else "", edits):
            what = "correct" if edits else "ask"
            raise HTTPException(401, f"a key that may {what} is needed; send it as Authorization: Bearer KEY")

    return Depends(check)


def _public(app: FastAPI, served: Served) -> None:
    ask = [_needs(served, edits=False)]

    @app.get("/")
    async def page() -> Response:
        headers = {"Content-Security-Policy": "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"}
        return FileResponse(PAGE, media_type="text/html", headers={**headers, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = served.engine.load
        return {"status": "ok", "running": running, "waiting": waiting}

    @app.get("/metrics", dependencies=ask)
    def metrics() -> Response:
        for name, live in served.models.items():
            for status, number in live.editor.ledger.counts().items():
                served.edits.labels(name, status).set(number)
        for state, number in zip(("running", "waiting"), served.engine.load, strict=True):
            served.busy.labels(state).set(number)
        return PlainTextResponse(generate_latest(served.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=ask)
    async def models() -> dict[str, Any]:
        of = {"object": "model", "created": served.created, "owned_by": "repair-lightning"}
        return {"object": "list", "data": [{"id": name, **of} for name in ("base", *served.models)]}


def _asking(app: FastAPI, served: Served) -> None:
    ask = [_needs(served, edits=False)]

    @app.post("/v1/chat/completions", dependencies=ask)
    async def chat(request: Request) -> Response:
        body = await _body(request)
        messages = _messages(body.get("messages"))
        note = ""
        if served.forms.marks is None and len(messages) > 1:
            note = "the base has no chat template: only the last message was asked"
            messages = messages[-1:]
        prompt = dialogue.dump(messages) if served.forms.marks is not None else messages[-1]["content"]
        return await Answering(served, request, body, [prompt], note, chat=True).respond()

    @app.post("/v1/completions", dependencies=ask)
    async def complete(request: Request) -> Response:
        body = await _body(request)
        given = body.get("prompt")
        prompts = [given] if isinstance(given, str) else given
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise HTTPException(422, "prompt must be a text or a list of texts")
        return await Answering(served, request, body, prompts, chat=False).respond()


def _editing(app: FastAPI, served: Served) -> None:
    ask, edit = [_needs(served, edits=False)], [_needs(served, edits=True)]

    @app.post("/v1/edits", dependencies=edit)
    async def add(request: Request) -> dict[str, Any]:
        body = await _body(request, dict, list)
        body = {"edits": body} if isinstance(body, list) else body
        name, by = body.pop("model", None), str(body.pop("user", "") or "")
        records = body.get("edits", body)
        records = [records] if isinstance(records, dict) else records
        if not isinstance(records, list) or not records:
            raise HTTPException(422, 'give {"prompt": ..., "target": ...}, or several of them as "edits"')
        if len(records) > MAX_EDITS:
            raise HTTPException(422, f"{len(records)} corrections in one request, at most {MAX_EDITS}; send several")
        live = served.live(name)
        found = await _done(served, lambda: live.add(records, by))
        return {"object": "list", "data": [asdict(outcome) for outcome in found]}

    @app.get("/v1/edits", dependencies=ask)
    def listed(model: str | None = None, q: str = "", subject: str = "", page: str = "1") -> dict[str, Any]:
        found = served.live(model).edits(q, subject)
        pages = max(1, -(-len(found) // PER_PAGE))
        if not (page.isascii() and page.isdigit()) or not 1 <= int(page) <= pages:
            raise HTTPException(422, f"page must be from 1 to {pages}, got '{page}'")
        start = (int(page) - 1) * PER_PAGE
        data = [_shown(one) for one in found[start : start + PER_PAGE]]
        return {"object": "list", "data": data, "page": int(page), "pages": pages, "total": len(found)}

    @app.get("/v1/edits/{id:path}", dependencies=ask)
    def one(id: str, model: str | None = None) -> dict[str, Any]:
        live = served.live(model)
        return {**_shown(live.one(id)), "history": live.history(id)}

    @app.delete("/v1/edits/{id:path}", dependencies=edit)
    async def undo(id: str, model: str | None = None) -> dict[str, Any]:
        live = served.live(model)
        again = await _done(served, lambda: live.undo(id))
        return {"id": id, "status": "undone", "written_anew": again}


def _shown(edit: dict[str, Any]) -> dict[str, Any]:
    """A correction whose prompt is messages, as messages."""
    return {**edit, "prompt": dialogue.parse(edit["prompt"]) or edit["prompt"]}


async def _done(served: Served, job: Callable[[], Any]) -> Any:
    """The result of a correction, which the engine does between two passes."""
    if served.waiting >= MAX_CORRECTIONS_WAITING:
        raise BusyError(f"{served.waiting} corrections wait already; send this one again later")
    served.waiting += 1
    try:  # it is finished even where its sender has gone: half a correction is none
        return await asyncio.shield(asyncio.wrap_future(served.engine.do(job)))
    finally:
        served.waiting -= 1


async def _body(request: Request, *kinds: type) -> Any:
    try:
        found = json.loads(await request.body())
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as problem:
        raise HTTPException(
            422, f"the body is not valid JSON ({type(problem).__name__}: {first_line(problem)})"
        ) from None
    if not isinstance(found, kinds or dict):
        raise HTTPException(422, "the body must be a JSON object")
    return found


def _messages(given: Any) -> list[dict[str, str]]:
    """Messages as the base's template takes them; parts of text are joined."""
    if not isinstance(given, list) or not given:
        raise HTTPException(422, 'messages must be a list such as [{"role": "user", "content": "..."}]')
    found = []
    for number, message in enumerate(given, 1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise HTTPException(422, f"messages[{number - 1}] must have a role (system, user, assistant) and a text")
        found.append({"role": role, "content": content})
    if found[-1]["role"] != "user" or not found[-1]["content"].strip():
        raise HTTPException(422, "the last message must be the user's, with a question")
    return found


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise HTTPException(422, f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return value


def _whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = _number(body, name, default, low, high)
    if int(value) != value:
        raise HTTPException(422, f"{name} must be a whole number, got {value!r}")
    return int(value)


class Answering:
    """One request for answers: checked, asked, and told whole or as a stream.

    Args:
        prompts: texts, or messages as the text of their JSON.
        note: what the asker should know of how it was asked.
        chat: whether in the form of `chat/completions`.
    """

    def __init__(
        self, served: Served, request: Request, body: dict[str, Any], prompts: list[str], note: str = "", *, chat: bool
    ) -> None:
        self.served, self.request, self.chat, self.note = served, request, chat, note
        given, options = body.get("model"), body.get("stream_options") or {}
        if not isinstance(given, (str, type(None))) or not isinstance(options, dict):
            raise HTTPException(422, "model must be a text, and stream_options an object")
        self.name = given or (next(iter(served.models)) if len(served.models) == 1 else None)
        self.live = None if self.name == "base" else served.live(self.name)
        self.stream, self.usage = body.get("stream") is True, bool(options.get("include_usage"))
        for name, neutral in _UNSUPPORTED.items():
            if body.get(name) not in neutral:
                raise HTTPException(422, f"{name} is not supported here, got {str(body[name])[:40]}; leave it out")
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.number = _whole(body, "n", 1, 1, MAX_ANSWERS)
        if len(prompts) * self.number > MAX_ANSWERS:
            raise HTTPException(422, f"{len(prompts) * self.number} answers in one request, at most {MAX_ANSWERS}")
        self.prompts, self.body = prompts, body
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.by: dict[int, Piece] = {}
        self.asked: list[Asked] = []

    def _read(self) -> list[Asked]:
        """What is asked, as the engine takes it; long texts take their time."""
        served, number, loop = self.served, self.number, self.loop
        rows = [self._row(prompt) for prompt in self.prompts]
        sampling = self._sampling(self.body, max(map(len, rows)))
        found = []
        for index in range(len(rows) * number):
            row, prompt = rows[index // number], self.prompts[index // number]
            seed = None if sampling.seed is None else sampling.seed + index % number
            one = replace(sampling, seed=seed)

            def tell(piece: Piece, index: int = index) -> None:
                loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

            model = None if self.live is None else self.live.model
            text = served.forms.asked(prompt) if self.chat else served.forms.asked_in(row)
            trims = self.chat and served.forms.marks is None
            found.append(Asked(list(row), text, one, served.forms, model, tell, trims))
        self.read = sum(map(len, rows))
        return found

    def _row(self, prompt: str) -> list[int]:
        forms = self.served.forms
        row = forms.ids(prompt) if self.chat or forms.is_rendered(prompt) else list(forms.bare(prompt))
        limit = self.served.engine.plain.longest - 1
        if not 0 < len(row) <= limit:
            raise HTTPException(422, f"the prompt has {len(row):,} tokens, the base reads 1 to {limit:,}; shorten it")
        return row

    def _sampling(self, body: Mapping[str, Any], longest: int) -> Sampling:
        room = self.served.engine.plain.longest - longest
        name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        limit = _whole(body, name, min(DEFAULT_TOKENS, room), 1, max(room, 1))
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise HTTPException(422, f"stop must be a text or at most {MAX_STOPS} texts")
        seed = None if body.get("seed") is None else _whole(body, "seed", 0, -(1 << 62), 1 << 62)
        return Sampling(
            limit,
            _number(body, "temperature", 0.0, 0, 2),
            max(_number(body, "top_p", 1.0, 0, 1), 1e-6),
            seed,
            tuple(stops),
        )

    async def respond(self) -> Response:
        """The answer, or a stream of its pieces."""
        self.loop = asyncio.get_running_loop()
        self.asked = await asyncio.to_thread(self._read)
        self.served.engine.ask(self.asked)
        self.served.tokens.labels("read").inc(self.read)
        if self.stream:
            try:
                early = await self._until_routed()
            except BaseException:
                self._cancel()
                raise
            return StreamingResponse(self._events(early), media_type="text/event-stream", headers=self._headers())
        watch = asyncio.create_task(self._watch())
        texts, ends = [""] * len(self.asked), [Piece()] * len(self.asked)
        try:
            early = await self._until_routed()
            while early or not all(end.finish for end in ends):
                index, piece = early.pop(0) if early else await self._next()
                texts[index] += piece.text
                ends[index] = piece if piece.finish else ends[index]
        finally:
            watch.cancel()
            self._cancel()
        choices = [self._choice(i, text, ends[i].finish) for i, text in enumerate(texts)]
        content = {**self._envelope("chat.completion" if self.chat else "text_completion"), "choices": choices}
        content |= {"usage": self._usage(ends), "repair": self._who()}
        return JSONResponse(content, headers=self._headers())

    async def _watch(self) -> None:
        """Ends what is asked where the asker has left."""
        while not await self.request.is_disconnected():
            await asyncio.sleep(0.2)
        self._cancel()
        self.pieces.put_nowait((0, Piece(error=ConnectionAbortedError("the client has left"))))

    async def _until_routed(self) -> list[tuple[int, Piece]]:
        """Wait until all sequences know who answers them; returns what else was told meanwhile."""
        early = []
        while len(self.by) < len(self.asked):
            index, piece = await self._next()
            if not piece.first:
                early.append((index, piece))
                continue
            self.by[index] = piece
            if piece.edit is not None:
                self.served.fires.labels(self.name, piece.edit).inc()
        return early

    async def _next(self) -> tuple[int, Piece]:
        """The next piece."""
        index, piece = await self.pieces.get()
        if isinstance(piece.error, ConnectionAbortedError):
            raise HTTPException(499, str(piece.error))
        if piece.error is not None:
            raise HTTPException(500, "the server could not answer this; its log says why")
        if piece.finish:
            self.served.tokens.labels("said").inc(piece.tokens)
        return index, piece

    def _cancel(self) -> None:
        for asked in self.asked:
            asked.cancelled = True

    async def _events(self, early: list[tuple[int, Piece]]) -> AsyncIterator[str]:
        """Server-sent events: chunks, and at the end usage where it is wanted."""
        ends: dict[int, Piece] = {}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        envelope = {**self._envelope(kind), **({"usage": None} if self.usage else {})}
        try:
            if self.chat:
                for index in range(len(self.asked)):
                    delta = {"role": "assistant", "content": ""}
                    choice = {"index": index, "delta": delta, "finish_reason": None}
                    yield _event({**envelope, "choices": [choice], "repair": self._who(index)})
            while len(ends) < len(self.asked):
                index, piece = early.pop(0) if early else await self._next()
                if piece.text:
                    yield _event({**envelope, "choices": [self._choice(index, piece.text, None, delta=True)]})
                if piece.finish:
                    ends[index] = piece
                    last = self._choice(index, "", piece.finish, delta=True)
                    yield _event({**envelope, "choices": [last], "repair": self._who(index)})
            if self.usage:
                yield _event({**envelope, "choices": [], "usage": self._usage(list(ends.values()))})
            yield "data: [DONE]\n\n"
        except HTTPException as found:
            yield _event({"error": {"message": str(found.detail), "type": "server_error"}})
        finally:
            self._cancel()

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _choice(self, index: int, text: str, finish: str | None, delta: bool = False) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"delta": {"content": text} if text else {}} if delta else {}
            said |= {} if delta else {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def _usage(self, ends: Sequence[Piece]) -> dict[str, int]:
        said = sum(end.tokens for end in ends)
        return {"prompt_tokens": self.read, "completion_tokens": said, "total_tokens": self.read + said}

    def _who(self, index: int = 0) -> dict[str, Any]:
        found = self.by[index]
        more = {"note": self.note} if self.note else {}
        return {"edit": found.edit, "memory": found.memory, "reason": found.reason, **more}

    def _headers(self) -> dict[str, str]:
        edit = self.by[0].edit
        return {} if edit is None else {"x-repair-edit": quote(edit)[:512]}


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def read_key(path: str | Path | None) -> str | None:
    """A key from its file. ConfigError where it cannot be read or is short."""
    if path is None:
        return None
    try:
        key = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"key file '{path}' cannot be read ({problem}); give a file with one line of ASCII") from None
    if len(key) < 16 or any(c.isspace() for c in key):
        raise ConfigError(f"key file '{path}' must hold one word of at least 16 characters")
    return key
