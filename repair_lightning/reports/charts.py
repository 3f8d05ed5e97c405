"""The pictures of one run and of several, the paper's figures among them: each is a chart, or one line on what is
missing for it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from repair_lightning.errors import ConfigError, counted
from repair_lightning.reports import comparison, drawing
from repair_lightning.reports.artefacts import Artefacts, Row, base_name
from repair_lightning.reports.comparison import COLUMNS, TABLE, Column, Grid, Result, cell, read_tables, short
from repair_lightning.reports.drawing import EDITORS, Chart, Look, records
from repair_lightning.reports.report import CHECKS, OTHER_CHECK, SCORES_IN_WORDS, held_back, only_in_base, percent
from repair_lightning.scoring.protocols import AUTOREGRESSIVE
from repair_lightning.scoring.separation import MEANT, OTHERS, auroc
from repair_lightning.types import BASE

KINDS_IN_WORDS = {"edit": "edits", "rephrase": "rephrases", "locality": "unrelated prompts", "near": "neighbours"}
OUTCOMES: Mapping[str, Look] = {
    "all right": (drawing.BLUE, "circle"),
    "a rephrase wrong": (drawing.ORANGE, "triangle-up"),
    "its own prompt wrong": (drawing.RED, "cross"),
    "not asked": (drawing.GREY, "diamond"),
}
"""How an edit is answered in the end, and how that looks."""
FIRES, UNDER, HELD = "over the line: a shard answers", "not over the line: the base answers", "over the line, but "
_DARK = (drawing.DARK, drawing.PINK, drawing.GREY)
WHO: Mapping[str, Look] = {
    FIRES: (drawing.BLUE, "circle"),
    UNDER: (drawing.ORANGE, "circle"),
    **{HELD + why: (colour, "circle") for why, colour in zip((*CHECKS.values(), OTHER_CHECK), _DARK, strict=True)},
}
"""Who answers a prompt, by the score and by what is checked besides, and how that looks."""
MOST_ABOVE = 20.0
"""Thresholds that a score is drawn above; what exceeds them is in the last bar."""


def separation(run: Artefacts, bins: int = 40) -> Chart | str:
    """The routing score of every prompt over its threshold, by kind of prompt and by who answers, so by the further
    checks as well (paper, Fig. 4)."""
    frame = pd.DataFrame(run.final, columns=["kind", "score", "threshold"])
    score, threshold = frame["score"].astype(float), frame["threshold"].astype(float).replace(0, np.nan)
    ratio = score.clip(lower=0) / threshold
    if ratio.isna().all():
        return "separation: no routing score with a threshold in generations.jsonl"
    ratio = ratio.mask(threshold.isna() & (score < 0), 0.0).dropna()  # below zero: no edit is about what it names
    who = pd.Series([_who(row) for row in run.final])
    found = {kind: ratio[frame["kind"] == kind].to_numpy() for kind in KINDS_IN_WORDS}
    top = min(max(1.2, 1.05 * float(ratio.quantile(0.995))), MOST_ABOVE)
    parts = max(1, round(bins / top))  # of a unit, so that no bar lies across the line
    edges = np.arange(math.ceil(top * parts) + 1) / parts
    rows, above = [], []
    for kind, values in found.items():
        if not len(values):
            continue
        above.append(f"{percent(float(np.mean(values > 1)))} of the {KINDS_IN_WORDS[kind]}")
        panel = f"{KINDS_IN_WORDS[kind]} ({len(values):,})"
        own = who[ratio.index][frame["kind"] == kind].to_numpy()
        for words in [name for name in WHO if (who == name).any()]:
            shares = 100 * np.histogram(values[own == words].clip(edges[0], edges[-1]), edges)[0] / len(values)
            places = np.array([*zip((edges[:-1] + edges[1:]) / 2, shares, strict=True)]).tolist()
            of_bars = {"prompts": panel, "who": words}
            rows += [of_bars | {"ratio": round(x, 4), "share": round(y, 3)} for x, y in places if y]
    about = torch.tensor(np.concatenate([found[kind] for kind in MEANT]))
    areas = {kind: auroc(about, torch.tensor(found[kind])) for kind in OTHERS}
    apart = [f"{area:.3f} against {KINDS_IN_WORDS[kind]}" for kind, area in areas.items() if area is not None]
    words = f"Routing score over threshold: {', '.join(above)} lie above their threshold."
    words += f" AUROC of edits and rephrases: {', '.join(apart)}." if apart else ""
    if run.option("model.routing.router") != "activation":
        words += " A prompt that names no edited subject counts as 0; above the line the base answers where a further"
        words += " check fails."
    titles = ("routing score over threshold", "% of prompts")
    picture = drawing.histograms(rows, "ratio", "share", "prompts", "who", titles, edges.tolist(), mark=1.0, looks=WHO)
    return Chart("separation", "Are edited and unrelated prompts apart?", words, rows, picture)


def _who(row: Row) -> str:
    """Who answered a prompt, and by what, in the words of `WHO`."""
    if row.get("memory", BASE) >= 0:
        return FIRES
    score, threshold = row.get("score"), row.get("threshold")
    if score is None or threshold is None or score <= threshold:
        return UNDER
    return HELD + held_back(row)


def answered_by(run: Artefacts) -> Chart | str:
    """How many prompts of each kind were answered by which memory."""
    routing = {} if only_in_base(run.metrics) else run.metrics.get("routing") or {}
    names = {"right": "its own edit's shard", "wrong": "another shard", "base": "the base"}
    asked = Counter(row["kind"] for row in run.final)
    known = {kind: shares for kind, shares in routing.items() if shares and asked[kind]}
    if not known:
        return "answered_by: no routing figures in metrics.json, no prompts, or no shard that could answer"
    rows: list[Row] = []
    shown: list[Row] = []
    for kind, shares in known.items():
        counts = {words: round(asked[kind] * shares[name]) for name, words in names.items()}
        rows.append({"prompts": KINDS_IN_WORDS[kind]} | counts)
        for name, words in names.items():
            cell = {"prompts": KINDS_IN_WORDS[kind], "memory": words, "share": round(100 * shares[name], 3)}
            shown.append(cell | {"shown": f"{counts[words]:,}"})
    right = "; ".join(
        f"{row['prompts']} {row[names['right']]:,} of {asked[kind]:,}" for kind, row in zip(known, rows, strict=True)
    )
    words = (
        f"Numbers of prompts. Answered by their own edit's shard: {right}. Edits and rephrases should be, others not."
    )
    picture = drawing.heat(shown, "memory", "prompts", "share")
    return Chart("answered_by", "Who answered?", words, rows, picture)


def live(run: Artefacts) -> Chart | str:
    """The live scores along the stream, free generation."""
    curve = run.objects("curves.jsonl", lines=True)
    rows = [
        {"edits": line["edits"], "score": SCORES_IN_WORDS[kind], "value": round(100 * value, 3)}
        for line in thinned([line for line in curve if line.get("live")])
        for kind, value in line["live"][AUTOREGRESSIVE].items()
        if value is not None and kind in SCORES_IN_WORDS
    ]
    if len({row["edits"] for row in rows}) < 2:
        return "live: needs live scores of two windows in curves.jsonl (scoreboard.live is 0, or one window)"
    ends = ", ".join(f"{name} {value:.1f}" for name, value in {row["score"]: row["value"] for row in rows}.items())
    asked = max(line.get("live_edits", 0) for line in curve)
    words = f"Free generation after each window, on samples of at most {asked} written edits; at the end {ends}."
    picture = drawing.lines(rows, "edits", "value", "score", ("edits written", "per cent"))
    return Chart("live", "Scores while editing", words, rows, picture)


def retention(run: Artefacts, bins: int = 12) -> Chart | str:
    """The final model's score by the age of the edits (the number of edits that arrived after them), beside the score
    right after writing."""
    final = [row for row in run.final if row["kind"] in MEANT]
    asked = {row["id"]: None for row in final}
    order = [id for id in run.entries if id in asked] or list(asked)
    if len(order) < 5:
        return "retention: fewer than five scored edits in generations.jsonl"
    rel, gen, first = names = "Rel at the end", "Gen at the end", "Rel right after writing"
    scores = [(rel if row["kind"] == "edit" else gen, row["id"], float(row["correct"])) for row in final]
    scores += [(first, id, score) for id, score in first_scores(run.events).items()]
    bins, last, place = min(bins, len(order)), len(order) - 1, {id: i for i, id in enumerate(order)}
    frame = pd.DataFrame(
        [(name, place[id] * bins // len(order), last - place[id], value) for name, id, value in scores if id in place],
        columns=["score", "group", "age", "value"],
    )
    means = frame.groupby(["score", "group"]).agg(age=("age", "mean"), value=("value", "mean"), n=("value", "size"))
    means = means.assign(value=(100 * means["value"]).round(3)).reset_index()
    rows = sorted(records(means[["age", "score", "value", "n"]]), key=lambda row: names.index(row["score"]))
    ends = [f"{row['value']:.1f} %" for row in rows if row["score"] == rel]
    words = (
        f"Final score by the number of edits that came later, in {bins} groups: Rel is {ends[-1]} for the newest "
        f"edits and {ends[0]} for the oldest. A line that falls to the right would mean that edits are forgotten."
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
    """The edits' features in the frozen base, along two principal components, coloured by how they are answered."""
    features = next(iter(run.objects("features.json")), {})
    places: Mapping[str, Sequence[float]] = features.get("edits") or {}
    if len(places) < 2:
        return "features: no features.json with two edits (an older run, or a single edit)"
    outcomes = outcomes_of(run.final)
    rows: list[Row] = [
        {"id": id, "x": x, "y": y, "outcome": outcomes.get(id, "not asked")} for id, (x, y) in places.items()
    ]
    rows.sort(key=lambda row: list(OUTCOMES).index(row["outcome"]))
    first, second = features.get("explained") or [0.0, 0.0]
    counts = Counter(row["outcome"] for row in rows)
    words = (
        f"{len(rows):,} edits of {run.metrics['n_edits']:,}, each the frozen base's state at its prompt's last token, "
        f"along the two directions of largest variance ({percent(first)} and {percent(second)} of it); "
        f"{', '.join(f'{number:,} {outcome}' for outcome, number in counts.items())}."
    )
    picture = drawing.points(rows, "x", "y", "outcome", ("first component", "second component"), OUTCOMES)
    return Chart("features", "Where the edits lie, and how they are answered", words, rows, picture)


