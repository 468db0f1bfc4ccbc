"""The plots of any measure by length: the values, and the methods relative to the best baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longrope.report.facts import measured_on, methods_of, verdict
from longrope.report.figures import Plot, letters, make_axis, make_figure, make_mark, make_trace, on_log_axis
from longrope.report.read import RunData
from longrope.report.style import length_text, look, title_of, value_text
from longrope.runs import lower_is_better

_WIDEST_GAP = 25.0  # percent: beyond it a method is simply far off


def _length_marks(run: RunData) -> dict[str, Any]:
    """Where the trained window ends and where the wanted one does."""
    inside = (min(run.lengths), max(run.lengths))
    wanted = [(run.original_length, "original"), (run.target_length, "target")]
    marks = [make_mark(at, text) for at, text in wanted if at is not None and inside[0] < at < inside[1]]
    notes = [note | {"x": math.log10(note["x"])} for _, note in marks]
    return {"shapes": [shape for shape, _ in marks], "annotations": notes}


def _length_axis(lengths: Sequence[int]) -> dict[str, Any]:
    texts = [length_text(length) for length in lengths]
    return make_axis("length in tokens", type="log", tickmode="array", tickvals=list(lengths), ticktext=texts)


def results_plot(run: RunData, name: str = "results") -> Plot | None:
    """Values of every method by length, with their intervals."""
    if not run.results:
        return None
    traces = [_result_trace(run, method) for method in reversed(methods_of(run))]
    positive = [result.value for result in run.results if result.value is not None and result.value > 0]
    vertical: dict[str, Any] = {} if lower_is_better(run.measure) else {"rangemode": "tozero"}
    if lower_is_better(run.measure) and positive:
        vertical = on_log_axis(positive)
    figure = make_figure(
        traces,
        xaxis=_length_axis(run.lengths),
        yaxis=make_axis(letters(run.measure), **vertical),
        legend_traceorder="reversed",
        **_length_marks(run),
    )
    better = "Lower" if lower_is_better(run.measure) else "Higher"
    title = f"{title_of(run.measure)} by length"
    caption = f"{measured_on(run)} {better} is better. A missing point is not finite.".lstrip()
    return Plot(name, title, caption, figure, log="xy" if vertical.get("type") == "log" else "x")


def _result_trace(run: RunData, method: str) -> dict[str, Any]:
    results = [run.result(method, length) for length in run.lengths]
    found = [result for result in results if result]
    trace = make_trace([r.length for r in found], [r.value for r in found], look(method, methods_of(run)))
    trace["text"] = [value_text(result.value) for result in found]
    trace["hovertemplate"] = "%{text} at %{x:,} tokens"
    if any(result.ci for result in found):
        ends = [(r.value, *r.ci) if r.ci and r.value is not None else (0.0, 0.0, 0.0) for r in found]
        above = [max(0.0, high - value) for value, _, high in ends]
        below = [max(0.0, value - low) for value, low, _ in ends]
        trace["error_y"] = {"symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 3}
    return trace


def gap_plot(run: RunData, name: str = "gap") -> Plot | None:
    """Every method relative to the best baseline at the length of the verdict, which squeezes nothing."""
    found = verdict(run)
    if not found or not found.baseline or len(run.lengths) == 1:
        return None
    reference = {length: run.result(found.baseline.method, length) for length in run.lengths}
    against = [(length, result.value) for length, result in reference.items() if result and result.value]
    traces = [_gap_trace(run, method, against) for method in reversed(methods_of(run))]
    gaps = [gap for trace in traces for gap in trace["y"] if gap is not None and abs(gap) <= _WIDEST_GAP]
    if not gaps:  # of a baseline that finds nothing, no part is more
        return None
    margin = 0.1 * (max(gaps) - min(gaps)) or 1.0
    label = look(found.baseline.method).label
    title = letters(f"difference from {label} in %")
    vertical = make_axis(title, range=[min(gaps) - margin, max(gaps) + margin], ticksuffix="%")
    lengths = [length for length, _ in against]
    figure = make_figure(
        traces, xaxis=_length_axis(lengths), yaxis=vertical, legend_traceorder="reversed", **_length_marks(run)
    )
    better = "below" if lower_is_better(run.measure) else "above"
    caption = (
        f"{better.capitalize()} zero is better than {label}. More than {_WIDEST_GAP:.0f}% off is outside the plot."
    )
    return Plot(name, f"Against {label}", caption, figure, log="x")


def _gap_trace(run: RunData, method: str, against: Sequence[tuple[int, float]]) -> dict[str, Any]:
    results = [run.result(method, length) for length, _ in against]
    gaps = [
        100 * (result.value / value - 1) if result and result.value is not None else None
        for result, (_, value) in zip(results, against, strict=True)
    ]
    trace = make_trace([length for length, _ in against], gaps, look(method, methods_of(run)))
    return trace | {"hovertemplate": "%{y:+.1f}% at %{x:,} tokens"}
