"""How things look and read on the page: method names, colours that the colour-blind can tell apart, numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from longrope.baselines import METHODS
from longrope.lengths import format_length
from longrope.report.results import RUN_SEPARATOR

UNSCALED = "none"
"""The method that is the model as it is."""
_LABELS = {
    UNSCALED: "unscaled",
    "pi": "PI",
    "ntk": "NTK",
    "ntk-cd": "NTK-cd",
    "dynamic-ntk": "dynamic NTK",
    "yarn": "YaRN",
    "yarn-paper": "YaRN (paper)",
    "yarn-rcd": "YaRN-rcd",
    "llama3": "Llama 3",
}
# Okabe and Ito's palette without its black and its yellow, and with a lighter blue: it must show on white and on black.
OURS_COLOUR, GREY = "#D55E00", "#8A8A8A"
_COLOURS = {
    UNSCALED: GREY,
    "pi": "#E69F00",
    "ntk": "#009E73",
    "ntk-cd": "#009E73",
    "dynamic-ntk": "#CC79A7",
    "yarn": "#1F86C7",
    "yarn-paper": "#1F86C7",
    "yarn-rcd": "#1F86C7",
    "llama3": "#56B4E9",
}
_SYMBOLS = {"pi": "square", "ntk": "triangle-up", "dynamic-ntk": "triangle-down", "yarn": "diamond", "llama3": "cross"}
_DASHES = {"ntk-cd": "dash", "yarn-paper": "dashdot", "yarn-rcd": "dash", UNSCALED: "dot"}
# The candidates of a search by the stage that made them: colour, symbol, size.
_PURPLE = "#8C6BD1"
DOTS = {
    "seeds": (GREY, "diamond", 7),
    "mutations": (GREY, "circle", 4),
    "crossovers": (GREY, "x", 5),
    "descent": (_PURPLE, "circle", 6),
    "start tokens": (_PURPLE, "square-open", 6),
    "polish": (_PURPLE, "triangle-up-open", 6),
}
_STAGES = {"mutation": "mutations", "crossover": "crossovers", "start tokens": "start tokens", "polish": "polish"}
_OURS_DASHES = ("solid", "dash", "dot", "dashdot")
# Of several runs each has a colour for what is its own, the first that of a single run.
_RUN_COLOURS = (OURS_COLOUR, _PURPLE, "#1F86C7", "#009E73", "#CC79A7", "#B8860B")


@dataclass(frozen=True)
class Look:
    """A method on the page: the same in every plot and table."""

    label: str
    ours: bool
    colour: str
    dash: str
    symbol: str
    width: float


def of_run(rank: int, run: str, method: str) -> str:
    """A method of one of several runs, which `look` tells apart; rank: the run's place among them."""
    return RUN_SEPARATOR.join((str(rank), run, method))


def parts_of(method: str) -> tuple[str, str]:
    """The run of a method, empty where only one is shown, and the method."""
    parts = method.split(RUN_SEPARATOR)
    return ("", method) if len(parts) == 1 else (parts[1], parts[2])


def is_ours(method: str) -> bool:
    """Whether a method is a result of this project rather than a baseline."""
    stem, _, _ = parts_of(method)[1].partition("+")
    return stem not in METHODS and stem != UNSCALED


def stage_of(origin: str) -> str:
    """The stage of a search that a candidate comes from, by its origin; what is no later stage's is a seed."""
    return "descent" if origin.startswith("descent ") else _STAGES.get(origin, "seeds")


def look(method: str, methods: Iterable[str] = ()) -> Look:
    """The look of a method beside the others of its run, or of its runs where there are several."""
    if RUN_SEPARATOR not in method:
        return _look(method, methods)
    run, name = parts_of(method)
    rank = int(method.partition(RUN_SEPARATOR)[0])
    made = _look(name, [other for its_run, other in map(parts_of, methods) if its_run == run])
    if made.ours:
        made = replace(made, colour=run_colour(rank))
    else:
        made = replace(made, dash=_OURS_DASHES[rank % len(_OURS_DASHES)])
    return replace(made, label=f"{run}: {made.label}")


def run_colour(rank: int) -> str:
    """The colour of what is a run's own, of several by their order."""
    return _RUN_COLOURS[rank % len(_RUN_COLOURS)]


def _look(method: str, methods: Iterable[str]) -> Look:
    if is_ours(method):
        rank = [name for name in dict.fromkeys([*methods, method]) if is_ours(name)].index(method)
        dash = _OURS_DASHES[rank % len(_OURS_DASHES)]
        return Look(method, ours=True, colour=OURS_COLOUR, dash=dash, symbol="circle", width=3.5)
    stem, plus, rule = method.partition("+")
    dash = "dot" if plus else _DASHES.get(stem, "solid")
    symbol = _SYMBOLS.get(stem.partition("-")[0], _SYMBOLS.get(stem, "circle-open"))
    label = _LABELS.get(stem, stem) + (f" + {rule}" if plus else "")
    return Look(label, ours=False, colour=_COLOURS.get(stem, GREY), dash=dash, symbol=symbol, width=1.75)


def slug(name: str) -> str:
    """A name as part of the name of a file or of an element."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-") or "measure"


def title_of(measure: str) -> str:
    """A measure as a heading."""
    named = {"ruler": "RULER", "harness": "Short benchmarks", "nonuniformity": "What non-uniformity gives"}
    return named.get(measure, f"{measure[:1].upper()}{measure[1:]}")


def length_text(length: int) -> str:
    """Tokens for readers: all digits while they are few."""
    return str(length) if length < 10_000 else format_length(length)


def value_text(value: float | None) -> str:
    """Four significant digits or so, a dash for what is not finite."""
    if value is None:
        return "—"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:,.1f}"


def percent_text(share: float) -> str:
    """A signed percentage with a real minus: -0.05 -> −5.0%."""
    return f"{100 * share:+.1f}%".replace("-", "−")


def count_text(count: float) -> str:
    """A count in three digits or so: 5120000 -> 5.12M."""
    count = float(f"{count:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"


def duration_text(seconds: float) -> str:
    """83 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    return f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min" if seconds < 7200 else f"{seconds / 3600:.1f}\N{NO-BREAK SPACE}h"
