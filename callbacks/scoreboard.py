"""The scoreboard: the score before editing, before the merge, and at the end; live scores in between.

It only reports. Nothing here reaches a writer, a threshold or a decision.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.errors import ConfigError, counted
from repair_lightning.packs.pack import bytes_left
from repair_lightning.scoring.beside import beside_scores, old_answer
from repair_lightning.scoring.bootstrap import op_interval
from repair_lightning.scoring.correctness import Answered, answered, kept
from repair_lightning.scoring.judge import Judge
from repair_lightning.scoring.measures import SPEED, PeakMemory, edits_per_minute, feature_map
from repair_lightning.scoring.probes import ProbeScorer, load_probes
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, TEACHER_FORCED, Scores, scores_of
from repair_lightning.scoring.scorer import Result, Scorer, Singles, sample_of

from .editing import Editing, stream_of

log = logging.getLogger(__name__)


class Scoreboard(pl.Callback):
    """Scores the model on the stream's edits, in both protocols.

    Args:
        live: edits that are scored after each window for the progress bar and the loggers; 0 turns that off.
        probes: file of general-knowledge questions that no edit touches, asked before the first edit and at the end.
        forms: edits that are asked in every form at the end (bare, chat, system message, second turn, ...); 0 for none.
        further: edits that are asked further questions at the end (what follows from them, texts, denials); 0 for none.
        judge: where an OpenAI-compatible interface begins, as http://127.0.0.1:8000/v1, to judge answers at the end.
        judge_model: the name of the model there.
        sample: edits that are scored, drawn at random with a fixed seed; 0 scores all. All are written.

    ConfigError for a negative number, or a judge that is no http address or has no model.
    """

    seed = 0
    """Of the live sample; `train.py` sets it to the run's."""

    def __init__(
        self,
        live: int = 16,
        probes: str | None = None,
        forms: int = 128,
        further: int = 128,
        judge: str | None = None,
        judge_model: str | None = None,
        sample: int = 0,
    ) -> None:
        for name, number in {"live": live, "forms": forms, "further": further, "sample": sample}.items():
            if number < 0:
                raise ConfigError(f"scoreboard.{name} must be a number of edits, at least 0, got {number}")
        self.live, self.sample = live, sample
        self.probes = load_probes(probes) if probes else ()
        self.forms, self.further = forms, further
        self.judge = Judge(judge, judge_model or "") if judge is not None else None
        self.results: dict[str, Result] = {}  # by stage: `pre_edit`, `before_merge`, `final`
        self.oracle: Scores | None = None  # the final model's under perfect routing
        self.perplexity: dict[str, float] | None = None  # of hallucination records' targets, `pre` and `final`
        self.kept: dict[str, float | int] | None = None  # what the probes say
        self.answered: Answered | None = None  # how the edits of the pack that the run starts from were, before it
        self.earlier: dict[str, Any] | None = None  # and what has become of them
        self.beside: dict[str, Any] = {"forms": None, "same_subject": None}
        self.beside_rows: list[dict[str, Any]] = []  # each raw answer to what is asked beside
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
            stream = stream_of(trainer)
            self.scored = sample_of(stream.edits, self.sample)
            self._scored_ids = {edit.id for edit in self.scored}
            edits = counted(len(self.scored), "edit")
            log.info("asking the base the prompts of %s, before the first is written", edits)
            self.scorer = Scorer(pl_module.edited, self.scored)
            self.results["pre_edit"] = self.scorer.by_base("pre_edit")  # not routed: a resumed run has shards
            if self.probes:
                self.probe_scorer = ProbeScorer(pl_module.edited, self.probes)
            if stream.format == "hallucination":
                self.perplexity = {"pre": self.scorer.perplexity(self.scorer.nobody)}
            self.singles = (self.singles or Singles()) if stream.singles else None
        self._mark = time.perf_counter() - self.seconds
        self.peak.begin()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """How a pack's edits are answered before the first new one is written."""
        self.prepare_seconds += self._edited() - self._before
        stream = stream_of(trainer)
        if stream.joined and self.answered is None:
            with self._timed():
                self.answered = answered(pl_module, stream.inherited)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Live scores on a sample of the edits that are written."""
        stream = stream_of(trainer)
        written = stream.written()
        line: dict[str, Any] = {"window": stream.windows, "edits": len(written), "seconds": round(self._edited(), 3)}
        line |= {"time": round(time.time(), 3), "shards": len(pl_module.memory), "statuses": stream.ledger.counts()}
        self.curve.append(line)
        reporting = float(trainer.callback_metrics.get("speed/dashboard_seconds", 0.0))
        pl_module.log(SPEED, edits_per_minute(stream.arrived, self._edited() - reporting), batch_size=1)
        if self.singles is not None:
            arrived = self._scored_ids.intersection(edit.id for edit in stream.edits[: stream.arrived])
            new = arrived - {row["id"] for row in self.singles.rows}
            if stream.complete and new:  # nothing more will be done for the edit that the model holds
                with self._timed():
                    part, spent = self.scorer.subset(new), bytes_left(pl_module)
                    self.singles.take(pl_module, part, spent, self.perplexity is not None)
        elif self.live and (asked := [id for id in written if id in self._scored_ids]):
            with self._timed():
                draw = random.Random(f"{self.seed}/{stream.windows}").sample(asked, min(self.live, len(asked)))
                scores = self._ask("live", self.scorer.subset(set(draw)), pl_module).scores
            line |= {"live": scores, "live_edits": len(draw)}
            named = {"live": scores[AUTOREGRESSIVE], "live_forced": scores[TEACHER_FORCED]}
            known = {f"{name}/{kind}": x for name, found in named.items() for kind, x in found.items() if x is not None}
            pl_module.log_dict(known | {"live/edits": float(len(written))}, batch_size=len(draw))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The score before a merge; this callback stands before the merging one."""
        if pl_module.can_merge:
            with self._timed():
                self._score("before_merge", pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The final model's score, what perfect routing would score, and how edits hold in other forms."""
        self.edit_seconds = self._edited()
        self.peak.end()
        pl_module.to(trainer.strategy.root_device)  # the strategy has taken it to the CPU by now
        with self._timed():
            self._score("final", pl_module)
            if not pl_module.can_merge:  # nothing has changed since
                rows = [row | {"stage": "before_merge"} for row in self.results["final"].rows]
                self.results["before_merge"] = replace(self.results["final"], stage="before_merge", rows=rows)
            edits = stream_of(trainer).edits
            if self.singles is not None:
                self.oracle = scores_of(self.singles.oracle)
                said = self.results["final"].rows
                self.beside |= {"old_answer": old_answer(self.scored, said), "op_interval": op_interval(said)}
            else:
                self.oracle = self._ask("oracle", self.scorer, pl_module, perfect=True).scores
                given = (edits, self.scored, self.results["final"].rows, pl_module.base_changed)
                self.beside, self.beside_rows = beside_scores(pl_module.edited, *given, self.forms, self.further)
            if self.judge is not None and trainer.is_global_zero:
                found, rows = self.judge.score(self.scored, self.results["final"].rows)
                self.beside["judge"] = found
                self.beside_rows += rows
            if self.answered is not None:
                self.earlier = kept(self.answered, answered(pl_module, self.answered, (EditStatus.SUPERSEDED,)))
            self.features = feature_map(pl_module, edits)
            if self.probes:
                self.kept = self.probe_scorer.score(pl_module.base_changed)
            if self.perplexity is not None and self.singles is not None:
                self.perplexity["final"] = self.singles.figures()["perplexity"]
            elif self.perplexity is not None:
                memory = torch.tensor([row["memory"] for row in self.results["final"].rows])
                self.perplexity["final"] = self.scorer.perplexity(memory)

    def _ask(self, stage: str, scorer: Scorer, editor: Editing, perfect: bool = False) -> Result:
        owners = editor.owner_choice([question.edit for question in scorer.questions])
        if perfect:
            return scorer.by_oracle(owners, editor.base_changed)
        return scorer.score(stage, scorer.choose(), owners, editor.base_changed)

    def _score(self, stage: str, editor: Editing) -> None:
        if self.singles is not None:
            self.results[stage] = self.singles.result(stage)
        else:
            log.info("scoring: %s, %s", stage, counted(len(self.scorer.questions), "prompt"))
            self.results[stage] = self._ask(stage, self.scorer, editor)

    def state_dict(self) -> dict[str, Any]:
        """The time spent so far on editing, the curve, and how a pack's edits were answered at the start."""
        singles = asdict(self.singles) if self.singles else None
        seconds = {"edit_seconds": self._edited(), "prepare_seconds": self.prepare_seconds}
        return {**seconds, "curve": self.curve, "earlier": self.answered, "singles": singles}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._before, self.curve = state_dict["edit_seconds"], state_dict["curve"]
        self.prepare_seconds, self.answered = state_dict["prepare_seconds"], state_dict["earlier"]
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
