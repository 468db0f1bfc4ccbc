"""The plots, as plotly figures without colours of their own for text and grid: the page's script sets those.

plotly reads some HTML in its texts, so every name that comes from a file is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope.baselines import baseline, critical_dimension
from longrope.factors import FactorTable
from longrope.report.facts import measured_on, methods_of, verdict
from longrope.report.read import Evaluation, RunData, shape_of
from longrope.report.style import GREY, OURS_COLOUR, Look, length_text, look, lower_is_better, value_text

_MOST_DOTS = 2000  # a page stays readable and below 6 MB
_WIDEST_GAP = 25.0  # percent: beyond it a method is simply far off
_BESIDE = ("pi", "ntk", "yarn")

Figure = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A figure with its place on the page and what to read in it."""

    name: str
    title: str
    caption: str
    figure: Figure


def plots(run: RunData) -> list[Plot]:
    """All plots that the run has the data for."""
    made = [_results_plot(run), _gap_plot(run), _factors_plot(run.table), *_convergence_plots(run.evaluations)]
    return [plot for plot in made if plot]


def _text(name: str) -> str:
    """A name as plotly shows it letter for letter; it decodes &lt; but not &quot;."""
    return html.escape(name, quote=False)


def _figure(traces: Sequence[Mapping[str, Any]], **layout: Any) -> Figure:
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
    figure: Figure = go.Figure(data=list(traces), layout=common | layout).to_plotly_json()
    del figure["layout"]["template"]
    return figure


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False, "fixedrange": True, **more}


def _trace(x: Sequence[float], y: Sequence[float | None], style: Look, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": _text(style.label),
        "x": list(x),
        "y": list(y),
        "line": {"color": style.colour, "width": style.width, "dash": style.dash},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 9 if style.ours else 7},
        **more,
    }


