"""Compare variants of a run over sizes and seeds: `repair-lightning compare --config ablations -- OPTIONS`.

OPTIONS are those of `repair-lightning train` and go to every run (`--model.base DIR --data.path FILE ...`); a variant's
own settings win over them. Each run is one process in `OUT/<variant>/n<size>-seed<seed>`; the seed also draws the
edits. What is finished under the same command and configurations is not run again, so a comparison that was
interrupted goes on where it stood; after a change of the code or of the data give another `--out`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from repair_lightning.commands.cli import CONFIGS, config_path, resolve_configs
from repair_lightning.commands.parsing import Parser
from repair_lightning.commands.parsing import parse as parsed
from repair_lightning.errors import ConfigError, counted
from repair_lightning.reports.charts import draw_comparison
from repair_lightning.reports.comparison import Grid, Result, write_tables
from repair_lightning.reports.html_report import write_comparison_page
from repair_lightning.storage.files import replace_text

TRAIN = Path(__file__).parents[2] / "train.py"
COMPARISONS = tuple(folder / "compare" for folder in CONFIGS)
FIXED = ("run_dir", "seed_everything", "data.sample_seed", "data.max_edits", "data.singles", "trainer.logger")
"""Options that a comparison gives to each run itself."""
STARTUP = 50
"""What starting a run is worth, in edits, where the time left is estimated."""


# -- what is compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to run: `configs` over the comparison's own, dotted `options` over everything, also what a command line
    cannot say. `sizes` are the only numbers of edits that it is run with, for a `reason`; empty runs it with all."""

    name: str
    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    sizes: tuple[int, ...] = ()
    reason: str = ""

    @property
    def folder(self) -> str:
        """`ours - key router` -> `ours-key_router`."""
        return re.sub(r"\s+", "_", re.sub(r"\s*([-+])\s*", r"\1", self.name))


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison's configuration: `config` is every run's, `sizes` are numbers of edits, `singles` is
    over how many edits, each the only one of a fresh base, the scores of one edit are averaged (0: the one drawn)."""

    config: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    grid: Grid | None = None
    singles: int = 0

    def __post_init__(self) -> None:
        for name, values, least in (("sizes", self.sizes, 1), ("seeds", self.seeds, 0), ("singles", [self.singles], 0)):
            if not values or not all(type(value) is int and value >= least for value in values):
                raise ConfigError(f"{name} must be whole numbers of at least {least}, got {list(values)}")
        names = [variant.name for variant in self.variants]
        bad = [name for name in names if not re.fullmatch(r"\w[\w .+-]*", name)]
        if bad or not names or len({variant.folder for variant in self.variants}) < len(names):
            words = "letters, digits, spaces and + - . that differ"
            raise ConfigError(f"variants need names of {words}, got {bad or names}")

    def cells(self, run: bool = True) -> Iterator[tuple[int, int, Variant]]:
        """Size, seed and variant of what is run, or of what is left out; the smallest first."""
        for size, seed, variant in product(self.sizes, self.seeds, self.variants):
            if (not variant.sizes or size in variant.sizes) is run:
                yield size, seed, variant


def read_comparison(path: Path) -> Comparison:
    """A comparison from its YAML file; a ConfigError where that says what no comparison has."""
    content = _checked(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), Comparison)
    grid = None if content.get("grid") is None else _grid(content["grid"], f"{path}: grid")
    named = _checked(content.get("variants", {} if grid else None), f"{path}: variants")
    variants = [_variant(str(name), given or {}, str(path)) for name, given in named.items()]
    variants += [Variant(name, options=options) for name, options in (grid.cells() if grid else ())]
    sizes, seeds = (tuple(dict.fromkeys(_listed(content.get(name)))) for name in ("sizes", "seeds"))
    configs = tuple(map(str, _listed(content.get("config"))))
    return Comparison(configs, sizes, seeds, tuple(variants), grid, content.get("singles", 0))


def _variant(name: str, given: Any, file: str) -> Variant:
    place = f"{file}: variant '{name}'"
    found = _checked(given, place, Variant, without="name")
    options = _checked(found.get("options") or {}, f"{file}: options of '{name}'")
    for key, value in options.items():
        if isinstance(value, Mapping):
            raise ConfigError(f"{file}: options of '{name}': write dotted options, {key}.<option>: value")
    configs, sizes = tuple(map(str, _listed(found.get("configs")))), tuple(_listed(found.get("sizes")))
    if sizes and not found.get("reason"):
        raise ConfigError(f"{place}: say in `reason` why it runs with {list(sizes)} alone")
    return Variant(name, configs, options, str(found.get("note") or ""), sizes, str(found.get("reason") or ""))


def _grid(given: Any, place: str) -> Grid:
    found = _checked(given, place, Grid)
    parts = {part: _checked(found.get(part) or {}, f"{place}: {part}") for part in ("options", "default", "fixed")}
    options = parts["options"]
    if len(options) != 2 or not all(isinstance(values, list) and values for values in options.values()):
        raise ConfigError(f"{place}: options must be two options, each with a list of its values, got {options!r}")
    for name, value in parts["default"].items():
        if value not in options.get(name, ()):
            raise ConfigError(f"{place}: default: {name}: {value!r} is not among the grid's values")
    for name in options.keys() & parts["fixed"].keys():
        raise ConfigError(f"{place}: fixed: {name} is one of the grid's two options; leave it out")
    return Grid(**parts)


def _checked(found: Any, place: str, kind: type | None = None, without: str = "") -> dict[str, Any]:
    """A mapping whose keys are a class's fields, if one is given."""
    if not isinstance(found, dict):
        raise ConfigError(f"{place}: must be a mapping, got {found!r}")
    known = [name for name in getattr(kind, "__dataclass_fields__", found) if name != without]
    for key in found:
        if key not in known:
            raise ConfigError(f"{place}: unknown '{key}'; known: {', '.join(known)}")
    return found


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of `train.py`; `arguments` name its overlay in `folder`, which holds the variant's options."""

    variant: Variant
    size: int
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.variant.name}, {counted(self.size, 'edit')}, seed {self.seed}"

    def asked(self) -> dict[str, Any]:
        """All that decides what comes out, short of the code and the data: a run is repeated where it changes. Where a
        configuration lies decides nothing: the project may move."""
        own = f"--config={self.folder / 'options.yaml'}"
        _, files = resolve_configs([part for part in self.arguments if part != own])
        digests = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
        found = {"arguments": list(self.arguments), "options": dict(self.variant.options), "configs": digests}
        return json.loads(json.dumps(found, default=str))  # as it is read again

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep what was asked, and how it went, beside the run; nothing is rounded."""
        replace_text(self.folder / "compared.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def record(self) -> dict[str, Any]:
        """What was written of what is asked now; empty where that is nothing."""
        try:
            found = json.loads((self.folder / "compared.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if found["asked"] == self.asked() else {}

    def result(self) -> Result:
        """What the run came to."""
        record, file = self.record(), self.folder / "metrics.json"
        found = Result(self.variant.name, self.variant.note, self.size, self.seed, "missing", record.get("command", ""))
        if record.get("stopped"):
            return replace(found, status="stopped", error=f"after {record['stopped']:g} min")
        if record.get("error"):
            return replace(found, status="failed", error=record["error"])
        known = json.loads(file.read_text(encoding="utf-8")) if record and file.is_file() else None
        return found if known is None else replace(found, status="finished", metrics=known)

    def settled(self, limit: float | None) -> bool:
        """Whether it need not be run: it is finished, or it was stopped though it had as long as it would have now."""
        status = self.result().status
        return status == "finished" or (status == "stopped" and limit is not None and self.record()["stopped"] >= limit)


def plan(comparison: Comparison, common: Sequence[str], out: Path) -> list[Run]:
    """All runs, the smallest first: a complete column of the table after each size. A ConfigError where a common option
    is one that a comparison sets itself."""
    for part in common:
        if part.removeprefix("--").split("=")[0] in FIXED:
            raise ConfigError(f"{part} is given to each run by the comparison; see --sizes, --seeds and --out")
    runs = []
    for size, seed, variant in comparison.cells():
        folder = out / variant.folder / f"n{size}-seed{seed}"
        arguments = [*_configs(comparison.config), *common, *_configs(variant.configs)]
        arguments += [f"--config={folder / 'options.yaml'}"] if variant.options else []
        arguments += ["--run_dir", str(folder), "--seed_everything", str(seed), "--data.sample_seed", str(seed)]
        singles = comparison.singles if size == 1 else 0
        arguments += ["--data.max_edits", str(singles or size)] + ["--data.singles", "true"] * bool(singles)
        arguments += ["--trainer.logger", "false", "--overwrite"]
        runs.append(Run(variant, size, seed, folder, tuple(arguments)))
    return runs


def _configs(names: Sequence[str]) -> list[str]:
    return [part for name in names for part in ("--config", name)]


def overlay(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted options as a configuration nests them: `model.base` is `model: {init_args: {base: ...}}`."""
    tree: dict[str, Any] = {}
    for option, value in options.items():
        *path, last = option.split(".")
        if path and path[0] == "model" and (path[1:] or [last])[0] not in ("init_args", "class_path"):
            path.insert(1, "init_args")
        at = tree
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value
    return tree


