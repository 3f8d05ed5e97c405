"""The command line of a run: configurations by name, a run directory, what a finished run leaves."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import transformers
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from repair_lightning.commands.helping import add_helps
from repair_lightning.commands.parsing import Parser, parse
from repair_lightning.commands.run_dir import CHECKPOINT, METRICS_FILE, Resume, RunDirectory
from repair_lightning.editors import REGISTRY, Editor
from repair_lightning.edits.checkpoints import SaveEachWindow
from repair_lightning.edits.journal import Tables
from repair_lightning.edits.ledger import EditStatus, KeptElsewhere, Ledger
from repair_lightning.edits.stream import EditStream
from repair_lightning.errors import ConfigError, NothingWritten, RepairError, counted
from repair_lightning.models.base import files_hash
from repair_lightning.packs.pack import JOURNAL_FILE, Pack, bytes_left, save_pack
from repair_lightning.reports.html_report import try_report
from repair_lightning.reports.report import print_report, verdict
from repair_lightning.reports.tracking import check_logger, final_figures, named_loggers, with_named_logger
from repair_lightning.scoring.measures import edits_per_minute
from repair_lightning.scoring.scorer import scored_of
from repair_lightning.storage.files import write_json, write_rows
from repair_lightning.training.ranks import explained, is_started_by_us
from repair_lightning.training.strategies import STRATEGIES, EditStrategy
from repair_lightning.training.team import ALONE, LeftOutError

CONFIGS = tuple(folder / "configs" for folder in Path(__file__).parents[1:3])
"""Where configurations lie: inside the package in a wheel, beside it in a checkout."""
SHOWN = ("progress", "scoreboard", "dashboard")
"""Callbacks that only report: a run may go on with others."""
OURS = ("repair_lightning", "callbacks")
"""The loggers that speak to the user."""
DECIDING = ("precision", "max_epochs", "max_steps", "max_time", "limit_train_batches")
"""The trainer's options that decide what a run computes; how many devices it has decides no more than last places."""
_ALIASES = {"ddp": "data_parallel", "ModelParallelStrategy": "model_parallel", "DDPStrategy": "data_parallel"}
"""Lightning's own strategies by name -> ours that take their place: there is no module of ours to wrap."""


def config_path(name: str, folders: Sequence[Path] = CONFIGS) -> Path:
    """A configuration by path, or by name (with or without `.yaml`) in one of the folders."""
    found = [Path(name), *(folder / file for folder in folders for file in (name, f"{name}.yaml"))]
    for candidate in found:
        if candidate.is_file():
            return candidate
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise ConfigError(f"no configuration '{name}'; give a file or one of: {', '.join(known)}")


