"""What a finished run left behind, read back for reports and figures; whatever an older run lacks is empty."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from repair_lightning.edits.journal import FILE as JOURNAL_FILE
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger, LedgerEntry
from repair_lightning.errors import RepairError
from repair_lightning.scoring.protocols import AUTOREGRESSIVE

Row = dict[str, Any]


@dataclass(frozen=True)
class Artefacts:
    """A finished run: its directory and its `metrics.json`; each other file is read when it is first asked for."""

    path: Path
    metrics: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Artefacts:
        """A run by its directory.

        Raises:
            RepairError: it holds no finished run, or one whose files are damaged.
        """
        path = Path(path)
        file = path / "metrics.json"
        if not file.is_file():
            raise RepairError(f"'{path}' holds no finished run: there is no metrics.json; give the directory of one")
        found = _json(file)
        missing = [name for name in ("base", "n_edits", "final", "pre_edit") if name not in found]
        if missing:
            raise RepairError(f"'{file}' has no '{missing[0]}': it is not of a run; give the directory of one")
        return cls(path, found)

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def base(self) -> str:
        """The base's name, without the folders before it."""
        return str(self.metrics["base"]["name"]).rstrip("/").split("/")[-1]

    def score(self, kind: str, stage: str = "final", protocol: str = AUTOREGRESSIVE) -> float | None:
        """A score in [0, 1]; None where there is none."""
        return ((self.metrics.get(stage) or {}).get(protocol) or {}).get(kind)

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Stage -> the lines of `generations.jsonl`."""
        found: dict[str, list[Row]] = {}
        for row in _json_lines(self.path / "generations.jsonl"):
            found.setdefault(str(row.get("stage")), []).append(row)
        return found

    @cached_property
    def curve(self) -> list[Row]:
        """The lines of `curves.jsonl`: a line per window."""
        return list(_json_lines(self.path / "curves.jsonl"))

    @cached_property
    def features(self) -> Mapping[str, Any]:
        """The content of `features.json`."""
        return _json(self.path / "features.json", {})

    @cached_property
    def entries(self) -> dict[str, LedgerEntry]:
        """Id -> the ledger's entry, in order of arrival."""
        file = self.path / "edits.parquet"
        if not file.is_file():
            return {}
        ledger = Ledger.from_parquet(file)
        return {id: ledger.entry(id) for id in ledger}

    @cached_property
    def events(self) -> list[Row]:
        """The journal's events that count, without the edits' texts."""
        if not (self.path / JOURNAL_FILE).is_file():
            return []
        journal = Journal(self.path / JOURNAL_FILE, read_only=True)
        try:
            return [{**event, "edit": None} for event in journal.events() if not event["void"]]
        finally:
            journal.close()

    @cached_property
    def config_text(self) -> str:
        """The complete configuration, as YAML."""
        file = self.path / "config.yaml"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """The command, the seed and the versions, from the pack."""
        return _json(self.path / "pack" / "repair_config.json", {}).get("provenance", {})

    def option(self, name: str, default: Any = None) -> Any:
        """A dotted option of the configuration; `model.` leads to the editor's own."""
        try:
            at: Any = yaml.safe_load(self.config_text)
        except yaml.YAMLError as error:
            raise RepairError(f"'{self.path / 'config.yaml'}' is damaged ({error}); restore it from a copy") from error
        for part in name.split("."):
            at = at.get("init_args", at).get(part) if isinstance(at, dict) else None
        return default if at is None else at


def _json(file: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not file.is_file():
        return default
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RepairError(f"'{file}' is damaged ({error}); restore it from a copy") from error
    if not isinstance(found, dict):
        raise RepairError(f"'{file}' holds no JSON object; restore it from a copy")
    return found


def _json_lines(file: Path) -> Iterator[Row]:
    if not file.is_file():
        return
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except ValueError as error:
                raise RepairError(f"'{file}', line {number} is damaged ({error}); restore it from a copy") from error
            yield row