# -- running -----------------------------------------------------------------------------------------------------------


class Schedule:
    """Runs what is not finished, `workers` processes at a time, and says how far it is; `done` were finished before. A
    run may take `limit` minutes; None lets it take what it takes."""

    def __init__(self, runs: Sequence[Run], workers: int, done: int, limit: float | None = None) -> None:
        self.runs, self.workers, self.done, self.limit = runs, workers, done, limit
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped, self.spent = False, 0.0
        self.results: list[Result] = []  # of the runs so far

    def run_all(self) -> None:
        """Run everything; what fails is recorded and does not stop the others. A ConfigError where the first runs of
        two variants were refused alike: their common options are at fault."""
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._execute, run): run for run in self.runs}
            try:
                for future in as_completed(futures):
                    self._report(futures[future], future.result())
                    if not self.done and len(self.results) == 2:  # what was finished before shows that others can work
                        (one, words), (other, again) = ((run.variant, run.error) for run in self.results)
                        if one != other and words == again and str(words).endswith("(exit code 2)"):
                            raise ConfigError(f"the first two runs were refused alike, and so would all: {words}")
            except BaseException:
                self.stopped = True  # what is running ends and counts as not run
                for end in (subprocess.Popen.terminate, _end):
                    for process in list(self.processes):
                        end(process)
                pool.shutdown(cancel_futures=True)
                raise

    def _execute(self, run: Run) -> float:
        """Run one process and record how it went; returns the seconds that it took."""
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{run}: waiting for a process that a killed comparison left running in {run.folder}")
                fcntl.flock(log, fcntl.LOCK_EX)
            if self.stopped or run.settled(self.limit):
                return 0.0
            started = time.perf_counter()
            program = [str(TRAIN)] if TRAIN.is_file() else ["-m", "repair_lightning", "train"]  # as in a wheel
            command = [sys.executable, *program, *run.arguments]
            record = {"asked": run.asked(), "command": shlex.join(command)}
            log.truncate(0)
            (run.folder / "metrics.json").unlink(missing_ok=True)
            run.write(record)
            (run.folder / "options.yaml").write_text(yaml.safe_dump(overlay(run.variant.options)), encoding="utf-8")
            code = self._call(command, log)
        seconds = time.perf_counter() - started
        if not self.stopped:
            ended = {"stopped": self.limit} if code is None else {"error": failure(run.folder, code)}
            run.write(record | {"seconds": seconds, "error": None, "stopped": None} | ended)
        return seconds

    def _call(self, command: Sequence[str], log: Any) -> int | None:
        """Run a process to its end, in a session of its own: a Ctrl-C reaches it through us alone. Returns its exit
        code, or None where it was ended because its time was over."""
        env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, stdout=log, env=env, start_new_session=True, **quiet) as process:
            self.processes.add(process)
            if self.stopped:
                process.terminate()
            try:
                return process.wait(self.limit and 60 * self.limit)
            except subprocess.TimeoutExpired:
                _end(process)
                return None
            finally:
                self.processes.discard(process)

    def _report(self, run: Run, seconds: float) -> None:
        """One line: how the run went, and the time left if edits go on taking what they took."""
        result = run.result()
        self.results.append(result)
        self.spent += seconds
        ended, whole = (sum(one.size + STARTUP for one in some) for some in (self.results, self.runs))
        remaining = self.spent / ended * (whole - ended) / self.workers
        op = result.figure(("final", "autoregressive", "op"))
        words = "done" if op is None else f"OP {100 * op:.1f}"
        words = {"failed": f"FAILED: {result.error}", "stopped": f"stopped {result.error}"}.get(result.status, words)
        took, left = (timedelta(seconds=round(time)) for time in (seconds, remaining))
        place = f"{self.done + len(self.results)}/{self.done + len(self.runs)}"
        say(f"[{place}] {run}: {words}, {took}; {left} left")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end it where it does not."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def failure(folder: Path, code: int) -> str | None:
    """What a process said last, if it failed."""
    if code == 0 and (folder / "metrics.json").is_file():
        return None
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    start = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=len(lines) - 1)
    said = " ".join(" ".join(lines[max(start, 0) :]).split())[:500]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said or 'it said nothing'} ({how})"


