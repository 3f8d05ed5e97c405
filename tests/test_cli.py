"""Commands as a user gives them: real processes, the embedded base, everything they leave behind."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from helpers_runs import REPOSITORY, hard_edits, main_here, succeeded, world_edits, write_edits
from helpers_wandb import offline_run, series

from callbacks import CALLBACKS
from repair_lightning import load_edited
from repair_lightning.commands.cli import EditCLI, Stopped, guarded
from repair_lightning.commands.parsing import with_nulls
from repair_lightning.editors import REGISTRY
from repair_lightning.edits.ledger import Ledger
from repair_lightning.errors import ConfigError
from repair_lightning.reports import tracking
from repair_lightning.reports.tracking import LOGGERS
from repair_lightning.types import BASE
from repair_lightning.world import base_dir

NO_LOGGER = ["--trainer.logger", "false"]
SMALL = ["--data.max_edits", "12", "--model.writing.steps", "40", "--data.max_irrelevant", "60", "--data.window", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, CompletedProcess]:
    """The quickstart on twelve edits: its run directory and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    ran = succeeded("train.py", "--config", "quickstart", *SMALL, "--run_dir", "out/first", cwd=folder)
    return folder / "out" / "first", ran


@pytest.fixture(scope="module")
def metrics(run) -> dict[str, Any]:
    return json.loads((run[0] / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_a_run_leaves_everything_in_its_directory(run):
    run_dir, ran = run
    files = ("config.yaml", "metrics.json", "generations.jsonl", "curves.jsonl", "features.json", "report.html")
    for name in (*files, "edits.parquet", "checkpoints/last.ckpt"):
        assert (run_dir / name).is_file(), name
    names = {file.name for file in (run_dir / "pack").iterdir()}
    assert names == {"repair_config.json", "side_memory.safetensors", "ledger.parquet", "journal.parquet", "README.md"}
    assert "| bare " in (run_dir / "pack" / "README.md").read_text()
    assert sorted(path.name for path in run_dir.parent.parent.iterdir()) == ["out"]  # and nothing elsewhere
    assert "12 edits of world" in ran.stdout
    assert "window 2: 12/12 edits" in ran.stderr


KINDS = ("edit", "rephrase", "locality", "near")
SHARE = (int, float, type(None))
SCORES = dict.fromkeys(("rel", "gen", "loc", "near", "op", "contains", "garbled"), SHARE)
PROTOCOLS = {"autoregressive": SCORES, "teacher_forced": SCORES}
FORM = dict.fromkeys(("rel", "contains", "fires", "garbled"), SHARE)
BESIDE = {
    "forms": dict.fromkeys(("bare", "chat", "system", "second_turn", "wrapped", "long"), FORM),
    "same_subject": {"asked": int, "fires": (int, float), "changed": (int, float)},
    "in_text": {"asked": int} | dict.fromkeys(("new", "new_before", "without_old", "both"), SHARE),
    "fluency": dict.fromkeys(("before", "after"), (int, float)),
    "negation": {"asked": int} | dict.fromkeys(("fires", "kept"), (int, float)),
}
SCHEMA = {
    "editor": str,
    "base": {"name": str, "sha256": str, "parameters": int},
    "n_edits": int,
    "seed": int,
    "seconds": dict.fromkeys(("load", "edit", "evaluate", "total"), (int, float)),
    "edits_per_minute": (int, float),
    "pre_edit": PROTOCOLS,
    "before_merge": PROTOCOLS,
    "final": PROTOCOLS | BESIDE,
    "routing": dict.fromkeys(KINDS, dict.fromkeys(("base", "right", "wrong"), (int, float))),
    "oracle_routing": PROTOCOLS,
    "closed_loop": dict.fromkeys(("windows", "pruned", "retriggered", "quarantined"), int),
    "merge": {"accepted": bool, "reason": str},
}


def follows(value: Any, schema: Any, at: str = "metrics") -> None:
    """Every key of the schema is there with its type; more keys may be, but not inside scores."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), at
        assert set(schema) <= set(value), f"{at}: {set(schema) - set(value)} missing"
        assert schema is not SCORES or set(schema) == set(value), at
        for key, part in schema.items():
            follows(value[key], part, f"{at}.{key}")
    else:
        assert isinstance(value, schema), f"{at}: {value!r} is no {schema}"
        assert schema is bool or not isinstance(value, bool), at


def test_metrics_have_the_promised_schema(metrics):
    follows(metrics, SCHEMA)
    assert (metrics["editor"], metrics["n_edits"], metrics["seed"]) == ("keyed", 12, 0)
    assert metrics["base"]["name"] == "world"
    assert len(metrics["base"]["sha256"]) == 64
    seconds = metrics["seconds"]
    assert seconds["total"] >= seconds["load"] + seconds["edit"] + seconds["evaluate"] - 0.01
    assert metrics["edits_per_minute"] == pytest.approx(60 * 12 / seconds["edit"], rel=1e-3)
    for kind, shares in metrics["routing"].items():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5), kind


def test_every_prompt_and_every_edit_is_there_before_and_after(run, metrics):
    rows = [json.loads(line) for line in (run[0] / "generations.jsonl").read_text().splitlines()]
    questions = []
    for edit in world_edits(12):
        others = [[probe.prompt for probe in probes] for probes in (edit.locality, edit.near)]
        prompts = zip(KINDS, ([edit.prompt], edit.rephrases, *others), strict=True)
        questions += [(edit.id, kind, prompt) for kind, those in prompts for prompt in those]
    for stage in ("pre_edit", "before_merge", "final"):
        of_stage = [row for row in rows if row["stage"] == stage]
        assert [(row["id"], row["kind"], row["prompt"]) for row in of_stage] == questions
        right = [row["correct"] for row in of_stage if row["kind"] == "edit"]
        assert metrics[stage]["autoregressive"]["rel"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert metrics["final"]["forms"]["bare"]["rel"] == metrics["final"]["autoregressive"]["rel"]
    assert metrics["final"]["forms"]["chat"]["rel"] is None  # this base has no template
    ledger = Ledger.from_parquet(run[0] / "edits.parquet")
    assert list(ledger) == [edit.id for edit in world_edits(12)]
    assert ledger.counts() == metrics["edits"]
    assert ledger == Ledger.from_parquet(run[0] / "pack" / "ledger.parquet")


def test_wandb_runs_offline_in_the_run_directory(run):
    """Named and grouped by the run, with its settings, and one value of each series per window."""
    records = offline_run(run[0])
    (named,) = {(record.run.display_name, record.run.run_group) for record in records if record.HasField("run")}
    assert named == ("first", "out/first")
    assert [len(series(records, key)) for key in ("live/rel", "routing/auroc", "pool/feedback")] == [2, 2, 2]
    assert series(records, "live/edits") == [8, 12]
    final = json.loads((run[0] / "metrics.json").read_text())["final"]
    assert series(records, "final/autoregressive/op") == [pytest.approx(final["autoregressive"]["op"])]
    assert series(records, "final/forms/bare/rel") == [pytest.approx(final["forms"]["bare"]["rel"])]
    keys = {item.key or item.nested_key[0] for r in records if r.HasField("config") for item in r.config.update}
    assert any(key.startswith("model") for key in keys)


def test_the_saved_config_runs_again(tmp_path, monkeypatch):
    """config.yaml is complete: alone, without presets and options, it gives the same pack. `paper` sets nulls."""
    options = ["--config", "quickstart", "--config", "paper", "--data.max_edits", "3", "--model.writing.steps", "6"]
    options += ["--data.max_irrelevant", "40", *NO_LOGGER, "--run_dir", str(tmp_path / "a")]
    main_here(monkeypatch, "train.py", *options)
    program = ["repair_lightning/__main__.py", "train"]
    main_here(monkeypatch, *program, "--config", tmp_path / "a" / "config.yaml", "--run_dir", tmp_path / "b")
    packs = [tmp_path / name / "pack" / "side_memory.safetensors" for name in "ab"]
    assert packs[0].read_bytes() == packs[1].read_bytes()
    saved = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab"]
    assert [config.pop("run_dir") for config in saved] == [str(tmp_path / name) for name in "ab"]
    for config in saved:
        config["trainer"].pop("default_root_dir")
    assert saved[0] == saved[1]
    assert saved[0]["model"]["init_args"]["writing"]["stop_margin"] is None


def test_another_process_scores_the_pack_alike(run, metrics, tmp_path):
    out = tmp_path / "deep" / "scores.json"
    options = ["--data.path", "world", "--data.max_edits", "12", "--out", out, "--generations", "said/all.jsonl"]
    ran = succeeded("evaluate.py", "--pack", run[0] / "pack", *options, cwd=tmp_path)
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    for key in ("pre_edit", "final", "routing", "oracle_routing", "editor", "n_edits"):
        assert found[key] == metrics[key], key
    assert "12 edits of world" in ran.stdout
    said = (tmp_path / "said" / "all.jsonl").read_text().splitlines()
    assert set(said) <= set((run[0] / "generations.jsonl").read_text().splitlines())
    assert {json.loads(line)["stage"] for line in said} == {"pre_edit", "final", "forms", "further"}


def test_a_run_that_wrote_nothing_says_so(tmp_path, monkeypatch, capsys, caplog):
    """Every edit is given up: the artefacts are there, the exit code is 1, and the pack is the base."""
    monkeypatch.chdir(tmp_path)
    records = write_edits(tmp_path / "edits.jsonl", [e for i, e in enumerate(hard_edits(4)) if i % 2])
    options = ["--data.path", records, "--feedback.max_attempts", "1", "--run_dir", "run", "--quiet", *NO_LOGGER]
    assert main_here(monkeypatch, "train.py", "--config", "quickstart", *SMALL, *options) == 1
    said = "error: nothing was written: of 2 edits 2 quarantined (still wrong after 1 attempt); run/report.html says"
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(said)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["shards"], metrics["closed_loop"]["quarantined"]) == (0, 2)
    model, _ = load_edited(tmp_path / "run" / "pack")
    (words,) = [record.getMessage() for record in caplog.records if record.name == "repair_lightning.packs.pack"]
    assert words.endswith("holds no written edit (2 quarantined): the base answers every prompt")
    assert model.route("Who?")[0].memory == BASE


def test_other_records_can_be_scored(run, tmp_path, monkeypatch, capfd):
    """Edits that the pack never saw: no owner, so nothing is routed right, and the base's answers stand."""
    monkeypatch.chdir(tmp_path)
    records = write_edits(tmp_path / "other.jsonl", world_edits(5, 200))
    base = tmp_path / "base"
    shutil.copytree(base_dir(), base)
    options = ["--data.path", records, "--base", base, "--out", "scores.json", "--quiet"]
    program = ["repair_lightning/__main__.py", "evaluate"]
    assert main_here(monkeypatch, *program, "--pack", run[0] / "pack", *options) == 0
    said = capfd.readouterr()
    assert (said.out.count("\n"), said.err) == (1, ""), "quiet"
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["n_edits"] == 5
    assert found["routing"]["edit"]["right"] == 0
    assert found["oracle_routing"] == found["pre_edit"]
    assert found["final"]["autoregressive"]["rel"] == 0


def refused(monkeypatch, capsys, script: str, options: list[Any], *words: str) -> None:
    """Exit code 2 and one line that says all, behind at most a line on what was being done."""
    code, said = main_here(monkeypatch, script, *options), capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) <= 2, said
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    for word in words:
        assert word in lines[-1], word


def test_skipped_records_are_listed_and_configs_compose(tmp_path, monkeypatch, capsys):
    """Or stop the run before anything is written. Of two configurations the later beats the earlier, options beat
    both."""
    monkeypatch.chdir(tmp_path)
    edits = world_edits(4)
    edits[2] = replace(edits[2], target=" ")
    bad_records = write_edits(tmp_path / "bad.jsonl", edits)
    stop = ["--config", "quickstart", "--data.path", bad_records, "--run_dir", "out"]
    words = "bad.jsonl, record 3, field 'target'", "is empty", "give the text the model should answer"
    refused(monkeypatch, capsys, "train.py", stop, *words)
    assert not (tmp_path / "out").exists()
    options = ["--data.path", bad_records, "--data.on_bad_record", "skip", "--model.writing.steps", "3"]
    more = [*NO_LOGGER, "--run_dir", "out", "--data.max_irrelevant", "40"]
    assert main_here(monkeypatch, "train.py", "--config", "quickstart", "--config=wise", *options, *more) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["n_edits"] == 3
    assert len(metrics["records"]["bad"]) == 1
    assert "record 3, field 'target'" in metrics["records"]["bad"][0]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    arguments = config["model"]["init_args"]
    assert arguments["base"] == "world"  # quickstart
    assert (arguments["routing"]["router"], config["data"]["batch_size"]) == ("activation", 1)  # wise
    assert (config["feedback"]["enabled"], config["merge"]["enabled"]) == (False, False)
    assert arguments["writing"]["optimizer"] == "sgd"
    assert arguments["writing"]["steps"] == 3  # the option, not wise's 70


@pytest.mark.parametrize(
    "options", [["--model.base", "./nowhere"], ["--data.path", "none.jsonl"], ["--model.layer", "99"]]
)
def test_a_refused_run_leaves_no_folder(monkeypatch, tmp_path, capsys, options):
    """None that it made, its parents among them; in one that was there all is as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for folder in ("new/er/run", "mine"):
        refused(monkeypatch, capsys, "train.py", ["--config", "quickstart", *options, "--run_dir", folder])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["mine", "mine/notes.txt"]


def interrupted(argv: list[str], cwd: Path) -> CompletedProcess:
    """A run that gets a Ctrl-C as soon as it has said that its second window is written."""
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("window 2"):
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=60)
    return CompletedProcess(argv, process.returncode, out, "".join(said) + rest)


def test_ctrl_c_is_one_line_that_says_what_resumes_the_run(tmp_path):
    """No line is broken at 80 columns either: the command is whole, and it does go on."""
    script = str(REPOSITORY / "train.py")
    size = ["--data.max_edits", "16", "--data.window", "4", "--model.writing.steps", "40"]
    options = ["--config", "quickstart", *size, *NO_LOGGER, "--run_dir", "a run"]
    ran = interrupted([sys.executable, script, *options], tmp_path)
    assert ran.returncode == 130, ran.stderr
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("stopped by Ctrl-C; this goes on from the last full window: python ")
    again = shlex.split(last.partition("window: ")[2])
    assert again == ["python", script, *options]
    more = succeeded("train.py", *again[2:], cwd=tmp_path)
    assert re.search(r"resuming 'a run' after window [12]; void: ", more.stderr)
    assert re.search(r"^window 4: 16/16 edits ", more.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model.base ./nowhere", ["base './nowhere': no such folder", "give a folder"]),
        ("--model Repair --model.routing.router keys", ["unknown router 'keys'", "did you mean 'key'?"]),
        ("--config quickstrat", ["no configuration 'quickstrat'", "quickstart"]),
        ("--model.writting.lr 1", ["unknown option '--model.writting.lr'; did you mean '--model.writing.lr'"]),
        ("--model GRACE --model.routing.router key", ["the class that is chosen has no option '--model.routing.rout"]),
        ("--trainer.devices 2 --trainer.max_time 00:01:00:00", ["trainer.max_time ", "give trainer.max_epochs"]),
        ("--trainer.devices 2 --trainer.strategy ddp_spawn", ["trainer.strategy ", "give one of: auto, ddp"]),
        (
            "--data.max_edit 3",
            ["unknown option '--data.max_edit'; did you mean '--data.max_edits'? train.py --data.he"],
        ),
        ("--model.writing.step 3", ["unknown option '--model.writing.step'; did you mean '--model.writing.steps'"]),
        ("--run_di here", ["unknown option '--run_di'; did you mean '--run_dir'? train.py --help lists all"]),
        ("--data.window", ["--data.window: expected one argument"]),
        ("--data.window many", ["--data.window cannot be 'many': it takes a whole number; see train.py --help"]),
        ("--model repiar", ["--model cannot be 'repiar'; did you mean 'repair'? It takes one of: ", " icl, "]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(monkeypatch, tmp_path, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    always = ["--config", "quickstart", *NO_LOGGER, "--data.max_edits", "2"]
    refused(monkeypatch, capsys, "train.py", [*always, *options.split()], *words)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "evaluate --pack here --data.max_edit 3",
            ["'--data.max_edit'; did you mean '--data.max_edits'? repair-light"],
        ),
        ("ask --pac here", ["unknown option '--pac'; did you mean '--pack'? repair-lightning ask --help lists all"]),
        ("train --data.max_edit 3", ["did you mean '--data.max_edits'? repair-lightning train --data.help lists all"]),
        ("evalute --pack here", ["no command 'evalute'; did you mean 'evaluate'? repair-lightning --help lists all"]),
        ("undo", ["give --run and --id; repair-lightning undo --help explains the options"]),
        ("serve --port some", ["--port cannot be 'some': it takes a whole number; see repair-lightning serve --help"]),
    ],
)
def test_a_mistake_in_any_command_is_one_line(monkeypatch, tmp_path, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    refused(monkeypatch, capsys, "repair_lightning/__main__.py", command.split(), *words)


@pytest.mark.parametrize("command", ["train.py", "repair_lightning/__main__.py train"])
def test_help_is_one_screen_that_begins_with_what_to_give(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    assert main_here(monkeypatch, *command.split(), "--help") == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert options[:4] == ["--config", "--model.base", "--data.path", "--run_dir"]
    assert {name for name in options if name.endswith(".help")} == {
        f"--{part}.help" for part in ("model", "data", "trainer", *CALLBACKS) if part != "progress"
    }
    for name in ("quickstart", *REGISTRY):  # what --config and --model.help take
        assert re.search(rf"\b{name}\b", said), name


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--data.help", "data.path data.max_edits data.singles"),
        ("--trainer.help", "trainer.devices trainer.logger"),
        ("--merge.help", "merge.rule merge.max_op_drop"),
        ("--model.help=keyed", "model.base model.hold model.writing.steps"),
    ],
)
def test_the_help_of_one_part(monkeypatch, capsys, option, expected):
    assert main_here(monkeypatch, "train.py", option) == 0
    options = re.findall(r"^  --(\S+)", capsys.readouterr().out, re.MULTILINE)
    assert set(expected.split()) <= set(options)
    assert {name.split(".")[0] for name in options} == {option.strip("-").split(".")[0]}


def test_one_command_for_all(monkeypatch, capsys):
    assert main_here(monkeypatch, "repair_lightning/__main__.py", "--version") == 0
    assert capsys.readouterr().out == f"repair-lightning {version('repair-lightning')}\n"
    for options in ([], ["--help"]):
        assert main_here(monkeypatch, "repair_lightning/__main__.py", *options) == 0
        commands = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
        assert commands[:4] == ["train", "evaluate", "compare", "ask"]
        assert {"export", "serve", "undo", "harness"} < set(commands)


@pytest.mark.parametrize(
    ("called", "again"),
    [
        ("/venv/bin/repair-lightning train --run_dir 'a run'", "repair-lightning train --run_dir 'a run'"),
        ("/venv/repair_lightning/__main__.py train", "python -m repair_lightning train"),
        ("../train.py --debug --quiet", "python ../train.py --quiet"),
    ],
)
def test_the_way_on_is_the_command_that_was_given(monkeypatch, capsys, called, again):
    def stopped() -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", shlex.split(called))
    with pytest.raises(SystemExit) as end:
        guarded(stopped, resumes=True)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(f"full window: {again}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data: {windw: 3}", "a configuration has the unknown option 'data.windw'; did you mean '--data.window'?"),
        ("model: {init_args: {writing: {stps: 3}}}", "unknown option 'writing.stps'; did you mean '--model.writing.s"),
        ("data: [", "Problems parsing config"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_line(monkeypatch, tmp_path, capsys, content, words):
    (tmp_path / "mine.yaml").write_text(content)
    options = ["--config", "quickstart", "--config", tmp_path / "mine.yaml"]
    refused(monkeypatch, capsys, "train.py", options, words)


@pytest.mark.parametrize(("options", "seed"), [([], 3), (["--model.seed", "0"], 0), (["--config", "seed.yaml"], 0)])
def test_a_seed_of_zero_is_a_seed(monkeypatch, tmp_path, options, seed):
    """The editor's follows `seed_everything` only where nobody gives it one."""
    monkeypatch.chdir(tmp_path)
    Path("seed.yaml").write_text("model: {init_args: {seed: 0}}")
    argv = ["--config", "quickstart", *NO_LOGGER, "--seed_everything", "3", *options]
    assert EditCLI(CALLBACKS, argv).config.model.init_args.seed == seed


def test_loggers_by_name(run, tmp_path, monkeypatch, capsys):
    """In place of the configuration's; its files lie in the run directory, and its speed is the one of the JSON."""
    monkeypatch.chdir(tmp_path)
    options = ["--config", "quickstart", "--data.max_edits", "4", "--model.writing.steps", "20", "--run_dir", "run"]
    options += ["--data.max_irrelevant", "40", "--data.window", "4", "--trainer.logger"]
    assert main_here(monkeypatch, "train.py", *options, "csv") == 0
    live = re.search(r"window 1: 4/4 edits .* (\d+) edits/min", capsys.readouterr().err)
    (file,) = Path("run").rglob("metrics.csv")
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert float(rows[-1]["final/autoregressive/op"]) == pytest.approx(metrics["final"]["autoregressive"]["op"])
    assert float(rows[-1]["final/edits_per_minute"]) == pytest.approx(metrics["edits_per_minute"])
    (speed,) = [float(row["speed/edits_per_minute"]) for row in rows if row["speed/edits_per_minute"]]
    assert round(speed) == int(live[1])
    assert speed >= metrics["edits_per_minute"] > speed / 2, "what came after the window counts too"
    assert not Path("run/wandb").exists()
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    words = ["trainer.logger tensorboard needs its package: pip install tensorboard; or give wandb, csv"]
    refused(monkeypatch, capsys, "train.py", [*options, "tensorboard"], *words)
    argv = [*options[:-1], "--trainer.logger=wandb"]
    assert EditCLI(CALLBACKS, argv).config.trainer.logger.class_path == LOGGERS["wandb"]


def test_loggers_by_name_in_a_configuration(tmp_path, monkeypatch, capsys):
    """The later configuration wins, an option beats both, and the rest of the configuration counts too."""
    monkeypatch.chdir(tmp_path)
    Path("logged.yaml").write_text("trainer: {logger: csv, max_epochs: 3}\nmonitor: {tau_correct: 5e-1}\n")
    argv = ["--config", "quickstart", "--config=logged.yaml", "--run_dir", "run"]
    cli = EditCLI(CALLBACKS, argv)
    (logger,) = cli.trainer.loggers
    assert (type(logger).__name__, logger.save_dir) == ("CSVLogger", "run")
    assert (cli.trainer.max_epochs, cli.config.monitor.tau_correct) == (3, 0.5)
    assert [file.stem for file in cli.config_files] == ["quickstart", "logged"]
    over = EditCLI(CALLBACKS, [*argv, "--trainer.logger", "wandb", "--trainer.logger.offline", "true"])
    assert over.config.trainer.logger.class_path == LOGGERS["wandb"]
    Path("logged.yaml").write_text("trainer: {logger: mlflow}")
    refused(monkeypatch, capsys, "train.py", argv, "trainer.logger cannot be 'mlflow'")


def test_null_on_the_command_line_is_null():
    """Also where a configuration before has set it, and an option after sets another of the same group."""
    argv = ["--model.writing.stop_margin", "null", "--model.routing.act_ratio=null", "--data.path", "null"]
    expected = ['--config={"model": {"init_args": {"writing": {"stop_margin": null}}}}']
    expected += ['--config={"model": {"init_args": {"routing": {"act_ratio": null}}}}', "--data.path", "null"]
    assert with_nulls(argv) == expected


def test_debug_shows_where_it_came_from(monkeypatch, tmp_path):
    """The error itself, for the interpreter to print with its traceback; exit codes are for users."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.window must be at least 1, got 0"):
        main_here(monkeypatch, "train.py", "--config", "quickstart", "--debug", "--data.window", "0")
