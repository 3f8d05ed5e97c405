"""Compare variants of a run over sizes and seeds: `python -m repair_lightning.compare --config ablations -- OPTIONS`.

OPTIONS are `train.py`'s and go to every run (`--model.base DIR --data.path FILE ...`); a variant's own settings win
over them. Each run is one process of `train.py` in `OUT/<variant>/n<size>-seed<seed>`; the seed also draws the edits.
What is finished under the same command and configurations is not run again, so a comparison that was interrupted goes
on where it stood; after a change of the code or of the data give another `--out`.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console

from repair_lightning.commands.cli import config_path, guarded, resolve_configs
from repair_lightning.errors import ConfigError
from repair_lightning.reports.comparison import Grid, Result, write_tables
from repair_lightning.reports.figures import draw_costs, draw_grid
from repair_lightning.reports.html_report import write_comparison_page

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "train.py"
COMPARISONS = (REPOSITORY / "configs" / "compare", Path(__file__).parents[1] / "configs" / "compare")
FIXED = ("run_dir", "seed_everything", "data.sample_seed", "data.max_edits", "data.singles", "trainer.logger")
"""Options that a comparison gives to each run itself."""
OUT_OF_TIME = 1 << 16
"""Stands for the exit code of a run whose time was over; no process has it."""
STARTUP = 50
"""What starting a run is worth, in edits, where the time left is estimated."""


# -- what is compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to run.

    Attributes:
        name: as the tables show it.
        configs: presets over the comparison's own configurations.
        options: dotted option -> value, over everything else; values may be what a command line cannot say, as null.
        note: one line for the tables.
        sizes: the only numbers of edits that it is run with; empty runs it with all.
        reason: why it is not run with the others.
    """

    name: str
    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    sizes: tuple[int, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        if self.sizes and not self.reason:
            raise ConfigError(f"variant '{self.name}': say in `reason` why it runs with {list(self.sizes)} alone")

    def runs(self, size: int) -> bool:
        """Whether it is run with so many edits."""
        return not self.sizes or size in self.sizes

    @property
    def folder(self) -> str:
        """`ours - key router` -> `ours-key_router`."""
        return re.sub(r"\s+", "_", re.sub(r"\s*([-+])\s*", r"\1", self.name))


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison's configuration.

    Attributes:
        config: of every run.
        sizes: numbers of edits.
        seeds: of the draw of edits and of the run.
        variants: what is compared.
        grid: of two options, if that is what is compared.
        singles: over how many edits, each the only one of a fresh base, the scores of one edit are averaged; 0 takes
            the one that is drawn.
    """

    config: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    grid: Grid | None = None
    singles: int = 0

    def __post_init__(self) -> None:
        for name, values, least in (("sizes", self.sizes, 1), ("seeds", self.seeds, 0)):
            if not values or not all(type(value) is int and value >= least for value in values):
                raise ConfigError(f"{name} must be whole numbers of at least {least}, got {list(values)}")
        if type(self.singles) is not int or self.singles < 0:
            raise ConfigError(f"singles must be a whole number of at least 0, got {self.singles!r}")
        names = [variant.name for variant in self.variants]
        bad = [name for name in names if not re.fullmatch(r"\w[\w .+-]*", name)]
        folders = {variant.folder for variant in self.variants}
        if bad or not names or len(folders) < len(names):
            raise ConfigError(
                f"variants need names of letters, digits, spaces and + - . that differ, got {bad or names}"
            )

    def only(self, names: Sequence[str]) -> Comparison:
        """The comparison of some of the variants, in its own order."""
        known = [variant.name for variant in self.variants]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(f"no variant '{unknown[0]}'; known: {', '.join(known)}")
        return replace(self, variants=tuple(variant for variant in self.variants if variant.name in names))


def read_comparison(path: Path) -> Comparison:
    """A comparison from its YAML file.

    Raises:
        ConfigError: where the file says what no comparison has.
    """
    content = _checked(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), Comparison)
    variants = []
    named = content.get("variants", {} if content.get("grid") else None)
    for name, given in _checked(named, f"{path}: variants").items():
        settings = _checked(given or {}, f"{path}: variant '{name}'", Variant, without="name")
        options = _checked(settings.get("options") or {}, f"{path}: options of '{name}'")
        nested = [key for key, value in options.items() if isinstance(value, Mapping)]
        if nested:
            raise ConfigError(f"{path}: options of '{name}': write dotted options, {nested[0]}.<option>: value")
        words = [str(settings.get(key) or "") for key in ("note", "reason")]
        only = tuple(_listed(settings.get("sizes") or ()))
        presets = _texts(settings.get("configs") or ())
        variants.append(Variant(str(name), presets, options, words[0], only, words[1]))
    grid = None if content.get("grid") is None else _grid(content["grid"], f"{path}: grid")
    if grid is not None:
        variants += [Variant(name, options=options) for name, options in grid.cells()]
    sizes, seeds = (tuple(dict.fromkeys(_listed(content.get(name, ())))) for name in ("sizes", "seeds"))
    return Comparison(_texts(content.get("config", ())), sizes, seeds, tuple(variants), grid, content.get("singles", 0))


def _grid(given: Any, place: str) -> Grid:
    """A grid of two options from what the file says of it."""
    found = _checked(given, place, Grid)
    options = _checked(found.get("options"), f"{place}: options")
    default = _checked(found.get("default") or {}, f"{place}: default")
    if len(options) != 2 or not all(isinstance(values, list) and values for values in options.values()):
        raise ConfigError(f"{place}: options must be two options, each with a list of its values, got {options!r}")
    outside = [name for name, value in default.items() if value not in options.get(name, ())]
    if outside:
        raise ConfigError(f"{place}: default: {outside[0]}: {default[outside[0]]!r} is not among the grid's values")
    fixed = _checked(found.get("fixed") or {}, f"{place}: fixed")
    twice = [name for name in fixed if name in options]
    if twice:
        raise ConfigError(f"{place}: fixed: {twice[0]} is one of the grid's two options; leave it out")
    return Grid({name: tuple(values) for name, values in options.items()}, default, fixed)


def _checked(found: Any, place: str, kind: type | None = None, without: str = "") -> dict[str, Any]:
    """A mapping whose keys are a class's fields, if one is given."""
    if not isinstance(found, dict):
        raise ConfigError(f"{place}: must be a mapping, got {found!r}")
    known = [name for name in getattr(kind, "__dataclass_fields__", found) if name != without]
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ConfigError(f"{place}: unknown '{unknown[0]}'; known: {', '.join(known)}")
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, _listed(value)))


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of `train.py`; `arguments` name its overlay in `folder`, which holds the variant's options."""

    variant: Variant
    size: int
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def title(self) -> str:
        """As progress lines name it."""
        return f"{self.variant.name}, {self.size} edits, seed {self.seed}"

    @property
    def command(self) -> list[str]:
        """What is executed."""
        return [sys.executable, str(TRAIN), *self.arguments]

    def asked(self) -> dict[str, Any]:
        """All that decides what comes out, short of the code and the data: a run is repeated where it changes. Where a
        configuration lies decides nothing: the project may move."""
        own = f"--config={self.folder / 'options.yaml'}"
        _, files = resolve_configs([part for part in self.arguments if part != own], [REPOSITORY / "configs"])
        digests = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
        return {"arguments": list(self.arguments), "options": dict(self.variant.options), "configs": digests}

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep what was asked, and how it went, beside the run."""
        text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
        (self.folder / "compared.json").write_text(text + "\n", encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """The inverse of :meth:`write`; empty where there is none, or half of one."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "compared.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def result(self, any_command: bool = False) -> Result:
        """What the run came to; `missing` where it was run under another command, unless any will do."""
        record = self.record()
        result = Result(
            self.variant.name, self.variant.note, self.size, self.seed, "missing", record.get("command", "")
        )
        if not record or not (any_command or record["asked"] == json.loads(json.dumps(self.asked(), default=str))):
            return replace(result, command="")
        if record.get("stopped"):
            return replace(result, status="stopped", error=f"after {record['stopped']:g} min")
        if record.get("error"):
            return replace(result, status="failed", error=record["error"])
        metrics = self.folder / "metrics.json"
        if not metrics.is_file():
            return result
        return replace(result, status="finished", metrics=json.loads(metrics.read_text(encoding="utf-8")))

    def settled(self, limit: float | None) -> bool:
        """Whether it need not be run: it is finished, or it was stopped though it had as long as it would have now."""
        status = self.result().status
        return status == "finished" or (status == "stopped" and limit is not None and self.record()["stopped"] >= limit)


