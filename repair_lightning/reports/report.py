"""What a run says: its scores and what was measured besides, and for its page what failed and why, edits, events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from repair_lightning.edits.journal import RESUMED
from repair_lightning.edits.ledger import EditStatus, LedgerEntry
from repair_lightning.errors import counted
from repair_lightning.reports.artefacts import Artefacts, Row
from repair_lightning.scoring.protocols import AUTOREGRESSIVE, KINDS, PROTOCOLS
from repair_lightning.scoring.separation import OTHERS
from repair_lightning.texts import dialogue
from repair_lightning.types import BASE, READS

STAGES = {"pre_edit": "before", "before_merge": "before merge", "final": "after", "oracle_routing": "oracle routing"}
ASKED = {"gen": "rephrases", "loc": "unrelated prompts", "near": "neighbours"}
"""What is asked for a score; OP needs the first two."""
SCORES_IN_WORDS = {**{name: name.capitalize() for name in KINDS}, "op": "OP"}
EDITS_SHOWN, ROWS_SHOWN, TEXT_SHOWN = 2000, 200, 240
"""Most edits in the searchable table, rows of another table, characters of a text."""


@dataclass(frozen=True)
class Table:
    """A title, the cells as texts or numbers, and what a reader must know of them.

    The columns may have two levels: what comes again for each group, and the groups above it.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""
    id: str = ""

    def flat(self) -> pd.DataFrame:
        """The cells under one line of titles: `OP, N = 30`."""
        columns = [", ".join(filter(None, one[::-1])) if isinstance(one, tuple) else one for one in self.frame.columns]
        return self.frame.set_axis(columns, axis=1)

    def text(self, form: str = "pipe") -> str:
        """The cells in a form of `tabulate`'s, Markdown by default; the first column is left-aligned."""
        cells = self.flat().map(lambda cell: str(cell).replace("|", r"\|"))
        align = ["left", *["right"] * (len(cells.columns) - 1)]
        return cells.to_markdown(index=False, disable_numparse=True, colalign=align, tablefmt=form)


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


FURTHER = {
    "in other persons' words": ("personas",),
    "portability": ("portability", "all", "with_leak"),
    "portability, without questions that state the answer": ("portability", "all", "without_leak"),
    "several hops, any of a case's questions": ("multi_hop", "any_of_3"),
    "several hops, all of them": ("multi_hop", "all_of_3"),
    "the old answer still said": ("old_answer",),
    "new answer likelier, edits (ES)": ("probability", "es"),
    "new answer likelier, rephrases (PS)": ("probability", "ps"),
    "own answer likelier, neighbours (NS)": ("probability", "ns"),
    "in text: the new answer": ("in_text", "new"),
    "in text: not the old answer": ("in_text", "without_old"),
    "in text: both": ("in_text", "both"),
    "denied, the base's answer kept": ("negation", "kept"),
    "judged right, edits": ("judge", "rel"),
    "judged right, rephrases": ("judge", "gen"),
}
"""What is scored beside, in words, and where it stands in `final` of `metrics.json`."""


def further_frame(final: Mapping[str, Any]) -> pd.DataFrame:
    """What was scored beside, in per cent, and the age of the edits where every fifth has some; what was not asked is
    left out."""
    rows = []
    for words, path in FURTHER.items():
        found: Any = final
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        rows += [[words, _percent(found)]] if found is not None else []
    fifths = final.get("age") or ()
    for kind in ("rel", "gen") if all(part["edits"] for part in fifths) else ():
        if any(part[kind] is not None for part in fifths):
            known = " ".join(_percent(part[kind]) for part in fifths)
            rows.append([f"{kind.capitalize()} by age, oldest fifth first", known])
    return pd.DataFrame(rows, columns=["score", "per cent"])


def percent(value: float | None, sign: str = " %") -> str:
    """A share in [0, 1] as a sentence has it."""
    return "-" if value is None else f"{100 * value:.1f}{sign}"


_percent = partial(percent, sign="")


