"""The five forms of pictures, drawn by Altair from rows of data. Texts of the user's are data here, never markup."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import altair as alt
import pandas as pd
import vl_convert

from repair_lightning.storage.files import replace_text

Row = Mapping[str, Any]

BLUE, ORANGE, GREEN, PINK = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
SKY, RED, DARK, GREY = "#56b4e9", "#d55e00", "#1d2529", "#8a949b"
"""Apart for the colour-blind too (Okabe and Ito, 2008), without the yellow."""
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, RED, DARK, GREY]
SHAPES = ["circle", "triangle-up", "square", "diamond", "cross", "triangle-down"]
Look = tuple[str, str]
"""A colour and a mark."""
EDITORS: Mapping[str, Look] = {
    "keyed": (BLUE, "circle"),
    "repair": (RED, "square"),
    "wise": (GREEN, "triangle-up"),
    "grace": (PINK, "diamond"),
    "defer": (ORANGE, "cross"),
    "ft": (GREY, "circle"),
    "ft_ewc": (GREY, "square"),
    "rome": (SKY, "triangle-up"),
    "memit": (SKY, "triangle-down"),
    "mend": (DARK, "diamond"),
    "ultraedit": (ORANGE, "triangle-up"),
    "rlsedit": (GREEN, "square"),
    "rls_repair": (PINK, "cross"),
    "lookup": (DARK, "cross"),
    "icl": (RED, "triangle-down"),
    "lora": (BLUE, "diamond"),
}
"""How each editor looks, in every picture."""
CONFIG = {
    "aria": False,  # the page has the words and the numbers beside each picture
    "font": "Liberation Sans, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#eceff1", "domainColor": "#8a949b", "tickColor": "#8a949b", "labelLimit": 300},
    "header": {"labelFontWeight": "bold", "labelAnchor": "start", "labelLimit": 300},
    "legend": {"orient": "bottom", "columns": 3, "labelLimit": 0, "title": None},
    "title": {"anchor": "start"},
}
WIDTH = 380
WHOLE = (0.0, 100.0)
"""The limits of an axis of shares in per cent that is not zoomed."""


@dataclass(frozen=True)
class Chart:
    """One picture: the name of its files, what it shows, what it says to a reader who does not see it, its data (rows
    with the same columns; None for what is unknown), and the picture as Altair draws it."""

    name: str
    title: str
    words: str
    rows: Sequence[Row]
    picture: Any

    def svg(self, titled: bool = False) -> str:
        """The picture as SVG; always the same for the same data."""
        svg = vl_convert.vegalite_to_svg(self._spec(titled))
        ids = list(dict.fromkeys(re.findall(r'id="((?:gradient_|clip)\d+)"', svg)))  # Vega counts on from the last one
        return re.sub(r'(?<=id=")\w+|(?<=url\(#)\w+', lambda m: f"i{ids.index(m[0])}" if m[0] in ids else m[0], svg)

    def write(self, folder: Path) -> list[Path]:
        """Write `NAME.png`, `NAME.svg` and the data as `NAME.csv`; returns the files."""
        png, svg, csv = files = [folder / f"{self.name}.{suffix}" for suffix in ("png", "svg", "csv")]
        png.write_bytes(vl_convert.vegalite_to_png(self._spec(titled=True), ppi=130))
        replace_text(svg, self.svg(titled=True))
        replace_text(csv, pd.DataFrame(self.rows, dtype=object).to_csv(index=False))
        return files

    def _spec(self, titled: bool) -> dict[str, Any]:
        title = {"title": _printable(self.title)} if titled else {}
        return self.picture.to_dict() | {"config": CONFIG} | title


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows; what is not a number is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def lines(
    rows: Sequence[Row],
    x: str,
    y: str,
    group: str,
    titles: Sequence[str],
    log: str = "",
    spread: tuple[str, str] | None = None,
    looks: Mapping[str, Look] | None = None,
) -> Any:
    """A line for each group; where some coincide, one under all their names. `titles` are those of x and y, `log` names
    logarithmic axes; y is in per cent where its title says so, `spread` are the columns with a bar's two ends."""
    rows, names = _once(rows, x, y, group)
    few = len(rows) <= 60 * len(names)
    colour, mark = _look(rows, group, {names.get(name, name): look for name, look in (looks or {}).items()})
    limits = _limits(row[name] for row in rows for name in (y, *(spread or ())))
    base = alt.Chart(_data(rows), width=WIDTH, height=230).encode(
        x=_axis(alt.X, x, titles[0], "x" in log), y=_axis(alt.Y, y, titles[1], "y" in log, limits), color=colour
    )
    drawn = [base.mark_line(clip=False).encode(strokeDash=_named(group, alt.StrokeDash, legend=None))]
    drawn += [base.mark_point(filled=True, size=40, opacity=1).encode(shape=mark)] if few else []
    if spread:
        ends = {"y": _axis(alt.Y, spread[0], titles[1], "y" in log, limits), "y2": spread[1]}
        drawn.append(base.mark_errorbar(ticks=True).encode(**ends))
    return alt.layer(*drawn)


