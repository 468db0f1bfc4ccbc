"""Tables and plots of suites of tasks: RULER by task, and short benchmarks, which tell what an extension costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from longrope.report.facts import Cell, Row, methods_of
from longrope.report.figures import Plot, letters, make_axis, make_figure
from longrope.report.read import RunData
from longrope.report.results import Result
from longrope.report.style import UNSCALED, length_text, look, parts_of, value_text
from longrope.report.tables import Table

_Figures = Mapping[tuple[str, str], float | None]  # by task and name
_AT_AN_AXIS = 40  # characters


def ruler_table(run: RunData) -> Table | None:
    """A row a method and length, a column a task."""
    results = _with_tasks(run)
    tasks = list(dict.fromkeys(task for result in results for task in result.details["tasks"]))
    if not tasks:
        return None
    best: dict[tuple[int, str], float] = {}
    for result in results:
        for task, figures in result.details["tasks"].items():
            if (score := figures.get("score")) is not None:
                best[result.length, task] = max(score, best.get((result.length, task), score))
    rows = []
    for result in results:
        cells = []
        for task in tasks:
            figures = result.details["tasks"].get(task, {})
            score, samples = figures.get("score"), figures.get("samples")
            title = "not measured" if score is None else "" if samples is None else f"{samples:g} samples"
            text = "" if score is None else value_text(score)
            cells.append(Cell(text, "", best=score is not None and score == best[result.length, task], title=title))
        rows.append(_row(run, result, cells, lengths=True))
    title = "RULER by task"
    return Table(
        f"{run.measure}-tasks", title, tuple(tasks), tuple(rows), "The best of each length is bold.", folded=True
    )


def harness_table(run: RunData) -> Table | None:
    """A row a method, a column a task and metric, with the difference from the model as it is underneath."""
    results = _with_tasks(run)
    columns = _columns(results)
    if not columns:
        return None
    base = _base(results)
    many = len({result.length for result in results}) > 1
    rows = []
    for result in results:
        figures, cells = _figures(result), []
        before = base.get(parts_of(result.method)[0], {})
        for task, name in columns:
            value, error = figures.get((task, name)), figures.get((task, _error_of(name)))
            old = before.get((task, name))
            change = "" if value is None or old is None else f"{value - old:+.3f}".replace("-", "−")
            title = "not measured" if value is None else "" if error is None else f"standard error {error:.4f}"
            shown = change if parts_of(result.method)[1] != UNSCALED else ""
            cells.append(Cell("" if value is None else value_text(value), shown, best=False, title=title))
        rows.append(_row(run, result, cells, lengths=many))
    titles = tuple(_title(task, name) for task, name in columns)
    note = "Small: the difference from the model as it is, unscaled. That is the cost at short length."
    return Table(f"{run.measure}-tasks", "Short benchmarks", titles, tuple(rows), note)


def harness_plot(run: RunData) -> Plot | None:
    """Bars of every share of right answers: tasks by method."""
    results = _with_tasks(run)
    columns = [
        column for column in _columns(results) if all(0 <= (_figures(r).get(column) or 0.0) <= 1 for r in results)
    ]
    if not columns:
        return None
    methods, titles = methods_of(run), [_title(*column) for column in columns]
    many = len({result.length for result in results}) > 1
    traces = []
    for result in results:
        style = look(result.method, methods)
        label = f"{style.label}, {length_text(result.length)}" if many else style.label
        figures = _figures(result)
        errors = [figures.get((task, _error_of(name))) or 0.0 for task, name in columns]
        trace = {
            "type": "bar",
            "name": letters(label),
            "x": [letters(each) for each in titles],
            "y": [figures.get(column) for column in columns],
            "marker": {"color": style.colour, "pattern": {"shape": _pattern(style.dash)}},
            "customdata": [letters(each) for each in titles],
            "hovertemplate": "%{y:.3f} in %{customdata}",
        }
        traces.append(trace | ({"error_y": {"array": errors, "thickness": 1, "width": 3}} if any(errors) else {}))
    figure = make_figure(
        traces,
        barmode="group",
        xaxis=make_axis(
            "",
            type="category",
            tickmode="array",
            tickvals=[letters(each) for each in titles],
            ticktext=[letters(_cut(each)) for each in titles],
        ),
        yaxis=make_axis("share of right answers", rangemode="tozero"),
    )
    caption = "Whiskers are standard errors. A method that costs nothing at short length stands as high as unscaled."
    return Plot(f"{run.measure}-short", "Short benchmarks", caption, figure)


def _cut(title: str) -> str:
    """A title as there is room for at an axis; the whole is where it is pointed at."""
    return title if len(title) <= _AT_AN_AXIS else f"{title[: _AT_AN_AXIS - 1]}…"


def _with_tasks(run: RunData) -> list[Result]:
    order = methods_of(run)
    found = [result for result in run.results if result.details.get("tasks")]
    return sorted(found, key=lambda result: (order.index(result.method), result.length))


def _row(run: RunData, result: Result, cells: list[Cell], *, lengths: bool) -> Row:
    style = look(result.method, methods_of(run))
    label = f"{style.label} at {length_text(result.length)}" if lengths else style.label
    return Row(result.method, replace(style, label=label), tuple(cells))


def _figures(result: Result) -> _Figures:
    return {(task, name): value for task, named in result.details["tasks"].items() for name, value in named.items()}


def _columns(results: list[Result]) -> list[tuple[str, str]]:
    """Tasks with their metrics; standard errors stand beside what they belong to."""
    return [
        column
        for column in dict.fromkeys(column for result in results for column in _figures(result))
        if "_stderr" not in column[1]
    ]


def _error_of(name: str) -> str:
    """The standard error of lm-evaluation-harness's `acc,none` is `acc_stderr,none`."""
    metric, comma, rule = name.partition(",")
    return f"{metric}_stderr{comma}{rule}"


def _title(task: str, name: str) -> str:
    return f"{task} {name.removesuffix(',none')}"


def _base(results: list[Result]) -> dict[str, _Figures]:
    """The model as it is, by run; results of tasks stand under where factors end, which is another length for it."""
    plain = [result for result in results if parts_of(result.method)[1] == UNSCALED]
    return {parts_of(result.method)[0]: _figures(result) for result in plain}


def _pattern(dash: str) -> str:
    return {"solid": "", "dash": "/", "dot": ".", "dashdot": "x"}[dash]