def resolve_configs(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments with each `--config NAME` as the parser takes it, and the paths of the configurations."""
    resolved, found = list(argv), []
    for i, argument in enumerate(argv):
        start = "--config=" if argument.startswith("--config=") else ""
        if start or (i and argv[i - 1] == "--config"):
            found.append(config_path(argument.removeprefix(start)))
            resolved[i] = f"{start}{with_named_logger(found[-1])}"
    return resolved, found


class EditCLI(LightningCLI):
    """The command line of a run: an editor, a stream and a trainer from YAML and the options in `argv`. All `callbacks`
    are there, in this order, configured under their names; help and errors call the program `prog`."""

    def __init__(self, callbacks: Mapping[str, type[pl.Callback]], argv: Sequence[str], prog: str = "train.py") -> None:
        self.started = self.loaded = time.perf_counter()
        self.forced = callbacks
        self.argv, self.config_files = resolve_configs(named_loggers(argv))
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--from_pack", nargs="?")
        folder = early.parse_known_args(self.argv)[0].from_pack
        self.started_from = Pack.read(folder) if folder else None
        super().__init__(
            Editor,
            EditStream,
            subclass_mode_model=True,
            run=False,
            parser_class=Parser,
            parser_kwargs={"prog": prog, "add_help": False},
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the editors make their own
            trainer_defaults={
                "max_epochs": -1,
                "reload_dataloaders_every_n_epochs": 1,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's own, with the parser's complaints in one line."""
        self.config = parse(parser, self.argv, REGISTRY)  # type: ignore[arg-type]
        given = self.config if self.started_from else parse(parser, self.argv, REGISTRY, defaults=False)  # type: ignore[arg-type]
        self.seed_given = given.get("model.init_args.seed") is not None  # by somebody, or by the pack: 0 is a seed too

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run directory and the callbacks' own sections."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="default: runs/<names of the configs>")
        parser.add_argument("--resume", type=Resume, default="auto", help="'never' refuses to go on with a stopped run")
        parser.add_argument("--quiet", action="store_true", help="only errors, and the score in one last line")
        parser.add_argument("--overwrite", action="store_true", help="remove a run that cannot go on in run_dir")
        parser.add_argument("--from_pack", type=str | None, default=None, help="go on with this pack's edited model")
        if self.started_from is not None:
            parser.set_defaults({"model": self.started_from.model_options()})
        for name, callback in self.forced.items():
            parser.add_lightning_class_args(callback, name)
        add_helps(parser, list(REGISTRY), [file.stem for folder in CONFIGS for file in folder.glob("*.yaml")])

    def before_instantiate_classes(self) -> None:
        """Everything that a run writes goes to its run directory."""
        name = "-".join(file.stem for file in self.config_files) or ("continued" if self.started_from else "default")
        self.seed = int(self.config.seed_everything)
        if not self.seed_given and "seed" in self.config.model.init_args:
            self.config.model.init_args.seed = self.seed
        if self.config.quiet:
            only_errors()
        self.run_dir = Path(self.config.run_dir or Path("runs") / name)
        self.config.run_dir = self.config.trainer.default_root_dir = str(self.run_dir)
        logger = self.config.trainer.logger
        check_logger(getattr(logger, "class_path", ""))
        if hasattr(logger, "init_args") and logger.init_args.get("save_dir") in (None, "."):
            logger.init_args.save_dir = str(self.run_dir)
            for option, value in (("name", self.run_dir.name), ("group", str(self.run_dir))):
                if option in logger.init_args and logger.init_args[option] is None:
                    logger.init_args[option] = value

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with a durable checkpoint after every window."""
        self.run = RunDirectory(self.run_dir)
        options = self.config_init.trainer
        self._choose_strategy(options)
        checkpoint = SaveEachWindow(self.run_dir / CHECKPOINT)

        def tables() -> Tables:  # the checkpoint's rows, read by the first rank for all
            return self.team.first(self.run.journal.tables() if self.team.rank == 0 else {})

        plugins = [*(options.plugins or []), self.run.checkpoint_io(lambda: self.datamodule.windows, tables)]
        if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # the same command goes on, from a whole window
        if options.max_epochs == 0:
            raise ConfigError("trainer.max_epochs is 0: no window would be written; give -1 for the whole stream")
        try:
            trainer = super().instantiate_trainer(**kwargs, callbacks=[checkpoint], plugins=plugins)
            if trainer.world_size > 1 and not isinstance(trainer.strategy, EditStrategy):
                options.strategy = "shard_parallel"  # what 'auto' comes to
                trainer = super().instantiate_trainer(**kwargs, callbacks=[checkpoint], plugins=plugins)
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        for option in ("max_steps", "max_time"):
            if trainer.world_size > 1 and options[option] not in (-1, None):
                words = f"would stop each of {trainer.world_size} ranks at a place of its own; give trainer.max_epochs"
                raise ConfigError(f"trainer.{option} {options[option]} {words}, the number of windows")
        return trainer

    def _choose_strategy(self, trainer: Any) -> None:
        """Put ours in the place of Lightning's own strategies for several devices."""
        given = trainer.strategy if isinstance(trainer.strategy, str) else type(trainer.strategy).__name__
        if given in _ALIASES:
            trainer.strategy = _ALIASES[given]
        elif given is trainer.strategy and given not in ("auto", *STRATEGIES):
            known = ", ".join(("auto", "ddp", *STRATEGIES))
            raise ConfigError(f"trainer.strategy '{given}' cannot run an edit stream; give one of: {known}")

    def load(self) -> None:
        """Read and check every record, load the base, and check that the edits fit it, all before the first write; then
        the run begins, or goes on. Several ranks do so together: what one of them cannot do is said once."""
        strategy = self.trainer.strategy
        self.team = strategy.join() if isinstance(strategy, EditStrategy) else ALONE
        if self.team.rank:  # what every rank could say, the first one says
            for name in (*OURS, "lightning.pytorch", "lightning.fabric", "py.warnings"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            warnings.simplefilter("ignore")
        for name in ("monitor", "scoreboard", "dashboard"):
            self.part(name).seed = self.seed
        if self.config.quiet:
            self.part("progress").disable()
        try:
            with self._among_ranks():
                self._load()
        except BaseException:
            self.run.leave()
            raise
        self.loaded = time.perf_counter()

    def _load(self) -> None:
        """Each step is done by all ranks or by none; only between the steps do they speak to each other."""
        first, together, stream = self.team.rank == 0, self.team.together, self.datamodule

        def on_first(step: Callable[[], None]) -> None:
            together(step if first else lambda: None)

        together(self._read)
        on_first(lambda: self.run.open(self.settings(), self.config.resume, self.config.overwrite))
        resumes = self.team.first(first and self.run.resumes)
        earlier = together(lambda: self._load_base(resumes))
        on_first(self.run.begin)
        self.run.checkpoint = self.team.first(self.run.checkpoint)
        if earlier is not None:
            stream.inherit(earlier)
        if self.run.checkpoint is not None:
            stream.ledger = together(self.run.journal.rebuild if first else Ledger)  # SQLite's log is for one machine
            state = self.team.first(stream.ledger.state_dict())
            if not first:
                stream.ledger.load_state_dict(state)
        if first:
            self.run.journal.follow(stream.ledger)
        else:
            stream.ledger.journal = KeptElsewhere()

    def _read(self) -> None:
        pack = self.config.from_pack
        if pack and Path(pack).resolve() == (self.run_dir / "pack").resolve():
            words = "lies in the run directory and would be replaced; give another --run_dir"
            raise ConfigError(f"from_pack '{pack}' {words}")
        self.datamodule.setup()
        self.datamodule.also_scored = tuple(probe.prompt for probe in self.part("scoreboard").probes)

    def _load_base(self, resumes: bool) -> Ledger | None:
        """Nothing is written. Returns the ledger of the pack that the run starts from."""
        self.model.scratch = self.run_dir / "scratch"
        self.model.join(self.team)  # the base's own score, before the first edit, is dealt out too
        self.model.load()
        self.datamodule.check_fit(self.model.edited.forms, self.model.edited.longest)
        if resumes or not self.config.from_pack:
            return None
        pack = self.started_from or Pack.read(self.config.from_pack)
        pack.restore_into(self.model)
        self.datamodule.join(pack.ledger)
        return pack.ledger

    @contextmanager
    def _among_ranks(self) -> Iterator[None]:
        """Inside, an error that comes of another rank's end says so."""
        try:
            yield
        except Exception as error:
            if self.team.size == 1 or (known := explained(error, self.team.rank)) is error:
                raise
            raise known from error

    def fit(self) -> None:
        """Run the stream, from its start or from where it was stopped."""
        for logger in self.trainer.loggers:
            logger.log_hyperparams(self.settings())
        with self._among_ranks():
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.run.checkpoint)
        if self.team.size > 1:
            self.trainer.strategy.barrier()
            torch.distributed.destroy_process_group()  # the first rank goes on alone

    def settings(self) -> dict[str, Any]:
        """All that decides what the run computes; what it shows and where it runs is not among it."""
        config = self.config.as_dict()
        kept = {name: config[name] for name in ("seed_everything", "model", "data", *self.forced) if name not in SHOWN}
        trainer = {name: config["trainer"][name] for name in DECIDING}
        read = (config["data"]["path"], config["data"]["irrelevant"], config.get("scoreboard", {}).get("probes"))
        contents = {name: files_hash([Path(name)]) for name in read if name and Path(name).is_file()}
        return kept | {"trainer": trainer, "contents": contents, "from_pack": self.config.from_pack}

    def part(self, name: str) -> Any:
        """The callback that is configured under a name."""
        kind = self.forced[name]
        return next(callback for callback in self.trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]

    def provenance(self) -> dict[str, Any]:
        """Command, seed and versions, for the pack."""
        origin = {"from_pack": self.config.from_pack} if self.config.from_pack else {}
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        found = origin | {"command": command, "data": self.config.data.path, "seed": self.config.seed_everything}
        found["python"] = platform.python_version()
        names = ("repair-lightning", "torch", "lightning", "transformers")
        return found | {"versions": {name: version(name) for name in names}}


def train(callbacks: Mapping[str, type[pl.Callback]], argv: Sequence[str], prog: str) -> None:
    """Load, edit, score, and write everything to the run directory."""
    cli = EditCLI(callbacks, argv, prog)
    cli.load()
    cli.fit()
    finish(cli)


def finish(cli: EditCLI) -> None:
    """Write a finished run's artefacts and print its report, on the first rank. Raises `NothingWritten` where, with all
    artefacts there, none of the run's edits is written at its end."""
    if cli.team.rank:
        return
    run_dir, editor, stream, board = cli.run_dir, cli.model, cli.datamodule, cli.part("scoreboard")
    metrics = _metrics(cli)
    cli.config.overwrite = False  # said once, for this run
    if (found := editor.adapted) is not None:  # what `auto` came to
        chosen = cli.config.model.init_args
        chosen.layer, chosen.writing.lr, chosen.writing.stop_margin = found.layer, found.lr, found.stop_margin
    cli.parser.save(cli.config, run_dir / "config.yaml", overwrite=True, skip_validation=True, skip_unset=False)
    stream.ledger.to_parquet(run_dir / "edits.parquet")
    cli.run.journal.note("finished", counted(len(stream.edits), "edit"))
    also = {JOURNAL_FILE: cli.run.journal.to_parquet}
    save_pack(editor, run_dir / "pack", cli.provenance(), also, metrics["final"])
    rows = (result.rows for result in board.results.values())
    write_rows(run_dir / "generations.jsonl", chain(*rows, board.beside_rows))
    write_rows(run_dir / "curves.jsonl", board.curve)
    write_rows(run_dir / "features.json", [board.features])
    for logger in cli.trainer.loggers:
        logger.log_metrics(final_figures(metrics))
        logger.finalize("success")
    metrics["seconds"]["total"] = time.perf_counter() - cli.started
    write_json(run_dir / METRICS_FILE, metrics)
    try_report(run_dir)  # while the journal is open: its last reader would leave SQLite's side files behind
    cli.run.close()
    if cli.config.quiet:
        Console().print(verdict(metrics, run_dir), markup=False, highlight=False, soft_wrap=True)
    else:
        print_report(metrics, run_dir)
    why = None if board.singles else _nothing_written(stream.ledger, [edit.id for edit in stream.edits])
    if why is not None:
        raise NothingWritten(f"{why}; {run_dir / 'report.html'} says more, and another base, layer or lr may do better")


def _nothing_written(ledger: Ledger, ids: Sequence[str]) -> str | None:
    """Why none of some edits is written, in words, the three commonest reasons; None where one is."""
    entries = [ledger.entry(id) for id in ids if id in ledger]
    if any(entry.shard is not None for entry in entries):
        return None
    reasons = Counter(f"{entry.status} ({entry.reason})" if entry.reason else str(entry.status) for entry in entries)
    words = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common(3)) or "none arrived"
    return f"nothing was written: of {counted(len(ids), 'edit')} {words}"


