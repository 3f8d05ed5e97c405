"""The real server, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx


class Server:
    """`repair-lightning serve` on a free port of this machine; `http` asks it, with a key where one is given."""

    def __init__(self, *options: Any, key: str = "", host: str = "127.0.0.1") -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        call = [sys.executable, "-m", "repair_lightning", "serve", "--host", host, "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"at (http://\S+)", line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"it did not start: {line}{self.process.communicate()[1]}")
        self.url = found[1].replace("0.0.0.0", "127.0.0.1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=120, headers=headers)

    def ask(self, prompt: str | list[dict[str, str]], model: str = "edited", **options: Any) -> dict[str, Any]:
        """The whole response to a question or a dialogue."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body = {"model": model, "messages": messages, "max_tokens": 12, **options}
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def say(self, prompt: str | list[dict[str, str]], model: str = "edited", **options: Any) -> str:
        """What is answered."""
        return self.ask(prompt, model, **options)["choices"][0]["message"]["content"].strip()

    def correct(self, **record: Any) -> dict[str, Any]:
        """What becomes of one correction."""
        response = self.http.post("/v1/edits", json=record)
        assert response.status_code == 200, response.text
        (outcome,) = response.json()["data"]
        return outcome

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """As an operator would; returns the exit status."""
        self.process.terminate()
        self.errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode


def key_file(path: Path, key: str) -> Path:
    """A file with a key."""
    path.write_text(f"{key}\n")
    return path
