"""The forms of pictures, drawn by Altair from rows of data. Texts of the user's are data here, never markup."""

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
MARK = "#b93a20"
CONFIG = {
    "aria": False,  # the page has the words and the numbers beside each picture
    "font": "Liberation Sans, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#eceff1", "domainColor": "#8a949b", "tickColor": "#8a949b", "labelLimit": 300},
    "header": {"labelFontWeight": "bold", "labelAnchor": "start", "labelLimit": 300},
    "legend": {"orient": "bottom", "columns": 3, "labelLimit": 0, "title": None},
    "title": {"anchor": "start"},
}
PPI = 130


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: of its files.
        title: what it shows.
        words: what it says, for a reader who does not see it.
        rows: the data, row by row, all with the same columns; what is unknown is None.
        picture: as Altair draws it.
    """

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

    def write(self, folder: Path, suffixes: Sequence[str] = ("png", "svg", "csv")) -> list[Path]:
        """Write `NAME.png`, `NAME.svg` and the data as `NAME.csv`, or some of them; returns the files."""
        files = [folder / f"{self.name}.{suffix}" for suffix in suffixes]
        for file in files:
            if file.suffix == ".png":
                file.write_bytes(vl_convert.vegalite_to_png(self._spec(titled=True), ppi=PPI))
            else:
                table = pd.DataFrame(self.rows, dtype=object)
                replace_text(file, self.svg(titled=True) if file.suffix == ".svg" else table.to_csv(index=False))
        return files

    def _spec(self, titled: bool) -> dict[str, Any]:
        title = {"title": _printable(self.title)} if titled else {}
        return self.picture.to_dict() | {"config": CONFIG} | title


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows; what is not a number is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def values(rows: Sequence[Row], column: str) -> list[Any]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def lines(
    rows: Sequence[Row],
    x: str,
    y: str,
    group: str,
    titles: Sequence[str],
    log: str = "",
    share: bool = True,
    spread: str | None = None,
) -> Any:
    """A line for each group. `titles` are those of x and y, `log` names logarithmic axes, `share` says that y is in per
    cent, `spread` is the column with the standard deviation."""
    few = len(rows) <= 60 * len(values(rows, group))
    base = alt.Chart(_data(rows), width=380, height=230).encode(
        x=_scale(alt.X, x, titles[0], "x" in log), y=_scale(alt.Y, y, titles[1], "y" in log, share)
    )
    colour = _colour(group)
    line = base.mark_line(point={"size": 25} if few else False, clip=False).encode(
        color=colour, strokeDash=alt.StrokeDash(field=group, type="nominal", sort=None, legend=None)
    )
    error = [base.mark_errorbar(ticks=True).encode(color=colour, yError=alt.YError(field=spread))] if spread else []
    return alt.layer(line, *error)


def histograms(rows: Sequence[Row], x: str, y: str, panel: str, titles: Sequence[str], mark: float) -> Any:
    """Bars y at the numbers x, a small picture for each panel one below the other; a vertical line at `mark`."""
    width = 380
    base = alt.Chart(width=width, height=60)
    bars = base.mark_bar(size=0.8 * width / len(values(rows, x))).encode(
        x=_scale(alt.X, x, titles[0]),
        y=alt.Y(field=y, type="quantitative", title=titles[1], axis=alt.Axis(tickCount=3)),
        color=_colour(panel, legend=None),
    )
    rule = base.mark_rule(color=MARK, strokeDash=[4, 3], strokeWidth=1.5).encode(x=alt.datum(mark))
    drawn = alt.layer(bars, rule, data=_data(rows)).facet(facet=_panels(rows, panel), columns=1)
    return drawn.resolve_scale(y="independent")


def bars(rows: Sequence[Row], x: str, y: str, panel: str, spread: str, title: str) -> Any:
    """Lying bars of shares in per cent, the categories y shared by a small picture for each panel."""
    base = alt.Chart(width=120, height=alt.Step(20)).encode(x=_share(x, title), y=_names(y))
    bar = base.mark_bar().encode(color=_colour(panel, legend=None))
    error = base.mark_errorbar().encode(xError=alt.XError(field=spread))
    number = base.mark_text(align="left", dx=4, fontSize=9).encode(
        x=alt.datum(0),
        text=alt.Text(field=x, type="quantitative", format=".1f"),
        color=alt.condition(alt.datum[x] > 25, alt.value("white"), alt.value("black")),
    )
    return alt.layer(bar, error, number, data=_data(rows)).facet(facet=_panels(rows, panel), columns=4)


def stacked(rows: Sequence[Row], x: str, y: str, group: str, title: str) -> Any:
    """Lying bars of shares in per cent, the groups end to end."""
    order = values(rows, group)
    placed = [{**row, "place": order.index(row[group])} for row in rows]
    bar = alt.Chart(_data(placed), width=380, height=alt.Step(30)).mark_bar()
    return bar.encode(x=_share(x, title), y=_names(y), color=_colour(group), order=alt.Order("place:Q"))


def heat(rows: Sequence[Row], x: str, y: str, value: str, text: str, frame: tuple[Any, Any] | None) -> Any:
    """A colour and a text for each pair of x and y; `frame` is the pair that is framed."""
    known = [row[value] for row in rows if row[value] is not None]
    top = max(known, default=100.0)
    low = min([*known, top - 20])  # small differences look small
    base = alt.Chart(_data(rows), width=alt.Step(70), height=alt.Step(45)).encode(
        x=alt.X(field=x, type="ordinal", sort=values(rows, x), title=x.replace("_", " "), axis=alt.Axis(labelAngle=0)),
        y=alt.Y(field=y, type="ordinal", sort=values(rows, y)[::-1], title=y.replace("_", " ")),
    )
    scale = alt.Scale(scheme="viridis", domain=[low, top])
    legend = alt.Legend(orient="right", title="per cent")
    cells = base.mark_rect().encode(color=alt.Color(field=value, type="quantitative", scale=scale, legend=legend))
    light = alt.datum[value] < (low + top) / 2
    words = base.mark_text(fontSize=10).encode(
        text=alt.Text(field=text, type="nominal"),
        color=alt.condition((alt.datum[value] != None) & light, alt.value("white"), alt.value("black")),  # noqa: E711
    )
    framed = [row for row in rows if (row[x], row[y]) == frame]
    around = base.mark_rect(fill=None, stroke="red", strokeWidth=3).properties(data=_data(framed))
    return alt.layer(cells, words, *([around] if framed else []))


def points(rows: Sequence[Row], x: str, y: str, group: str, titles: Sequence[str], panel: str | None = None) -> Any:
    """Places: a colour for each name in `group`, or a scale where it holds numbers; a small picture for each panel,
    then with shares in per cent over a logarithmic axis."""
    if any(isinstance(row[group], str) for row in rows):  # colours come again with another mark
        shapes = [SHAPES[i // len(COLOURS) % len(SHAPES)] for i in range(len(values(rows, group)))]
        shape = alt.Shape(field=group, type="nominal", sort=None, scale=alt.Scale(range=shapes))
        look: dict[str, Any] = {"color": _colour(group), "shape": shape}
    else:
        legend = alt.Legend(orient="right", title=group)
        look = {"color": alt.Color(f"{group}:Q", scale=alt.Scale(scheme="viridis"), legend=legend)}
    drawn = alt.Chart(_data(rows), width=280 if panel else 380, height=180 if panel else 280).encode(
        x=_scale(alt.X, x, titles[0], log=bool(panel), zero=False),
        y=_scale(alt.Y, y, titles[1], share=bool(panel), zero=False),
        **look,
    )
    drawn = drawn.mark_point(filled=True, size=40)
    return drawn.facet(facet=_panels(rows, panel), columns=2) if panel else drawn


def _share(column: str, title: str) -> alt.X:
    return alt.X(field=column, type="quantitative", title=title, scale=alt.Scale(domain=[0, 100]))


def _names(column: str) -> alt.Y:
    return alt.Y(field=column, type="nominal", sort=None, title=None)


def _panels(rows: Sequence[Row], panel: str) -> alt.Facet:
    return alt.Facet(field=panel, type="nominal", sort=values(rows, panel), title=None)


def _colour(group: str, legend: Any = alt.Undefined) -> alt.Color:
    return alt.Color(field=group, type="nominal", sort=None, scale=alt.Scale(range=COLOURS), legend=legend)


def _scale(kind: Any, column: str, title: str, log: bool = False, share: bool = False, zero: bool = True) -> Any:
    """A numeric axis; shares in per cent have room for marks that lie on their limits."""
    limits: dict[str, Any] = {"domain": [-3, 103], "nice": False} if share else {"zero": zero}
    scale = alt.Scale(type="log") if log else alt.Scale(**limits)
    return kind(field=column, type="quantitative", title=title, scale=scale, axis=alt.Axis(format=",~f"))


def _data(rows: Sequence[Row]) -> alt.InlineData:
    return alt.InlineData(values=[{name: _printable(value) for name, value in row.items()} for row in rows])


def _printable(value: Any) -> Any:
    """Control characters in a user's text have no glyph, and XML takes none."""
    return "".join(c if c.isprintable() else " " for c in value) if isinstance(value, str) else value