def say(text: str) -> None:
    """A line as it is, however long."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


# -- the command -------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """The comparison's own options, and those after `--` for every run."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    parser = Parser(prog=prog, description=f"{main.__doc__} What stands after -- goes to every run.")
    parser.add_argument("--config", required=True, help="the comparison: a file, or a name in configs/compare")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of edits, instead of the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", help="likewise")
    parser.add_argument("--limit_minutes", type=float, help="end a run that takes longer; the tables say so")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="run only these; the tables hold all")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs at a time; by default one per core"
    )
    parser.add_argument("--out", type=Path, help="default: runs/<name of the configuration>")
    try:
        options = parsed(parser, argv[:at])
    except ConfigError as error:
        raise ConfigError(f"{error}; options of the runs stand after --") from error
    if options.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {options.workers}")
    if options.limit_minutes is not None and options.limit_minutes <= 0:
        raise ConfigError(f"--limit_minutes must be above 0, got {options.limit_minutes:g}")
    return options, list(argv[at + 1 :])


def main(argv: Sequence[str], prog: str = "python -m repair_lightning.compare") -> None:
    """Compare variants of a run over sizes and seeds: run what is not finished, write the tables. A run that fails
    makes the exit code 1."""
    options, common = parse(argv, prog)
    file = config_path(options.config, COMPARISONS)
    out = options.out or Path("runs") / file.stem
    asked, whole = _asked(options, read_comparison(file))
    runs, everything = plan(asked, common, out), plan(whole, common, out)
    for run in runs:
        run.asked()  # every configuration is there
    todo = [run for run in runs if not run.settled(options.limit_minutes)]
    say(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before; {options.workers} at a time")
    try:
        Schedule(todo, options.workers, len(runs) - len(todo), options.limit_minutes).run_all()
    finally:
        failed = _tables(whole, everything, runs, out)
    if failed:
        raise SystemExit(1)


def _asked(options: Any, known: Comparison) -> tuple[Comparison, Comparison]:
    """What the options ask for, and all that the tables may show: that and what the configuration says."""
    names = [variant.name for variant in known.variants]
    for name in options.variants or ():
        if name not in names:
            raise ConfigError(f"no variant '{name}'; known: {', '.join(names)}")
    chosen = tuple(variant for variant in known.variants if variant.name in (options.variants or names))
    sizes, seeds = (tuple(dict.fromkeys(given or ())) for given in (options.sizes, options.seeds))
    asked = replace(known, variants=chosen, sizes=sizes or known.sizes, seeds=seeds or known.seeds)
    sizes, seeds = (tuple(sorted({*a, *b})) for a, b in ((known.sizes, sizes), (known.seeds, seeds)))
    return asked, replace(known, sizes=sizes, seeds=seeds)


def _tables(whole: Comparison, everything: Sequence[Run], asked: Sequence[Run], out: Path) -> int:
    """Write the tables, the report and the pictures of what was asked for and of all that was run before; returns how
    many of those asked for failed."""
    results = {run.folder: run.result() for run in everything}
    begun = [result for result in results.values() if result.status != "missing"]
    if not begun:
        say(f"no run is finished in {out}; no table is written")
        return 0
    mine = [results[run.folder] for run in asked]
    if missing := dict.fromkeys(f"{one.variant} ({one.size})" for one in mine if one.status == "missing"):
        say(f"not there yet: {', '.join(missing)}")
    counts = Counter(result.status for result in begun)
    names, sizes = {result.variant for result in begun}, {result.size for result in begun}
    for size, seed, variant in whole.cells(run=False):
        if variant.name in names and size in sizes:
            begun.append(Result(variant.name, variant.note, size, seed, "not run", error=variant.reason))
    write_tables(out, begun, whole.grid)
    stopped = f", {counts['stopped']} stopped" if counts["stopped"] else ""
    words = f"{counts['finished']} runs finished, {counts['failed']} failed{stopped}"
    say(f"{words}; tables: {out}/table.md .tex .csv .json")
    if whole.grid is None:
        say(f"report: {write_comparison_page(out, begun)}; the paper's tables: {out}/scores.md .tex .csv")
    say(f"pictures: {', '.join(map(str, draw_comparison(out, begun, whole.grid))) or 'none: no run has an OP'}")
    return sum(one.status == "failed" for one in mine)


def command(argv: Sequence[str], prog: str) -> None:
    """Compare variants of a run over sizes and seeds. A signal that ends the process ends its runs too."""
    signal.signal(signal.SIGHUP, lambda number, _: sys.exit(128 + number))
    main(argv, prog)
