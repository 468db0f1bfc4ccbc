"""The page: a template that escapes everything, with plotly.js, the figures, the style and the script inline."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from longrope import __version__
from longrope.report import facts
from longrope.report.plots import plots
from longrope.report.read import RunData
from longrope.report.searched import search_facts
from longrope.report.style import length_text, lower_is_better


def page(run: RunData) -> str:
    """The whole HTML page of a run."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.from_string(_resource("page.html")).render(**_content(run))


def _content(run: RunData) -> dict[str, Any]:
    made = plots(run)
    return {
        "run": run,
        "headline": facts.headline(run),
        "model": facts.model_name(run),
        "cards": facts.cards(run),
        "missing": facts.missing(run),
        "rows": facts.table_rows(run),
        "seen_rows": facts.seen_rows(run),
        "measured_on": facts.measured_on(run),
        "lengths": [length_text(length) for length in run.lengths],
        "seen_lengths": [length_text(length) for length in sorted({result.length for result in run.seen})],
        "lower": lower_is_better(run.measure),
        "factor_rows": [(row, length_text(row.up_to)) for row in run.table.rows] if run.table else [],
        "search_facts": search_facts(run),
        "settings": facts.settings(run),
        "command_line": facts.command_line(run),
        "plots": {plot.name: plot for plot in made},
        "figures": {plot.name: plot.figure for plot in made},
        "version": __version__,
        "style": Markup(_resource("page.css")),
        "script": Markup(_resource("page.js")),
        "plotly": Markup(_plotly()) if made else None,
    }


def _resource(name: str) -> str:
    return files("longrope.report").joinpath(name).read_text("utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    assert "</script" not in source.lower()
    return source
