"""The pictures of a run: each is a chart, or one line on what is missing for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.classification import binary_auroc

from repair_lightning.errors import counted
from repair_lightning.reports import drawing
from repair_lightning.reports.artefacts import Artefacts, Row
from repair_lightning.reports.drawing import Chart, records
from repair_lightning.reports.report import only_in_base, percent
from repair_lightning.scoring.metrics import KIND_OF_PROMPT
from repair_lightning.scoring.protocols import AUTOREGRESSIVE
from repair_lightning.types import BASE

KINDS_IN_WORDS = {"edit": "edits", "rephrase": "rephrases", "locality": "unrelated", "near": "neighbours"}
SCORES_IN_WORDS = {"rel": "Rel", "gen": "Gen", "loc": "Loc", "near": "Near", "op": "OP"}
MOST_COLOURS = 8
"""Shards that a map can tell apart by colour; more are shown as a scale."""


def separation(run: Artefacts, bins: int = 40) -> Chart | str:
    """The routing score of every prompt over its threshold, by kind of prompt (paper, Fig. 4)."""
    found: dict[str, list[float]] = {}
    final = [row for row in run.rows.get("final", ()) if row.get("score") is not None]
    if not any(row.get("threshold") for row in final):
        return "separation: no routing score with a threshold in generations.jsonl"
    for row in final:
        if row.get("threshold") or row["score"] < 0:  # below zero: no edit is about what it names
            found.setdefault(row["kind"], []).append(max(row["score"], 0.0) / (row.get("threshold") or 1.0))
    largest = float(np.quantile(np.concatenate([*map(np.asarray, found.values())]), 0.995))
    edges = np.linspace(0.0, max(1.2, 1.05 * largest), bins + 1)
    rows, above = [], []
    for kind in (kind for kind in KIND_OF_PROMPT if kind in found):
        ratios, name = np.asarray(found[kind]), KINDS_IN_WORDS[kind]
        above.append(f"{percent(float(np.mean(ratios > 1)))} of the {name}")
        shares = 100 * np.histogram(ratios.clip(edges[0], edges[-1]), edges)[0] / len(ratios)
        for centre, share in zip((edges[:-1] + edges[1:]) / 2, shares, strict=True):
            place = {"ratio": round(float(centre), 4), "share": round(float(share), 3)}
            rows.append({"prompts": f"{name} ({len(ratios):,})", **place})
    words = f"Routing score over threshold: {', '.join(above)} lie above their threshold. {_auroc(found)}"
    if run.option("model.routing.router", "key") != "activation":
        words += " A prompt that names no edited subject counts as 0."
    titles = ("routing score over threshold", "% of prompts")
    picture = drawing.histograms(rows, "ratio", "share", "prompts", titles, mark=1.0)
    return Chart("separation", "Are edited and unrelated prompts apart?", words.strip(), rows, picture)


def _auroc(ratios: Mapping[str, Sequence[float]]) -> str:
    """How well the score tells what an edit is about from what it is not, as a sentence."""
    about = [value for kind in ("edit", "rephrase") for value in ratios.get(kind, ())]
    words = []
    for kind in ("locality", "near"):
        others = ratios.get(kind, ())
        if about and others:
            labels = torch.tensor([1] * len(about) + [0] * len(others))
            scores = torch.tensor([*about, *others], dtype=torch.float64)
            value = binary_auroc(scores / (1 + scores), labels)  # in [0, 1), in the same order
            words.append(f"{float(value):.3f} against {KINDS_IN_WORDS[kind]} prompts")
    return f"AUROC of edits and rephrases: {', '.join(words)}." if words else ""


def answered_by(run: Artefacts) -> Chart | str:
    """Which memory answered each kind of prompt."""
    routing = {} if only_in_base(run.metrics) else run.metrics.get("routing") or {}
    names = {"right": "the edit's own shard", "wrong": "another shard", "base": "the base"}
    rows = [
        {"prompts": KINDS_IN_WORDS.get(kind, kind), "memory": words, "share": round(100 * shares[name], 3)}
        for kind, shares in routing.items()
        if shares
        for name, words in names.items()
    ]
    if not rows:
        return "answered_by: no routing figures in metrics.json, or no shard that could answer"
    right = "; ".join(f"{row['prompts']} {row['share']:.1f} %" for row in rows if row["memory"] == names["right"])
    words = f"Answered by the edit's own shard: {right}. Edits and rephrases should be, all others not."
    picture = drawing.stacked(rows, "share", "prompts", "memory", "% of prompts")
    return Chart("answered_by", "Who answered?", words, rows, picture)


def live(run: Artefacts) -> Chart | str:
    """The live scores along the stream, free generation."""
    rows = [
        {"edits": line["edits"], "score": SCORES_IN_WORDS[kind], "value": round(100 * value, 3)}
        for line in thinned([line for line in run.curve if line.get("live")])
        for kind, value in line["live"][AUTOREGRESSIVE].items()
        if value is not None and kind in SCORES_IN_WORDS
    ]
    if not rows:
        return "live: no live scores in curves.jsonl (scoreboard.live is 0, or an older run)"
    last = {row["score"]: row["value"] for row in rows}
    asked = max(line.get("live_edits", 0) for line in run.curve)
    ends = ", ".join(f"{name} {value:.1f}" for name, value in last.items())
    words = f"Free generation after each window, on samples of at most {asked} written edits; at the end {ends}."
    picture = drawing.lines(rows, "edits", "value", "score", ("edits written", "per cent"))
    return Chart("live", "Scores while editing", words, rows, picture)


_LINES = ("Rel at the end", "Gen at the end", "Rel right after writing")


def retention(run: Artefacts, bins: int = 12) -> Chart | str:
    """The final model's score by the age of the edits, beside the score right after writing.

    An edit's age is the number of edits that arrived after it.
    """
    final = [row for row in run.rows.get("final", ()) if row["kind"] in ("edit", "rephrase")]
    asked = {row["id"] for row in final}
    order = [id for id in run.entries if id in asked] or list(dict.fromkeys(row["id"] for row in final))
    if len(order) < 2:
        return "retention: fewer than two scored edits in generations.jsonl"
    names = {"edit": _LINES[0], "rephrase": _LINES[1]}
    scores = [(names[row["kind"]], row["id"], float(row["correct"])) for row in final]
    scores += [(_LINES[2], id, score) for id, score in first_scores(run.events).items()]
    bins, place = min(bins, len(order)), {id: i for i, id in enumerate(order)}
    frame = pd.DataFrame(scores, columns=["score", "id", "value"])
    frame = frame[frame["id"].isin(order)].assign(place=lambda known: known["id"].map(place))
    frame["group"], frame["age"] = frame["place"] * bins // len(order), len(order) - 1 - frame["place"]
    groups = frame.sort_values("group", kind="stable").groupby(["score", "group"])
    means = groups.agg(age=("age", "mean"), value=("value", "mean"), n=("value", "size")).reset_index()
    means["value"] = (100 * means["value"]).round(3)
    rows = sorted(records(means[["age", "score", "value", "n"]]), key=lambda row: _LINES.index(row["score"]))
    rel = [f"{row['value']:.1f} %" for row in rows if row["score"] == names["edit"]]
    words = (
        f"Final score by the number of edits that came later, in {bins} groups: Rel is {rel[-1]} for the newest "
        f"edits and {rel[0]} for the oldest. A line that falls to the right would mean that edits are forgotten."
    )
    picture = drawing.lines(rows, "age", "value", "score", ("edits that came later", "per cent"))
    return Chart("retention", "Are old edits kept?", words, rows, picture)


def first_scores(events: Sequence[Row]) -> dict[str, float]:
    """Id -> how an edit scored when it was first asked after its last write."""
    found: dict[str, float] = {}
    for event in events:
        if event["kind"] == "written":
            found.pop(event["id"], None)
        elif event["kind"] == "evaluated" and event["score"] is not None and event["shard"] is not None:
            found.setdefault(event["id"], float(event["score"]))
    return found


def feature_points(run: Artefacts) -> Chart | str:
    """The edits' features in the frozen base, along two principal components, coloured by the shard that owns them."""
    places: Mapping[str, Sequence[float]] = run.features.get("edits") or {}
    if len(places) < 2:
        return "features: no features.json with two edits (an older run)"
    owners = {id: entry.shard for id, entry in run.entries.items()}
    shards = {owner for id in places if (owner := owners.get(id)) is not None and owner != BASE}
    many = len(shards) > MOST_COLOURS
    rows: list[Row] = [
        {"id": id, "x": x, "y": y, "shard": owners.get(id) if many else _shard(owners.get(id))}
        for id, (x, y) in places.items()
    ]
    first, second = (run.features.get("explained") or [0.0, 0.0])[:2]
    colour = "The colour is the shard's number, in the order of writing." if many else "Each shard has its colour."
    held = (
        f"{counted(len(shards), 'shard')} own{'s' * (len(shards) == 1)} them. {colour}"
        if shards
        else "no shard has one."
    )
    words = (
        f"{len(rows):,} edits of {run.metrics['n_edits']:,}, each the frozen base's state at its prompt's last token, "
        f"along the two directions of largest variance ({percent(first)} and {percent(second)} of it); {held}"
    )
    picture = drawing.points(rows, "x", "y", "shard", ("first component", "second component"))
    return Chart("features", "Where the edits lie", words, rows, picture)


