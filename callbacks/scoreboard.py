"""The scoreboard: the score before editing, before the merge, and at the end; live scores in between.

It only reports. Nothing here reaches a writer, a threshold or a decision.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from repair_lightning.errors import counted
from repair_lightning.packs.pack import bytes_left
from repair_lightning.scoring.earlier import EarlierEdits
from repair_lightning.scoring.feature_map import feature_map
from repair_lightning.scoring.forms import form_scores
from repair_lightning.scoring.metrics import Scores
from repair_lightning.scoring.peak_memory import PeakMemory
from repair_lightning.scoring.probes import ProbeScorer, load_probes
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, TEACHER_FORCED
from repair_lightning.scoring.same_subject import same_subject
from repair_lightning.scoring.scorer import Result, Scorer, oracle_choice
from repair_lightning.scoring.singles import Singles
from repair_lightning.types import BASE, Edit

log = logging.getLogger(__name__)


class Scoreboard(pl.Callback):
    """Scores the model on the stream's edits, in both protocols.

    Args:
        live: edits that are scored after each window for the progress bar and the loggers; 0 turns that off.
        probes: file of general-knowledge questions that no edit touches, asked before the first edit and at the end.
        forms: edits that are asked in every form at the end (bare, chat, system message, second turn, ...); 0 for none.
    """

    batch_size = 64
    """Prompts per forward pass."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None takes the longest target and 8 more, at least 32."""
    seed = 0
    """Of the live sample; `train.py` sets it to the run's."""

    def __init__(self, live: int = 16, probes: str | None = None, forms: int = 128) -> None:
        self.live = live
        self.probes = load_probes(probes) if probes else ()
        self.forms = forms
        self.results: dict[str, Result] = {}  # by stage: `pre_edit`, `before_merge`, `final`
        self.oracle: Scores | None = None  # the final model's under perfect routing
        self.perplexity: dict[str, float] | None = None  # of hallucination records' targets, `pre` and `final`
        self.kept: dict[str, float | int] | None = None  # what the probes say
        self.earlier: EarlierEdits | None = None  # how the edits of the pack that the run started from are answered
        self.beside: dict[str, Any] = {"forms": None, "same_subject": None}
        self.form_rows: list[dict[str, Any]] = []  # each raw answer of the forms
        self.seconds = 0.0  # of scoring
        self.edit_seconds = 0.0  # of fitting without the scoring
        self.prepare_seconds = 0.0  # of these, what went before the first edit
        self.curve: list[dict[str, Any]] = []  # the lines of `curves.jsonl`, one per window
        self.features: dict[str, Any] = {}
        self.singles: Singles | None = None  # what single edits came to, where the stream gives one at a time
        self.peak = PeakMemory()  # of editing without scoring
        self._before = 0.0  # editing before the run was stopped and resumed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The base's own score, before the first edit."""
        with self._timed():
            stream: Any = trainer.datamodule  # type: ignore[attr-defined]
            edits = counted(len(stream.edits), "edit")
            log.info("asking the base the prompts of %s, before the first is written", edits)
            self.scorer = Scorer(pl_module.edited, stream.edits, self.max_new_tokens, self.batch_size)
            nobody = torch.full((len(self.scorer.questions),), BASE)  # said, not routed: a resumed run has shards
            self.results["pre_edit"] = self.scorer.score(
                "pre_edit", oracle_choice(self.scorer.questions, nobody), nobody
            )
            if self.probes:
                self.probe_scorer = ProbeScorer(pl_module.edited, self.probes, self.batch_size)
            if stream.format == "hallucination":
                self.perplexity = {"pre": self.scorer.perplexity(nobody)}
            self.singles = (self.singles or Singles()) if stream.singles else None
        self._mark = time.perf_counter() - self.seconds
        self.peak.begin()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """How a pack's edits are answered before the first new one is written."""
        self.prepare_seconds += self._edited() - self._before
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stream.joined and self.earlier is None:
            with self._timed():
                self.earlier = EarlierEdits.ask(pl_module, stream.inherited)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Live scores on a sample of the edits that are written."""
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        written = stream.written()
        line = {"window": stream.windows, "edits": len(written), "seconds": round(self._edited(), 3)}
        line |= {"time": round(time.time(), 3), "shards": len(pl_module.memory), "statuses": stream.ledger.counts()}
        self.curve.append(line)
        if self.singles is not None:
            self._take_single(stream, pl_module)
        if not self.live or not written or stream.singles:
            return
        with self._timed():
            draw = random.Random(f"{self.seed}/{stream.windows}").sample(written, min(self.live, len(written)))
            part = self.scorer.subset(set(draw))
            owners = pl_module.owner_choice([question.edit for question in part.questions])
            scores = part.score("live", part.choose(), owners, pl_module.base_changed).scores
        line |= {"live": scores, "live_edits": len(draw)}
        named = {"live": scores[AUTOREGRESSIVE], "live_forced": scores[TEACHER_FORCED]}
        known = {f"{name}/{kind}": x for name, found in named.items() for kind, x in found.items() if x is not None}
        pl_module.log_dict(known | {"live/edits": float(len(written))}, batch_size=len(draw))

    def _take_single(self, stream: Any, editor: Any) -> None:
        """Score the edit that the model holds, once nothing more will be done for it."""
        assert self.singles is not None
        new = {edit.id for edit in stream.edits[: stream.arrived]} - {row["id"] for row in self.singles.rows}
        if stream.complete and new:
            with self._timed():
                self.singles.take(editor, self.scorer.subset(new), bytes_left(editor), self.perplexity is not None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The score before the merge; this callback stands before the merging one."""
        with self._timed():
            self._score("before_merge", pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The final model's score, and what perfect routing would score."""
        self.edit_seconds = self._edited()
        self.peak.end()
        pl_module.to(trainer.strategy.root_device)  # the strategy has taken it to the CPU by now
        with self._timed():
            result = self._score("final", pl_module)
            edits = trainer.datamodule.edits  # type: ignore[attr-defined]
            if self.singles is not None:
                self.oracle = self.singles.oracle_scores()
            else:
                self._ask_beside(edits, pl_module)
            if self.earlier is not None:
                self.earlier.ask_again(pl_module)
            self.features = feature_map(pl_module, edits)
            if self.probes:
                self.kept = self.probe_scorer.score(pl_module.base_changed)
            if self.perplexity is not None and self.singles is not None:
                self.perplexity["final"] = self.singles.figures()["perplexity"]
            elif self.perplexity is not None:
                memory = torch.tensor([row["memory"] for row in result.rows])
                self.perplexity["final"] = self.scorer.perplexity(memory)

    def _ask_beside(self, edits: Sequence[Edit], editor: Any) -> None:
        """Perfect routing, how the edits hold in other forms, and other questions about their subjects."""
        owners = editor.owner_choice([question.edit for question in self.scorer.questions])
        perfect = oracle_choice(self.scorer.questions, owners)
        self.oracle = self.scorer.score("oracle", perfect, owners, editor.base_changed).scores
        self.beside["same_subject"] = same_subject(editor.edited, edits, editor.base_changed)
        if self.forms:
            found = form_scores(editor.edited, edits, self.forms, editor.edited.longest)
            self.beside["forms"], self.form_rows = found

    def _score(self, stage: str, editor: Any) -> Result:
        if self.singles is not None:
            self.results[stage] = self.singles.result(stage, self.scorer)
        else:
            log.info("scoring: %s, %s", stage, counted(len(self.scorer.questions), "prompt"))
            owners = editor.owner_choice([question.edit for question in self.scorer.questions])
            self.results[stage] = self.scorer.score(stage, self.scorer.choose(), owners, editor.base_changed)
        return self.results[stage]

    def state_dict(self) -> dict[str, Any]:
        """The time spent so far on editing, the curve, and how a pack's edits were answered at the start."""
        earlier = self.earlier.before if self.earlier else None
        singles = self.singles.as_dict() if self.singles else None
        seconds = {"edit_seconds": self._edited(), "prepare_seconds": self.prepare_seconds}
        return {**seconds, "curve": self.curve, "earlier": earlier, "singles": singles}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._before, self.curve = state_dict["edit_seconds"], state_dict["curve"]
        self.prepare_seconds = state_dict["prepare_seconds"]
        self.earlier = EarlierEdits(state_dict["earlier"]) if state_dict["earlier"] is not None else None
        self.singles = Singles(**state_dict["singles"]) if state_dict["singles"] is not None else None

    def _edited(self) -> float:
        return self._before + time.perf_counter() - self._mark - self.seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        self.peak.end()
        yield
        self.seconds += time.perf_counter() - start
        self.peak.begin()