def _once(rows: Sequence[Row], x: str, y: str, group: str) -> tuple[list[Row], dict[str, str]]:
    """The rows of lines that do not coincide with an earlier one, which has the names of all that do; and by its first
    name that of each."""
    same: dict[Any, list[str]] = {}
    for name in _values(rows, group):
        same.setdefault(tuple((row[x], row[y]) for row in rows if row[group] == name), []).append(name)
    words = {names[0]: " = ".join(names) for names in same.values()}
    return [{**row, group: words[row[group]]} for row in rows if row[group] in words], words


def histograms(
    rows: Sequence[Row],
    x: str,
    y: str,
    panel: str,
    group: str,
    titles: Sequence[str],
    edges: Sequence[float],
    mark: float,
    looks: Mapping[str, Look],
) -> Any:
    """Bars y at the numbers x, each between two of the `edges`, with a colour for each name in `group`, a small picture
    for each panel one below the other; a vertical line at `mark`."""
    domain = alt.Scale(domain=[edges[0], edges[-1]], nice=False)
    base = alt.Chart(width=WIDTH, height=60)
    bars = base.mark_bar(size=0.9 * WIDTH / (len(edges) - 1)).encode(
        x=_axis(alt.X, x, titles[0]).scale(domain),
        y=alt.Y(y, type="quantitative", title=titles[1], axis=alt.Axis(tickCount=3)),
        color=_look(rows, group, looks)[0].legend(columns=1),
    )
    rule = base.mark_rule(color=DARK, strokeDash=[4, 3], strokeWidth=1.5).encode(x=alt.datum(mark))
    drawn = alt.layer(bars, rule, data=_data(rows)).facet(facet=_panels(rows, panel), columns=1)
    return drawn.resolve_scale(y="independent")


def heat(
    rows: Sequence[Row], x: str, y: str, value: str, titles: Sequence[str | None] = (None, None), frame: Any = None
) -> Any:
    """A colour for each pair of x and y and its text, `shown`; `frame` is the pair that is framed. Numbers rise
    upwards, words are read downwards."""
    known = [row[value] for row in rows if row[value] is not None]
    top, places = max(known), _values(rows, y)
    low = min([*known, top - 20])  # small differences look small
    wide = max(70, *(7 * len(str(name)) for name in _values(rows, x)))
    base = alt.Chart(_data(rows), width=alt.Step(wide), height=alt.Step(45)).encode(
        x=alt.X(x, type="ordinal", sort=_values(rows, x), title=titles[0], axis=alt.Axis(labelAngle=0)),
        y=alt.Y(y, type="ordinal", sort=places if isinstance(places[0], str) else places[::-1], title=titles[1]),
    )
    scale = alt.Scale(scheme="viridis", domain=[low, top])
    legend = alt.Legend(orient="right", title="per cent")
    cells = base.mark_rect().encode(color=alt.Color(value, type="quantitative", scale=scale, legend=legend))
    light = (alt.datum[value] != None) & (alt.datum[value] < (low + top) / 2)  # noqa: E711
    colour = alt.condition(light, alt.value("white"), alt.value("black"))
    words = base.mark_text(fontSize=10).encode(text=alt.Text("shown", type="nominal"), color=colour)
    framed = _data([row for row in rows if (row[x], row[y]) == frame])
    return alt.layer(cells, words, base.mark_rect(fill=None, stroke="red", strokeWidth=3).properties(data=framed))


def points(
    rows: Sequence[Row], x: str, y: str, group: str, titles: Sequence[str], looks: Mapping[str, Look] | None = None
) -> Any:
    """Places, with a look for each name in `group`."""
    colour, mark = _look(rows, group, looks or {})
    drawn = alt.Chart(_data(rows), width=WIDTH, height=280).mark_point(filled=True, size=40)
    return drawn.encode(x=_axis(alt.X, x, titles[0]), y=_axis(alt.Y, y, titles[1]), color=colour, shape=mark)


