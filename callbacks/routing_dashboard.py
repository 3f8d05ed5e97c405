"""The dashboard: per window, what the loggers are told of routing, shards, pools, the closed loop, speed and memory.

It only reports. Scalars go to every logger of the trainer, over the number of edits written; histograms and tables to
Weights & Biases alone. Live scores, losses and the monitor's verdict are logged by those who have them.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from repair_lightning.edits.ledger import EditStatus, LedgerEntry
from repair_lightning.edits.stream import EditStream
from repair_lightning.scoring.protocols import answers
from repair_lightning.scoring.separation import MEANT, OTHERS, SCORE, Separation
from repair_lightning.texts import dialogue

from .editing import Editing, Remembering, stream_of

_POOLS = {
    "pool/residual": EditStatus.RESIDUAL,
    "pool/feedback": EditStatus.FAILED,
    "pool/requeued": EditStatus.REQUEUED,
    "pool/quarantined": EditStatus.QUARANTINED,
}
FAILED = ("window", "edit", "prompt", "target", "answer", "memory", "score", "threshold", "correctness", "why")


class RoutingDashboard(Remembering):
    """Measures routing on a sample of the edits after each window, and says what became of shards and edits.

    It stands after the error monitor and before the closed loop, so failed edits are still where they failed; what the
    loop then does is said when the next window begins, or the stream has ended.

    Args:
        enabled: off logs none of it.
    """

    shards = 8
    """Most shards that get series and histograms of their own; where there are more, all are taken together."""
    sample = 32
    """Edits whose prompts are routed after each window; the first prompt of each kind."""
    rows = 200
    """Most rows of a table, the latest."""
    seed = 0
    """Of the sample; `train.py` sets it to the run's."""
    kept = ("seconds",)

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds = 0.0  # spent here
        self._before: dict[str, LedgerEntry] | None = None
        self._failed: dict[tuple[str, int], list[Any]] = {}
        self._events: list[list[Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Everything is drawn over the number of edits."""
        if not self._on(trainer):
            return
        for run in _wandb_runs(trainer):
            run.define_metric("edits", hidden=True)
            run.define_metric("*", step_metric="edits", step_sync=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """What the closed loop did after the last window."""
        self._follow_up(trainer, pl_module)
        if self._on(trainer):
            stream = stream_of(trainer)
            self._before = {id: stream.ledger.entry(id) for id in stream.ledger}
            self._window = stream.windows

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """The place of the batch's losses on the axis."""
        if self._on(trainer):
            pl_module.log("edits", float(len(stream_of(trainer).written())), batch_size=1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure, and tell the loggers."""
        if not self._on(trainer):
            return
        with self._timed():
            stream = stream_of(trainer)
            written = stream.written()
            draw = random.Random(f"{self.seed}/{stream.windows}").sample(written, min(self.sample, len(written)))
            found = Separation.measure(pl_module, map(stream.ledger.edit, draw)) if draw else None
            rates = {shard: rate for shard, (rate, asked) in stream.ledger.error_rates().items() if asked}
            known = {"edits": float(len(written))}
            known |= _memory_in_use(pl_module) | (_shard_errors(rates, self.shards) if rates else {})
            if found:
                areas = {"routing/auroc": found.auroc(), "routing/auroc_near": found.auroc(others=("near",))}
                areas |= {f"routing/auroc {name}": found.auroc(name) for name in found.values if name != SCORE}
                known |= {name: area for name, area in areas.items() if area is not None}
                known |= {f"routing/{kind}_right": share for kind, share in found.right().items()}
            wanted = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
            shown = self._failures(stream, pl_module) if wanted else {}  # asked by all ranks together
            for run in _wandb_runs(trainer):
                shown |= _histograms({"shards/error_rates": torch.tensor(list(rates.values()))})
                shown |= self._of_routing(found) if found else {}
                run.log(shown | {"edits": known["edits"]})
        pl_module.log_dict(known | {"speed/dashboard_seconds": self.seconds}, batch_size=max(len(draw), 1))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """What the closed loop did after the last window, and the merge after it."""
        self._follow_up(trainer, pl_module)

    def _follow_up(self, trainer: pl.Trainer, editor: Editing) -> None:
        """Pools, and what has changed since the window began for other reasons than that it was written."""
        if not self._on(trainer) or self._before is None:
            return
        with self._timed():
            ledger = editor.ledger
            now = map(ledger.entry, ledger.with_status(EditStatus.REQUEUED, EditStatus.QUARANTINED))
            acted = [entry for entry in now if self._before.get(entry.edit.id) is not entry]
            # Each shard that was pruned and each window that was rolled back has left one reason with all its edits.
            reasons = {entry.reason for entry in acted}
            counts = {name: len(ledger.with_status(status)) for name, status in _POOLS.items()}
            counts["loop/requeued"] = sum(entry.status == EditStatus.REQUEUED for entry in acted)
            counts["loop/quarantined"] = len(acted) - counts["loop/requeued"]
            counts["loop/pruned"] = sum(reason.startswith("pruned: ") for reason in reasons)
            counts["loop/rolled_back"] = sum(reason.startswith("window rolled back: ") for reason in reasons)
            editor.log_now({name: float(count) for name, count in counts.items()})
            self._events += [[self._window, entry.edit.id, entry.status.value, entry.reason] for entry in acted]
            self._events = self._events[-self.rows :]
            for run in _wandb_runs(trainer) if acted else ():
                run.log({"tables/events": _table(("window", "edit", "became", "reason"), self._events)})
            self._before = None

    def _failures(self, stream: EditStream, editor: Editing) -> dict[str, Any]:
        """The table of failed edits, where there are new ones: those are asked once more, for the answer itself."""
        entries = [stream.ledger.entry(id) for id in stream.ledger.with_status(EditStatus.FAILED)]
        new = [entry for entry in entries if (entry.edit.id, entry.attempts) not in self._failed][-self.rows :]
        if not new:
            return {}
        edits = [entry.edit for entry in new]
        choice = editor.choose_for(edits)
        said = answers(editor.edited, [edit.prompt for edit in edits], choice.memory, 32)
        for entry, route, answer in zip(new, choice.routes(), said, strict=True):
            edit, why = entry.edit, entry.reason or route.reason
            row = [stream.windows, edit.id, dialogue.shown(edit.prompt), edit.target, answer, route.memory]
            self._failed[edit.id, entry.attempts] = [*row, route.score, route.threshold, entry.score, why]
        return {"tables/failed": _table(FAILED, list(self._failed.values())[-self.rows :])}

    def _of_routing(self, found: Separation) -> dict[str, Any]:
        """Who answered, as a table; scores and limits as histograms, for each shard too where they are few."""
        names = ("base", "right", "wrong")
        rows = [[kind, *map(who.get, names)] for kind, who in found.confusion().items() if who]
        drawn = {"tables/confusion": _table(("prompt", "base", "right shard", "wrong shard"), rows)}
        owners = found.owners.unique().tolist()
        few = len(owners) <= self.shards and 2 * len(owners) <= int(found.of("edit").sum())
        for name, (value, limit) in found.values.items():
            parts = {f"separation/{name}/limit": limit}
            for kind in (*MEANT, *OTHERS):
                parts[f"separation/{name}/{kind}"] = value[found.of(kind)]
                for shard in owners if few else ():
                    parts[f"separation/shard {shard}/{name}/{kind}"] = value[found.of(kind) & (found.owners == shard)]
            drawn |= _histograms(parts)
        return drawn

    def _on(self, trainer: pl.Trainer) -> bool:
        return self.enabled and bool(trainer.loggers)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def _shard_errors(rates: dict[int, float], most: int) -> dict[str, float]:
    """The shards' error rates: how many fail at all, the worst and the mean; each, where they are few."""
    found = list(rates.values())
    summary = {"shards/number": float(len(found)), "shards/failing": float(sum(rate > 0 for rate in found))}
    summary |= {"shards/worst_error": max(found), "shards/mean_error": sum(found) / len(found)}
    return summary | {f"shards/error/{shard}": rate for shard, rate in rates.items() if len(rates) <= most}


def _memory_in_use(editor: Editing) -> dict[str, float]:
    """MiB: of the shards, the process's peak, and the accelerator's where there is one."""
    memory = editor.edited.memory
    shards = memory.nbytes
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    found = {"shards": shards, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if editor.device.type == "cuda":
        found["gpu_peak"] = torch.cuda.max_memory_allocated(editor.device)
    return {f"memory/{name}_mib": size / 2**20 for name, size in found.items()}


def _wandb_runs(trainer: pl.Trainer) -> list[Any]:
    """The first rank's."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def _histograms(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Histograms over the same bins, so that they can be compared; what holds no finite value is left out."""
    import wandb

    finite = {name: values[values.isfinite()].double().numpy() for name, values in parts.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins=32)
    kept = {name: np.histogram(values, edges) for name, values in finite.items() if len(values)}
    return {name: wandb.Histogram(np_histogram=histogram) for name, histogram in kept.items()}


def _table(columns: tuple[str, ...], rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=rows)
