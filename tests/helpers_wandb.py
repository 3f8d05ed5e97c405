"""Reading an offline run of Weights & Biases back: its file is a LevelDB log of protocol buffers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Record]:
    """What a `.wandb` file holds, in its order. A block ends with zeros where no header fits any more."""
    content = file.read_bytes()
    at, whole = _FILE_HEADER, b""
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + _HEADER])
        if at + _HEADER + length > len(content):
            return  # not yet written
        whole += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(whole)
            whole = b""


def start_afresh() -> None:
    """Close what another test of this process has left open, and forget the settings that wandb keeps of it."""
    wandb.finish()
    wandb.teardown()


def offline_run(folder: Path, patience: float = 30) -> list[Record]:
    """The records of the one offline run in a run directory; it is written by another process, so wait for its end."""
    late = time.monotonic() + patience
    while True:
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        found = list(records(file))
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < late, f"{file} has {len(found)} records and no end"
        time.sleep(0.1)


def rows(found: list[Record]) -> list[dict[str, Any]]:
    """What was logged, row by row; media as wandb describes them."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]


def series(found: list[Record], key: str) -> list[Any]:
    """The values of one key, in the order in which they were logged."""
    return [row[key] for row in rows(found) if key in row]