def named_points(
    rows: Sequence[Row], x: str, y: str, group: str, titles: Sequence[str], panel: str, looks: Mapping[str, Look]
) -> Any:
    """Shares y in per cent over a logarithmic axis x, each place with its name, in a small picture for each panel."""
    width, height = 300, 250
    colour, mark = (part.legend(None) for part in _look(rows, group, looks))
    low, high = (
        round_(math.log10(end(row[x] for row in rows))) for round_, end in ((math.floor, min), (math.ceil, max))
    )
    across = [{**row, "across": (math.log10(row[x]) - low) / max(high - low, 1)} for row in rows]
    limits = _limits(row[y] for row in rows)
    panels = [[row for row in across if row[panel] == name] for name in _values(rows, panel)]
    placed = [row for one in panels for row in _apart(one, y, group, limits)]
    base = alt.Chart(width=width, height=height).encode(
        x=_axis(alt.X, x, titles[0], log=True), y=_axis(alt.Y, y, titles[1], limits=limits), color=colour
    )
    layers = [
        base.mark_rule(strokeWidth=0.7).encode(y2="label"),
        base.mark_point(filled=True, size=60).encode(shape=mark),
    ]
    sides: tuple[tuple[Literal["left", "right"], int], ...] = (("left", 1), ("right", -1))
    for side, sign in sides:
        words = base.transform_filter(alt.datum.side == side).encode(y=alt.Y("label", type="quantitative"))
        layers.append(
            words.mark_text(align=side, dx=7 * sign, fontSize=10).encode(text=alt.Text(group, type="nominal"))
        )
    return alt.layer(*layers, data=_data(placed)).facet(facet=_panels(rows, panel), columns=2)


def _apart(rows: Sequence[Row], y: str, group: str, limits: tuple[float, float] = WHOLE) -> list[Row]:
    """Rows, each `across` so much of the width, with the height `label` of their names and the `side` at which these
    begin, so that none lies on another or on a mark."""
    line = 0.06 * (limits[1] - limits[0])  # a line's height
    letter, mark = 0.02, 0.02  # a letter and half a mark as shares of the width
    floor = min(limits[0], *(float(row[y]) for row in rows)) if rows else limits[0]
    taken = [(row["across"] - mark, row["across"] + mark, float(row[y])) for row in rows]
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: -row[y]):
        at, size = row["across"], letter * len(row[group])
        side = "left" if at + size <= 1 else "right"
        start = at + 1.1 * mark if side == "left" else at - 1.1 * mark - size
        near = [height for begin, end, height in taken if start < end and begin < start + size]
        heights = (row[y] + sign * step * line / 2 for step in itertools.count() for sign in (-1, 1))
        free = (height for height in heights if all(abs(height - other) >= line for other in near))
        label = next(height for height in free if height >= floor)
        taken.append((start, start + size, label))
        found.append({**row, "label": label, "side": side})
    return found


def _look(rows: Sequence[Row], group: str, looks: Mapping[str, Look]) -> tuple[Any, Any]:
    """The colours and marks of the names in a column: those given, and for others those that are left."""
    names = [_printable(name) for name in _values(rows, group)]
    taken = set(looks.values())
    free = [(colour, shape) for shape, colour in itertools.product(SHAPES, COLOURS) if (colour, shape) not in taken]
    others = [name for name in names if name not in looks]
    known = {**looks, **{name: free[i % len(free)] for i, name in enumerate(others)}}
    scales = [alt.Scale(domain=names, range=[known[name][part] for name in names]) for part in (0, 1)]
    return _named(group, alt.Color, scale=scales[0]), _named(group, alt.Shape, scale=scales[1])


def _values(rows: Sequence[Row], column: str) -> list[Any]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def _panels(rows: Sequence[Row], panel: str) -> alt.Facet:
    return alt.Facet(panel, type="nominal", sort=_values(rows, panel), title=None)


def _named(column: str, kind: Any = alt.Color, **more: Any) -> Any:
    """A column of names, in the order of the rows."""
    return kind(column, type="nominal", sort=None, **more)


def _limits(values: Iterable[float | None]) -> tuple[float, float]:
    """The limits of an axis of shares in per cent: `WHOLE`, unless all values differ by less than ten points."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or not 0 < max(known) - min(known) < 10:
        return WHOLE
    return max(0.0, math.floor(min(known)) - 1.0), min(100.0, math.ceil(max(known)) + 1.0)


def _axis(kind: Any, column: str, title: str, log: bool = False, limits: tuple[float, float] = WHOLE) -> Any:
    """A numeric axis, from zero unless it is logarithmic, which its title says; shares in per cent lie between limits,
    which their title gives where they are not `WHOLE`, with room for marks that lie on them."""
    scale = alt.Scale(type="log") if log else alt.Scale(zero=True)
    if "per cent" in title:
        room = 0.03 * (limits[1] - limits[0])
        scale = alt.Scale(domain=[limits[0] - room, limits[1] + room], nice=False)
        title += f", from {limits[0]:g}" * (limits != WHOLE) + f" to {limits[1]:g}" * (limits[1] < WHOLE[1])
    title += ", logarithmic" if log else ""
    return kind(column, type="quantitative", title=title, scale=scale, axis=alt.Axis(format=",~f"))


def _data(rows: Sequence[Row]) -> alt.InlineData:
    return alt.InlineData(values=[{name: _printable(value) for name, value in row.items()} for row in rows])


def _printable(value: Any) -> Any:
    """Control characters in a user's text have no glyph, and XML takes none."""
    return "".join(c if c.isprintable() else " " for c in value) if isinstance(value, str) else value
