"""The table of methods by length."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope import __version__
from longrope.checkpoint import LoadOptions, load_options
from longrope.describe import describe_model, describe_options, describe_windows, metrics
from longrope.documents import read_sources
from longrope.errors import UserError
from longrope.evaluate.methods import DEFAULT_METHODS, OnStep, Result, measure_methods, method_factors
from longrope.factors import FactorTable
from longrope.lengths import as_length
from longrope.model import LoadedModel, load_model
from longrope.runs import METRICS, RunFolder, command_line, default_run_path
from longrope.windows import Window, windows_of

logger = logging.getLogger(__name__)


def compare(
    model: str | LoadedModel,
    *,
    lengths: Sequence[int | str],
    documents: Sequence[str],
    methods: Sequence[str] = DEFAULT_METHODS,
    factors: Mapping[str, FactorTable] | None = None,
    windows: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    options: LoadOptions | None = None,
    on_step: OnStep | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Perplexity of methods and factor tables (by name) at lengths, on the same windows; returns metrics.json's dict.

    Baselines are set up for the longest length. Without `factors` those beside the weights are compared; an empty
    mapping ignores them. Writes a run folder `out` (runs/compare-MODEL-LENGTH by default) and resumes one that is
    there; a finished one is read, not measured again. Of `stdlib` the unseen share is used. on_step is called before
    each measurement. `load` are the fields of LoadOptions. Raises UserError for bad input.
    """
    options, wanted = load_options(options, load), [as_length(length) for length in lengths]
    if factors is not None and not factors:
        options = replace(options, own_factors=False)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, options)
    if factors is None:
        factors = {} if loaded.table is None else {"checkpoint": loaded.table}
    _check(loaded, wanted, methods, factors)
    found = read_sources(documents, share="unseen", tokenizer=loaded.tokenizer)
    chosen = {length: windows_of(loaded, found, length, windows, seed) for length in sorted(set(wanted))}
    return compare_windows(loaded, chosen, methods, factors, seed=seed, out=out, on_step=on_step)


def _check(
    loaded: LoadedModel, lengths: Sequence[int], methods: Sequence[str], tables: Mapping[str, FactorTable]
) -> None:
    """Raise UserError for what cannot be compared, before anything is written."""
    if not lengths or not (methods or tables):
        got = f"{len(lengths)} lengths, {len(methods)} methods and {len(tables)} tables"
        raise UserError("compare", got=got, rule="there is something to compare", do="give lengths and methods")
    for method in methods:
        method_factors(loaded, method, max(lengths), max(lengths))
    for name, table in tables.items():
        loaded.check(table)
        if name in methods:
            rule = "a table's name is none of the methods compared"
            raise UserError("factors", got=f"a table named {name}", rule=rule, do="choose another name for it")
        table.row_for(min(lengths))  # one that reaches no length at all would be left out without a word


def compare_windows(
    loaded: LoadedModel,
    windows: Mapping[int, Sequence[Window]],
    methods: Sequence[str],
    tables: Mapping[str, FactorTable],
    *,
    seed: int,
    out: str | Path | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """`compare` on windows already chosen."""
    target = max(windows)
    loaded.widen_window(target)
    path = Path(out) if out is not None else default_run_path("compare", loaded.name, target)
    settings = {
        "lengths": sorted(windows),
        "methods": list(methods),
        "factors": {name: [row.key for row in table.rows] for name, table in tables.items()},
        "seed": seed,
        **describe_options(loaded),
    }
    config = {
        "command": "compare",
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": settings,
        "documents": {"unseen": [one for length in sorted(windows) for one in describe_windows(windows[length])]},
        "ignored": {"command_line": command_line()},
    }
    for note in loaded.notes:
        logger.info(note)
    with RunFolder.open(path, config) as run:
        if run.finished:
            logger.info("%s is finished: its measurements are in %s", path, path / METRICS)
        else:
            results = measure_methods(
                loaded,
                windows,
                methods,
                tables,
                known=[Result.from_dict(record) for record in run.results()],
                on_step=on_step,
                on_result=lambda result: run.log_result(result.to_dict()),
            )
            run.save_metrics(metrics("compare", loaded, settings, results))
            run.finish()
        return run.metrics()