def _mark(x: float, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dotted vertical line with words beside its top. On a log axis a shape takes x itself, a note its logarithm."""
    line = {"color": GREY, "width": 1, "dash": "dot"}
    shape = {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}
    note = {"x": x, "y": 1, "yref": "paper", "text": text, "showarrow": False, "xanchor": "left", "yanchor": "top"}
    return shape, note | {"xshift": 4, "font": {"size": 11, "color": GREY}}


def _length_marks(run: RunData) -> dict[str, Any]:
    """Where the trained window ends and where the wanted one does."""
    inside = (min(run.lengths), max(run.lengths))
    wanted = [(run.original_length, "original"), (run.target_length, "target")]
    marks = [_mark(at, text) for at, text in wanted if at is not None and inside[0] < at < inside[1]]
    notes = [note | {"x": math.log10(note["x"])} for _, note in marks]
    return {"shapes": [shape for shape, _ in marks], "annotations": notes}


def _length_axis(lengths: Sequence[int]) -> dict[str, Any]:
    texts = [length_text(length) for length in lengths]
    return _axis("length in tokens", type="log", tickmode="array", tickvals=list(lengths), ticktext=texts)


def _results_plot(run: RunData) -> Plot | None:
    if not run.results:
        return None
    traces = [_result_trace(run, method) for method in reversed(methods_of(run))]
    positive = [result.value for result in run.results if result.value is not None and result.value > 0]
    vertical: dict[str, Any] = {}
    if lower_is_better(run.measure) and positive:
        ticks = log_ticks(min(positive), max(positive))
        texts = [f"{tick:g}" for tick in ticks]
        vertical = {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts}
    figure = _figure(
        traces,
        xaxis=_length_axis(run.lengths),
        yaxis=_axis(_text(run.measure), **vertical),
        legend_traceorder="reversed",
        **_length_marks(run),
    )
    better = "lower" if lower_is_better(run.measure) else "higher"
    title = f"{run.measure.capitalize()} by length"
    caption = f"Measured on {measured_on(run)}; {better} is better. A missing point is not finite."
    return Plot("results", title, caption, figure)


def _result_trace(run: RunData, method: str) -> dict[str, Any]:
    results = [run.result(method, length) for length in run.lengths]
    found = [result for result in results if result]
    trace = _trace([r.length for r in found], [r.value for r in found], look(method, methods_of(run)))
    trace["text"] = [value_text(result.value) for result in found]
    trace["hovertemplate"] = "%{text} at %{x:,} tokens"
    if any(result.ci for result in found):
        ends = [(r.value, *r.ci) if r.ci and r.value is not None else (0.0, 0.0, 0.0) for r in found]
        above, below = [high - value for value, _, high in ends], [value - low for value, low, _ in ends]
        trace["error_y"] = {"symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 3}
    return trace


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis from `low` to `high`: sparse over decades, dense within one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ([1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8], np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        ticks = [float(f"{digit * 10.0**decade:.3g}") for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low * 0.98 <= tick <= high * 1.02]
        if len(inside) >= 5:
            break
    return inside[:: math.ceil(len(inside) / 9)] if inside else [low]


def _gap_plot(run: RunData) -> Plot | None:
    """Every method relative to the best baseline at the length of the verdict, which squeezes nothing."""
    found = verdict(run)
    if not found or not found.baseline or len(run.lengths) == 1:
        return None
    reference = {length: run.result(found.baseline.method, length) for length in run.lengths}
    against = [(length, result.value) for length, result in reference.items() if result and result.value]
    traces = [_gap_trace(run, method, against) for method in reversed(methods_of(run))]
    gaps = [gap for trace in traces for gap in trace["y"] if gap is not None and abs(gap) <= _WIDEST_GAP]
    margin = 0.1 * (max(gaps) - min(gaps)) or 1.0
    label = look(found.baseline.method).label
    title = _text(f"difference from {label} in %")
    vertical = _axis(title, range=[min(gaps) - margin, max(gaps) + margin], ticksuffix="%")
    lengths = [length for length, _ in against]
    figure = _figure(
        traces, xaxis=_length_axis(lengths), yaxis=vertical, legend_traceorder="reversed", **_length_marks(run)
    )
    better = "below" if lower_is_better(run.measure) else "above"
    caption = (
        f"{better.capitalize()} zero is better than {label}. More than {_WIDEST_GAP:.0f}% off is outside the plot."
    )
    return Plot("gap", f"Against {label}", caption, figure)


def _gap_trace(run: RunData, method: str, against: Sequence[tuple[int, float]]) -> dict[str, Any]:
    results = [run.result(method, length) for length, _ in against]
    gaps = [
        100 * (result.value / value - 1) if result and result.value is not None else None
        for result, (_, value) in zip(results, against, strict=True)
    ]
    trace = _trace([length for length, _ in against], gaps, look(method, methods_of(run)))
    return trace | {"hovertemplate": "%{y:+.1f}% at %{x:,} tokens"}


def _factors_plot(table: FactorTable | None) -> Plot | None:
    if table is None:
        return None
    shape, row = shape_of(table), table.rows[-1]
    pairs, hover = list(range(shape.pairs)), "pair %{x}: %{y:.3f}"
    searched = Look("this run", ours=True, colour=OURS_COLOUR, dash="solid", symbol="circle", width=3)
    lines = [(look(name), list(baseline(name, shape, row.up_to).rescale)) for name in _BESIDE]
    lines.append((searched, list(row.rescale)))
    traces = [_trace(pairs, values, style, hovertemplate=hover) for style, values in lines]
    for trace, (style, _) in zip(traces, lines, strict=True):
        trace["mode"] = "lines+markers" if style.ours else "lines"
        trace["marker"]["size"] = 5
    largest = max(value for _, values in lines for value in values)
    critical = critical_dimension(shape)
    shown = [_mark(critical, f"critical dimension {critical:.1f}")] if 0 <= critical <= shape.pairs - 1 else []
    figure = _figure(
        traces,
        xaxis=_axis("pair i (fast pairs left)"),
        yaxis=_axis("rescale factor λ", type="log", **_ratio_ticks(largest)),
        legend_traceorder="reversed",
        shapes=[line for line, _ in shown],
        annotations=[note | {"y": 0.04, "yanchor": "bottom"} for _, note in shown],
    )
    caption = (
        f"What divides the frequency of each pair, for up to {length_text(row.up_to)} tokens. Beyond the theoretical "
        "critical dimension one turn is longer than the original window."
    )
    return Plot("factors", "Rescale factors by pair", caption, figure)


def _ratio_ticks(largest: float) -> dict[str, Any]:
    step = max(1, math.ceil(math.log2(max(largest, 2.0)) / 8))
    ticks = [2**power for power in range(0, math.ceil(math.log2(max(largest, 2.0))) + 1, step)]
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}


def _convergence_plots(evaluations: Sequence[Evaluation]) -> list[Plot]:
    """The best value so far against evaluations and against token-passes."""
    values = [math.inf if evaluation.value is None else evaluation.value for evaluation in evaluations]
    if not values or min(values) == math.inf:
        return []
    best = np.minimum.accumulate(values)
    counts = np.arange(1, len(values) + 1, dtype=float)
    tokens = np.cumsum([evaluation.tokens for evaluation in evaluations])
    where = int(np.argmin(values))
    frame = _frame(values, best)
    above = sum(value > frame[1] for value in values)
    caption = (
        f"Best {value_text(values[where])} at evaluation {where + 1:,} of {len(values):,}. Dots are candidates; "
        f"{above:,} lie above the frame or are not finite."
    )
    made = [Plot("convergence", "Best value by evaluations", caption, _convergence(evaluations, counts, best, frame))]
    made[0].figure["layout"]["xaxis"]["title"]["text"] = "candidate evaluations"
    if tokens[-1] > 0:
        by_tokens = _convergence(evaluations, tokens, best, frame)
        by_tokens["layout"]["xaxis"]["title"]["text"] = "token-passes"
        caption = "The same against the cost: tokens through a forward pass, a backward pass counting as two more."
        made.append(Plot("cost", "Best value by token-passes", caption, by_tokens))
    return made


def _frame(values: Sequence[float], best: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """What part of the values to show: from the best to as far above the best seed as that is above the best."""
    low, start = float(best[-1]), float(best[min(2, len(best) - 1)])
    gain = start - low if math.isfinite(start) else 0.0
    spread = float(np.median([value for value in values if math.isfinite(value)])) - low
    span = gain or spread or 0.01 * abs(low) or 1.0
    return low - 0.15 * span, low + 2.2 * span


def _convergence(
    evaluations: Sequence[Evaluation],
    cost: np.ndarray[Any, np.dtype[np.float64]],
    best: np.ndarray[Any, np.dtype[np.float64]],
    frame: tuple[float, float],
) -> Figure:
    every = math.ceil(len(evaluations) / _MOST_DOTS)
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "candidates",
        "x": cost[::every].tolist(),
        "y": [evaluation.value for evaluation in evaluations[::every]],
        "text": [_text(evaluation.origin) for evaluation in evaluations[::every]],
        "hovertemplate": "%{text}: %{y:.4f}",
        "marker": {"color": GREY, "size": 4, "opacity": 0.5},
    }
    better = [i for i in range(len(best)) if math.isfinite(best[i]) and (i == 0 or best[i] < best[i - 1])]
    steps = {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": [*cost[better].tolist(), float(cost[-1])],
        "y": [*best[better].tolist(), float(best[-1])],
        "hovertemplate": "%{y:.4f}",
        "line": {"color": OURS_COLOUR, "width": 3, "shape": "hv"},
    }
    horizontal = _axis("", rangemode="tozero", nticks=6)
    seeds = _seed_lines(evaluations, (float(cost[0]), float(cost[-1])), frame)
    return _figure([dots, *seeds, steps], xaxis=horizontal, yaxis=_axis("value", range=list(frame)))


def _seed_lines(
    evaluations: Sequence[Evaluation], ends: tuple[float, float], frame: tuple[float, float]
) -> list[dict[str, Any]]:
    """A level line for each of PI, NTK and YaRN that the search started from, where it is inside the frame."""
    lines = []
    for name in _BESIDE:
        value = next((e.value for e in evaluations if e.origin == name and e.value is not None), math.inf)
        if frame[0] <= value <= frame[1]:
            line = _trace(ends, [value, value], look(name), hovertemplate="%{y:.4f}")
            lines.append(line | {"mode": "lines", "line": line["line"] | {"dash": "dash"}})
    return lines
