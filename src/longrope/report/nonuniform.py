"""What non-uniformity gives: perplexity by the pairs that are rescaled, by start tokens kept, by attention factor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longrope.report.facts import Cell, Row, methods_of
from longrope.report.figures import Plot, letters, make_axis, make_figure, make_trace, on_log_axis
from longrope.report.read import RunData
from longrope.report.results import Result
from longrope.report.style import GREY, OURS_COLOUR, UNSCALED, Look, length_text, look, parts_of, value_text
from longrope.report.tables import Table

_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")


def nonuniformity_plots(run: RunData) -> list[Plot]:
    """A plot of each of the three studies, as far as they were made, at the longest length measured."""
    chosen = _longest(run)
    return [plot for plot in (_groups(run, chosen), _start_tokens(run, chosen), _attention(run, chosen)) if plot]


def nonuniformity_tables(run: RunData) -> list[Table]:
    """The same figures, a row each."""
    made = []
    chosen = _longest(run)
    groups = [
        _row(run, result, f"pairs {first:g} to {last:g}", only, without)
        for result in chosen
        for first, last, only, without in result.details.get("groups", ())
    ]
    if groups:
        columns = ("only these rescaled", "all but these")
        made.append(Table("nonuniformity-groups", "By group of pairs", columns, tuple(groups), folded=True, corner=""))
    tokens = [
        _row(run, result, f"{name}, {start:g} start tokens", value)
        for result in chosen
        for start, name, value in result.details.get("start_tokens", ())
    ]
    if tokens:
        title, name = "By start tokens kept", "nonuniformity-start-tokens"
        made.append(Table(name, title, ("perplexity",), tuple(tokens), folded=True, corner=""))
    attention = [
        _row(run, result, f"{name}, {method}", value)
        for result in chosen
        for name, method, value in result.details.get("attention", ())
    ]
    if attention:
        title, name = "By attention factor", "nonuniformity-attention"
        made.append(Table(name, title, ("perplexity",), tuple(attention), folded=True, corner=""))
    return made


def _longest(run: RunData) -> list[Result]:
    """Of each method the results of the longest length that has details."""
    known = [result for result in run.results if result.details]
    chosen = []
    for method in methods_of(run):
        if own := [result for result in known if result.method == method]:
            chosen.append(max(own, key=lambda result: result.length))
    return chosen


def _row(run: RunData, result: Result, what: str, *values: float | None) -> Row:
    cells = tuple(Cell(value_text(value), "", best=False, title="") for value in values)
    style = look(result.method, methods_of(run))
    label = f"{parts_of(result.method)[0]}: {what}" if parts_of(result.method)[0] else what
    return Row(result.method, Look(label, style.ours, style.colour, style.dash, style.symbol, style.width), cells)


def _at(chosen: list[Result]) -> str:
    lengths = dict.fromkeys(length_text(result.length) for result in chosen)
    return f"At {', '.join(lengths)} tokens."


def _name(run: RunData, result: Result, chosen: list[Result], what: str) -> str:
    """Which study, and of what where several are shown."""
    return what if len(chosen) == 1 else f"{look(result.method, methods_of(run)).label}: {what}"


def _groups(run: RunData, chosen: list[Result]) -> Plot | None:
    traces = []
    for number, result in enumerate(each for each in chosen if each.details.get("groups")):
        rows = [row for row in result.details["groups"] if row[0] is not None and row[1] is not None]
        middles = [(first + last) / 2 for first, last, *_ in rows]
        places = [f"pairs {first:g} to {last:g}" for first, last, *_ in rows]
        for index, (what, colour) in enumerate((("only these rescaled", OURS_COLOUR), ("all but these", GREY))):
            symbol = _SYMBOLS[number % len(_SYMBOLS)]
            style = Look(_name(run, result, chosen, what), index == 0, colour, "solid", symbol, 2.5 - 0.75 * index)
            trace = make_trace(middles, [row[2 + index] for row in rows], style)
            traces.append(trace | {"text": places, "hovertemplate": "%{text}: %{y:.3f}"})
        for method, value in result.details.get("whole", ()):
            name = _name(run, result, chosen, "nothing rescaled" if method == UNSCALED else f"all rescaled ({method})")
            style = Look(name, False, GREY, "dot" if method == UNSCALED else "dash", "circle-open", 1.25)
            level = make_trace([middles[0], middles[-1]], [value, value], style) if middles else {}
            traces += [level | {"mode": "lines", "hovertemplate": "%{y:.3f}"}] if level else []
    if not traces:
        return None
    figure = make_figure(traces, xaxis=make_axis("pair i (fast pairs left)"), yaxis=_perplexity(traces))
    caption = (
        f"{_at(chosen)} Perplexity when only one group of pairs is rescaled, and when all others are: where the lines "
        "part, the group matters."
    )
    return Plot("nonuniformity-groups", "By group of pairs rescaled", caption, figure, log="y")


def _start_tokens(run: RunData, chosen: list[Result]) -> Plot | None:
    traces: list[dict[str, Any]] = []
    for number, result in enumerate(chosen):
        rows = result.details.get("start_tokens", ())
        for name in dict.fromkeys(row[1] for row in rows):
            own = sorted((row[0], row[2]) for row in rows if row[1] == name and None not in (row[0], row[2]))
            style = _method(run, chosen, number, name)
            trace = make_trace([start for start, _ in own], [value for _, value in own], style)
            traces.append(trace | {"hovertemplate": "%{y:.3f} with %{x} start tokens"})
    if not traces:
        return None
    figure = make_figure(traces, xaxis=make_axis("start tokens that are not rescaled"), yaxis=_perplexity(traces))
    return Plot("nonuniformity-start", "By start tokens kept", _at(chosen), figure, log="y")


def _attention(run: RunData, chosen: list[Result]) -> Plot | None:
    traces: list[dict[str, Any]] = []
    for number, result in enumerate(chosen):
        rows = result.details.get("attention", ())
        for method in dict.fromkeys(row[1] for row in rows):
            own = [row for row in rows if row[1] == method]
            style = _method(run, chosen, number, method)
            trace = make_trace([], [row[2] for row in own], style, hovertemplate="%{y:.3f} with %{x}")
            traces.append(trace | {"mode": "markers", "x": [letters(row[0]) for row in own]})
            traces[-1]["marker"]["size"] = 11
    if not traces:
        return None
    figure = make_figure(traces, xaxis=make_axis("attention factor", type="category"), yaxis=_perplexity(traces))
    return Plot("nonuniformity-attention", "By attention factor", _at(chosen), figure, log="y")


def _perplexity(traces: list[dict[str, Any]]) -> dict[str, Any]:
    return make_axis("perplexity", **on_log_axis(value for trace in traces for value in trace["y"]))


def _method(run: RunData, chosen: list[Result], number: int, method: str) -> Look:
    """A method's look as everywhere on the page; where several studies are shown, their lines and symbols differ."""
    own = look(method)
    style = replace(own, label=_name(run, chosen[number], chosen, own.label))
    if len(chosen) == 1:
        return style
    return replace(style, dash=_DASHES[number % len(_DASHES)], symbol=_SYMBOLS[number % len(_SYMBOLS)])
