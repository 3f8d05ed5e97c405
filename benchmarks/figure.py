"""All parts in one figure of small multiples; parts that were not measured are left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import report

OURS, SHARDS, OTHER, FAINT, DARK, GOAL = "#0b6e99", "#5aa5c4", "#9aa5ad", "#d5dbdf", "#20282d", "#c4472b"
"""Colours: what this project does, its shards, what it is compared with, room that is granted, marks, and goals."""


def draw(folder: Path) -> list[Path]:
    """Draw what the folder's JSON files hold; returns the files, none where matplotlib is missing."""
    content = report.load(folder)
    shown = {part: value["result"] for part, value in content.items() if "skipped" not in value["result"]}
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(style()):
        columns = 3 if len(shown) in (3, 5, 6) else min(4, len(shown))
        lines = -(-len(shown) // columns)
        figure, grid = plt.subplots(lines, columns, figsize=(4.0 * columns, 3.5 * lines + 0.3), squeeze=False)
        axes = list(grid.flat)
        for axis, (part, result) in zip(axes, shown.items(), strict=False):
            PANELS[part](axis, result)
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        first = next(iter(content.values()))
        machine, base = first["machine"], Path(first["settings"]["base"]).name
        where = f"base {base}, {machine['cpu']}, {machine['threads']} thread(s)"
        figure.suptitle(where, x=0.995, y=0.005, ha="right", va="bottom", fontsize=7.5, color="#5c666d")
        figure.tight_layout(rect=(0, 0.02, 1, 1), w_pad=2.5, h_pad=2.5)
        files = [folder / "figure.png", folder / "figure.svg"]
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)
    return files


def style() -> Any:
    """Quiet axes, titles on the left."""
    return {
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a949b",
        "axes.labelcolor": "#3d464c",
        "xtick.color": "#3d464c",
        "ytick.color": "#3d464c",
        "grid.color": "#eceff1",
        "svg.hashsalt": "repair",
    }


def editing(axis: Any, result: dict[str, Any]) -> None:
    """Bars of edits per minute on a logarithmic scale, with each one's OP."""
    rows = result["variants"][::-1]
    speeds = [row["edits_per_minute"] for row in rows]
    colours = [OURS if row["name"].startswith("ours") else OTHER for row in rows]
    axis.barh([row["name"].replace(", ", ",\n") for row in rows], speeds, color=colours, height=0.62)
    axis.set_xscale("log")
    axis.set_xlim(min(speeds) / 2.5, max(speeds) * 12)
    for at, row in enumerate(rows):
        op = report.percent(row["scores"]["autoregressive"].get("op"))
        axis.text(speeds[at] * 1.12, at, f"{report.number(speeds[at])}  (OP {op})", va="center", fontsize=7.5)
    axis.set_xlabel("edits per minute, logarithmic")
    axis.set_title(f"Editing, {result['edits']} edits")