def plan(comparison: Comparison, common: Sequence[str], out: Path) -> list[Run]:
    """All runs, the smallest first: a complete column of the table after each size.

    Raises:
        ConfigError: where a common option is one that a comparison sets itself.
    """
    taken = [part for part in common if part.removeprefix("--").split("=")[0] in FIXED]
    if taken:
        raise ConfigError(f"{taken[0]} is given to each run by the comparison; see --sizes, --seeds and --out")
    return [
        _run(comparison, variant, size, seed, common, out)
        for size in comparison.sizes
        for seed in comparison.seeds
        for variant in comparison.variants
        if variant.runs(size)
    ]


def not_run(comparison: Comparison) -> list[Result]:
    """What the comparison leaves out, and why."""
    return [
        Result(variant.name, variant.note, size, seed, "not run", error=variant.reason)
        for size in comparison.sizes
        for seed in comparison.seeds
        for variant in comparison.variants
        if not variant.runs(size)
    ]


def _run(comparison: Comparison, variant: Variant, size: int, seed: int, common: Sequence[str], out: Path) -> Run:
    folder = out / variant.folder / f"n{size}-seed{seed}"
    arguments = [*_configs(comparison.config), *common, *_configs(variant.configs)]
    arguments += [f"--config={folder / 'options.yaml'}"] if variant.options else []
    arguments += ["--run_dir", str(folder), "--seed_everything", str(seed), "--data.sample_seed", str(seed)]
    singles = comparison.singles if size == 1 else 0
    arguments += ["--data.max_edits", str(singles or size)] + ["--data.singles", "true"] * bool(singles)
    arguments += ["--trainer.logger", "false", "--overwrite"]
    return Run(variant, size, seed, folder, tuple(arguments))


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
    """Runs processes, some at a time, and says how far it is.

    Args:
        runs: those that are not finished.
        workers: at a time.
        done: how many were finished before.
        console: for the progress lines.
        limit: minutes that a run may take; None lets it take what it takes.
    """

    def __init__(
        self, runs: Sequence[Run], workers: int, done: int, console: Console, limit: float | None = None
    ) -> None:
        self.runs, self.workers, self.done, self.console, self.limit = runs, workers, done, console, limit
        self.total = len(runs) + done
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.spent = 0.0
        self.said: list[tuple[str, str | None]] = []
        """The variants of the runs so far, and what went wrong."""
        self.waiting = [run.size + STARTUP for run in runs]

    def run_all(self) -> None:
        """Run everything; what fails is recorded and does not stop the others, unless nothing can work."""
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self.execute, run): run for run in self.runs}
            try:
                for future in as_completed(futures):
                    self.report(futures[future], future.result())
                    self.refuse_early()
            except BaseException:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def refuse_early(self) -> None:
        """Stop where the first runs of two variants were refused alike: their common options are at fault.

        Raises:
            ConfigError: it says what the runs said.
        """
        if self.done > len(self.said) or len(self.said) != 2:
            return  # what was finished before shows that others can work
        (one, said), (other, again) = self.said
        if one != other and said == again and str(said).endswith("(exit code 2)"):
            raise ConfigError(f"the first two runs were refused alike, and so would all: {said}")

    def execute(self, run: Run) -> float:
        """Run one process and record how it went; returns the seconds that it took."""
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            self.wait_for(run, log)
            if self.stopped or run.settled(self.limit):
                return 0.0
            started = time.perf_counter()
            record = {"asked": run.asked(), "command": shlex.join(run.command)}
            log.truncate(0)
            (run.folder / "metrics.json").unlink(missing_ok=True)
            run.write(record)
            (run.folder / "options.yaml").write_text(yaml.safe_dump(overlay(run.variant.options)), encoding="utf-8")
            code = self.call(run.command, log)
        seconds = time.perf_counter() - started
        if not self.stopped:
            over = self.limit if code == OUT_OF_TIME else None
            error = None if over else failure(run.folder, code)
            run.write(record | {"seconds": seconds, "error": error, "stopped": over})
        return seconds

    def wait_for(self, run: Run, log: Any) -> None:
        """Wait, and say so, while what a killed comparison left running holds the run's log."""
        told = False
        while not self.stopped:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not told:
                    say(self.console, f"{run.title}: waiting for a process that was left running in {run.folder}")
                told = True
                time.sleep(0.5)

    def call(self, command: Sequence[str], log: Any) -> int:
        """Run a process to its end, in a session of its own: a Ctrl-C reaches it through `stop` alone.

        Returns:
            Its exit code, or `OUT_OF_TIME` where it was ended because its time was over.
        """
        env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, stdout=log, env=env, start_new_session=True, **quiet) as process:  # type: ignore[call-overload]
            self.processes.add(process)
            if self.stopped:
                process.terminate()
            try:
                code: int = process.wait(self.limit and 60 * self.limit)
            except subprocess.TimeoutExpired:
                _end(process)
                code = OUT_OF_TIME
        self.processes.discard(process)
        return code

    def stop(self) -> None:
        """End what is running; it counts as not run."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()
        for process in list(self.processes):
            _end(process)

    def report(self, run: Run, seconds: float) -> None:
        """One line: how the run went, and the time left if edits go on taking what they took."""
        result = run.result()
        self.done += 1
        self.said.append((run.variant.name, result.error if result.status == "failed" else None))
        self.spent += seconds
        weight = run.size + STARTUP
        self.waiting.remove(weight)
        ran = sum(other.size + STARTUP for other in self.runs) - sum(self.waiting)
        left = self.spent / ran * sum(self.waiting) / self.workers
        op = result.figure(("final", "autoregressive", "op"))
        words = (
            f"FAILED: {result.error}" if result.status == "failed" else "done" if op is None else f"OP {100 * op:.1f}"
        )
        words = f"stopped {result.error}" if result.status == "stopped" else words
        say(self.console, f"[{self.done}/{self.total}] {run.title}: {words}, {_time(seconds)}; {_time(left)} left")


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


def say(console: Console, text: str) -> None:
    """A line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# -- the command -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        remedy = "options of train.py stand behind --" if "unrecognized" in message else "--help lists all options"
        raise ConfigError(f"{message}; {remedy}")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The comparison's own options, and those after `--` for every run."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    parser = _Parser(prog="python -m repair_lightning.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help="the comparison: a file, or a name in configs/compare")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of edits, instead of the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", help="likewise")
    parser.add_argument("--singles", type=int, help="edits over which the scores of one edit are averaged, likewise")
    parser.add_argument("--limit_minutes", type=float, help="end a run that takes longer; the tables say so")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="run only these; the tables hold all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)")
    parser.add_argument("--out", type=Path, help="default: runs/<name of the configuration>")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    parser.add_argument("--tables_only", action="store_true", help="write the tables anew from what is there")
    options = parser.parse_args(list(argv[:at]))
    if options.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {options.workers}")
    if options.limit_minutes is not None and options.limit_minutes <= 0:
        raise ConfigError(f"--limit_minutes must be above 0, got {options.limit_minutes:g}")
    return options, list(argv[at + 1 :])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, write the tables; exits with 1 where a run failed."""
    options, common = parse(sys.argv[1:] if argv is None else argv)
    file = config_path(options.config, COMPARISONS)
    comparison = read_comparison(file)
    sizes, seeds = (tuple(dict.fromkeys(given or ())) for given in (options.sizes, options.seeds))
    comparison = replace(comparison, singles=comparison.singles if options.singles is None else options.singles)
    chosen = comparison.only(options.variants) if options.variants else comparison
    chosen = replace(chosen, sizes=sizes or comparison.sizes, seeds=seeds or comparison.seeds)
    known_sizes, known_seeds = ({*comparison.sizes, *chosen.sizes}, {*comparison.seeds, *chosen.seeds})
    comparison = replace(comparison, sizes=tuple(sorted(known_sizes)), seeds=tuple(sorted(known_seeds)))
    out = options.out or Path("runs") / file.stem
    runs, console = plan(chosen, common, out), Console()
    if options.tables_only:
        if not out.is_dir():
            raise ConfigError(f"--tables_only: '{out}' is no folder; give the --out of the runs")
        everything = plan(comparison, common, out)
        other = sum(run.result(any_command=True).status != run.result().status for run in everything)
        if other:
            say(
                console,
                f"{other} runs in {out} were made with other options or configurations than these: shown as they are",
            )
        _tables(comparison, chosen, common, out, console, any_command=True)
        return
    _check(runs)
    if options.dry_run:
        for run in runs:
            say(console, f"# {run.title}: {json.dumps(dict(run.variant.options))}\n{shlex.join(run.command)}")
        return
    todo = [run for run in runs if not run.settled(options.limit_minutes)]
    say(console, f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before; {options.workers} at a time")
    again = sum(run.result(any_command=True).status == "finished" for run in todo)
    if again:
        say(console, f"{again} of them finished under other options or configurations, and are run anew")
    try:
        Schedule(todo, options.workers, len(runs) - len(todo), console, options.limit_minutes).run_all()
    finally:
        failed = _tables(comparison, chosen, common, out, console)
    if failed:
        raise SystemExit(1)


def _check(runs: Sequence[Run]) -> None:
    """Refuse before the first run what no run could do."""
    if not TRAIN.is_file():
        raise ConfigError(
            f"a comparison runs train.py, and {TRAIN} is not there: an installed wheel does not hold it; clone the "
            "repository and install it with pip install -e ."
        )
    for run in runs:
        run.asked()  # every configuration is there


def _tables(
    comparison: Comparison,
    chosen: Comparison,
    common: Sequence[str],
    out: Path,
    console: Console,
    any_command: bool = False,
) -> int:
    """Write the tables, the report and the pictures of what was chosen and of all that was run before; returns how many
    of the chosen failed."""
    results = [run.result(any_command) for run in plan(comparison, common, out)]
    failed = [result for result in results if result.status == "failed"]
    known = {result.variant for result in results if result.status != "missing"}
    if not known:
        say(console, f"no run is finished in {out}; no table is written")
        return 0
    begun = [result for result in results if result.status != "missing"]
    sizes = {result.size for result in begun}
    begun += [result for result in not_run(comparison) if result.variant in known and result.size in sizes]
    asked = {(run.variant.name, run.size, run.seed) for run in plan(chosen, common, out)}
    missing = dict.fromkeys(
        f"{one.variant} ({one.size})"
        for one in results
        if one.status == "missing" and (one.variant, one.size, one.seed) in asked
    )
    if missing:
        say(console, f"not there yet: {', '.join(missing)}")
    write_tables(out, begun, comparison.grid)
    counts = {status: sum(result.status == status for result in begun) for status in ("finished", "stopped")}
    said = f"{counts['finished']} runs finished, {len(failed)} failed"
    said += f", {counts['stopped']} stopped" if counts["stopped"] else ""
    say(console, f"{said}; tables: {out}/table.md .tex .csv .json")
    if comparison.grid is None:
        page = write_comparison_page(out, begun)
        drawn = draw_costs(out, begun)
        words = ", ".join(file.name for file in drawn) or "no run has an OP to draw"
        say(console, f"report: {page}; the paper's tables: {out}/scores.md .tex .csv; {words}")
    else:
        files = draw_grid(out, comparison.grid, begun)
        say(
            console,
            f"heat map: {', '.join(map(str, files))}" if files else "no heat map: no cell of the grid has an OP",
        )
    return sum((one.variant, one.size, one.seed) in asked for one in failed)


def command() -> None:
    """The command as a process: a signal that ends it ends its runs too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    guarded(main)
