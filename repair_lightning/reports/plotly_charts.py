"""Charts as Plotly figures in plain types.

Colours are CSS variables, which the report's script looks up when it draws: a figure follows the reader's theme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from repair_lightning.reports.charts import Chart

Figure = dict[str, Any]
COLOURS = tuple(f"var(--c{i})" for i in range(1, 9))
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "triangle-up", "square", "diamond")
_GAP = 0.07
"""Room between small pictures, as a share of the height."""


def figure(chart: Chart) -> Figure:
    """A chart as `{"data": ..., "layout": ...}`."""
    found = DRAWN[chart.kind](chart)
    layout: Figure = {
        "font": {"color": "var(--ink)", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "height": 340,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "x": 0, "yanchor": "bottom", "traceorder": "normal"},
    }
    return {"data": found["data"], "layout": layout | found["layout"]}


def _axis(chart: Chart, column: str, **more: Any) -> Figure:
    look = {"gridcolor": "var(--grid)", "linecolor": "var(--faint)", "zeroline": False, "automargin": True}
    return look | {"title": {"text": _text(chart.label(column))}} | more


def _text(value: Any) -> str:
    """What stands in a figure as it is: Plotly reads a few HTML tags in texts, and names come from the user's data."""
    return escape(str(value), quote=False)


def _lines(chart: Chart) -> Figure:
    traces = []
    for i, group in enumerate(chart.values(chart.group)):
        look = _look(i)
        part = chart.part(chart.group, group)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(part[chart.x]) <= 60 else "lines",
                "name": _text(group),
                "x": part[chart.x],
                "y": part[chart.y],
                "line": {"color": look["color"], "width": 2, "dash": DASHES[i % len(DASHES)]},
                "marker": look | {"size": 6},
                "showlegend": len(chart.values(chart.group)) > 1,
            }
        )
    scales: list[Figure] = [{"type": "log"} if side in chart.log else {"rangemode": "tozero"} for side in "xy"]
    axes = {"xaxis": _axis(chart, chart.x, **scales[0]), "yaxis": _axis(chart, chart.y, **scales[1], **_limits(chart))}
    return {"data": traces, "layout": axes}


