"""`longrope evaluate`: one measure of one model by length."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope import __version__
from longrope.checkpoint import LoadOptions, load_options
from longrope.convert import factors_file, read_factors
from longrope.describe import describe_model, describe_options, describe_windows, metrics
from longrope.documents import Document, read_sources
from longrope.errors import UserError
from longrope.evaluate.methods import OnStep, Result, measure_each
from longrope.evaluate.passkey import make_prompts, passkey
from longrope.evaluate.perplexity import check_stride, measure, measure_sliding
from longrope.factors import FactorTable
from longrope.lengths import as_length
from longrope.model import LoadedModel, load_model
from longrope.runs import METRICS, RunFolder, command_line
from longrope.windows import Window, whole_documents, windows_of

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
    on_step: OnStep | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Measure `perplexity` or `passkey` at lengths; returns the document that --json prints, and metrics.json holds.

    factors: a table or its file, by default the checkpoint's own factors.json; "none" ignores that one. Writes a run
    folder where `out` names one, and resumes one that is there; a finished one is read, not measured again. on_step is
    called before each measurement. `load` are the fields of LoadOptions. Raises UserError for bad input.
    """
    if measure_name not in MEASURES:
        rule = f"it is one of {', '.join(MEASURES)}"
        raise UserError("measure", got=repr(measure_name), rule=rule, do="choose one of them")
    wanted = sorted({as_length(length) for length in lengths})
    if not wanted:
        raise UserError("lengths", got="none", rule="there is at least one", do="give lengths in tokens")
    options = load_options(options, load)
    if factors == "none":
        options = replace(options, own_factors=False)
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
        for length in wanted:
            make_prompts(loaded, length, tries=tries, seed=seed)  # refuses one too short before anything is paid
    else:
        settings |= {"windows": windows, "stride": stride}
        found = read_sources(documents, share="unseen", tokenizer=loaded.tokenizer)
        chosen = {length: _windows(loaded, found, length, windows, stride, seed) for length in wanted}
    command, steps = f"evaluate {measure_name}", [("factors" if table else "none", length) for length in wanted]

    def measure_one(method: str, length: int) -> Result:
        with loaded.patch() as patch:
            patch.install(rows[length])
            if measure_name == "passkey":
                keys = passkey(loaded, length, tries=tries, seed=seed)
                return Result(method, length, keys.value, keys.tries * length, keys.ci, windows=None)
            if stride:
                slid = measure_sliding(loaded, chosen[length], length=length, stride=stride)
                return Result.of(method, length, slid, windows=None)
            return Result.of(method, length, measure(loaded, chosen[length]), windows=None)

    if out is None:
        results = measure_each(steps, measure_one, on_step=on_step)
        return metrics(command, loaded, settings, results, measure_name)
    config = {
        "command": command,
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
            results = measure_each(
                steps,
                measure_one,
                known=[Result.from_dict(record) for record in run.results()],
                on_step=on_step,
                on_result=lambda result: run.log_result(result.to_dict()),
            )
            run.save_metrics(metrics(command, loaded, settings, results, measure_name))
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
    loaded: LoadedModel, documents: Sequence[Document], length: int, count: int | None, stride: int | None, seed: int
) -> list[Window]:
    if stride:
        check_stride(length, stride)
        return whole_documents(loaded, documents, length, count)
    return windows_of(loaded, documents, length, count, seed)