def flat(axis: Any, result: dict[str, Any]) -> None:
    """Milliseconds per edit against the number of edits already written."""
    before = [0, *(window["edits"] for window in result["windows"])]
    windows = zip(result["windows"], before, strict=False)
    points = [(w["edits"], 1e3 * w["seconds"] / (w["edits"] - b)) for w, b in windows if w["edits"] > b]
    axis.plot(*zip(*points, strict=True), ".", color=OTHER, markersize=3.5, label="each window", zorder=1)
    rows = result["sizes"]
    edits, cost = [row["edits"] for row in rows], [1e3 * row["seconds_per_edit"] for row in rows]
    axis.plot(edits, cost, "o-", color=OURS, markersize=5, label="median before a size")
    for row, x, y in zip(rows, edits, cost, strict=True):
        axis.annotate(f"{row['ratio']:.2f}x", (x, y), (0, -15), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xscale("log")
    axis.set_xticks(edits, [f"{count:,}" for count in edits])
    axis.set_xticks([], minor=True)
    axis.set_xlim(min(edits) / 1.5, max(edits) * 1.5)
    axis.set_ylim(0, 1.35 * max(y for _, y in points))
    axis.set_xlabel("edits written")
    axis.set_ylabel("ms per edit")
    axis.grid(axis="y")
    axis.legend(frameon=False, fontsize=7.5, loc="lower right")
    axis.set_title("Flatness along one stream")


def roofline(axis: Any, result: dict[str, Any]) -> None:
    """Bars of the share, with the goal."""
    names = list(result["batches"])
    shares = [100 * result["batches"][name]["share"] for name in names]
    axis.bar([name.replace(" beside ", "\nbeside ") for name in names], shares, color=OURS, width=0.5)
    for at, share in enumerate(shares):
        inside = share > 10  # else the goal's line may cross it
        look = {"color": "white", "va": "top"} if inside else {"va": "bottom"}
        axis.text(at, share - 2 if inside else share + 1, f"{share:.0f} %", ha="center", fontsize=8, **look)
    axis.axhline(40, color=GOAL, linewidth=1, linestyle="--")
    axis.text(len(names) - 0.55, 41, "goal", color=GOAL, fontsize=7.5, ha="right")
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylim(0, max(100, 1.1 * max(shares)))
    axis.set_ylabel("% of the matmul rate")
    axis.set_title("Roofline of the inner steps")


def generation(axis: Any, result: dict[str, Any]) -> None:
    """A heat map of the ratios."""
    from matplotlib.colors import LinearSegmentedColormap

    low_rank = [cell for cell in result["cells"] if cell["form"] == "low_rank"]
    cells = {(cell["shards"], cell["batch"]): cell["ratio"] for cell in low_rank}
    shards, batches = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    values = [[cells[k, b] for b in batches] for k in shards]
    colours = LinearSegmentedColormap.from_list("ratio", ["#eef5f8", OURS])
    top = max(1.5, *(value for row in values for value in row))
    axis.imshow(values, cmap=colours, vmin=1.0, vmax=top, aspect="auto", origin="lower")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = value > 1 + 0.55 * (top - 1)
            axis.text(x, y, f"{value:.2f}x", ha="center", va="center", color="white" if dark else DARK)
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_yticks(range(len(shards)), [str(count) for count in shards])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("prompts per batch")
    axis.set_ylabel("shards")
    axis.set_title("Generation, time over the plain base's")


def memory(axis: Any, result: dict[str, Any]) -> None:
    """What must be held, stacked, against what was held; each stream in units of its own bound."""
    rows = result["streams"][::-1]
    bounds = [row["base_bytes"] + row["shard_bytes"] + row["cache_budget"] for row in rows]
    left = [0.0] * len(rows)
    kinds = (("base_bytes", "base", OURS), ("shard_bytes", "shards", SHARDS), ("cache_budget", "cache", FAINT))
    for key, label, colour in kinds:
        sizes = [row[key] / bound for row, bound in zip(rows, bounds, strict=True)]
        axis.barh(range(len(rows)), sizes, left=left, color=colour, height=0.5, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for at, row in enumerate(rows):
        mark: dict[str, Any] = {"color": DARK, "linewidth": 2, "label": "held" if at == 0 else None}
        axis.plot([row["ratio"]] * 2, [at - 0.36, at + 0.36], **mark)
        text = f"{row['ratio']:.2f}x, {report.mib(row['held'])} MiB"
        axis.text(row["ratio"] + 0.03, at + 0.28, text, va="bottom", fontsize=7.5)
    axis.axvline(1.3, 0, 0.82, color=GOAL, linewidth=1, linestyle="--", label="goal")
    axis.set_yticks(range(len(rows)), [f"{row['cache_budget'] >> 20} MiB\ncache" for row in rows])
    axis.set_xlim(0, 1.25 * max(1.5, *(row["ratio"] for row in rows)))
    axis.set_ylim(-0.6, len(rows) + 0.1)
    axis.set_xlabel("held, in units of base + shards + cache budget")
    axis.legend(frameon=False, fontsize=7.5, ncols=5, loc="upper left", columnspacing=0.9, handlelength=1.0)
    axis.set_title(f"Memory of a stream, {rows[0]['edits']:,} edits")


def clustering(axis: Any, result: dict[str, Any]) -> None:
    """Seconds against the number of vectors, both logarithmic, with the recall."""
    rows = result["sizes"]
    points, seconds = [row["points"] for row in rows], [row["seconds"] for row in rows]
    axis.plot(points, seconds, "o-", color=OURS, markersize=5)
    for row in rows:
        text = f"recall {row['recall']:.2f}"
        axis.annotate(text, (row["points"], row["seconds"]), (6, -9), textcoords="offset points", fontsize=7.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(min(points) / 1.6, max(points) * 6)
    axis.set_ylim(min(seconds) / 3, max(seconds) * 3)
    axis.set_xticks(points, [f"{count // 1000:,}k" for count in points])
    axis.set_xticks([], minor=True)
    axis.grid()
    axis.set_xlabel("vectors")
    axis.set_ylabel("seconds")
    axis.set_title("Clustering into homogeneous batches")


def routing(axis: Any, result: dict[str, Any]) -> None:
    """Milliseconds of routing one prompt, against the number of shards in one and in two levels, and of edits."""
    banks, keyed = result["banks"], result["keyed"]
    lines = [
        ("activation router, one level", OTHER, "s--", [(row["shards"], row["batch_1"]["one"]) for row in banks]),
        ("activation router, two levels", OTHER, "o-", [(row["shards"], row["batch_1"]["two"]) for row in banks]),
        ("key router", OURS, "o-", [(row["edits"], row["rephrased"]["batch_1"]["median"]) for row in keyed]),
        (
            "key router, search alone",
            OURS,
            "s--",
            [(row["edits"], row["searched"]["batch_1"]["median"]) for row in keyed],
        ),
    ]
    for label, colour, form, points in lines:
        counts, seconds = [count for count, _ in points], [1e3 * spent for _, spent in points]
        axis.plot(counts, seconds, form, color=colour, markersize=5, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid()
    axis.set_xlabel("shards or edits")
    axis.set_ylabel("ms per prompt")
    axis.legend(frameon=False, fontsize=7.5, loc="best")
    axis.set_title("Routing, one prompt at a time")


def checkpoints(axis: Any, result: dict[str, Any]) -> None:
    """Seconds of a checkpoint against the number of edits that are held, written whole and in segments."""
    rows = result["sizes"]
    edits = [row["edits"] for row in rows]
    axis.plot(edits, [row["whole"]["seconds"] for row in rows], "o-", color=OTHER, markersize=5, label="whole")
    axis.plot(edits, [row["apart"]["seconds"] for row in rows], "o-", color=OURS, markersize=5, label="in segments")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid()
    axis.set_xlabel("edits held")
    axis.set_ylabel("seconds per checkpoint")
    axis.legend(frameon=False, fontsize=7.5, loc="upper left")
    axis.set_title("Checkpoints")


def merging(axis: Any, result: dict[str, Any]) -> None:
    """OP of the default rule and of the references against the number of shards, beside the OP before."""
    forms = list(dict.fromkeys(bank["form"] for bank in result["banks"]))
    counts = sorted({bank["shards"] for bank in result["banks"]})
    for form, colour in zip(forms, (OURS, SHARDS, OTHER), strict=False):
        banks = sorted((bank for bank in result["banks"] if bank["form"] == form), key=lambda bank: bank["shards"])
        before = [bank["before"]["scores"]["autoregressive"]["op"] for bank in banks]
        lines = [(before, "--", ""), (_merged(banks, "ties"), "o-", form), (_merged(banks, "least squares"), ":", "")]
        for ops, look, label in lines:
            axis.plot(counts, [100 * (op or 0) for op in ops], look, color=colour, markersize=4, label=label or None)
    axis.plot([], [], "--", color=DARK, label="before")
    axis.plot([], [], ":", color=DARK, label="least squares")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_ylim(0, 105)
    axis.set_xlabel("shards that became one")
    axis.set_ylabel("OP, per cent")
    axis.grid(axis="y")
    axis.legend(frameon=False, fontsize=7)
    axis.set_title("Merging, default rule")


def _merged(banks: list[dict[str, Any]], kind: str) -> list[float | None]:
    """Each bank's OP after the merge of a kind, of the default rule where there are several."""
    default = {"alpha": 1.0, "normalize": "contributors"}
    rows = [
        next(row for row in bank["after"] if row["rule"]["kind"] == kind and default.items() <= row["rule"].items())
        for bank in banks
    ]
    return [row["scores"]["autoregressive"]["op"] for row in rows]


def scaling(axis: Any, result: dict[str, Any]) -> None:
    """Speed-up by number of ranks, of editing and of scoring, against as many times as there are ranks."""
    rows = result["rows"]
    ranks = [row["ranks"] for row in rows]
    axis.plot(ranks, ranks, color="#b8c0c5", linewidth=1, label="ranks")
    axis.plot(ranks, [row["speedup"] for row in rows], "o-", color=OURS, label="editing")
    axis.plot(ranks, [row["speedup_of_scoring"] for row in rows], "s--", color=OTHER, label="scoring")
    axis.set_xticks(ranks)
    axis.set_xlabel("ranks")
    axis.set_ylabel("faster by")
    axis.legend()
    axis.set_title(f"Scaling, {result['edits']} edits")


def gpu(axis: Any, result: dict[str, Any]) -> None:
    """Bars of edits per second by edited layer."""
    rows = result["layers"]
    speeds = [row["edits_per_second"] for row in rows]
    axis.bar([f"layer {row['layer']}" for row in rows], speeds, color=OURS, width=0.5)
    for at, row in enumerate(rows):
        held = f"\n{row['peak'] / 2**30:.1f} GiB" if row["peak"] else ""
        axis.text(at, speeds[at], f"{speeds[at]:.3g}/s{held}", ha="center", va="bottom", fontsize=8)
    axis.set_ylim(0, 1.3 * max(speeds))
    axis.set_ylabel("edits per second")
    axis.set_title(f"GPU, {result['parameters'] / 1e9:.2g} B parameters")


def recursion(axis: Any, result: dict[str, Any]) -> None:
    """Milliseconds of a step along the stream."""
    rows = result["sizes"]
    axis.plot([row["steps"] for row in rows], [1e3 * row["seconds"] for row in rows], "o-", color=OURS)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("steps so far")
    axis.set_ylabel("ms per step")
    axis.set_title("recursive least squares")


PANELS: Mapping[str, Callable[[Any, dict[str, Any]], None]] = {
    "editing": editing,
    "flat": flat,
    "roofline": roofline,
    "generation": generation,
    "memory": memory,
    "clustering": clustering,
    "routing": routing,
    "checkpoints": checkpoints,
    "merging": merging,
    "scaling": scaling,
    "recursion": recursion,
    "gpu": gpu,
}