def _metrics(cli: EditCLI) -> dict[str, Any]:
    """The content of `metrics.json`; figures that do not apply are None."""
    board, feedback, merge = cli.part("scoreboard"), cli.part("feedback"), cli.part("merge")
    editor, stream, results = cli.model, cli.datamodule, board.results
    records, joined = stream.records, stream.joined
    reporting = cli.part("dashboard").seconds  # reporting measures, as scoring does
    editing = board.edit_seconds - reporting
    merged = merge.verdict(editor)
    right = [row["id"] for row in results["pre_edit"].rows if row["kind"] == "edit" and row["correct"]]
    return {
        "editor": editor.editor_name,
        "base": {"name": editor.base.name, "sha256": editor.base.sha256, "parameters": editor.base.parameters},
        "layer": editor.layer,
        "n_edits": len(stream.edits),
        "seed": cli.config.seed_everything,
        "seconds": {
            "load": cli.loaded - cli.started,
            "edit": editing,
            "prepare": board.prepare_seconds,  # the part of `edit` before the first edit
            "evaluate": board.seconds + reporting,
        },
        "edits_per_minute": edits_per_minute(len(stream.edits), editing),
        **{stage: results[stage].scores for stage in ("pre_edit", "before_merge")},
        "final": results["final"].scores | board.beside,
        "routing": results["final"].routing,
        "oracle_routing": board.oracle,
        "closed_loop": {
            "windows": stream.windows - (joined.windows if joined else 0),
            "rolled_back": cli.part("gate").rolled_back,
            "pruned": feedback.pruned,
            "retriggered": feedback.retriggered,
            "quarantined": len(stream.ledger.with_status(EditStatus.QUARANTINED)),
        },
        "merge": {"accepted": merged.yes, "reason": merged.reason, "merges": merge.merges},
        "records": {
            "bad": list(records.bad),
            "duplicates": list(records.duplicates),
            "superseded": dict(records.superseded),
            "renamed": dict(joined.renamed) if joined else {},
            "already_right": right,
        },
        "edits": stream.ledger.counts(),
        "method": editor.figures(),
        **_more_metrics(cli),
    }


