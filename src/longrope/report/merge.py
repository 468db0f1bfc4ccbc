"""Several runs as one, to be shown side by side: results of the same measure, each method under its run's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from longrope.report.read import RunData
from longrope.report.results import Result
from longrope.report.style import of_run


def with_names(runs: Sequence[RunData]) -> list[RunData]:
    """The runs under names that differ: of runs of the same name the second is NAME-2."""
    named: list[RunData] = []
    for run in runs:
        taken, name, count = {other.name for other in named}, run.name, 1
        while name in taken:
            count += 1
            name = f"{run.name}-{count}"
        named.append(replace(run, name=name))
    return named


def merge(runs: Sequence[RunData]) -> RunData:
    """One run with the results of all; a single one as it is. Its factors and evaluations are none of any run's."""
    if len(runs) == 1:
        return runs[0]
    measures: dict[str, tuple[Result, ...]] = {}
    for rank, run in enumerate(runs):
        for measure in run.measures:
            # Each run's own choice between held-out windows and those of its search.
            chosen = [replace(each, method=of_run(rank, run.name, each.method)) for each in run.of(measure).results]
            measures[measure] = (*measures.get(measure, ()), *chosen)
    names = {str(run.model.get("name")) for run in runs}
    originals = {run.original_length for run in runs}
    lengths = [run.target_length for run in runs if run.target_length]
    model: dict[str, Any] = dict(runs[0].model) if len(names) == 1 else {"name": f"{len(names)} models"}
    model.pop("original_length", None)
    if len(originals) == 1 and None not in originals:
        model["original_length"] = originals.pop()
    merged = RunData(
        name=", ".join(run.name for run in runs),
        config={},
        model=model,
        settings={"to": max(lengths)} if lengths else {},
        documents={},
        measure="perplexity",
        results=(),
        seen=(),
        table=None,
        evaluations=(),
        finished=all(run.finished for run in runs),
        measures=measures,
    )
    return merged.of(next(iter(measures), "perplexity"))