def _shard(shard: int | None) -> str:
    return "none" if shard is None else "base" if shard < 0 else f"shard {shard}"


def thinned(rows: Sequence[Row], most: int = 400) -> list[Row]:
    """At most so many rows, at even distances, the last among them."""
    step = -(-len(rows) // most) if rows else 1
    return list(rows[::-1][::step][::-1])


def costs_of(runs: Sequence[Artefacts]) -> pd.DataFrame:
    """Seconds of editing without loading and scoring, along a run's stream or at its end: `of`, `edits`, `seconds`."""
    rows = []
    for run in runs:
        end = {"edits": run.metrics["n_edits"], "seconds": run.metrics["seconds"]["edit"]}
        rows += [(run.name, one["edits"], one["seconds"]) for one in thinned(run.curve) or [end]]
    return pd.DataFrame(rows, columns=["of", "edits", "seconds"])


def cost(spent: pd.DataFrame, log: bool = True) -> Chart | str:
    """Time of editing against the number of edits, both logarithmic as in the paper (Fig. 7), or not."""
    spent = spent[(spent["edits"] > 0) & (spent["seconds"] > 0)]
    if spent.empty:
        return "cost: no run with edits and seconds"
    sizes = spent.groupby("of")["edits"].transform("nunique")
    spent = spent[sizes > min(1, sizes.max() - 1)]  # beside lines, a point alone says nothing about growth
    rows = records(spent.sort_values(["of", "edits"], kind="stable").round(3))
    ends = "; ".join(
        f"{name}: {row['edits']:,} edits in {row['seconds']:.1f} s, {60 * row['edits'] / row['seconds']:,.0f} a minute"
        for name, row in {row["of"]: row for row in rows}.items()
    )
    words = f"Seconds of editing, without loading and scoring, for the first so many edits. {ends}."
    titles = ("edits", "seconds of editing")
    picture = drawing.lines(rows, "edits", "seconds", "of", titles, log="xy" if log else "", share=False)
    return Chart("cost", "What editing costs", words, rows, picture)


RUN_CHARTS: Mapping[str, Callable[[Artefacts], Chart | str]] = {
    "separation": separation,
    "answered_by": answered_by,
    "live": live,
    "retention": retention,
    "cost": lambda run: cost(costs_of([run]), log=False),
    "features": feature_points,
}
"""The charts of a single run, in the order of the report."""
