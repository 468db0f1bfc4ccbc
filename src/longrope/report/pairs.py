"""Plots by pair of dimensions: rescale factors and wavelengths, beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longrope.baselines import RopeShape, baseline, critical_dimension
from longrope.factors import FactorTable
from longrope.report.figures import Plot, make_axis, make_figure, make_level, make_mark, make_trace
from longrope.report.read import RunData, shape_of
from longrope.report.style import OURS_COLOUR, Look, length_text, look, run_colour

_BESIDE = ("pi", "ntk", "yarn")
_Line = tuple[Look, RopeShape, list[float]]


def factors_plot(runs: Sequence[RunData]) -> Plot | None:
    """Rescale factors by pair of every run that has some, beside baselines for the same lengths."""
    lines, shape, up_to = _lines(runs)
    if not lines:
        return None
    traces = _traces(lines, [values for _, _, values in lines], "pair %{x}: %{y:.3f}")
    largest = max(value for _, _, values in lines for value in values)
    shown, caption = [], "What divides the frequency of each pair."
    if shape:
        critical = critical_dimension(shape)
        shown = [make_mark(critical, f"critical dimension {critical:.1f}")] if 0 <= critical <= shape.pairs - 1 else []
        caption = (
            f"What divides the frequency of each pair, for up to {up_to} tokens. Beyond the theoretical critical "
            "dimension one turn is longer than the original window."
        )
    figure = make_figure(
        traces,
        xaxis=make_axis("pair i (fast pairs left)"),
        yaxis=make_axis("rescale factor λ", type="log", **_ratio_ticks(largest)),
        legend_traceorder="reversed",
        shapes=[line for line, _ in shown],
        annotations=[note | {"y": 0.04, "yanchor": "bottom"} for _, note in shown],
    )
    return Plot("factors", "Rescale factors by pair", caption, figure, log="y")


def wavelengths_plot(runs: Sequence[RunData]) -> Plot | None:
    """Tokens for one full turn of each pair: of the unscaled model, of the baselines and of every run."""
    lines, shape, _ = _lines(runs)
    if not lines:
        return None
    if shape:
        lines = [(look("none"), shape, [1.0] * shape.pairs), *lines]
    values = [[T * factor for T, factor in zip(its.periods, factors, strict=True)] for _, its, factors in lines]
    traces = _traces(lines, values, "pair %{x}: %{y:,.0f} tokens a turn")
    levels = []
    if shape:
        wanted = max((run.table.rows[-1].up_to for run in runs if run.table), default=0)
        levels = [make_level(shape.original_length, "original length")]
        levels += [make_level(wanted, "target")] if wanted > shape.original_length else []
    figure = make_figure(
        traces,
        xaxis=make_axis("pair i (fast pairs left)"),
        yaxis=make_axis("tokens for one turn", type="log", dtick=1, exponentformat="power"),
        legend_traceorder="reversed",
        shapes=[line for line, _ in levels],
        annotations=[note for _, note in levels],
    )
    caption = "A pair above the level of a length does not make a full turn in it."
    return Plot("wavelengths", "Wavelengths by pair", caption, figure, log="y")


def _lines(runs: Sequence[RunData]) -> tuple[list[_Line], RopeShape | None, str]:
    """Baselines and runs with their factors; the shape and length that all share, None where they differ."""
    known: list[tuple[int, RunData, FactorTable]] = [(i, run, run.table) for i, run in enumerate(runs) if run.table]
    if not known:
        return [], None, ""
    targets = {(shape_of(table), table.rows[-1].up_to) for _, _, table in known}
    shapes = {shape for shape, _ in targets}
    lines: list[_Line] = []
    shape, up_to = next(iter(targets))
    if len(targets) == 1:
        lines = [(look(name), shape, list(baseline(name, shape, up_to).rescale)) for name in _BESIDE]
    for rank, run, table in known:
        name, colour = ("this run", OURS_COLOUR) if len(runs) == 1 else (run.name, run_colour(rank))
        style = Look(name, ours=True, colour=colour, dash="solid", symbol="circle", width=3)
        lines.append((style, shape_of(table), list(table.rows[-1].rescale)))
    said = " or ".join(length_text(length) for length in sorted({length for _, length in targets}))
    return lines, shape if len(shapes) == 1 else None, said


def _traces(lines: Sequence[_Line], values: Sequence[Sequence[float]], hover: str) -> list[dict[str, Any]]:
    traces = []
    for (style, _, _), line in zip(lines, values, strict=True):
        trace = make_trace(list(range(len(line))), [float(value) for value in line], style, hovertemplate=hover)
        trace["mode"] = "lines+markers" if style.ours else "lines"
        trace["marker"]["size"] = 5
        traces.append(trace)
    return traces


def _ratio_ticks(largest: float) -> dict[str, Any]:
    step = max(1, math.ceil(math.log2(max(largest, 2.0)) / 8))
    ticks = [2**power for power in range(0, math.ceil(math.log2(max(largest, 2.0))) + 1, step)]
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}
