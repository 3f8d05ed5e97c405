"""Comparisons: what is run, what is not run again, what tables say; with a fake `train.py` but for the last part."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_runs import REPOSITORY, world_edits

from callbacks import CALLBACKS
from repair_lightning.commands import compare
from repair_lightning.commands.cli import EditCLI
from repair_lightning.commands.compare import main, overlay, plan, read_comparison
from repair_lightning.editors import REGISTRY
from repair_lightning.editors.repair import Writing
from repair_lightning.errors import ConfigError

ABLATIONS = REPOSITORY / "configs" / "compare" / "ablations.yaml"

FAKE = '''
"""Stands for train.py: logs its start, does as its overlay says, writes figures that depend on size and seed."""
import json, os, sys, time
from pathlib import Path
import yaml

argv, home = sys.argv[1:], Path(__file__).parent
value = lambda name: argv[argv.index(name) + 1]
run, seed, size = Path(value("--run_dir")), int(value("--seed_everything")), int(value("--data.max_edits"))
overlays = [part.split("=", 1)[1] for part in argv if part.startswith("--config=")]
options = yaml.safe_load(open(overlays[-1])) if overlays else {}
fake = options.get("fake", {})
with open(home / "starts.jsonl", "a") as log:
    log.write(json.dumps({"run": str(run), "argv": argv, "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}))
    log.write(chr(10))
while "wait" in fake and not (home / fake["wait"]).exists():
    time.sleep(0.02)
if "fail" in fake and seed in fake["fail"]:
    print("loading")
    sys.exit(f"error: cannot do {fake['fail']}; do something else")
op = round(fake.get("op", 0.9) - 0.01 * seed - size / 10_000, 6)
scores = {protocol: {"rel": 1.0, "gen": found, "loc": 0.99, "near": None, "op": found}
          for protocol, found in (("autoregressive", op), ("teacher_forced", round(op + 0.05, 6)))}
metrics = {"n_edits": min(size, 40), "before_merge": scores, "oracle_routing": scores, "shards": size,
           "final": scores | {"op_interval": {"low": op - 0.1, "high": op + 0.05}},
           "closed_loop": {"windows": 1, "pruned": 2, "retriggered": 3, "quarantined": seed}, "seconds": {"total": 1.5},
           "memory_bytes": 1000 * size, "bytes_per_edit": 1000 * size / min(size, 40),
           "merge": {"accepted": False, "reason": "is off"}, "edits_per_minute": 100.0 * (1 + seed)}
(run / "metrics.json").write_text(json.dumps(metrics))
'''


class Bench:
    """A folder with a fake train.py and a comparison of it."""

    def __init__(self, home: Path) -> None:
        self.home, self.out = home, home / "out"
        self.common: list[str] = []
        (home / "train.py").write_text(FAKE)
        self.write({"plain": None, "plain - part": {"options": {"fake.op": 0.5, "model.writing.stop_margin": None}}})

    def write(self, variants: dict[str, Any], **more: Any) -> None:
        content = {"config": ["zsre_small"], "sizes": [30], "seeds": [0, 1], "variants": variants} | more
        (self.home / "bench.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def run(self, *options: str) -> None:
        call = ["--config", str(self.home / "bench.yaml"), "--out", str(self.out), *options]
        main([*call, "--", *self.common])

    def fails(self, *options: str) -> None:
        with pytest.raises(SystemExit) as caught:
            self.run(*options)
        assert caught.value.code == 1

    @property
    def starts(self) -> list[dict[str, Any]]:
        file = self.home / "starts.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def new(self) -> list[str]:
        """The runs that were started since the last call, sorted."""
        found = sorted(str(Path(start["run"]).relative_to(self.out)) for start in self.starts)
        (self.home / "starts.jsonl").unlink(missing_ok=True)
        return found

    def text(self, suffix: str) -> str:
        return re.sub(" +", " ", (self.out / f"table.{suffix}").read_text())  # without what aligns columns


PLAIN = ["plain/n30-seed0", "plain/n30-seed1"]
PART = ["plain-part/n30-seed0", "plain-part/n30-seed1"]


@pytest.fixture
def bench(tmp_path, monkeypatch, request) -> Bench:
    monkeypatch.setattr(compare, "TRAIN", tmp_path / "train.py")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if "drawn" not in request.keywords:  # pages and pictures take longer than the fake runs
        monkeypatch.setattr(compare, "write_comparison_page", lambda folder, results: folder / "report.html")
        monkeypatch.setattr(compare, "draw_comparison", lambda folder, results, grid: [])
    return Bench(tmp_path)


def test_each_variant_runs_with_each_size_and_seed(bench):
    bench.write({"plain": None, "wise one": {"configs": ["wise"], "options": {"data.clustering": False}}})
    bench.common = ["--model.base", "some/base", "--data.irrelevant_prefix", "nq question: "]
    bench.run("--sizes", "30", "40")
    starts = {str(Path(start["run"]).relative_to(bench.out)): start for start in bench.starts}
    assert set(starts) == {f"{v}/n{n}-seed{s}" for v in ("plain", "wise_one") for n in (30, 40) for s in (0, 1)}
    folder = bench.out / "wise_one" / "n40-seed1"
    expected = ["--config", "zsre_small", *bench.common, "--config", "wise", f"--config={folder}/options.yaml"]
    expected += ["--run_dir", str(folder), "--seed_everything", "1", "--data.sample_seed", "1"]
    expected += ["--data.max_edits", "40", "--trainer.logger", "false", "--overwrite"]
    assert starts["wise_one/n40-seed1"]["argv"] == expected
    assert not [part for part in starts["plain/n30-seed0"]["argv"] if "options.yaml" in part]
    assert {start["threads"] for start in starts.values()} == {"1"}


def test_what_is_missing_or_has_another_command_is_run_again(bench):
    bench.run()
    assert bench.new() == PART + PLAIN
    before = bench.text("json")
    bench.run()
    assert bench.new() == []
    (bench.out / PLAIN[1] / "metrics.json").unlink()
    bench.run()
    assert bench.new() == [PLAIN[1]]
    assert bench.text("json") == before
    bench.common = ["--data.window", "16"]
    bench.run()
    assert bench.new() == PART + PLAIN
    bench.write({"plain": {"note": "in other words"}, "plain - part": {"options": {"fake.op": 0.4}}})
    bench.run()
    assert bench.new() == PART
    assert json.loads((bench.out / PART[0] / "metrics.json").read_text())["final"]["autoregressive"]["op"] == 0.397


def test_a_failure_is_recorded_and_does_not_stop_the_others(bench, capsys):
    fails = {name: {"options": {"fake.fail": seeds}} for name, seeds in (("some - fail", [1]), ("all - fail", [0, 1]))}
    bench.write({"plain": None, **fails})
    bench.fails("--workers", "1")
    assert len(bench.new()) == 6
    said = "error: cannot do [1]; do something else (exit code 1)"
    assert f"some - fail, 30 edits, seed 1: FAILED: {said}" in capsys.readouterr().out
    runs = {(run["variant"], run["seed"]): run for run in json.loads(bench.text("json"))["runs"]}
    assert (runs["some - fail", 1]["error"], runs["some - fail", 1]["metrics"]) == (said, None)
    failed = {key for key, run in runs.items() if run["status"] == "failed"}
    assert failed == {("some - fail", 1), ("all - fail", 0), ("all - fail", 1)}
    assert f"- Failed: `some - fail`, 30 edits, seed 1: {said}" in bench.text("md")
    bench.fails()  # what failed, and that alone, is tried again
    assert bench.new() == ["all-fail/n30-seed0", "all-fail/n30-seed1", "some-fail/n30-seed1"]


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        ({"sizes": [0]}, [], "sizes must be whole numbers of at least 1, got "),
        ({"variants": {"a/b": None}}, [], "variants need names of letters, digits, spaces and"),
        ({"variants": {"a": {"options": {"data": {"window": 1}}}}}, [], "options of 'a': write dotted options, data.<"),
        ({"variants": {"a": {"configs": ["nothing"]}}}, [], "no configuration 'nothing'; give a file or one of"),
        ({"grid": {"options": {"a.b": [1]}}}, [], "options must be two options, each with a list of its values"),
        ({}, ["--variants", "other"], "no variant 'other'; known: a"),
        ({}, ["--size", "3"], "unknown option '--size'; did you mean '--sizes'"),
        ({}, ["--model.base", "x"], "unknown option '--model.base'; .* options of the runs stand after --"),
        ({}, ["--workers", "0"], "--workers must be at least 1, got 0"),
        ({}, ["--", "--data.max_edits", "3"], "--data.max_edits is given to each run by the comparison; see --sizes"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_run(bench, change, call, message):
    bench.write(**({"variants": {"a": None}} | change))
    options, bench.common = ([], call[1:]) if call[:1] == ["--"] else (call, [])
    with pytest.raises(ConfigError, match=message):
        bench.run(*options)
    assert bench.starts == []


def process_of(bench: Bench) -> subprocess.Popen[str]:
    """The comparison as a process, once two of its runs, which wait for a file named `go`, have begun."""
    bench.write({"done": None, "waits": {"options": {"fake.wait": "go"}}})
    program = "import sys, pathlib; from repair_lightning.commands import cli, compare; "
    program += "compare.TRAIN = pathlib.Path(sys.argv.pop(1)); cli.guarded(lambda: compare.command(sys.argv[1:], ''))"
    call = ["--config", str(bench.home / "bench.yaml"), "--out", str(bench.out), "--workers", "2", "--"]
    call = [sys.executable, "-c", program, str(compare.TRAIN), *call]
    process = subprocess.Popen(call, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    until = time.time() + 120
    while len(bench.starts) < 4 and time.time() < until:
        time.sleep(0.05)
    assert len(bench.starts) == 4
    return process


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_comparison_that_is_ended_ends_its_runs_and_goes_on_later(bench):
    process = process_of(bench)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "not there yet: waits (30)" in out
    assert not [start for start in bench.starts if alive(start["pid"])]
    assert {run["variant"] for run in json.loads(bench.text("json"))["runs"]} == {"done"}
    bench.new()
    (bench.home / "go").touch()
    bench.run()
    assert bench.new() == ["waits/n30-seed0", "waits/n30-seed1"]


def test_the_tables_say_what_the_runs_measured(bench):
    bench.run("--sizes", "30", "40", "50", "--seeds", "0", "1", "2")
    rows = {(row["variant"], row["size"], row["seed"]): row for row in csv.DictReader(bench.text("csv").splitlines())}
    assert len(rows) == 18
    row = rows["plain - part", "40", "2"]  # 0.5 - 0.02 - 0.004; teacher forced 0.05 more
    figures = {"final.autoregressive.op": "0.476", "final.teacher_forced.op": "0.526", "edits_per_minute": "300.0"}
    figures |= {"n_edits": "40", "closed_loop.quarantined": "2", "memory_bytes": "40000", "merge.accepted": "False"}
    figures |= {"status": "finished", "error": "", "final.autoregressive.near": ""}
    assert figures.items() <= row.items()

    text = bench.text("md")  # 100 (0.9 - 0.01 seed - 0.003): 89.7, 88.7, 87.7
    assert "\n| plain | 88.7 ± 1.0 | 88.6 ± 1.0 | 88.5 ± 1.0 |\n| plain - part | 48.7 ± 1.0 |" in text
    part = ["100.0 ± 0.0", "48.5 ± 1.0", "99.0 ± 0.0", "-", "48.5 ± 1.0", "38.5 ± 1.0", "53.5 ± 1.0"]
    part += ["53.5 ± 1.0", "48.5 ± 1.0"]
    part += ["-", "-", "1.0 ± 1.0", "1250 ± 0"]  # 50,000 bytes over the 40 edits that were there
    assert f"\n| plain - part | {' | '.join(part)} | 200 ± 100 |\n" in text
    assert "- The data hold no 50 edits, but 40.\n" in text


def settings_of(run: compare.Run) -> dict[str, Any]:
    """All options of a run as train.py's parser reads its command, flat."""
    run.folder.mkdir(parents=True)
    (run.folder / "options.yaml").write_text(yaml.safe_dump(overlay(run.variant.options)))
    cli = EditCLI(CALLBACKS, run.arguments)
    flat = {key.replace("model.init_args.", "model."): value for key, value in vars(cli.config.as_flat()).items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


LESS = {
    "repair by Adam": {"model.writing.optimizer"},
    "repair in dual coordinates": {"model.writing.optimizer"},
    "repair by SGD": {"model.writing.optimizer", "model.writing.lr", "model.writing.relative"},
    "repair - quiet prompts": {"model.routing.sample"},
    "repair + routing loss": {"model.routing.router", "model.routing.weight"},
    "repair - key router": {"model.routing.router", "model.routing.weight"},
    "repair + distillation": {"model.distillation.weight", "model.distillation.temperature"},
    "repair - clustering": {"data.clustering"},
    "repair + mask": {"model.writing.mask_ratio"},
    "repair 4 per shard": {"model.writing.capacity"},
    "repair 64 per shard": {"model.writing.capacity", "data.batch_size"},
    "repair - feedback": {"feedback.enabled"},
    "repair - merge": {"merge.enabled"},
    "repair + TIES": {"merge.rule", "merge.max_op_drop"},
}


def test_the_ablations_take_away_what_their_names_say(tmp_path, monkeypatch):
    """Each variant, read by train.py's own parser, has its options, and differs from its parent in no other."""
    comparison = read_comparison(ABLATIONS)
    common = ["--model.base", "some/base", "--data.path", "some.json", "--data.format", "zsre"]
    runs = [run for run in plan(comparison, common, tmp_path) if run.size == 30 and run.seed == 1]
    ablations = {run.variant.name: settings_of(run) for run in runs}
    variants = {variant.name: variant for variant in comparison.variants}
    assert set(variants) == set(ablations) == {"keyed", "repair", "paper", "wise", *LESS}
    for name, found in ablations.items():
        assert variants[name].options.items() <= found.items()
        assert (found["model.base"], found["data.path"], found["data.format"]) == ("some/base", "some.json", "zsre")
        fixed = (found["seed_everything"], found["data.sample_seed"], found["data.max_edits"], found["trainer.logger"])
        assert fixed == (1, 1, 30, False)
    for name, options in LESS.items():
        changed = {key for key, value in ablations[name].items() if value != ablations["repair"].get(key)}
        assert {key for key in changed if "dir" not in key and key != "config"} == options, name


GRID = {"options": {"fake.op": [0.5, 0.9], "model.writing.steps": [1, 2]}}
GRID |= {"default": {"fake.op": 0.9, "model.writing.steps": 2}}


@pytest.mark.drawn
def test_a_grid_is_a_variant_for_each_pair_of_values(bench):
    bench.write({"plain": None}, grid=GRID, seeds=[0])
    bench.run()
    cells = [f"op_{op}_steps_{steps}/n30-seed0" for op in (0.5, 0.9) for steps in (1, 2)]
    assert bench.new() == sorted([*cells, "plain/n30-seed0"])
    options = yaml.safe_load((bench.out / cells[1] / "options.yaml").read_text())
    assert options == {"fake": {"op": 0.5}, "model": {"init_args": {"writing": {"steps": 2}}}}
    drawn = set(re.findall(">([^<]+)<", (bench.out / "heat_map.svg").read_text()))
    assert {"steps", "op", "0.5", "49.7", "89.7"} <= drawn


@pytest.mark.slow
def test_a_comparison_of_real_runs(tmp_path):
    """Two editors on four edits of the embedded world, the same ones, which a seed has drawn."""
    options = {"data.format": "jsonl", "model.writing.capacity": 2, "model.writing.stop_margin": None}
    variants = {"ours": None, "dense - margin": {"configs": ["repair_small"], "options": options}}
    content = {"config": "quickstart", "sizes": [4], "seeds": [1], "variants": variants}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    call = ["--config", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--workers", "2", "--"]
    call += ["--model.writing.steps", "20", "--data.max_irrelevant", "60", "--trainer.accelerator", "cpu"]
    main(call)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"report.html", "scores.md", "scores.tex", "scores.csv", "table.md", "table.json"}
    assert "dense - margin" in (tmp_path / "out" / "report.html").read_text()
    drawn = []
    for run in json.loads((tmp_path / "out" / "table.json").read_text())["runs"]:
        assert run["status"] == "finished"
        folder = tmp_path / "out" / run["variant"].replace(" ", "") / f"n4-seed{run['seed']}"
        assert run["metrics"] == json.loads((folder / "metrics.json").read_text())
        writing = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["writing"]
        expected = (None, 2.0, 20) if run["variant"] == "ours" else (2, None, 20)
        assert (writing.get("capacity"), writing["stop_margin"], writing["steps"]) == expected
        rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
        drawn.append(list(dict.fromkeys(row["id"] for row in rows if row.get("kind") == "edit")))
    first = [edit.id for edit in world_edits(4)]
    assert drawn[0] == drawn[1] != first


def test_one_edit_is_many_single_ones_and_a_slow_variant_is_not_run_with_all_sizes(bench):
    variants = {"plain": None, "slow": {"sizes": [1], "reason": "it takes hours"}}
    bench.write(variants, sizes=[1, 30], seeds=[0], singles=100)
    bench.run()
    argv = {str(Path(start["run"]).relative_to(bench.out)): start["argv"] for start in bench.starts}
    assert sorted(argv) == ["plain/n1-seed0", "plain/n30-seed0", "slow/n1-seed0"]
    at = argv["plain/n1-seed0"].index("--data.max_edits")
    assert argv["plain/n1-seed0"][at : at + 4] == ["--data.max_edits", "100", "--data.singles", "true"]
    assert "--data.singles" not in argv["plain/n30-seed0"]
    assert "- Not run: `slow`, 30 edits: it takes hours." in bench.text("md")


def test_a_run_that_takes_too_long_is_stopped_and_the_others_go_on(bench, capsys):
    bench.write({"waits": {"options": {"fake.wait": "go"}}, "plain": None}, seeds=[0])
    bench.run("--limit_minutes", "0.03", "--variants", "waits")
    assert "waits, 30 edits, seed 0: stopped after 0.03 min" in capsys.readouterr().out
    assert len(bench.new()) == 1
    bench.run("--limit_minutes", "0.03", "--variants", "waits")
    assert bench.new() == []  # it would not get longer
    (bench.home / "go").touch()
    bench.run("--limit_minutes", "0.9")
    assert bench.new() == ["plain/n30-seed0", "waits/n30-seed0"]
    assert "topped" not in (bench.out / "scores.md").read_text()


def test_every_editor_is_compared_in_chat(tmp_path):
    """On the records that are asked for, and through the template, whatever an editor's own configuration says."""
    comparison = read_comparison(ABLATIONS.with_name("compare_smollm2.yaml"))
    assert {variant.name for variant in comparison.variants} == set(REGISTRY)
    common = ["--data.path", "some.json", "--data.format", "counterfact"]
    for run in [run for run in plan(comparison, common, tmp_path) if run.size == 30]:
        found = settings_of(run)
        assert found["model.class_path"].rsplit(".", 1)[-1] == REGISTRY[run.variant.name].__name__
        asked = [found[name] for name in ("model.base", "data.path", "data.format")]
        assert asked == ["smollm2", "some.json", "counterfact"]
        assert found["model.template"] in ("chat", "auto")
        named = {name: value for name, value in run.variant.options.items() if name != "model.class_path"}
        assert named == {name: found[name] for name in named}


@pytest.mark.parametrize("path", sorted(ABLATIONS.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_of_the_project_can_be_run(path, tmp_path):
    """Its presets are there, its options fit a write, and it names runs; editors are compared by registered names."""
    found = read_comparison(path)
    assert plan(found, [], tmp_path)
    here = {preset.stem for preset in (REPOSITORY / "configs").glob("*.yaml")}
    for variant in found.variants:
        assert set(variant.configs) <= here
        assert not path.stem.startswith("compare_") or variant.configs in ((), (variant.name,), ("repair_small",))
        writing = {key.split(".")[-1]: value for key, value in variant.options.items() if ".writing." in key}
        Writing(**writing).check()