def _more_metrics(cli: EditCLI) -> dict[str, Any]:
    """What the edits left, in bytes, and what not every run has."""
    editor, stream, board = cli.model, cli.datamodule, cli.part("scoreboard")
    means = board.singles.figures() if board.singles else {}  # the editor at the end holds none of the single edits
    left = means["memory_bytes"] if means else bytes_left(editor)
    found = {
        "scored": scored_of(board.scored, stream.edits),
        "shards": len(editor.memory),
        "memory_bytes": left,
        "bytes_per_edit": left / (1 if means else max(len(stream.edits), 1)),
        "peak_bytes": board.peak.figures(),
        "adapted": asdict(editor.adapted) if editor.adapted else None,
        "ranks": list(editor.paces) or None,
        "perplexity": board.perplexity,
        "probes": board.kept,
        "earlier": board.earlier | {"superseded": len(stream.joined.replaced)} if board.earlier else None,
        "singles": means.get("number"),
        "method": {"deviation": means["deviation"]} if "deviation" in means else None,
    }
    return {name: figures for name, figures in found.items() if figures is not None}


STOPS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
"""The signals that end a command, by the name that people know."""


class Stopped(BaseException):
    """Somebody asked to stop. No `KeyboardInterrupt`, for which the trainer has an end of its own."""


