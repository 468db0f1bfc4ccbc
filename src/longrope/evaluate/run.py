"""`longrope evaluate`: one measure of one model by length."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope import __version__
from longrope.checkpoint import LoadOptions, load_options
from longrope.convert import factors_file, read_factors
from longrope.describe import describe_model, describe_options, describe_windows
from longrope.errors import UserError
from longrope.evaluate.passkey import Retrieval, passkey
from longrope.evaluate.perplexity import Perplexity, measure, measure_sliding
from longrope.factors import FactorTable
from longrope.lengths import as_length
from longrope.model import LoadedModel, load_model
from longrope.runs import METRICS, RunFolder, command_line
from longrope.windows import Window, whole_documents, windows_for

logger = logging.getLogger(__name__)

MEASURES = ("perplexity", "passkey")


def evaluate(
    measure_name: str,
    model: str | LoadedModel,
    *,
    lengths: Sequence[int | str],
    factors: FactorTable | str | Path | None = None,
    documents: Sequence[str] = (),
    windows: int | None = None,
    stride: int | None = None,
    tries: int = 10,
    seed: int = 0,
    out: str | Path | None = None,
    options: LoadOptions | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Measure `perplexity` or `passkey` at lengths; returns the document that --json prints, and metrics.json holds.

    factors: a table or its file, by default the checkpoint's own factors.json; "none" ignores that one. Writes a run
    folder where `out` names one; a finished one is read, not measured again. `load` are the fields of LoadOptions.
    Raises UserError for bad input.
    """
    if measure_name not in MEASURES:
        rule = f"it is one of {', '.join(MEASURES)}"
        raise UserError("measure", got=repr(measure_name), rule=rule, do="choose one of them")
    wanted = sorted({as_length(length) for length in lengths})
    if not wanted:
        raise UserError("lengths", got="none", rule="there is at least one", do="give lengths in tokens")
    options = load_options(options, load)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, options)
    table = _table(loaded, factors)
    rows = {length: table.row_for(length) if table else None for length in wanted}
    loaded.widen_window(wanted[-1])
    for note in loaded.notes:
        logger.info(note)
    settings: dict[str, Any] = {"lengths": wanted, "seed": seed, **describe_options(loaded)}
    settings |= {"factors": [row.key if row else None for row in rows.values()]}
    chosen: dict[int, list[Window]] = {}
    if measure_name == "passkey":
        settings |= {"tries": tries}
    else:
        settings |= {"windows": windows, "stride": stride}
        chosen = {length: _windows(loaded, documents, length, windows, stride, seed) for length in wanted}

    def run_measure() -> dict[str, Any]:
        results = []
        with loaded.patch() as patch:
            for length, row in rows.items():
                patch.install(row)
                if measure_name == "passkey":
                    figure = _passkey(passkey(loaded, length, tries=tries, seed=seed), length)
                elif stride:
                    figure = _perplexity(measure_sliding(loaded, chosen[length], length=length, stride=stride))
                else:
                    figure = _perplexity(measure(loaded, chosen[length]))
                results.append({"method": "factors" if table else "none", "length": length, **figure})
        told = {"command": f"evaluate {measure_name}", "model": loaded.name, "settings": settings}
        return {**told, "measure": measure_name, "results": results}

    if out is None:
        return run_measure()
    config = {
        "command": f"evaluate {measure_name}",
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": settings,
        "documents": {"unseen": [one for group in chosen.values() for one in describe_windows(group)]},
        "ignored": {"command_line": command_line()},
    }
    with RunFolder.open(Path(out), config) as run:
        if run.finished:
            logger.info("%s is finished: its measurements are in %s", out, Path(out) / METRICS)
        else:
            run.save_metrics(run_measure())
            run.finish()
        return run.metrics()


def _table(loaded: LoadedModel, factors: FactorTable | str | Path | None) -> FactorTable | None:
    """The table to measure, None for the checkpoint as it is without its factors.json."""
    if factors is None:
        return loaded.table  # checked when it was loaded
    if factors == "none":
        return None
    table = factors if isinstance(factors, FactorTable) else read_factors(factors_file(factors))
    loaded.check(table)
    return table


def _windows(
    loaded: LoadedModel, documents: Sequence[str], length: int, count: int | None, stride: int | None, seed: int
) -> list[Window]:
    if stride:
        return whole_documents(loaded, documents, length, count, share="unseen")
    return windows_for(loaded, documents, length, count, seed, share="unseen")


def _perplexity(figure: Perplexity) -> dict[str, Any]:
    return {"value": figure.value, "tokens": figure.tokens, "ci": list(figure.ci) if figure.ci else None}


def _passkey(found: Retrieval, length: int) -> dict[str, Any]:
    return {"value": found.value, "tokens": found.tries * length, "ci": list(found.ci)}