def print_report(metrics: Mapping[str, Any], run_dir: Path | None, console: Console | None = None) -> None:
    """The closing words of a run: scores, routing, what became of the edits, and where everything is."""
    by = f", {metrics['editor']}" if "editor" in metrics else ""
    title = f"{counted(metrics['n_edits'], 'edit')} of {metrics['base']['name']}{by}{sample_words(metrics)}"
    tables = [Table(title, score_frame(metrics))]
    tables += [] if only_in_base(metrics) else [Table("Who answered", routing_frame(metrics["routing"]))]
    tables.append(Table("Edits in other forms", form_frame(metrics["final"].get("forms"))))
    said = [f"\n{table.title}\n{table.text('simple')}" for table in tables if len(table.frame)]
    further = "; ".join(f"{words}: {value}" for words, value in further_frame(metrics["final"]).values.tolist())
    said += ["", *([f"Also, per cent: {further}."] if further else []), *side_words(metrics)]
    if run_dir is not None:
        times = {"edit": "editing", "evaluate": "scoring", "total": "in all"}
        spent = metrics["seconds"]
        first = f" ({spent['prepare']:.1f} of them before the first edit)" if spent.get("prepare") else ""
        took = ", ".join(f"{spent[key]:.1f} s {word}{first * (key == 'edit')}" for key, word in times.items())
        said += [loop_words(metrics), f"{counted(round(metrics['edits_per_minute']), 'edit')} a minute: {took}."]
        names = ", ".join(sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")))
        said.append(f"Everything is in {run_dir}, for a reader in report.html: {names}")
        if (run_dir / "pack").is_dir():
            said.append(f"Ask both models: repair-lightning ask --pack {run_dir / 'pack'} (or serve)")
            said.append(f"The edits by their ids: repair-lightning log --run {run_dir}")
    (console or Console()).print("\n".join(said), markup=False, highlight=False, soft_wrap=True)


def sample_words(metrics: Mapping[str, Any]) -> str:
    """What a title of scores says where they are of some edits alone; else nothing."""
    scored = metrics.get("scored")
    return f", scores of a sample of {counted(scored['edits'], 'edit')}" if scored else ""


def not_measured(scores: Mapping[str, float | None]) -> Iterator[str]:
    """A sentence on the scores that are missing, and why; none where all are there."""
    lacking = {SCORES_IN_WORDS[name]: what for name, what in ASKED.items() if scores.get(name) is None}
    if lacking:
        named = ", ".join(f"{name} (no record has {what})" for name, what in lacking.items())
        needed = " and ".join(name for name in lacking if name != "Near")
        yield f"Not measured: {named}." + f" Without {needed} there is no OP." * bool(needed)


def side_words(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What was measured beside the scores."""
    yield from not_measured(metrics["final"][AUTOREGRESSIVE])
    if (found := metrics["final"].get("op_interval")) and found["low"] < found["high"]:
        bounds = f"between {percent(found['low'])} and {percent(found['high'])}"
        yield f"Were the edits drawn again, OP would lie {bounds} in 95 of 100 cases."
    if about := metrics["final"].get("same_subject"):
        words = f"a shard answers {percent(about['fires'])}, {percent(about['changed'])} of the answers changed"
        none = "a shard answers none, and no answer changed"
        found = words if about["fires"] or about["changed"] else none
        yield f"{counted(about['asked'], 'other question')} about edited subjects: {found}."
    if undone := metrics.get("undone"):
        named = f"{', '.join(undone[:5])}{', ...' * (len(undone) > 5)}"
        yield f"Taken back, and therefore not asked: {counted(len(undone), 'edit')} ({named})."
    if metrics.get("perplexity"):
        yield "Perplexity of the targets: " + ", ".join(f"{k} {v:.2f}" for k, v in metrics["perplexity"].items())
    if kept := metrics.get("probes"):
        yield (
            f"{counted(kept['number'], 'probe')} that no edit touches: {percent(kept['pre'])} right before, "
            f"{percent(kept['final'])} after; {percent(kept['same'])} of the answers are unchanged."
        )
    if earlier := metrics.get("earlier"):
        before, after, lost = earlier["before"], earlier["after"], earlier["lost"]
        words = ", ".join(f"{kind.capitalize()} {_percent(before[kind])} -> {_percent(after[kind])}" for kind in before)
        words += f"; no longer answered right: {', '.join(lost[:5])}{', ...' * (len(lost) > 5)}" * bool(lost)
        live = f"{counted(earlier['n_edits'], 'edit')} live ({words})"
        live += f" and {earlier['superseded']:,} superseded" * bool(earlier["superseded"])
        yield f"Of the pack that the run started from: {live}."


def loop_words(metrics: Mapping[str, Any]) -> str:
    """What the closed loop and the merge did; empty where the run has no such figures."""
    loop, merge = metrics.get("closed_loop"), metrics.get("merge")
    if not loop or not merge:
        return ""
    done = {
        f"{loop['rolled_back']} rolled back": loop["rolled_back"],
        f"{counted(loop['pruned'], 'shard')} pruned": loop["pruned"],
        f"{counted(loop['retriggered'], 'edit')} written again": loop["retriggered"],
        f"{counted(loop['quarantined'], 'edit')} quarantined": loop["quarantined"],
    }
    told = [words for words, number in done.items() if number] or ["nothing rolled back, pruned or written again"]
    return (
        f"Closed loop: {counted(loop['windows'], 'window')}, {', '.join(told)}. "
        f"Merge: {'accepted' if merge['accepted'] else 'not applied'} ({merge['reason']})."
    )


def verdict(metrics: Mapping[str, Any], place: str | Path) -> str:
    """A finished run, or a scored pack, in one line: the final score in free generation, what became of the edits."""
    final = metrics["final"][AUTOREGRESSIVE]
    scores = "  ".join(f"{words} {_percent(final[name])}" for name, words in SCORES_IN_WORDS.items())
    quarantined = metrics.get("closed_loop", {}).get("quarantined", 0)
    given_up = f"; {quarantined:,} quarantined" * bool(quarantined)
    edits = f"{counted(metrics['n_edits'], 'edit')} of {metrics['base']['name']}{sample_words(metrics)}"
    return f"{edits}: {scores}{given_up}; {place}"


# -- the tables of its page, which escapes their texts -----------------------------------------------------------------


def table(id: str, title: str, rows: Sequence[Row], rest: str, most: int = ROWS_SHOWN) -> Table:
    """The first rows as a table, long texts cut off, which says how many there are and where the `rest` is."""
    frame = pd.DataFrame(rows[:most], dtype=object)
    long = frame.map(lambda cell: isinstance(cell, str) and len(cell) > TEXT_SHOWN)
    frame = frame.mask(long, frame.map(lambda cell: str(cell)[: TEXT_SHOWN - 1].rstrip() + "…"))
    note = f"The first {most:,} of {len(rows):,}; the others are in {rest}." if len(rows) > most else ""
    return Table(title, frame, note, id)


def problems(run: Artefacts) -> dict[str, str]:
    """Id -> why, for every edit that is not answered right at the end or whose place in the ledger says so."""
    found: dict[str, str] = {}
    for id in dict.fromkeys([*run.entries, *run.own_rows]):
        entry, row = run.entries.get(id), run.own_rows.get(id)
        wrong = why_wrong(row, entry) if row is not None and not row["correct"] else None
        if entry is None or entry.status == EditStatus.WRITTEN:
            found |= {id: wrong} if wrong else {}
        elif entry.status not in (EditStatus.SUPERSEDED, EditStatus.UNDONE):
            words = f"{entry.status}: {entry.reason}" if entry.reason else str(entry.status)
            if entry.loss is not None:
                words += f" (its loss after the last write was {entry.loss:.3g} nats a token)"
            words += "; the base answers it" if entry.shard is None else f"; {wrong}" if wrong else ""
            found[id] = words
    return found


CHECKS = {
    "its target's tokens said": "the nearest edit's shard would not say its target here",
    "activation": "the shard that the key chose was not excited enough",
}
"""What a prompt has to pass besides the score, as its line in `generations.jsonl` names it, and what is so where it
did not."""
OTHER_CHECK = "a further check failed"
"""Of a check that is not among these, or of an older run."""


def check_failed(row: Row) -> str | None:
    """The first check besides the score that a prompt did not pass, by its name."""
    checks = row.get("checks") or {}
    return next((name for name, (value, limit) in checks.items() if value is None or value < limit), None)


def held_back(row: Row) -> str:
    """Why a prompt whose score is over its threshold is answered by the base."""
    return CHECKS.get(check_failed(row) or "", OTHER_CHECK)


def why_wrong(row: Row, entry: LedgerEntry | None) -> str:
    """Why a prompt is answered wrong, from who answered it."""
    owner, memory, kept = entry.shard if entry else None, row["memory"], row["kind"] in OTHERS
    score, threshold = row["score"], row["threshold"]
    scored = score is not None and threshold is not None
    words = f"score {score:.2f}, needed {threshold:.2f}" if scored else ""
    if memory == READS:
        return f"it asks for a text: the base answered, which has read edit {row['nearest']}"
    if memory == BASE:
        if kept:
            return "the base answered, and its own weights have changed"
        if owner == BASE:
            return "the base answered, into whose weights the edit is written"
        if scored and score > threshold:
            words = held_back(row)
        elif score is not None and score < 0 and threshold is None:
            words = "it names nothing that an edit is about"
        return f"no shard answered: {words}".removesuffix(": ")
    words += f", nearest edit {row['nearest']}" if row.get("nearest") else ""
    if kept:
        return f"shard {memory} answered in place of the base ({words})"
    if memory == owner:
        return "its own shard answered, in other words than the target"
    return f"another edit's shard answered: {memory} ({words})"


def _by(memory: int, base: str) -> str:
    """Who answered, in words; `base` names the base."""
    return {BASE: base, READS: "base, which has read edits"}.get(memory, f"shard {memory}")


def others_table(run: Artefacts) -> Table:
    """Rephrases, unrelated prompts and neighbours that are answered wrong, with the reason."""
    names = {"rephrase": "in other words", "locality": "unrelated", "near": "neighbour"}
    rows = []
    for row in run.final:
        if row["kind"] != "edit" and not row["correct"]:
            expected = row["expected"] if row["kind"] == "rephrase" else row["base_answer"]
            asked = {"kind": names[row["kind"]], "of edit": row["id"], "asked": dialogue.shown(row["prompt"])}
            why = why_wrong(row, run.entries.get(row["id"]))
            rows.append(asked | {"should say": expected, "says": row["answer"], "why": why})
    return table("others-table", "Other prompts that are answered wrong", rows, "generations.jsonl")


def changed_table(run: Artefacts) -> Table:
    """Other questions about edited subjects that were asked, those whose answers changed first."""
    rows = []
    for row in sorted(run.about_subjects, key=lambda row: row["kept"]):
        said = {"of edit": row["id"], "asked": dialogue.shown(row["prompt"]), "the base says": row["base_answer"]}
        by = _by(row["memory"], "the base" if row["kept"] else "the base, changed")
        rows.append(said | {"now says": "the same" if row["kept"] else row["answer"], "answered by": by})
    title = "Other questions about edited subjects, and which of their answers changed"
    return table("changed-table", title, rows, "generations.jsonl, kind `same_subject`")


def edits_table(run: Artefacts) -> Table:
    """All edits: failed ones first with the reason, then in order of arrival. Answers of those that were taken back are
    from before, and say so."""
    why, answered = problems(run), run.own_rows
    base = "base, changed" if "deviation" in run.metrics.get("method", {}) else "base"
    rows = []
    for one in dict.fromkeys([*why, *run.entries, *answered]):
        entry, row = run.entries.get(one), answered.get(one, {})
        prompt, target = (entry.edit.prompt, entry.edit.target) if entry else (row["prompt"], row["expected"])
        said = {"edit": one, "asked": dialogue.shown(prompt), "should say": target, "says": row.get("answer")}
        said |= {"before": row.get("base_answer"), "now": "not asked", "answered by": None}
        if row:
            said["now"] = "right" if row["correct"] else "wrong"
            said["answered by"] = _by(row["memory"], base)
            if entry and entry.status == EditStatus.UNDONE:
                said |= {name: f"before it was taken back: {said[name]}" for name in ("says", "now", "answered by")}
        said |= {"status": str(entry.status), "writes": entry.attempts} if entry else {"status": None, "writes": None}
        rows.append(said | {"why": why.get(one) or (entry.reason if entry else None)})
    return table("all-edits", "", rows, "edits.parquet and generations.jsonl", EDITS_SHOWN)


def event_table(run: Artefacts) -> Table:
    """The journal's resumptions, and of its edits all but arrivals, writes and checks that went well: what was done to
    which, why, and how many of them are written in the end."""
    plain = ("arrived", "written", "evaluated", "inherited")
    told = [e for e in run.events if e["kind"] == RESUMED or (e["id"] is not None and e["kind"] not in plain)]
    rows = []
    for (kind, reason, window), same in groupby(told, key=lambda e: (e["kind"], e["reason"], e["window"])):
        first, *others = same
        ids = list(dict.fromkeys(event["id"] for event in (first, *others) if event["id"] is not None))
        known = [run.entries[id].status for id in ids if id in run.entries]
        when = f"{datetime.fromtimestamp(first['time'], timezone.utc):%H:%M:%S}"
        done = {"time, UTC": when, "what": kind, "why": reason, "edits": len(ids) or None}
        done |= {"arrived in window": None if window is None else window + 1}  # as `log` counts
        named = ", ".join(ids[:4]) + ", ..." * (len(ids) > 4)
        rows.append(done | {"written in the end": known.count(EditStatus.WRITTEN) if ids else None, "which": named})
    return table("event-table", "What was done to which edits", rows, "`repair-lightning log --run DIR`")


def merge_table(metrics: Mapping[str, Any]) -> Table:
    """Every merge that was tried: what it made of which shards, by what weights, and what it cost."""
    rows = []
    for one in (metrics.get("merge") or {}).get("merges") or ():
        into = {None: "-", BASE: "the base's own weights"}.get(one["into"], f"shard {one['into']}")
        weights = ", ".join(f"{weight:.2f}" for weight in one["weights"].values())
        tried = {"shards": ", ".join(map(str, one["shards"])), "into": into, "rule": one["rule"].replace("_", " ")}
        tried |= {"weights": weights, "before": _percent(one["before"]), "after": _percent(one["after"])}
        rows.append(tried | {"accepted": "yes" if one["accepted"] else "no", "why": one["reason"]})
    return table("merge-table", "Merges", rows, "metrics.json")


# -- tables as files ---------------------------------------------------------------------------------------------------


def markdown(tables: Sequence[Table], lead: Sequence[str], remarks: Sequence[str]) -> str:
    """Some sentences, the tables, and remarks as a list."""
    parts = list(lead)
    for table in tables:
        parts += [f"## {table.title}", table.text(), table.note]
    parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """The tables as a document that compiles as it is, and serves a paper by `\\input` where the packages `standalone`
    and `booktabs` are loaded."""
    texts = [
        r"\documentclass[varwidth=\maxdimen, border=6pt]{standalone}",
        r"\usepackage{booktabs}",
        r"\begin{document}",
    ]
    for table in tables:
        columns = "l" + "r" * (len(table.frame.columns) - 1)
        cells = table.frame.to_latex(index=False, escape=True, column_format=columns, multicolumn_format="c")
        texts.append(rf"\textbf{{{table.title}}}\par\smallskip")
        texts.append(cells.replace("±", r"$\pm$") + r"\par\bigskip" + "\n")
    return "\n".join([*texts, r"\end{document}", ""])