def outcomes_of(final: Sequence[Row]) -> dict[str, str]:
    """By id, how the final model answers an edit, in the words of `OUTCOMES`."""
    wrong = {kind: {row["id"] for row in final if row["kind"] == kind and not row["correct"]} for kind in MEANT}
    right, rephrase, own, _ = OUTCOMES
    return {
        row["id"]: own if row["id"] in wrong["edit"] else rephrase if row["id"] in wrong["rephrase"] else right
        for row in final
    }


def thinned(rows: Sequence[Row]) -> list[Row]:
    """At most 400 rows, at even distances, the last among them."""
    return list(rows[::-1][:: -(-len(rows) // 400) or 1][::-1])


def costs_of(runs: Sequence[Artefacts]) -> pd.DataFrame:
    """Seconds of editing without loading and scoring, along a run's stream or at its end: `of`, `edits`, `seconds`."""
    rows = []
    for run in runs:
        end = {"edits": run.metrics["n_edits"], "seconds": run.metrics["seconds"]["edit"]}
        curve = thinned(run.objects("curves.jsonl", lines=True)) or [end]
        rows += [(run.name, one["edits"], one["seconds"]) for one in curve]
    return pd.DataFrame(rows, columns=["of", "edits", "seconds"])


def cost(spent: pd.DataFrame, log: bool = True) -> Chart | str:
    """Time of editing against the number of edits, both logarithmic as in the paper (Fig. 7), or not."""
    spent = spent[(spent["edits"] > 0) & (spent["seconds"] > 0)]
    spent = spent[spent.groupby("of")["edits"].transform("nunique") > 2]  # fewer say nothing about growth
    if spent.empty:
        return "cost: needs the seconds of editing at three numbers of edits"
    rows = records(spent.sort_values(["of", "edits"], kind="stable").round(3))
    last = {row["of"]: (row["edits"], row["seconds"]) for row in rows}
    ends = "; ".join(
        f"{name}: {counted(edits, 'edit')} in {seconds:.1f} s, {60 * edits / seconds:,.0f} a minute"
        for name, (edits, seconds) in last.items()
    )
    words = f"Seconds of editing, without loading and scoring, for the first so many edits. {ends}."
    looks = dict(EDITORS) | {name: EDITORS[of] for name in spent["of"] if (of := name.rpartition(": ")[2]) in EDITORS}
    titles = ("edits", "seconds of editing")
    picture = drawing.lines(rows, "edits", "seconds", "of", titles, log="xy" if log else "", looks=looks)
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


# -- of several runs ---------------------------------------------------------------------------------------------------

PANELS = ["Rel", "Gen", "Loc", "OP"]
COSTS = {
    "seconds": "seconds per edit",
    "kept": "kB per edit that are kept",
    "peak": "MiB at the peak of editing, above the base",
}
"""What OP is drawn against, in words."""
FIGURES = {
    **{name: COLUMNS[name] for name in PANELS},
    "spent": Column(("seconds", "edit"), scale=1.0),
    "written": Column(("n_edits",), scale=1),
    "low": COLUMNS["OP low"],
    "high": COLUMNS["OP high"],
    "seconds": comparison.COSTS["s/edit"],
    "kept": comparison.COSTS["kB/edit"],
    "device": comparison.COSTS["GPU MiB"],
    "host": comparison.COSTS["peak MiB"],
}


def finished(results: Sequence[Result]) -> pd.DataFrame:
    """A row per finished run: `variant`, `size`, `seed`, `base`, `edits`, scores in per cent, what it cost."""
    rows = [
        [run.variant, run.size, run.seed, base_name(run.metrics or {}), run.edits]
        + [column.of(run) for column in FIGURES.values()]
        for run in results
        if run.status == "finished"
    ]
    frame = pd.DataFrame(rows, columns=["variant", "size", "seed", "base", "edits", *FIGURES])
    return frame.assign(peak=frame["device"].combine_first(frame["host"]))


def averaged(frame: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """The mean of a column in each group, and as `sd` its standard deviation where there are several."""
    found = frame.dropna(subset=[value]).groupby(by, sort=False)[value].agg(["mean", "std"]).round(3)
    return found.reset_index().rename(columns={"mean": value, "std": "sd"})


def components(results: Sequence[Result]) -> Chart | str:
    """Rel, Gen, Loc and OP of every variant (paper, Fig. 5), at the size at which most variants were run."""
    frame = finished(results)
    variants = frame.groupby("size")["variant"].nunique()
    if frame["variant"].nunique() < 2:
        return "components: needs a comparison (python -m repair_lightning.compare) with two finished variants"
    size = max(variants.index, key=lambda size: (variants[size], size))
    shown = frame[frame["size"] == size]
    rows = records(averaged(shown.melt("variant", PANELS, "score", "value"), ["variant", "score"], "value"))
    if not rows:
        return "components: no finished variant has a score"
    words = f"Free generation, mean over {counted(shown['seed'].nunique(), 'seed')}."
    cells = [{**row, "shown": f"{row['value']:.1f}" + (f" ± {row['sd']:.1f}" if row["sd"] else "")} for row in rows]
    picture = drawing.heat(cells, "score", "variant", "value")
    return Chart("components", f"Which parts help, {counted(size, 'edit')}", words, rows, picture)


def sensitivity(grid: Grid, results: Sequence[Result], name: str) -> Chart | str:
    """OP over a grid of two options (paper, Fig. 6), at the largest size; the default has a frame."""
    row, column = grid.options
    y, x = short(row), short(column)
    size = max((run.size for run in results if run.status == "finished"), default=0)
    rows = []
    for variant, options in grid.cells():
        runs = [run for run in results if run.variant == variant and run.size == size]
        values = comparison.values_of(runs, COLUMNS["OP"])
        op = round(sum(values) / len(values), 3) if values else None
        rows.append({x: options[column], y: options[row], "OP": op, "shown": cell(runs, COLUMNS["OP"])})
    known = sorted((line for line in rows if line["OP"] is not None), key=lambda line: line["OP"])
    if not known:
        return f"{name}: no cell of the grid has an OP"
    worst, best = (f"{line['OP']:.1f} at {y} {line[y]} and {x} {line[x]}" for line in (known[0], known[-1]))
    default = (grid.default[column], grid.default[row]) if len(grid.default) == 2 else None
    words = f"Best {best}; worst {worst}." + " The frame marks the default." * bool(default)
    picture = drawing.heat(rows, x, y, "OP", [name.replace("_", " ") for name in (x, y)], default)
    return Chart(name, f"OP over {counted(size, 'edit')}", words, rows, picture)


def result_of(run: Artefacts) -> Result:
    """A single run as a comparison has it; the editor's name is the variant."""
    m = run.metrics
    return Result(m.get("editor", "run"), "", m["n_edits"], m.get("seed") or 0, "finished", metrics=m)


def scale(results: Sequence[Result]) -> Chart | str:
    """OP against the number of edits, a line per base and variant (paper, Fig. 3)."""
    by, frame = ["base", "variant", "edits"], finished(results)
    drawn_again = frame.astype({"low": float, "high": float}).groupby(by)[["low", "high"]].mean().reset_index()
    found = averaged(frame, by, "OP").merge(drawn_again, on=by)
    low, high = (found["OP"] - found["sd"]).fillna(found["low"]), (found["OP"] + found["sd"]).fillna(found["high"])
    found = found.assign(low=low.round(3), high=high.round(3))
    found = found[found.groupby(["base", "variant"])["edits"].transform("nunique") > 1]
    if found.empty:
        return "scale: needs runs of one base with different numbers of edits"
    parts = [name for name in ("base", "variant") if found[name].nunique() > 1] or ["base"]
    found = found.assign(of=found[parts].agg(", ".join, axis=1))
    looks = dict(EDITORS) | {row["of"]: EDITORS[row["variant"]] for row in records(found) if row["variant"] in EDITORS}
    rows = records(found[["of", "edits", "OP", "sd", "low", "high"]].sort_values(["of", "edits"]))
    words = "Free generation, final model, by the number of edits. Where a line falls, edits get in each other's way."
    if found["low"].notna().any():
        words += " Bars: the deviation over seeds; of one seed, where OP would lie in 95 of 100 draws of the edits."
    picture = drawing.lines(
        rows,
        "edits",
        "OP",
        "of",
        ("edits", "OP, per cent"),
        log="x",
        spread=("low", "high"),
        looks=looks,
    )
    return Chart("scale", "OP against the number of edits", words, rows, picture)


def costs_of_results(results: Sequence[Result], before: str = "") -> pd.DataFrame:
    """What `cost` draws of a comparison: mean seconds of editing; `before` leads the variants' names."""
    found = averaged(finished(results), ["variant", "written"], "spent")
    return pd.DataFrame({"of": before + found["variant"], "edits": found["written"], "seconds": found["spent"]})


def op_against(results: Sequence[Result]) -> Iterator[Chart | str]:
    """OP of editors against what an edit costs, each of `COSTS`, a point for each number of edits: upper left is
    best."""
    for spent, title in COSTS.items():
        frame = finished(results).dropna(subset=[spent, "OP"])
        frame = frame[frame[spent] > 0]
        if frame.empty:
            yield f"op_against_{spent}: needs a comparison with finished runs that say what an edit cost"
            continue
        found = frame.groupby(["size", "variant"], sort=False)[[spent, "OP"]].mean().round(4).reset_index()
        found = found.rename(columns={"variant": "editor", spent: "cost"})
        found = found.assign(id=found["size"].map(lambda size: f"N = {size:,}"))[["id", "editor", "cost", "OP"]]
        best = records(found.loc[found.groupby("id", sort=False)["OP"].idxmax()])
        said = "; ".join(f"{row['id']}: {row['editor']} {row['OP']:.1f} at {row['cost']:,g}" for row in best)
        said = f"Free generation, a picture per number of edits; upper left is best. Highest OP at {said}."
        picture = drawing.named_points(records(found), "cost", "OP", "editor", (title, "OP, per cent"), "id", EDITORS)
        yield Chart(f"op_against_{spent}", f"OP against {title}", said, records(found), picture)


# -- as files ----------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """What a comparison measured."""

    name: str
    results: Sequence[Result]
    grid: Grid | None


def draw_figures(folders: Sequence[Path], to: Path) -> tuple[list[Path], list[str]]:
    """Draw all figures that some runs, comparisons, or folders of either provide, into a folder, which is made.
    Returns the files, and a line for every figure that is left out, with what it misses."""
    made = list(charts_of(*gather(folders)))
    to.mkdir(parents=True, exist_ok=True)
    files = [file for chart in made if isinstance(chart, Chart) for file in chart.write(to)]
    return files, [words for words in made if isinstance(words, str)]


def draw_comparison(folder: Path, results: Sequence[Result], grid: Grid | None = None) -> list[Path]:
    """Draw OP over a grid as `heat_map`, or against what an edit costs; returns the PNG files, none without an OP."""
    drawn = op_against(results) if grid is None else [sensitivity(grid, results, "heat_map")]
    return [chart.write(folder)[0] for chart in drawn if isinstance(chart, Chart)]


def gather(folders: Sequence[Path]) -> tuple[list[Artefacts], list[Comparison]]:
    """The runs and comparisons in some folders; a ConfigError where one holds none. A comparison's own runs are its
    results, and not runs besides."""
    runs: list[Artefacts] = []
    comparisons: list[Comparison] = []
    for folder in folders:
        tables = [file.parent for file in sorted(folder.rglob(TABLE))]
        inside = [file.parent for file in sorted(folder.rglob("metrics.json"))]
        alone = [run for run in inside if not any(run.is_relative_to(table) for table in tables)]
        if not tables and not alone:
            words = "holds no finished run and no comparison; give a run directory or a folder of them"
            raise ConfigError(f"'{folder}' {words}")
        comparisons += [Comparison(table.resolve().name, *read_tables(table)) for table in tables]
        runs += [Artefacts.read(run) for run in alone]
    return runs, comparisons


def charts_of(runs: Sequence[Artefacts], comparisons: Sequence[Comparison]) -> Iterator[Chart | str]:
    """Every chart, or why there is none: of each run, of each comparison, and of all together."""
    of_runs = {name: make for name, make in RUN_CHARTS.items() if name != "cost"}
    for run in runs:
        yield from (_named(make(run), run.name, len(runs)) for make in of_runs.values())
    if not runs:
        yield f"{', '.join(of_runs)}: need the directory of a run"
    plain = [one for one in comparisons if one.grid is None]
    several = [one for one in plain if len({result.variant for result in one.results}) > 1]
    for one in several:
        drawn = (components(one.results), *op_against(one.results))
        yield from (_named(chart, one.name, len(several)) for chart in drawn)
    if not several:
        yield components([])
    for one in comparisons:
        if one.grid is not None:
            yield sensitivity(one.grid, one.results, f"sensitivity-{_plain(one.name)}")
    if len(plain) == len(comparisons):
        yield "sensitivity: needs a comparison over a grid, as configs/compare/shards_mask.yaml"
    yield scale([*map(result_of, runs), *(result for one in plain for result in one.results)])
    spent = [costs_of_results(one.results, f"{one.name}: ") for one in plain]
    yield cost(pd.concat([costs_of(runs), *spent]))


def _named(chart: Chart | str, of: str, among: int) -> Chart | str:
    """A chart whose files, or a line that, says what it is of, where it is one among several."""
    if among < 2:
        return chart
    return f"{of}: {chart}" if isinstance(chart, str) else replace(chart, name=f"{chart.name}-{_plain(of)}")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
