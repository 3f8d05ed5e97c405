"""What a run leaves behind: `metrics.json`, `generations.jsonl`, the table that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repair_lightning.errors import counted
from repair_lightning.scoring.metrics import KINDS
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, PROTOCOLS

STAGES = {"pre_edit": "before", "before_merge": "before merge", "final": "after", "oracle_routing": "oracle routing"}
SECONDS = {"edit": "editing", "evaluate": "scoring", "total": "in all"}
_TITLES = {name: "OP" if name == "op" else name.capitalize() for name in (*KINDS, "op")}


def only_in_base(metrics: Mapping[str, Any]) -> bool:
    """Whether all edits lie in the base's own weights: then there is no memory to choose."""
    return metrics.get("shards") == 0 and "deviation" in metrics.get("method", {})


def stages(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The stages that have scores, in words; perfect routing only where there is anything to route."""
    routed = not only_in_base(metrics)
    return {
        stage: words for stage, words in STAGES.items() if metrics.get(stage) and (routed or "routing" not in stage)
    }


def score_frame(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """The scores in per cent: a row per protocol and stage."""
    return pd.DataFrame(
        [
            [protocol.replace("_", " "), words, *(_percent(metrics[stage][protocol][name]) for name in _TITLES)]
            for protocol in PROTOCOLS
            for stage, words in stages(metrics).items()
        ],
        columns=["protocol", "model", *_TITLES.values()],
    )


def routing_frame(routing: Mapping[str, Mapping[str, float] | None]) -> pd.DataFrame:
    """Which memory answered each kind of prompt, in per cent."""
    kinds = {kind: shares for kind, shares in routing.items() if shares}
    rows = [[kind, *(_percent(shares[name]) for name in ("base", "right", "wrong"))] for kind, shares in kinds.items()]
    return pd.DataFrame(rows, columns=["prompt", "base", "right shard", "wrong shard"])


def form_frame(forms: Mapping[str, Mapping[str, float | None]] | None) -> pd.DataFrame:
    """How edits hold in each form, in per cent; forms that the base does not have are left out."""
    shown = {form: found for form, found in (forms or {}).items() if found["rel"] is not None}
    names = {"rel": "exact", "contains": "contains", "fires": "fires", "garbled": "garbled"}
    rows = [[form.replace("_", " "), *(_percent(found[name]) for name in names)] for form, found in shown.items()]
    return pd.DataFrame(rows, columns=["form", *names.values()])


def console_table(frame: pd.DataFrame, title: str) -> Table:
    """A table for the console; a line parts what differs in the first column where that comes again."""
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for column in frame.columns:
        table.add_column(column, justify="left" if column in ("protocol", "model", "prompt", "form") else "right")
    for i, row in enumerate(rows := frame.values.tolist()):
        again = frame.iloc[:, 0].duplicated().any()
        table.add_row(*row, end_section=again and i + 1 < len(rows) and rows[i + 1][0] != row[0])
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def percent(value: float | None) -> str:
    """A share in [0, 1] as a sentence has it."""
    return "-" if value is None else f"{_percent(value)} %"


def print_report(metrics: Mapping[str, Any], run_dir: Path | None, console: Console | None = None) -> None:
    """The closing words of a run: scores, routing, what became of the edits, and where everything is."""
    console = console or Console()
    base = metrics["base"]["name"]
    console.print()
    by = f", {metrics['editor']}" if "editor" in metrics else ""
    console.print(console_table(score_frame(metrics), f"{counted(metrics['n_edits'], 'edit')} of {base}{by}"))
    if not only_in_base(metrics):
        console.print(console_table(routing_frame(metrics["routing"]), "Who answered"))
    if metrics["final"].get("forms"):
        console.print(console_table(form_frame(metrics["final"]["forms"]), "Edits in other forms"))
    said = list(side_words(metrics))
    if run_dir is not None:
        took = ", ".join(f"{metrics['seconds'][key]:.1f} s {word}" for key, word in SECONDS.items())
        said += [loop_words(metrics), f"{metrics['edits_per_minute']:.0f} edits a minute: {took}."]
    for line in said:
        console.print(escape(line), soft_wrap=not console.is_terminal)  # whoever reads a pipe wants whole lines
    if run_dir is None:
        return
    console.print(f"Everything is in [bold]{escape(str(run_dir))}[/bold]:", highlight=False, soft_wrap=True)
    for name, words in FILES.items():
        if (run_dir / name).exists():
            console.print(f"  {name:<18} {words}", highlight=False, soft_wrap=True)


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
    if not metrics.get("closed_loop") or not metrics.get("merge"):
        return ""
    loop, merge = metrics["closed_loop"], metrics["merge"]
    return (
        f"Closed loop: {counted(loop['windows'], 'window')}, {loop['rolled_back']} rolled back, "
        f"{counted(loop['pruned'], 'shard')} pruned, {counted(loop['retriggered'], 'edit')} written anew, "
        f"{loop['quarantined']} quarantined. "
        f"Merge: {'accepted' if merge['accepted'] else 'not applied'} ({merge['reason']})."
    )


def verdict(metrics: Mapping[str, Any], place: str | Path) -> str:
    """A finished run, or a scored pack, in one line: the final score in free generation, what became of the edits."""
    final = metrics["final"][AUTOREGRESSIVE]
    scores = "  ".join(f"{_TITLES[name]} {_percent(final[name])}" for name in _TITLES)
    given_up = f"; {metrics['closed_loop']['quarantined']} quarantined" if "closed_loop" in metrics else ""
    return f"{counted(metrics['n_edits'], 'edit')} of {metrics['base']['name']}: {scores}{given_up}; {place}"


FILES = {
    "report.html": "everything below for a reader, with pictures: open it in a browser",
    "metrics.json": "all figures",
    "generations.jsonl": "every prompt with every answer, before and after",
    "curves.jsonl": "how things stood after each window",
    "features.json": "where the edits' features lie, in two dimensions",
    "edits.parquet": "the ledger: what became of each edit",
    "journal.sqlite": "every event of every edit: `repair-lightning log --run ...`",
    "pack": "the edited model: repair_lightning.load_edited('.../pack')",
    "checkpoints": "the state of the stream",
    "config.yaml": "the complete configuration",
    "wandb": "the dashboard's data; `wandb sync` sends it where you want it",
}
