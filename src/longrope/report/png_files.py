"""`report --png`: every plot of the page as a picture, drawn by matplotlib from the same figures."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope.errors import UserError
from longrope.files import disk_errors, write_atomically
from longrope.report.figures import Plot
from longrope.report.plots import plots_of
from longrope.report.read import RunData

_DPI, _WIDTH = 200, 6.4  # inches
_MARKERS = {
    "circle": "o",
    "circle-open": "o",
    "square": "s",
    "square-open": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-up-open": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "x",
}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_HATCHES = {"": "", "/": "//", ".": "..", "x": "xx"}


def write(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """plot-NAME.png of each plot. Raises UserError without matplotlib, and when the folder cannot be written."""
    try:
        import matplotlib
    except ImportError:
        do = "pip install 'longrope[plots]', or use --csv"
        raise UserError("--png", got="no matplotlib", rule="it draws the pictures", do=do) from None
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    # A dollar sign in a name is a dollar sign, not mathematics.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "axes.spines.top": False}):
        for plot in plots_of(runs):
            path = folder / f"plot-{plot.name}.png"
            write_atomically(path, draw(plot))
            written.append(path)
    return written


def draw(plot: Plot) -> bytes:
    """A plot as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data, layout = plot.figure["data"], plot.figure["layout"]
    figure = Figure(figsize=(_WIDTH, _WIDTH * layout["height"] / 640), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.set_title(_text(plot.title), fontsize=10)
    bars = [trace for trace in data if trace["type"] == "bar"]
    for trace in data:
        if trace["type"] == "heatmap":
            _heat_map(axes, trace)
        elif trace["type"] == "bar":
            _bars(axes, trace, bars.index(trace), len(bars))
        else:
            _line(axes, trace)
    _axis(axes, "x", layout["xaxis"])
    _axis(axes, "y", layout["yaxis"])
    _marks(axes, layout)
    if any(trace.get("name") for trace in data):
        handles, labels = axes.get_legend_handles_labels()
        turn = -1 if layout.get("legend", {}).get("traceorder") == "reversed" else 1
        figure.legend(handles[::turn], labels[::turn], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def _text(text: str) -> str:
    return html.unescape(text)


def _line(axes: Any, trace: dict[str, Any]) -> None:
    line, marker = trace.get("line", {}), trace.get("marker", {})
    x = [_text(each) if isinstance(each, str) else each for each in trace["x"]]
    y = [math.nan if each is None else each for each in trace["y"]]
    symbol = marker.get("symbol", "circle")
    style: dict[str, Any] = {"color": line.get("color", marker.get("color")), "label": _text(trace.get("name", ""))}
    style |= {"linestyle": _DASHES[line.get("dash", "solid")] if "lines" in trace["mode"] else "none"}
    style |= {"linewidth": 0.6 * line.get("width", 2)}
    if line.get("shape") == "hv":
        style["drawstyle"] = "steps-post"
    if "markers" in trace["mode"]:
        style |= {"marker": _MARKERS.get(symbol, "o"), "markersize": 0.55 * marker.get("size", 6)}
        style |= {"markerfacecolor": "none"} if symbol.endswith("-open") else {}
    error = trace.get("error_y")
    if error:
        axes.errorbar(x, y, yerr=[error["arrayminus"], error["array"]], elinewidth=0.6, capsize=2, **style)
    else:
        axes.plot(x, y, **style)


def _bars(axes: Any, trace: dict[str, Any], number: int, count: int) -> None:
    width = 0.8 / count
    places = [index + (number - (count - 1) / 2) * width for index in range(len(trace["x"]))]
    heights = [math.nan if each is None else each for each in trace["y"]]
    marker = trace["marker"]
    hatch = _HATCHES[marker["pattern"]["shape"]]
    error = trace.get("error_y", {}).get("array")
    label = _text(trace["name"])
    axes.bar(places, heights, width, yerr=error, color=marker["color"], hatch=hatch, label=label, edgecolor="white")
    names = [_text(each).replace(" ", "\n") for each in trace["x"]]
    axes.set_xticks(range(len(names)), names, fontsize=7)


def _heat_map(axes: Any, trace: dict[str, Any]) -> None:
    cells = [[math.nan if cell is None else cell for cell in row] for row in trace["z"]]
    axes.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(trace["x"])), [_text(each) for each in trace["x"]])
    axes.set_yticks(range(len(trace["y"])), [_text(each) for each in trace["y"]])
    for row, texts in enumerate(trace["text"]):
        for column, text in enumerate(texts):
            colour = "white" if cells[row][column] < 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def _axis(axes: Any, name: str, layout: dict[str, Any]) -> None:
    getattr(axes, f"set_{name}label")(_text(layout["title"]["text"]))
    if layout.get("type") == "category":
        return
    axis = getattr(axes, f"{name}axis")
    if layout.get("type") == "log":
        getattr(axes, f"set_{name}scale")("log")
    if layout.get("tickmode") == "array":
        axis.set_ticks(layout["tickvals"], [_text(text) for text in layout["ticktext"]])
        axis.set_ticks([], minor=True)
    if "range" in layout:
        getattr(axes, f"set_{name}lim")(layout["range"])
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)


def _marks(axes: Any, layout: dict[str, Any]) -> None:
    """Dotted lines with their words."""
    for shape in layout.get("shapes", ()):
        draw_line = axes.axhline if shape.get("xref") == "paper" else axes.axvline
        at = shape["y0"] if shape.get("xref") == "paper" else shape["x0"]
        draw_line(at, color=shape["line"]["color"], linestyle=":", linewidth=0.8)
    for note in layout.get("annotations", ()):
        kind = "x" if note.get("yref") == "paper" else "y"
        log = layout[f"{kind}axis"].get("type") == "log"
        at = 10 ** note[kind] if log else note[kind]
        transform = axes.get_xaxis_transform() if kind == "x" else axes.get_yaxis_transform()
        place = (at, note["y"]) if kind == "x" else (note["x"], at)
        how = {"va": note["yanchor"], "fontsize": 7, "color": note["font"]["color"], "transform": transform}
        axes.text(*place, f" {_text(note['text'])}", **how)
