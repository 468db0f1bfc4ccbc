"""The page: a template that escapes everything, with plotly.js, the figures, the style and the script inline."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from longrope import __version__
from longrope.report import facts
from longrope.report.plots import measure_sections, search_plots
from longrope.report.read import RunData
from longrope.report.searched import search_facts
from longrope.report.style import length_text, run_colour

_OWN_SECTIONS = {"convergence": "Convergence", "training": "Training"}


def page(runs: Sequence[RunData]) -> str:
    """The whole HTML page of a run, or of several side by side."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.from_string(_resource("page.html")).render(**_content(runs))


def _content(runs: Sequence[RunData]) -> dict[str, Any]:
    sections, searched = measure_sections(runs), search_plots(runs)
    made = [*(plot for section in sections for plot in section.plots), *searched]
    alone = len(runs) == 1
    scripts = {"script": _resource("page.js"), "plotly": _plotly()} if made else {}
    return {
        "runs": [_asked(run, rank) for rank, run in enumerate(runs)],
        "headline": facts.headline(runs[0]) if alone else f"{len(runs)} runs side by side",
        "finished": all(run.finished for run in runs),
        "cards": facts.cards(runs[0]) if alone else [],
        "missing": facts.missing(runs[0]) if alone else facts.missing_of(runs),
        "sections": sections,
        "not_measured": facts.not_measured(runs),
        "stages": [("" if alone else run.name, facts.stage_rows(run)) for run in runs if run.stages],
        "factor_tables": [
            ("" if alone else run.name, [(row, length_text(row.up_to)) for row in run.table.rows])
            for run in runs
            if run.table
        ],
        "factor_plots": [plot for plot in searched if plot.name not in _OWN_SECTIONS],
        "own_sections": [(_OWN_SECTIONS[plot.name], plot) for plot in searched if plot.name in _OWN_SECTIONS],
        "figures": {plot.name: plot.figure for plot in made},
        "version": __version__,
        "style": Markup(_resource("page.css")),
        "script": Markup(scripts.get("script", "")),
        "plotly": Markup(scripts["plotly"]) if made else None,
        "allowed": " ".join(map(_hash_source, scripts.values())) or "'none'",
    }


def _hash_source(script: str) -> str:
    """How a page's policy names a script that may run: by its hash, so that no other one does."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


def _asked(run: RunData, rank: int) -> dict[str, Any]:
    """What the page says of each run."""
    return {
        "run": run,
        "colour": run_colour(rank),
        "headline": facts.headline(run),
        "model": facts.model_name(run),
        "search_facts": search_facts(run),
        "settings": facts.settings(run),
        "command_lines": facts.command_lines(run),
    }


def _resource(name: str) -> str:
    return files("longrope.report").joinpath(name).read_text("utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    assert "</script" not in source.lower()
    return source
