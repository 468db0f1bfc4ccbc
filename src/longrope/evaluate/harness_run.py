"""`longrope evaluate harness` as a run: lm-eval's answers on disk as they come, its metrics as one result."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope import __version__
from longrope.checkpoint import LoadOptions, load_options
from longrope.describe import describe_model, describe_options, metrics
from longrope.evaluate.harness import check_tasks, harness
from longrope.evaluate.methods import Result
from longrope.evaluate.run import table_of
from longrope.factors import FactorTable
from longrope.model import LoadedModel, load_model
from longrope.runs import METRICS, RunFolder, command_line

logger = logging.getLogger(__name__)

ANSWERS = "answers"


def evaluate_harness(
    model: str | LoadedModel,
    *,
    tasks: Sequence[str],
    factors: FactorTable | str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    include_path: str | Path | None = None,
    chat: bool = False,
    unsafe_code: bool = False,
    seed: int | None = None,
    out: str | Path | None = None,
    options: LoadOptions | None = None,
    **load: Any,
) -> dict[str, Any]:
    """lm-eval's tasks on one model; the document that --json prints. See `harness` for the settings.

    Writes a run folder where `out` names one; resumed, answers that are there are not asked for again. The result's
    value is the mean over tasks of the first metric of each. Raises UserError for bad input.
    """
    check_tasks(tasks, include_path)
    options = load_options(options, load)
    if factors == "none":
        options = replace(options, own_factors=False)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, options)
    table = table_of(loaded, factors)
    chosen: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "chat": chat}
    told = {"tasks": list(tasks), **chosen, **describe_options(loaded)}
    told |= {"include_path": str(include_path) if include_path else None}
    told |= {"factors": [row.key for row in table.rows] if table else None}

    def measured(answers: Path | None) -> dict[str, Any]:
        found = harness(
            loaded,
            table,
            tasks,
            batch_size=batch_size,
            include_path=include_path,
            unsafe_code=unsafe_code,
            answers=answers,
            **chosen,
        )
        result = Result(
            "factors" if table else "none", found["max_length"], _value(found["tasks"]), 0, None, None, found
        )
        return metrics("evaluate harness", loaded, told, [result], "harness")

    if out is None:
        return measured(None)
    config = {
        "command": "evaluate harness",
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": told,
        "ignored": {"command_line": command_line()},
    }
    with RunFolder.open(Path(out), config) as run:
        if run.finished:
            logger.info("%s is finished: its measurements are in %s", out, Path(out) / METRICS)
            return run.metrics()
        run.save_metrics(measured(run.path / ANSWERS))
        run.finish()
        return run.metrics()


def _value(tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """The mean over tasks of the first metric of each."""
    firsts = [
        next((value for name, value in found.items() if "stderr" not in name and isinstance(value, int | float)), None)
        for found in tasks.values()
    ]
    known = [float(value) for value in firsts if value is not None]
    return sum(known) / len(known) if known else math.nan
