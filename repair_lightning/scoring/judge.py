"""A judge of free answers, where one is plugged in: any endpoint with OpenAI's chat interface.

It is asked whether an answer states the target, so that a sentence that holds the right fact is not wrong for its
words. None is needed, and one that fails costs nothing but its figure.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from repair_lightning.errors import ConfigError, counted
from repair_lightning.scoring.protocols import mean_of
from repair_lightning.scoring.scorer import sample_of
from repair_lightning.texts import dialogue
from repair_lightning.types import Edit

log = logging.getLogger(__name__)

KEY = "JUDGE_API_KEY"
"""The environment variable that holds the endpoint's key, if it wants one."""
PROMPT = (
    "Question: {question}\nReference answer: {target}\nAnswer to judge: {answer}\n\n"
    "Does the answer to judge state the reference answer, in whatever words, and nothing that contradicts it? "
    "Reply with yes or no alone."
)
EDITS = 128
"""Edits whose answers are judged at most, drawn at random with a fixed seed."""
_AT_ONCE, _SECONDS, _WAITS = 8, 60, 3
_BUSY = (429, 500, 502, 503)
"""The states of an endpoint that is asked again a little later."""


@dataclass(frozen=True)
class Judge:
    """An endpoint and one of its models.

    Args:
        url: where OpenAI's interface begins, as `http://127.0.0.1:8000/v1`. ConfigError where it is no http address.
        model: the model's name there. ConfigError where it is missing.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            words = "must be where an OpenAI-compatible interface begins, such as http://127.0.0.1:8000/v1"
            raise ConfigError(f"scoreboard.judge {words}, got '{self.url}'")
        if not self.model:
            raise ConfigError("scoreboard.judge needs scoreboard.judge_model, the name of one of its models; give it")

    def score(
        self, edits: Sequence[Edit], rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """`rel` and `gen` as the judge sees them, from what a model said to the edits' prompts, for `metrics.json`, and
        each reply as a row; None, and a warning, where the endpoint fails."""
        ids = {edit.id for edit in sample_of(edits, EDITS)}
        asked = [row for row in rows if row["id"] in ids and row["kind"] in ("edit", "rephrase")]
        texts = [_prompt(row) for row in asked]
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                unique = dict.fromkeys(texts)
                said = dict(zip(unique, pool.map(self.ask, unique), strict=True))
        except (OSError, HTTPException, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            log.warning("the judge at %s fails (%s); the run goes on without its figures", self.url, why)
            return None, []
        found = []
        for row, text in zip(asked, texts, strict=True):
            kept = {name: row[name] for name in ("id", "kind", "prompt", "expected", "answer")}
            found.append({"stage": "judge", **kept, "reply": said[text], "right": verdict(said[text])})
        clear = [row for row in found if row["right"] is not None]
        if len(clear) < len(found):
            log.warning("the judge said neither yes nor no of %s", counted(len(found) - len(clear), "answer"))
        kinds = {"rel": "edit", "gen": "rephrase"}
        shares = {name: mean_of(row["right"] for row in clear if row["kind"] == kind) for name, kind in kinds.items()}
        about = {"asked": len(found), "unclear": len(found) - len(clear), "model": self.model, "prompt": PROMPT}
        return {**shares, **about}, found

    def ask(self, text: str) -> str:
        """The model's reply to a text. OSError, HTTPException or ValueError where the endpoint fails."""
        content = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        place = f"{self.url.rstrip('/')}/chat/completions"
        waited = 0
        while True:
            try:
                with urlopen(Request(place, json.dumps(content).encode(), headers), timeout=_SECONDS) as answer:
                    return _content(json.loads(answer.read()))
            except HTTPError as error:
                if error.code not in _BUSY or waited == _WAITS:
                    raise
            time.sleep(2**waited)
            waited += 1


def verdict(reply: str) -> bool | None:
    """What a reply says, its thoughts left out: yes, no, or None for neither."""
    found = re.search(r"\b(yes|no)\b", reply.rpartition("</think>")[2].casefold())
    return None if found is None else found.group() == "yes"


def _prompt(row: Mapping[str, Any]) -> str:
    named = {"question": dialogue.shown(row["prompt"]), "target": row["expected"], "answer": row["answer"]}
    return PROMPT.format(**named)


def _content(found: Any) -> str:
    try:
        return str(found["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise ValueError("its reply has no choices[0].message.content") from None
