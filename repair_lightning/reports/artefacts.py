"""What a finished run left behind, read back for reports and figures; whatever an older run lacks is empty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from repair_lightning.edits.journal import FILE as JOURNAL_FILE
from repair_lightning.edits.journal import Journal
from repair_lightning.edits.ledger import Ledger, LedgerEntry
from repair_lightning.errors import RepairError

Row = dict[str, Any]


@dataclass(frozen=True)
class Artefacts:
    """A finished run: its directory and its `metrics.json`; each other file is read when it is first asked for."""

    path: Path
    metrics: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Artefacts:
        """A run by its directory; a RepairError where that holds no finished run, or a damaged one."""
        found = next(iter(cls(Path(path), {}).objects("metrics.json")), None)
        if found is None:
            raise RepairError(f"'{path}' holds no finished run: there is no metrics.json; give the directory of one")
        for name in ("base", "n_edits", "final", "pre_edit"):
            if name not in found:
                file = Path(path) / "metrics.json"
                raise RepairError(f"'{file}' has no '{name}': it is not of a run; give the directory of one")
        return cls(Path(path), found)

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @cached_property
    def _generations(self) -> list[Row]:
        return self.objects("generations.jsonl", lines=True)

    @cached_property
    def final(self) -> list[Row]:
        """The lines of `generations.jsonl` about the final model."""
        return [row for row in self._generations if row.get("stage") == "final"]

    @cached_property
    def about_subjects(self) -> list[Row]:
        """The lines of `generations.jsonl` about other questions that name an edited subject."""
        return [row for row in self._generations if row.get("kind") == "same_subject"]

    @cached_property
    def own_rows(self) -> dict[str, Row]:
        """Id -> the final model's line for the edit's own prompt."""
        return {row["id"]: row for row in self.final if row["kind"] == "edit"}

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
        with closing(Journal(self.path / JOURNAL_FILE, read_only=True)) as journal:
            return [{**event, "edit": None} for event in journal.events() if not event["void"]]

    @cached_property
    def config_text(self) -> str:
        """The complete configuration, as YAML."""
        file = self.path / "config.yaml"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def option(self, name: str) -> Any:
        """A dotted option of the configuration, None where it has none; `model.` leads to the editor's own."""
        try:
            at: Any = yaml.safe_load(self.config_text)
        except yaml.YAMLError as error:
            raise RepairError(f"'{self.path / 'config.yaml'}' is damaged ({error}); restore it from a copy") from error
        for part in name.split("."):
            at = at.get("init_args", at).get(part) if isinstance(at, dict) else None
        return at

    def objects(self, name: str, lines: bool = False) -> list[Row]:
        """The JSON object in a file of the run, or one per line; none where there is no such file."""
        file = self.path / name
        if not file.is_file():
            return []
        found, where = [], f"'{file}'"
        try:
            with open(file, encoding="utf-8") as text:
                for number, part in enumerate(text if lines else [text.read()], 1):
                    where = f"'{file}', line {number}" if lines else where
                    found.append(json.loads(part) | {})  # an object, nothing else
        except (OSError, ValueError, TypeError) as error:
            raise RepairError(f"{where} is damaged ({error}); restore it from a copy") from error
        return found


def base_name(metrics: Mapping[str, Any]) -> str:
    """The base's name in `metrics.json`, without the folders before it."""
    return str((metrics.get("base") or {}).get("name") or "base").rstrip("/").split("/")[-1]
