"""The plot of a search: values of complete candidates and the best so far against what the search had cost by then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longrope.baselines import RULES
from longrope.errors import plural
from longrope.report.figures import Figure, Plot, letters, make_axis, make_figure, make_trace, on_log_axis
from longrope.report.read import RunData
from longrope.report.searched import counts, objective_text
from longrope.report.style import DOTS, OURS_COLOUR, count_text, is_ours, look, run_colour, stage_of, value_text

_MOST_DOTS = 2000  # a page stays readable and below 6 MB
_TITLE = "Best value by token-passes"


@dataclass(frozen=True)
class Point:
    """A candidate on all windows: its value, infinite when it failed, and the token-passes spent when it was known."""

    cost: float
    value: float
    origin: str


def convergence_plot(run: RunData) -> Plot | None:
    """Complete candidates by where they come from and the best so far, against token-passes."""
    points, spent = _points(run)
    if not points or min(point.value for point in points) == math.inf:
        return None
    best = np.minimum.accumulate([point.value for point in points])
    frame = _frame(points, float(best[-1]))
    made = _figure(run, points, best, spent, frame)
    return Plot("convergence", _TITLE, _caption(run, points, spent, frame[1]), made, log="x")


def convergences_plot(runs: Sequence[RunData]) -> Plot | None:
    """The best so far of each of several runs."""
    traces, objectives = [], set()
    for rank, run in enumerate(runs):
        points, spent = _points(run)
        if points and min(point.value for point in points) < math.inf:
            best = np.minimum.accumulate([point.value for point in points])
            line = {"color": run_colour(rank), "width": 3, "shape": "hv"}
            traces.append(_steps(letters(run.name), points, best, spent) | {"line": line})
            objectives.add(letters(objective_text(run.settings)))
    if not traces:
        return None
    figure = make_figure(
        traces,
        xaxis=make_axis("token-passes", rangemode="tozero", nticks=6),
        yaxis=make_axis(" or ".join(sorted(objectives)), **on_log_axis(v for trace in traces for v in trace["y"])),
        showlegend=True,
    )
    caption = "The best candidate on all windows so far. Runs on other windows, models or lengths have other values."
    return Plot("convergence", _TITLE, caption, figure, log="xy")


def _points(run: RunData) -> tuple[list[Point], float]:
    """Candidates on all windows in order, and the token-passes spent in all."""
    costs = np.cumsum([each.tokens for each in run.evaluations])
    points: list[Point] = []
    known: set[str] = set()  # a candidate that fails on one window may fail on the next
    for cost, each in zip(costs, run.evaluations, strict=True):
        if each.kind in ("complete", "failed") and each.candidate not in known:
            known.add(each.candidate)
            points.append(Point(float(cost), math.inf if each.value is None else each.value, each.origin))
    return points, float(costs[-1]) if len(costs) else 0.0


def _caption(run: RunData, points: Sequence[Point], spent: float, top: float) -> str:
    first = min(points, key=lambda point: point.value)
    above = sum(point.value > top for point in points)
    done = counts(run.evaluations)
    said = (
        f"Best {value_text(first.value)} after {count_text(first.cost)} of {count_text(spent)} token-passes. Dots are "
        f"candidates on all windows, {len(points):,}; {above:,} lie above the frame or are not finite."
    )
    others = [plural(done.gradient, "gradient step")] if done.gradient else []
    others += [f"{plural(done.partial, 'candidate')} on some windows only"] if done.partial else []
    return said + (f" The cost includes {' and '.join(others)}." if others else "")


def _frame(points: Sequence[Point], low: float) -> tuple[float, float]:
    """Values between which the search is worth a look: from below the best to above the best seed."""
    finite = [point.value for point in points if math.isfinite(point.value)]
    start = min((point.value for point in points if stage_of(point.origin) == "seeds"), default=finite[0])
    gain = start - low if math.isfinite(start) else 0.0
    spread = float(np.median(finite)) - low
    span = gain or spread or 0.01 * abs(low) or 1.0
    return low - 0.15 * span, low + 2.2 * span


def _figure(
    run: RunData, points: Sequence[Point], best: NDArray[np.float64], spent: float, frame: tuple[float, float]
) -> Figure:
    steps = _steps("best so far", points, best, spent)
    rule = run.settings.get("attention_factor")
    seeds = _seed_lines(points, rule, (points[0].cost, spent), frame)
    one = "" if run.evaluation_tokens is None else f", {count_text(run.evaluation_tokens)} an evaluation"
    horizontal = make_axis(f"token-passes{one}", rangemode="tozero", nticks=6)
    objective = letters(objective_text(run.settings))
    vertical = make_axis(objective, range=list(frame))
    return make_figure([*_dots(points), *seeds, steps], xaxis=horizontal, yaxis=vertical)


def _steps(name: str, points: Sequence[Point], best: NDArray[np.float64], spent: float) -> dict[str, Any]:
    better = [i for i in range(len(best)) if math.isfinite(best[i]) and (i == 0 or best[i] < best[i - 1])]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [*(points[i].cost for i in better), spent],
        "y": [*best[better].tolist(), float(best[-1])],
        "hovertemplate": "%{y:.4f} at %{x:.4s}",
        "line": {"color": OURS_COLOUR, "width": 3, "shape": "hv"},
    }


def _dots(points: Sequence[Point]) -> list[dict[str, Any]]:
    every = math.ceil(len(points) / _MOST_DOTS)
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(stage_of(point.origin), []).append(point)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": stage,
            "x": [point.cost for point in groups[stage][::every]],
            "y": [point.value if math.isfinite(point.value) else None for point in groups[stage][::every]],
            "text": [letters(point.origin) for point in groups[stage][::every]],
            "hovertemplate": "%{text}: %{y:.4f}",
            "marker": {"color": colour, "symbol": symbol, "size": size, "opacity": 0.8},
        }
        for stage, (colour, symbol, size) in DOTS.items()
        if stage in groups
    ]


def _seed_lines(
    points: Sequence[Point], rule: object, ends: tuple[float, float], frame: tuple[float, float]
) -> list[dict[str, Any]]:
    """A level line for each baseline that the search started from, with its best attention factor, inside the frame.

    rule: where the search gave all seeds one attention factor, which their origins then do not name.
    """
    best: dict[str, Point] = {}
    for point in points:
        stem = point.origin.partition("+")[0]
        if not is_ours(point.origin) and (stem not in best or point.value < best[stem].value):
            best[stem] = point
    lines = []
    for stem, point in best.items():
        if frame[0] <= point.value <= frame[1]:
            name = f"{stem}+{rule}" if point.origin == stem and rule in RULES else point.origin
            line = make_trace(ends, [point.value, point.value], look(name), hovertemplate="%{y:.4f}")
            lines.append(line | {"mode": "lines", "line": line["line"] | {"dash": "dash"}})
    return lines
