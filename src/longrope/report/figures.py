"""What plots share. A figure is plain data without colours of its own for text and grid: the page's script sets those.

plotly reads some HTML in its texts, so every name that comes from a file is escaped with `letters`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope.report.style import Look

Figure = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A figure with its place on the page and what to read in it."""

    name: str
    title: str
    caption: str
    figure: Figure


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