def _look(i: int) -> Figure:
    """Colour and mark of the i-th group; colours come again with another mark."""
    return {"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i // len(COLOURS) % len(SYMBOLS)]}


def _limits(chart: Chart) -> Figure:
    """The limits, with room for marks that lie on them."""
    if not chart.limits:
        return {}
    low, high = chart.limits
    return {"range": [low - 0.04 * (high - low), high + 0.04 * (high - low)]}


def _histograms(chart: Chart) -> Figure:
    """A small picture per panel, above each other on one x-axis."""
    panels = chart.values(chart.panel)
    height = (1 - _GAP * 1.6 * (len(panels) - 1)) / len(panels)
    layout: Figure = {"height": 110 * len(panels) + 80, "showlegend": False, "bargap": 0.04}
    data, notes = [], []
    for i, (panel, colour) in enumerate(zip(panels, COLOURS, strict=False)):
        part = chart.part(chart.panel, panel)
        place = f"y{i + 1 if i else ''}"
        top = 1 - i * (height + _GAP * 1.6)
        data.append(
            {
                "type": "bar",
                "name": _text(panel),
                "x": part[chart.x],
                "y": part[chart.y],
                "yaxis": place,
                "marker": {"color": colour},
            }
        )
        domain = [max(0.0, top - height), top]
        layout[f"yaxis{place[1:]}"] = _axis(chart, chart.y, domain=domain, title={"text": "%"}, nticks=3)
        where = {"xref": "paper", "yref": "paper", "x": 0.01, "y": top, "yanchor": "bottom", "xanchor": "left"}
        notes.append({"text": f"<b>{_text(panel)}</b>", "showarrow": False, "font": {"size": 12}, **where})
    layout["xaxis"] = _axis(chart, chart.x, anchor=f"y{len(panels) if len(panels) > 1 else ''}")
    layout["annotations"] = notes
    layout["margin"] = {"l": 56, "r": 16, "t": 28, "b": 48}
    if chart.mark is not None:
        line = {"color": "var(--bad)", "width": 2, "dash": "dash"}
        ends = {"x0": chart.mark, "x1": chart.mark, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [{"type": "line", "line": line, **ends}]
    return {"data": data, "layout": layout}


def _stacked(chart: Chart) -> Figure:
    """Lying bars, the groups end to end; the first category stands on top."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _text(group),
            "x": part[chart.x],
            "y": [_text(value) for value in part[chart.y]],
            "marker": {"color": colour},
        }
        for group, colour in zip(chart.values(chart.group), COLOURS, strict=False)
        for part in [chart.part(chart.group, group)]
    ]
    bars = len(chart.values(chart.y))
    xaxis = _axis(chart, chart.x, range=list(chart.limits)) if chart.limits else _axis(chart, chart.x)
    yaxis = _axis(chart, chart.y, autorange="reversed")
    layout = {"barmode": "stack", "height": 52 * bars + 120, "xaxis": xaxis, "yaxis": yaxis}
    return {"data": data, "layout": layout}


def _points(chart: Chart) -> Figure:
    """Places, a small picture per panel; what is named has a colour each, numbers are a scale of colours."""
    groups, panels = chart.values(chart.group), chart.values(chart.panel)
    named = any(isinstance(group, str) for group in groups)
    layout = _panels(chart, panels) | {"showlegend": named}
    data, shown = [], set()
    for i, panel in enumerate(panels):
        part = chart.part(chart.panel, panel)
        on = {"xaxis": f"x{i + 1 if i else ''}", "yaxis": f"y{i + 1 if i else ''}"}
        if named:
            for j, group in enumerate(groups):
                mine = [k for k, of in enumerate(part[chart.group or ""]) if of == group]
                one = {column: [values[k] for k in mine] for column, values in part.items()}
                legend = {"legendgroup": _text(group), "showlegend": bool(mine) and group not in shown}
                shown |= {group} if mine else set()
                data.append(_cloud(chart, one, _look(j), _text(group)) | on | legend)
        else:
            bar = {"title": {"text": _text(chart.label(chart.group or ""))}, "thickness": 12}
            colours = {"color": part[chart.group or ""], "colorscale": "Viridis", "showscale": not i, "colorbar": bar}
            data.append(_cloud(chart, part, colours, "") | on)
    return {"data": data, "layout": layout}


def _panels(chart: Chart, panels: Sequence[Any]) -> Figure:
    """Axes of small pictures, two in a row, with a title each; of one alone, without."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    gap = 2.2 * _GAP
    wide, high = (1 - _GAP * (across - 1)) / across, (1 - gap * (down - 1)) / down
    scale: Figure = {"type": "log"} if "x" in chart.log else {}
    layout: Figure = {"height": 420 if down == 1 else 260 * down + 80}
    notes = []
    for i, panel in enumerate(panels):
        left, top = i % across * (wide + _GAP), 1 - i // across * (high + gap)
        number = str(i + 1) if i else ""
        more: Figure = {"domain": [left, min(1.0, left + wide)], "anchor": f"y{number}"}
        more |= {"matches": "x"} if i else {}
        more |= {} if i + across >= len(panels) else {"title": None}
        layout[f"xaxis{number}"] = _axis(chart, chart.x, **scale, **more)
        more = {"domain": [max(0.0, top - high), top], "anchor": f"x{number}"} | ({"title": None} if i % across else {})
        layout[f"yaxis{number}"] = _axis(chart, chart.y, **more, **_limits(chart))
        where = {"xref": "paper", "yref": "paper", "x": left, "y": top, "yanchor": "bottom", "xanchor": "left"}
        notes.append({"text": f"<b>{_text(panel)}</b>", "showarrow": False, "font": {"size": 12}, **where})
    if len(panels) > 1:  # a legend on top would lie on the titles
        layout["annotations"] = notes
        layout["legend"] = {"orientation": "h", "y": -0.12, "x": 0, "yanchor": "top", "traceorder": "normal"}
        layout["margin"] = {"l": 56, "r": 16, "t": 28, "b": 48}
    return layout


def _cloud(chart: Chart, part: Mapping[str, Any], marker: Figure, name: str) -> Figure:
    shown = [f"{_text(id)}, {_text(group)}" for id, group in zip(part["id"], part[chart.group or "id"], strict=True)]
    look = {"size": 7, "opacity": 0.8} | marker
    place = {"x": part[chart.x], "y": part[chart.y], "text": shown, "hoverinfo": "text"}
    return {"type": "scatter", "mode": "markers", "name": name, "marker": look, **place}


DRAWN: Mapping[str, Callable[[Chart], Figure]] = {
    "lines": _lines,
    "histograms": _histograms,
    "stacked": _stacked,
    "points": _points,
}
"""How each kind that a run's report shows is drawn."""
