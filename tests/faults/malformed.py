"""Record files that are wrong in every way we could think of, and many that chance thought of."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from repair_lightning.edits.formats import FORMATS
from repair_lightning.edits.records import load_records, same_question_key
from repair_lightning.errors import LISTED, RepairError

GOOD = '{"prompt": "Who?", "target": "Nobody"}'
DEEP = "[" * 100_000 + "]" * 100_000

BY_HAND: dict[str, bytes] = {
    "empty.jsonl": b"",
    "no-json.jsonl": b"who, what\n",
    "half-a-line.jsonl": f"{GOOD}\n{GOOD[:20]}".encode(),
    "null.json": b"null",
    "empty-list.json": b"[]",
    "list-of-nothing.json": b"[null, [], {}, 1, true]",
    "deep.json": DEEP.encode(),
    "deep-line.jsonl": f"{GOOD}\n{DEEP}".encode(),
    "long-number.json": f'[{{"prompt": "a", "target": "b", "id": {"9" * 5000}}}]'.encode(),
    "nan.jsonl": b'{"prompt": NaN, "target": Infinity}',
    "latin1.jsonl": '{"prompt": "Où?", "target": "Là"}'.encode("latin-1"),
    "utf16.jsonl": GOOD.encode("utf-16"),
    "half-a-surrogate.jsonl": b'{"prompt": "\\ud800", "target": "b"}',
    "no-target.jsonl": b'{"prompt": "a"}',
    "empty-prompt.jsonl": b'{"prompt": "  ", "target": "b"}',
    "same-id.jsonl": b'{"id": 1, "prompt": "a", "target": "b"}\n{"id": 1, "prompt": "c", "target": "d"}',
    "strange-id.jsonl": b'{"id": {"a": 1}, "prompt": "a", "target": "b"}',
    "rephrases.jsonl": b'{"prompt": "a", "target": "b", "rephrases": [1]}',
    "locality.jsonl": b'{"prompt": "a", "target": "b", "locality": [{"answer": "b"}]}',
    "near.jsonl": b'{"prompt": "a", "target": "b", "near": {"prompt": "c"}}',
    "open.jsonl": b'{"prompt": "The mayor of {} is", "target": "b"}',
    "no-messages.jsonl": b'{"prompt": [], "target": "b"}',
    "further.jsonl": b'{"prompt": "a", "target": "b", "further": [{"kind": ["c"], "prompt": "d", "answers": [[]]}]}',
    "nested.json": b'[{"prompt": "a", "target_new": "b", "locality": {"A": {"prompt": [["c"], 3, {}]}}}]',
    "rewrites.json": b'[{"requested_rewrite": [null, {"prompt": [], "subject": 3}], "questions": {"a": 1}}]',
    "python-cells.csv": b"prompt,target,rephrases\na,b,\"['c', {1: (2,)}]\"\n",
    "answered.jsonl": b'{"prompt": [{"role": "assistant", "content": "a"}], "target": "b"}',
    "strange-role.jsonl": b'{"prompt": [{"role": {"a": 1}, "content": "a"}], "target": "b"}',
    "mixed-rephrases.jsonl": b'{"prompt": "a", "target": "b", "rephrases": [{"role": "user", "content": "c"}, "d"]}',
    "json-cells.csv": b'prompt,target,rephrases\n"[{""role"": 3}]",b,"[[[]]]"\n',
    "control\n\x1b[31m.jsonl": b'{"prompt": "a\\u001b[31m"}',
    "cells.csv": b"prompt,target\na,b,c\n",
    "quotes.csv": b'prompt,target\n"a,b\n',
    "no-parquet.parquet": b"PAR1 and nothing else PAR1",
    "empty.parquet": b"",
}


def malformed(number: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and content of record files: those by hand, then `number` by chance."""
    yield from BY_HAND.items()
    rng = random.Random(seed)
    for n in range(number):
        suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
        yield f"chance-{n}{suffix}", _damaged(_content(rng, suffix), rng)


def survives(path: Path) -> bool:
    """Whether every format, stopping and skipping, makes valid edits of a file or refuses it in plain lines."""
    return all(_reads(path, name, mode) for name in FORMATS for mode in ("stop", "skip"))


def _reads(path: Path, name: str, mode: Any) -> bool:
    try:
        found = load_records(path, name, on_bad_record=mode)
    except RepairError as error:
        lines = str(error).split("\n")
        return len(lines) <= LISTED + 1 and all(map(str.isprintable, lines))
    except Exception:  # any other is what is looked for
        return False
    ids = {edit.id for edit in found.edits}
    sound = all(edit.prompt.strip() and edit.target.strip() for edit in found.edits)
    apart = len(ids) == len(found.edits) == len({same_question_key(edit.prompt) for edit in found.edits})
    return bool(ids) and sound and apart and set(found.superseded.values()) <= ids


def _content(rng: random.Random, suffix: str) -> bytes:
    rows = [_record(rng) for _ in range(rng.randint(1, 4))]
    if suffix == ".parquet":
        return _parquet([{name: ascii(value) for name, value in row.items()} for row in rows])
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        return "\n".join(mark.join(map(str, cells)) for cells in [rows[0], *(row.values() for row in rows)]).encode(
            "utf-8", "surrogatepass"
        )
    rows = [rng.choice([row, row, row, _anything(rng)]) for row in rows]
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    return text.encode("utf-8", "surrogatepass")


def _parquet(rows: list[dict[str, str]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _record(rng: random.Random) -> dict[str, Any]:
    """A record of some format, with some fields replaced, dropped or added."""
    chosen = FORMATS[rng.choice(sorted(FORMATS))]
    record: dict[str, Any] = {name: rng.choice(["a", "b {}", "c"]) for name in chosen.required[0]}
    for name in rng.sample(sorted(chosen.fields), rng.randint(0, min(3, len(chosen.fields)))):
        record[name] = _anything(rng)
    if rng.random() < 0.2:
        record.pop(rng.choice(sorted(record)))
    return record


def _anything(rng: random.Random, depth: int = 0) -> Any:
    plain: list[Any] = [None, True, 0, -1, 1e400, float("nan"), "", " ", "a", "\ud800", "\x00", "é" * 50, 10**30]
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(plain)
    inner = [_anything(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    names = rng.choice((["prompt", "answer", "str", "target_new", "subject"], ["content", "role"]))
    return inner if rng.random() < 0.5 else dict(zip(names, inner, strict=False))


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Now and then cut off, with a byte changed, or with bytes put in."""
    kind, at = rng.random(), rng.randrange(len(content) + 1)
    if kind < 0.15:
        return content[:at]
    if kind < 0.3:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind < 0.4:
        return content[:at] + rng.randbytes(5) + content[at:]
    return content