def _stop(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked once is enough
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asks twice does not want to wait
    raise Stopped(signum)


def guarded(main: Callable[[], Any], resumes: bool = False) -> None:
    """Run a command; a mistake of the user's becomes one line and exit code 2, a run that wrote nothing likewise 1,
    SIGTERM one line and 143, Ctrl-C 130, with the way on where the same command resumes. `--debug` shows tracebacks."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _quiet()
    for signum in STOPS:
        signal.signal(signum, _stop)
    try:
        main()
    except Stopped as stopped:
        (signum,) = stopped.args
        remedy = f"; this goes on from the last full window: {_again()}" if resumes else ""
        said_elsewhere = is_started_by_us() or bool(getattr(rank_zero_only, "rank", 0))
        _end("" if said_elsewhere else f"stopped by {STOPS[signum]}{remedy}", 128 + signum)
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RepairError, ValueError) as error:
        known: BaseException | None = error
        while known is not None and not isinstance(known, RepairError):
            known = known.__cause__  # the parser wraps what a constructor raises
        if debug or known is None:
            raise
        _end("" if isinstance(known, LeftOutError) else f"error: {known}", known.exit_code)


def _again() -> str:
    """This very command, to be typed again."""
    script = Path(sys.argv[0])
    if script.stem == "repair-lightning":
        return shlex.join([script.stem, *sys.argv[1:]])
    module = ["-m", "repair_lightning"] if script.name == "__main__.py" else [sys.argv[0]]
    return shlex.join(["python", *module, *sys.argv[1:]])


def _end(words: str, code: int) -> NoReturn:
    """End the process, with some words; before the ranks have met, the first of each machine says them. An interrupted
    collective would hold up the interpreter's own way out, for ever where its peers are gone."""
    met = torch.distributed.is_available() and torch.distributed.is_initialized()
    on_machine = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    if words and (met or on_machine == "0"):
        print(words, file=sys.stderr)
    if met:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


def only_errors() -> None:
    """Let our loggers say what went wrong alone."""
    for ours in OURS:
        logging.getLogger(ours).setLevel(logging.ERROR)


def _quiet() -> None:
    """Leave the terminal to the run's own words: other libraries' progress bars, tips and known false alarms go."""
    assert logging.lastResort is not None
    to_stderr = copy(logging.lastResort)  # writes to what `sys.stderr` is at the moment: above a live bar
    to_stderr.setLevel(logging.NOTSET)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[to_stderr])
    for ours in OURS:
        logging.getLogger(ours).setLevel(logging.INFO)
    for theirs in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(theirs).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its retries; what comes of them is said
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("WANDB_SILENT", "true")  # its folder is named in the closing report
    for expected in (
        "Found .* module.* in eval mode",  # the frozen base stays in it on purpose
        "Checkpoint directory .* exists",  # the last run's is replaced
        ".*sync_dist=True.*",  # what is logged is the same on all ranks
        ".*treespec, LeafSpec.*",  # inside Lightning
        ".*does not have many workers.*",  # a worklist of a few batches in memory
    ):
        warnings.filterwarnings("ignore", expected)
