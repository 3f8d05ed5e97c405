"""What a run says at its end: the tables of its scores, and sentences on what was measured besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from repair_lightning.errors import counted
from repair_lightning.reports.tables import Table
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, KINDS, PROTOCOLS

STAGES = {"pre_edit": "before", "before_merge": "before merge", "final": "after", "oracle_routing": "oracle routing"}
SCORES_IN_WORDS = {**{name: name.capitalize() for name in KINDS}, "op": "OP"}


def only_in_base(metrics: Mapping[str, Any]) -> bool:
    """Whether all edits lie in the base's own weights: then there is no memory to choose."""
    return metrics.get("shards") == 0 and "deviation" in metrics.get("method", {})


def score_frame(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """The scores in per cent: a row per protocol and stage; perfect routing only where there is anything to route."""
    rows = [
        [protocol.replace("_", " "), words, *(_percent(metrics[stage][protocol][name]) for name in SCORES_IN_WORDS)]
        for protocol in PROTOCOLS
        for stage, words in STAGES.items()
        if metrics.get(stage) and not (stage == "oracle_routing" and only_in_base(metrics))
        if stage != "before_merge" or metrics[stage][protocol] != metrics["final"][protocol]  # as where nothing merges
    ]
    return pd.DataFrame(rows, columns=["protocol", "model", *SCORES_IN_WORDS.values()])


def routing_frame(routing: Mapping[str, Mapping[str, float] | None]) -> pd.DataFrame:
    """Which memory answered each kind of prompt, in per cent."""
    rows = [[kind, *(_percent(of[name]) for name in ("base", "right", "wrong"))] for kind, of in routing.items() if of]
    return pd.DataFrame(rows, columns=["prompt", "base", "right shard", "wrong shard"])


def form_frame(forms: Mapping[str, Mapping[str, float | None]] | None) -> pd.DataFrame:
    """How edits hold in each form, in per cent; forms that the base does not have are left out."""
    names, known = ("rel", "contains", "fires", "garbled"), (forms or {}).items()
    asked = {form.replace("_", " "): of for form, of in known if of["rel"] is not None}
    rows = [[form, *(_percent(of[name]) for name in names)] for form, of in asked.items()]
    return pd.DataFrame(rows, columns=["form", "exact", *names[1:]])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def percent(value: float | None) -> str:
    """A share in [0, 1] as a sentence has it."""
    return "-" if value is None else f"{_percent(value)} %"


def print_report(metrics: Mapping[str, Any], run_dir: Path | None, console: Console | None = None) -> None:
    """The closing words of a run: scores, routing, what became of the edits, and where everything is."""
    by = f", {metrics['editor']}" if "editor" in metrics else ""
    title = f"{counted(metrics['n_edits'], 'edit')} of {metrics['base']['name']}{by}"
    tables = [Table(title, score_frame(metrics))]
    tables += [] if only_in_base(metrics) else [Table("Who answered", routing_frame(metrics["routing"]))]
    tables.append(Table("Edits in other forms", form_frame(metrics["final"].get("forms"))))
    said = [f"\n{table.title}\n{table.text('simple')}" for table in tables if len(table.frame)]
    said += ["", *side_words(metrics)]
    if run_dir is not None:
        times = {"edit": "editing", "evaluate": "scoring", "total": "in all"}
        took = ", ".join(f"{metrics['seconds'][key]:.1f} s {word}" for key, word in times.items())
        said += [loop_words(metrics), f"{metrics['edits_per_minute']:.0f} edits a minute: {took}."]
        names = ", ".join(sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")))
        said.append(f"Everything is in {run_dir}, for a reader in report.html: {names}")
    (console or Console()).print("\n".join(said), markup=False, highlight=False, soft_wrap=True)


def side_words(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What was measured beside the scores."""
    about = metrics["final"].get("same_subject")
    if about:
        yield (
            f"{counted(about['asked'], 'other question')} about edited subjects: a shard answers "
            f"{percent(about['fires'])}, {percent(about['changed'])} of the answers changed."
        )
    if metrics.get("perplexity"):
        yield "Perplexity of the targets: " + ", ".join(f"{k} {v:.2f}" for k, v in metrics["perplexity"].items())
    if metrics.get("probes"):
        kept = metrics["probes"]
        yield (
            f"{counted(kept['number'], 'probe')} that no edit touches: {percent(kept['pre'])} right before, "
            f"{percent(kept['final'])} after; {percent(kept['same'])} of the answers are unchanged."
        )
    if metrics.get("earlier"):
        earlier = metrics["earlier"]
        before, after, lost = earlier["before"], earlier["after"], earlier["lost"]
        words = ", ".join(f"{kind.capitalize()} {_percent(before[kind])} -> {_percent(after[kind])}" for kind in before)
        words += f"; no longer answered right: {', '.join(lost[:5])}{', ...' * (len(lost) > 5)}" * bool(lost)
        live = f"{counted(earlier['n_edits'], 'edit')} live ({words})"
        yield f"Of the pack that the run started from: {live} and {earlier['superseded']} superseded."


def loop_words(metrics: Mapping[str, Any]) -> str:
    """What the closed loop and the merge did; empty where the run has no such figures."""
    loop, merge = metrics.get("closed_loop"), metrics.get("merge")
    if not loop or not merge:
        return ""
    return (
        f"Closed loop: {counted(loop['windows'], 'window')}, {loop['rolled_back']} rolled back, "
        f"{counted(loop['pruned'], 'shard')} pruned, {counted(loop['retriggered'], 'edit')} written again, "
        f"{loop['quarantined']} quarantined. "
        f"Merge: {'accepted' if merge['accepted'] else 'not applied'} ({merge['reason']})."
    )


def verdict(metrics: Mapping[str, Any], place: str | Path) -> str:
    """A finished run, or a scored pack, in one line: the final score in free generation, what became of the edits."""
    final = metrics["final"][AUTOREGRESSIVE]
    scores = "  ".join(f"{words} {_percent(final[name])}" for name, words in SCORES_IN_WORDS.items())
    given_up = f"; {metrics['closed_loop']['quarantined']} quarantined" if "closed_loop" in metrics else ""
    return f"{counted(metrics['n_edits'], 'edit')} of {metrics['base']['name']}: {scores}{given_up}; {place}"
