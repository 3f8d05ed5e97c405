"""`report.html`: a finished run for a reader who never saw the project, in one file that asks nothing of the network.

Everything that comes from the data is escaped: by Jinja in the page, by `textContent` in its script, by `tojson`
between the two. plotly.js lies in it once, compressed; the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import logging
from collections import Counter
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from repair_lightning.edits.ledger import EditStatus
from repair_lightning.errors import counted
from repair_lightning.reports.artefacts import Artefacts
from repair_lightning.reports.charts import RUN_CHARTS, SCORES_IN_WORDS, Chart, percent
from repair_lightning.reports.plotly_charts import figure
from repair_lightning.reports.report_tables import (
    EDITS_SHOWN,
    chart_table,
    duration,
    edit_rows,
    edits_table,
    event_table,
    examples,
    failed_table,
    forms_table,
    others_table,
    problems,
    score_table,
    skipped_table,
)
from repair_lightning.storage.files import replace_text

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
GLOSSARY = (
    ("Rel", "reliability: corrected prompts that get the new answer"),
    ("Gen", "generalisation: the same questions in other words that get the new answer"),
    ("Loc", "locality: unrelated prompts that are answered as before"),
    ("Near", "neighbours: the same question about another subject, answered as before"),
    ("OP", "overall performance: the cube root of Rel × Gen × Loc"),
    ("autoregressive", "the model writes its answer freely; it counts if it is exactly the expected one"),
    ("teacher forced", "the expected answer is fed in; the share of its tokens that the model would have chosen"),
    ("before merge", "behind the last edit, before side memories were fused, if they were"),
    ("oracle routing", "what the same memories score if every prompt is sent to the right one"),
)


OTHERS_WORDS = (
    "Routing decides from a prompt's words alone which memory answers. Where it chose well and the answer is wrong all "
    "the same, the memory itself has not learnt it in these words."
)


# -- making one --------------------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path) -> Path:
    """Make `report.html` of a finished run from its artefacts, in place of an earlier one; returns the file.

    Raises:
        RepairError: there is no finished run, or its files are damaged.
    """
    run = Artefacts.read(run_dir)
    page = environment().get_template("report.html.j2").render(context(run))
    replace_text(run.path / REPORT_FILE, page)
    return run.path / REPORT_FILE


def try_report(run_dir: str | Path) -> Path | None:
    """The same where nothing may fail: a run is not lost because its report cannot be made. None: it was not."""
    try:
        return write_report(run_dir)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        log.warning(
            "%s could not be made (%s); the run is whole: `repair-lightning report --run %s` tries again",
            REPORT_FILE,
            words,
            run_dir,
        )
        return None


def environment() -> Environment:
    """Where the pages' templates are; everything that they are given is escaped."""
    loader = PackageLoader("repair_lightning.reports")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def packed_plotly() -> str:
    """plotly.js, compressed, as base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def context(run: Artefacts) -> dict[str, Any]:
    """Everything that the page shows."""
    drawn = {name: make(run) for name, make in RUN_CHARTS.items()}
    charts = [chart for chart in drawn.values() if isinstance(chart, Chart)]
    number = f"{run.metrics['n_edits']:,}"
    return {
        "title": f"{number} corrections of {run.base}",
        "subtitle": subtitle(run),
        "lead": lead(run),
        "notices": notices(run),
        "tiles": tiles(run),
        "examples": examples(run),
        "scores": score_table(run),
        "forms": forms_table(run),
        "subject_words": subject_words(run),
        "glossary": glossary(run),
        "further": further(run),
        "failed_words": failed_words(run),
        "failed": failed_table(run),
        "others_words": OTHERS_WORDS,
        "others": others_table(run),
        "skipped": skipped_table(run),
        "charts": [chart_in_words(chart) for chart in charts],
        "figures": {chart.name: figure(chart) for chart in charts},
        "missing": [words for words in drawn.values() if isinstance(words, str)],
        "edits": edits_table(run),
        "edits_words": edits_words(run),
        "loop_words": loop_words(run),
        "events": event_table(run),
        "command": run.provenance.get("command", ""),
        "setup": setup(run),
        "config": run.config_text,
        "made": f"Made by REPAIR-Lightning; `repair-lightning report --run {run.path}` makes it anew.",
        "plotly": packed_plotly(),
    }


# -- what was asked and what came of it --------------------------------------------------------------------------------


def subtitle(run: Artefacts) -> str:
    """The run's name, when it ended, how long it took."""
    seconds = run.metrics.get("seconds", {}).get("total")
    ended = [event["time"] for event in run.events]
    when = f", {datetime.fromtimestamp(max(ended), timezone.utc):%Y-%m-%d %H:%M} UTC" if ended else ""
    return f"Run {run.name}{when}" + (f", {duration(seconds)} in all" if seconds else "")


