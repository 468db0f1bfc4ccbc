"""What plots share. A figure is plain data without colours of its own for text and grid: the page's script sets those.

plotly reads some HTML in its texts, so every name that comes from a file is escaped with `letters`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope.report.style import GREY, Look, count_text

Figure = dict[str, Any]
"""A figure of plotly as plain data."""


@dataclass(frozen=True)
class Plot:
    """A figure with its place on the page and what to read in it.

    log: the axes, of x and y, that readers may turn from logarithmic to linear and back.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    log: str = ""


def letters(name: str) -> str:
    """A name as plotly shows it letter for letter; it decodes &lt; but not &quot;."""
    return html.escape(name, quote=False)


def make_figure(traces: Sequence[Mapping[str, Any]], **layout: Any) -> Figure:
    """A checked figure as plain data."""
    import plotly.graph_objects as go

    common = {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "height": 400,
        "dragmode": False,  # a finger on a plot scrolls the page
        "hovermode": "closest",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    }
    made: Figure = go.Figure(data=list(traces), layout=common | layout).to_plotly_json()
    del made["layout"]["template"]
    return made


def make_axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis that no finger can move."""
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False, "fixedrange": True, **more}


def on_log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis for values, of which those above 0 and finite count, with numbers written out at its ticks.

    plotly's own ticks are the digits 2 to 9 between powers of ten, which crowd and which few can read.
    """
    inside = [value for value in values if value is not None and 0 < value < math.inf]
    if not inside:
        return {"type": "log"}
    ticks = log_ticks(min(inside), max(inside))
    texts = [f"{tick:g}" if tick < 10_000 else count_text(tick) for tick in ticks]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts}


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis from `low` to `high`: sparse over decades, dense within one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ([1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8], np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        ticks = [float(f"{digit * 10.0**decade:.3g}") for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low * 0.98 <= tick <= high * 1.02]
        if len(inside) >= 5:
            break
    return inside[:: math.ceil(len(inside) / 9)] if inside else [low]


def make_trace(x: Sequence[float], y: Sequence[float | None], style: Look, **more: Any) -> dict[str, Any]:
    """A line with the look of a method."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": letters(style.label),
        "x": list(x),
        "y": list(y),
        "line": {"color": style.colour, "width": style.width, "dash": style.dash},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 9 if style.ours else 7},
        **more,
    }


def make_heat_map(
    columns: Sequence[str], rows: Sequence[str], cells: Mapping[tuple[str, str], tuple[float, str, str]], **axes: str
) -> Figure:
    """Shares by column and row, the first row on top; a cell is its share of 0 to 1, its text and its hover text.

    axes: the titles `x` and `y`. A cell that is not there stays empty.
    """
    found = [[cells.get((column, row)) for column in columns] for row in rows]
    trace = {
        "type": "heatmap",
        "x": [letters(column) for column in columns],
        "y": [letters(row) for row in rows],
        "z": [[cell[0] if cell else None for cell in line] for line in found],
        "text": [[cell[1] if cell else "" for cell in line] for line in found],
        "customdata": [[letters(cell[2]) if cell else "" for cell in line] for line in found],
        "texttemplate": "%{text}",
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": "Cividis",  # the same to the colour-blind, from dark for 0 to bright for 1
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    }
    plain = {"type": "category", "showgrid": False, "ticks": ""}
    return make_figure(
        [trace],
        height=min(130 + 26 * len(rows), 520),
        xaxis=make_axis(axes["x"], **plain),
        yaxis=make_axis(axes["y"], autorange="reversed", **plain),
    )


def make_mark(x: float, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dotted vertical line with words beside its top. On a log axis a shape takes x itself, a note its logarithm."""
    line = {"color": GREY, "width": 1, "dash": "dot"}
    shape = {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}
    note = {"x": x, "y": 1, "yref": "paper", "text": text, "showarrow": False, "xanchor": "left", "yanchor": "top"}
    return shape, note | {"xshift": 4, "font": {"size": 11, "color": GREY}}


def make_level(y: float, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dotted level line with words above its left end, on a log axis."""
    line = {"color": GREY, "width": 1, "dash": "dot"}
    shape = {"type": "line", "y0": y, "y1": y, "x0": 0, "x1": 1, "xref": "paper", "line": line, "layer": "below"}
    note = {"x": 0, "xref": "paper", "y": math.log10(y), "text": text, "showarrow": False}
    return shape, note | {"xanchor": "left", "yanchor": "bottom", "font": {"size": 11, "color": GREY}}
