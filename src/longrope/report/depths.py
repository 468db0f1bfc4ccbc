"""Where in a window: perplexity by position, and retrieval by length and depth as heat maps."""

from __future__ import annotations

from longrope.report.facts import methods_of
from longrope.report.figures import Plot, letters, make_axis, make_figure, make_heat_map, make_trace, on_log_axis
from longrope.report.read import RunData
from longrope.report.results import Result
from longrope.report.style import length_text, look, value_text


def position_plot(run: RunData) -> Plot | None:
    """Perplexity by position inside the longest windows that have it."""
    known = [result for result in run.results if result.details.get("by_position")]
    if not known:
        return None
    longest = max(result.length for result in known)
    methods = methods_of(run)
    traces = []
    for method in reversed(methods):
        for result in known:
            if (result.method, result.length) == (method, longest):
                places, values = zip(*result.details["by_position"], strict=True)
                traces.append(make_trace(places, values, look(method, methods)))
                traces[-1]["hovertemplate"] = "%{y:.3f} up to position %{x:,}"
    figure = make_figure(
        traces,
        xaxis=make_axis("position in the window", **on_log_axis(place for trace in traces for place in trace["x"])),
        yaxis=make_axis(letters(run.measure), **on_log_axis(value for trace in traces for value in trace["y"])),
        legend_traceorder="reversed",
    )
    caption = (
        f"Windows of {length_text(longest)} tokens. Each point is the perplexity of the tokens from the point before "
        "it up to its position: a method that uses its context falls to the right."
    )
    return Plot("position", "Perplexity by position", caption, figure, log="xy")


def depth_plots(run: RunData) -> list[Plot]:
    """A heat map of each method: what was found, by length and by depth in the window."""
    made = []
    methods = methods_of(run)
    for number, method in enumerate(methods, start=1):
        results = sorted((r for r in run.results if r.method == method and r.details.get("by_depth")), key=_length)
        cells: dict[tuple[str, str], tuple[float, str, str]] = {}
        rows: dict[tuple[float, float], str] = {}
        for result in results:
            for row in result.details["by_depth"]:
                key, label, share, said = _cell(run.measure, row)
                if key is None or share is None:
                    continue
                rows[key] = label
                column = length_text(result.length)
                cells[column, label] = (share, f"{100 * share:.0f}%", f"{column} tokens, depth {label}: {said}")
        if cells:
            columns = [length_text(length) for length in dict.fromkeys(result.length for result in results)]
            labels = list(dict.fromkeys(rows[key] for key in sorted(rows)))
            figure = make_heat_map(columns, labels, cells, x="length in tokens", y="depth in the window")
            label = look(method, methods).label
            made.append(Plot(f"{run.measure}-depth-{number}", f"{label}, by length and depth", "", figure))
    return made


def task_plots(run: RunData) -> list[Plot]:
    """A heat map of each method: scores by length and task."""
    made = []
    methods = methods_of(run)
    scores = [f.get("score") for r in run.results for f in r.details.get("tasks", {}).values()]
    whole = 100.0 if any(score is not None and score > 1 for score in scores) else 1.0
    for number, method in enumerate(methods, start=1):
        results = sorted((r for r in run.results if r.method == method and r.details.get("tasks")), key=_length)
        cells: dict[tuple[str, str], tuple[float, str, str]] = {}
        for result in results:
            column = length_text(result.length)
            for task, figures in result.details["tasks"].items():
                if (score := figures.get("score")) is not None:
                    samples = f" of {figures['samples']:g} samples" if figures.get("samples") is not None else ""
                    share = score / whole
                    said = f"{task} at {column} tokens: {value_text(score)}{samples}"
                    cells[column, task] = (share, f"{100 * share:.0f}", said)
        if cells:
            columns = [length_text(length) for length in dict.fromkeys(result.length for result in results)]
            tasks = list(dict.fromkeys(task for _, task in cells))
            figure = make_heat_map(columns, tasks, cells, x="length in tokens", y="")
            label = look(method, methods).label
            made.append(Plot(f"{run.measure}-tasks-{number}", f"{label}, by length and task, in %", "", figure))
    return made


def _length(result: Result) -> int:
    return result.length


def _cell(measure: str, row: list[float | None]) -> tuple[tuple[float, float] | None, str, float | None, str]:
    """Where a row of by_depth stands, what that is called, its share, and what a reader who points at it is told."""
    if measure == "passkey":
        low, high, share, tries = row
        if low is None or high is None:
            return None, "", None, ""
        key, label, more = (low, high), f"{100 * low:.0f}–{100 * high:.0f}%", ""
    else:
        depth, share, tries, loss = row
        if depth is None:
            return None, "", None, ""
        key, label = (depth, depth), f"{100 * depth:.3g}%"
        more = "" if loss is None else f", mean loss {value_text(loss)}"
    said = "" if share is None else f"{100 * share:.0f}%" + ("" if tries is None else f" of {tries:g} tries") + more
    return key, label, share, said
