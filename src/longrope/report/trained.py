"""The loss of a training by step."""

from __future__ import annotations

from collections.abc import Sequence

from longrope.report.figures import Plot, letters, make_axis, make_figure, make_trace
from longrope.report.read import RunData
from longrope.report.style import OURS_COLOUR, Look, run_colour

_MOST_POINTS = 2000


def training_plot(runs: Sequence[RunData]) -> Plot | None:
    """Loss by step of every run that was trained."""
    traces = []
    for rank, run in enumerate(runs):
        if run.losses:
            every = 1 + len(run.losses) // _MOST_POINTS
            colour = OURS_COLOUR if len(runs) == 1 else run_colour(rank)
            style = Look("loss" if len(runs) == 1 else letters(run.name), True, colour, "solid", "circle", 2.0)
            steps, losses = zip(*run.losses[::every], strict=True)
            traces.append(
                make_trace(steps, losses, style) | {"mode": "lines", "hovertemplate": "%{y:.4f} at step %{x}"}
            )
    if not traces:
        return None
    figure = make_figure(traces, xaxis=make_axis("step"), yaxis=make_axis("loss in nats a token"))
    return Plot("training", "Loss by step", "Of the windows that a step was trained on, before it.", figure, log="xy")