def lead(run: Artefacts) -> list[str]:
    """What was asked and what it came to, in plain words."""
    m = run.metrics
    data, many = run.option("data.path"), f"{m['n_edits']:,}"
    size = m["base"].get("parameters")
    base = f"the language model {run.base}" + (f" ({size / 1e6:,.1f} million parameters)" if size else "")
    source = f" They come from {data}." if data else ""
    changed = "deviation" in m.get("method", {})
    shards = (
        f"Corrections are kept in memories beside it (shards; {m.get('shards', 0):,} at the end), and for every "
        "question a router decides, from its words alone, whether one of them or the "
        f"{'changed' if changed else 'unchanged'} model answers."
    )
    how = f"The model itself was not retrained. {shards}"
    if changed:
        how = "They change some of its own weights" + (f". {shards}" if m.get("shards") else ", for every question.")
    asked = (
        f"A language model was wrong about some facts. {many} corrections were written into {base}, one after the "
        f"other, as they would arrive in use.{source} {how}"
    )
    rel, gen, loc = (run.score(kind) for kind in ("rel", "gen", "loc"))
    parts = [
        f"{percent(rel)} of the corrected prompts get the new answer ({percent(run.score('rel', 'pre_edit'))} before)"
    ]
    parts += [f"{percent(gen)} of the same questions in other words"] * (gen is not None)
    parts += [f"{percent(loc)} of unrelated prompts are answered as before"] * (loc is not None)
    return [asked, f"With all corrections in place, {'; '.join(parts)}."]


def notices(run: Artefacts) -> list[str]:
    """What a reader must know beforehand."""
    statuses = [entry.status for entry in run.entries.values()]
    undone = statuses.count(EditStatus.UNDONE)
    found = []
    if undone:
        found.append(
            f"{undone} of the edits were taken back after the run. The scores and the answers are those at the end of "
            "the run, before that."
        )
    bad = len(run.metrics.get("records", {}).get("bad", ()))
    if bad:
        found.append(f"{bad} records of the data were bad and were not written; they are listed below.")
    return found


def tiles(run: Artefacts) -> list[dict[str, str]]:
    """The headline figures."""
    words = {
        "rel": "of the edits answered right (Rel)",
        "gen": "in other words (Gen)",
        "loc": "unrelated answers kept (Loc)",
        "near": "neighbours' answers kept (Near)",
        "op": "overall (OP)",
    }
    found = [
        {"value": percent(run.score(kind)), "words": text, "mood": ""}
        for kind, text in words.items()
        if run.score(kind) is not None
    ]
    failed = len(problems(run))
    found.append({"value": f"{failed:,}", "words": "edits failed", "mood": "bad" if failed else "good"})
    speed = run.metrics.get("edits_per_minute")
    return found + ([{"value": f"{speed:,.0f}", "words": "edits a minute", "mood": ""}] if speed else [])


def chart_in_words(chart: Chart) -> dict[str, Any]:
    """A picture's text alternative: what it says, and its numbers; small pictures side by side want the whole width."""
    found = {"name": chart.name, "title": chart.title, "words": chart.words, "table": chart_table(chart)}
    return found | {"wide": chart.kind == "points" and chart.panel is not None}


def subject_words(run: Artefacts) -> str:
    """What became of other questions about edited subjects; empty where none was asked."""
    about = run.metrics["final"].get("same_subject")
    if not about:
        return ""
    return (
        f"{counted(about['asked'], 'other question')} about edited subjects, which no edit answers: a shard answers "
        f"{percent(about['fires'])} of them, and {percent(about['changed'])} of the answers changed."
    )


def glossary(run: Artefacts) -> list[tuple[str, str]]:
    """What the words of the score table mean, for those that it uses."""
    unused = {name for kind, name in SCORES_IN_WORDS.items() if run.score(kind) is None}
    return [(word, meaning) for word, meaning in GLOSSARY if word not in unused]


