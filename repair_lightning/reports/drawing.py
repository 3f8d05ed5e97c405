"""The four forms of pictures, drawn by Altair from rows of data. Texts of the user's are data here, never markup."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from repair_lightning.storage.files import replace_text

Row = Mapping[str, Any]

COLOURS = ["#0b6e99", "#d97706", "#2f855a", "#a23b72", "#6b5fb5", "#b93a20", "#7a8790", "#8a6d1f"]
SHAPES = ["circle", "triangle-up", "square", "diamond", "cross"]
CONFIG = {
    "aria": False,  # the page has the words and the numbers beside each picture
    "font": "Liberation Sans, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#eceff1", "domainColor": "#8a949b", "tickColor": "#8a949b", "labelLimit": 300},
    "header": {"labelFontWeight": "bold", "labelAnchor": "start", "labelLimit": 300},
    "legend": {"orient": "bottom", "columns": 3, "labelLimit": 0, "title": None},
    "title": {"anchor": "start"},
    "range": {"category": COLOURS},
}
WIDTH = 380


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
    rows: Sequence[Row], x: str, y: str, group: str, titles: Sequence[str], log: str = "", spread: str = ""
) -> Any:
    """A line for each group. `titles` are those of x and y, `log` names logarithmic axes; y is in per cent where its
    title says so, `spread` is the column with the standard deviation."""
    few = len(rows) <= 60 * len(_values(rows, group))
    base = alt.Chart(_data(rows), width=WIDTH, height=230).encode(
        x=_axis(alt.X, x, titles[0], "x" in log), y=_axis(alt.Y, y, titles[1], "y" in log), color=_named(group)
    )
    dash = _named(group, alt.StrokeDash, legend=None)
    drawn = [base.mark_line(point={"size": 25} if few else False, clip=False).encode(strokeDash=dash)]
    drawn += [base.mark_errorbar(ticks=True).encode(yError=alt.YError(spread))] if spread else []
    return alt.layer(*drawn)


def histograms(rows: Sequence[Row], x: str, y: str, panel: str, group: str, titles: Sequence[str], mark: float) -> Any:
    """Bars y at the numbers x, with a colour for each name in `group`, a small picture for each panel one below the
    other; a vertical line at `mark`."""
    base = alt.Chart(width=WIDTH, height=60)
    bars = base.mark_bar(size=0.8 * WIDTH / len(_values(rows, x))).encode(
        x=_axis(alt.X, x, titles[0]),
        y=alt.Y(y, type="quantitative", title=titles[1], axis=alt.Axis(tickCount=3)),
        color=_named(group),
    )
    rule = base.mark_rule(color="#b93a20", strokeDash=[4, 3], strokeWidth=1.5).encode(x=alt.datum(mark))
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
    base = alt.Chart(_data(rows), width=alt.Step(70), height=alt.Step(45)).encode(
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


def points(rows: Sequence[Row], x: str, y: str, group: str, titles: Sequence[str], panel: str | None = None) -> Any:
    """Places: a colour for each name in `group`, or a scale where it holds numbers; a small picture for each panel,
    then with shares in per cent over a logarithmic axis."""
    if any(isinstance(row[group], str) for row in rows):  # colours come again with another mark
        shapes = [SHAPES[i // len(COLOURS) % len(SHAPES)] for i in range(len(_values(rows, group)))]
        look = {"color": _named(group), "shape": _named(group, alt.Shape, scale=alt.Scale(range=shapes))}
    else:
        legend = alt.Legend(orient="right", title=group)
        look = {"color": alt.Color(f"{group}:Q", scale=alt.Scale(scheme="viridis"), legend=legend)}
    drawn = alt.Chart(_data(rows), width=280 if panel else WIDTH, height=180 if panel else 280).encode(
        x=_axis(alt.X, x, titles[0], log=bool(panel), zero=False), y=_axis(alt.Y, y, titles[1], zero=False), **look
    )
    drawn = drawn.mark_point(filled=True, size=40)
    return drawn.facet(facet=_panels(rows, panel), columns=2) if panel else drawn


def _values(rows: Sequence[Row], column: str) -> list[Any]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def _panels(rows: Sequence[Row], panel: str) -> alt.Facet:
    return alt.Facet(panel, type="nominal", sort=_values(rows, panel), title=None)


def _named(column: str, kind: Any = alt.Color, **more: Any) -> Any:
    """A column of names, in the order of the rows."""
    return kind(column, type="nominal", sort=None, **more)


def _axis(kind: Any, column: str, title: str, log: bool = False, zero: bool = True) -> Any:
    """A numeric axis; shares in per cent have room for marks that lie on their limits."""
    limits: dict[str, Any] = {"domain": [-3, 103], "nice": False} if "per cent" in title else {"zero": zero}
    scale = alt.Scale(type="log") if log else alt.Scale(**limits)
    return kind(column, type="quantitative", title=title, scale=scale, axis=alt.Axis(format=",~f"))


def _data(rows: Sequence[Row]) -> alt.InlineData:
    return alt.InlineData(values=[{name: _printable(value) for name, value in row.items()} for row in rows])


def _printable(value: Any) -> Any:
    """Control characters in a user's text have no glyph, and XML takes none."""
    return "".join(c if c.isprintable() else " " for c in value) if isinstance(value, str) else value
