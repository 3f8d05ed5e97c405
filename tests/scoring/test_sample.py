"""A sample of the edits is scored: the same ones at every stage and from the pack, and everything says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_runs import main_here, world_edits, write_edits

from callbacks import Scoreboard
from repair_lightning.commands.evaluate import evaluate_pack
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.scoring.scorer import sample_of

SMALL = "--data.max_edits 10 --data.window 5 --data.max_irrelevant 60 --model.writing.steps 40 --trainer.logger false"


def test_a_sample_is_in_order_and_the_same_each_time():
    edits = world_edits(30)
    drawn = sample_of(edits, 7)
    assert drawn == sample_of(edits, 7)
    assert drawn == [edit for edit in edits if edit in drawn] != edits[:7]
    assert len(drawn) == 7
    assert sample_of(edits, 0) == sample_of(edits, 30) == sample_of(edits, 99) == edits


def test_a_run_scores_a_sample_and_writes_all(tmp_path, monkeypatch, capsys):
    """Its tables and page say so; `evaluate.py --sample` finds the same figures, on the run's own records."""
    monkeypatch.chdir(tmp_path)
    edits = world_edits(20)[10:]
    write_edits(Path("own.jsonl"), [*edits, *world_edits(4)])  # of which the run takes ten
    options = ["--config", "quickstart", *SMALL.split(), "--data.path", "own.jsonl"]
    options += ["--scoreboard.sample", "4", "--run_dir", "run"]
    assert main_here(monkeypatch, "train.py", *options) == 0
    assert "10 edits of world, keyed, scores of a sample of 4 edits\n" in capsys.readouterr().out
    assert "Scores of a sample of 4 edits" in (tmp_path / "run" / "report.html").read_text()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["n_edits"], metrics["scored"]) == (10, {"edits": 4, "of": 10})
    assert Ledger.from_parquet(tmp_path / "run" / "edits.parquet").counts()["written"] == 10
    rows = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    drawn = [edit.id for edit in sample_of(edits, 4)]
    for stage, name in {"pre_edit": "edit", "before_merge": "edit", "final": "edit", "forms": "bare"}.items():
        of_stage = [row for row in rows if row["stage"] == stage and name in (row.get("kind"), row.get("form"))]
        assert [row["id"] for row in of_stage] == drawn, stage
    given = ["--pack", "run/pack", "--sample", "4", "--out", "found.json", "--quiet"]
    assert main_here(monkeypatch, "evaluate.py", *given) == 0
    assert "10 edits of world, scores of a sample of 4 edits: Rel" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    for key in ("scored", "n_edits", "pre_edit", "final", "routing", "oracle_routing"):
        assert found[key] == metrics[key], key


def test_a_negative_number_is_refused():
    with pytest.raises(ConfigError, match=r"scoreboard\.sample must be a number of edits, at least 0, got -1"):
        Scoreboard(sample=-1)
    with pytest.raises(ConfigError, match="sample must be a number of edits, at least 0, got -2"):
        evaluate_pack("nowhere", "world", sample=-2)