def further(run: Artefacts) -> list[str]:
    """Figures that only some runs have."""
    m, found = run.metrics, []
    moved = m.get("method", {}).get("deviation")
    if moved:
        each = ", ".join(f"{share:.3f} in layer {layer}" for layer, share in moved.items())
        found.append(f"The base's own value matrices were moved, as a share of their norm, by {each}.")
    if m.get("perplexity"):
        both = m["perplexity"]
        found.append(f"Perplexity of the targets: {both['pre']:.2f} before, {both['final']:.3f} after.")
    if m.get("probes"):
        kept = m["probes"]
        found.append(
            f"{kept['number']:,} questions that no edit touches: {percent(kept['pre'])} right before, "
            f"{percent(kept['final'])} after; {percent(kept['same'])} of the answers are unchanged."
        )
    if m.get("earlier"):
        earlier = m["earlier"]
        both = {SCORES_IN_WORDS[kind]: (share, earlier["after"][kind]) for kind, share in earlier["before"].items()}
        shares = ", ".join(f"{name} {percent(old)} before, {percent(new)} after" for name, (old, new) in both.items())
        found.append(
            f"The run went on with an edited model: of its edits {earlier['n_edits']:,} are live ({shares}) and "
            f"{earlier['superseded']:,} superseded."
        )
    return found


def failed_words(run: Artefacts) -> str:
    """How many edits failed."""
    failed, quarantined = len(problems(run)), run.metrics.get("closed_loop", {}).get("quarantined", 0)
    if not failed:
        return "No edit failed: each corrected prompt gets its new answer, and none was given up (quarantined)."
    given_up = f"; {quarantined:,} of them were quarantined: given up after repeated attempts, so the base answers them"
    return f"{failed:,} of {run.metrics['n_edits']:,} edits failed{given_up if quarantined else ''}."


def edits_words(run: Artefacts) -> str:
    """How many edits the table holds, and what became of them."""
    total = len({**run.entries, **edit_rows(run)})
    known = Counter(str(entry.status) for entry in run.entries.values()) or run.metrics.get("edits", {})
    counts = ", ".join(f"{number:,} {status}" for status, number in known.items() if number)
    rest = f" The table holds the first {EDITS_SHOWN:,} of them, failed ones first; all are in edits.parquet."
    return f"{total:,} edits" + (f": {counts}." if counts else ".") + (rest if total > EDITS_SHOWN else "")


def loop_words(run: Artefacts) -> str:
    """The closed loop and the merge in a few sentences."""
    m = run.metrics
    loop, merge = m.get("closed_loop", {}), m.get("merge", {})
    words = f"The edits arrived in {counted(loop.get('windows', 0), 'window')}."
    if run.option("gate.enabled") is not False:
        words += (
            " After each, unrelated questions were asked "
            f"({counted(loop.get('rolled_back', 0), 'window')} taken back because too many had changed)."
        )
    if run.option("feedback.enabled") is not False:
        words += (
            f" The edits themselves were asked: {counted(loop.get('pruned', 0), 'shard')} emptied because of many "
            f"failures, {counted(loop.get('retriggered', 0), 'time')} an edit was sent back to be written anew, "
            f"{counted(loop.get('quarantined', 0), 'edit')} given up."
        )
    if merge:
        words += f" Fusing the side memories: {'accepted' if merge['accepted'] else 'not applied'} ({merge['reason']})."
    return words


def setup(run: Artefacts) -> list[tuple[str, str]]:
    """What was run, where and with what."""
    m, seconds = run.metrics, run.metrics.get("seconds", {})
    options = {
        "router": "model.routing.router",
        "form of a shard": "model.writing.form",
        "edits per window": "data.window",
        "records": "data.path",
        "their format": "data.format",
        "unrelated prompts": "data.irrelevant",
    }
    found = [("base", f"{m['base']['name']} ({str(m['base'].get('sha256', ''))[:12]})")]
    found += [(word, str(m[word])) for word in ("editor", "seed") if word in m]
    layers = list(m.get("method", {}).get("deviation", ())) or [str(m.get("layer"))] * ("layer" in m)
    if layers:
        found.append(("edited layers" if len(layers) > 1 else "edited layer", ", ".join(layers)))
    found += [(word, str(value)) for word, name in options.items() if (value := run.option(name)) is not None]
    if m.get("memory_bytes") is not None:
        found.append(
            ("kept of the edits", f"{m['memory_bytes'] / 2**20:.2f} MiB; {counted(m.get('shards', 0), 'shard')}")
        )
    if seconds:
        parts = (("loading", "load"), ("editing", "edit"), ("scoring", "evaluate"))
        found.append(("time", ", ".join(f"{duration(seconds[key])} {word}" for word, key in parts if key in seconds)))
    versions = run.provenance.get("versions", {})
    if versions:
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return found
