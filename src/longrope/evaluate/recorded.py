"""A measurement as a run: settings and documents in config.json, items in results.jsonl, results in metrics.json."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope import __version__
from longrope.describe import describe_model, describe_windows, metrics
from longrope.errors import UserError
from longrope.evaluate.execute import OnStep, Rows, execute
from longrope.evaluate.measures import Item, Measure, fingerprint_of
from longrope.evaluate.methods import Result, rows_of
from longrope.evaluate.perplexity_measure import PerplexityMeasure
from longrope.factors import FactorTable
from longrope.model import LoadedModel
from longrope.runs import METRICS, RESULTS, RunFolder, command_line
from longrope.windows import Window

logger = logging.getLogger(__name__)

_RECORDS = 1
"""Version of what a line of results.jsonl holds: a run of another is not gone on with."""

_Conclude = Callable[[list[Result]], list[Result]]


def measure_methods(
    loaded: LoadedModel,
    windows: Mapping[int, Sequence[Window]],
    methods: Sequence[str],
    tables: Mapping[str, FactorTable],
    run: RunFolder,
    *,
    windows_name: str | None = "unseen",
) -> list[Result]:
    """Perplexity of methods and tables on windows by length, inside a run of another command; resumes there.

    Baselines are set up for the longest length, tables are measured where they reach.
    """
    loaded.widen_window(max(windows))
    measure, rows = PerplexityMeasure(windows), rows_of(loaded, list(windows), methods, tables)
    items = {length: measure.items(loaded, length) for length in windows}
    # Of another table, where the factors of a run have changed since: those are other items.
    keys = {key: row.key if row else "" for key, row in rows.items()}
    known = [line for line in run.results() if line.get("factors") == keys.get((line["method"], line["length"]))]

    def log(line: dict[str, Any]) -> None:
        run.log_result(line | {"factors": keys[line["method"], line["length"]]})

    return execute(loaded, measure, rows, items, windows=windows_name, known=known, on_record=log)


def _checked(lines: list[dict[str, Any]], measure: Measure, path: Path) -> list[dict[str, Any]]:
    """Lines of results.jsonl whose records are this measure's. Raises UserError for another, with its line."""
    for number, line in enumerate(lines, start=1):
        record = line["record"]
        for name, kind in measure.record_keys.items():
            value = record.get(name)
            good = isinstance(value, kind) and name in record and (kind is bool or not isinstance(value, bool))
            if not good or (name == "count" and value < 1):
                got = f"{path}, line {number} with no proper {name!r} in its record"
                rule = "every line is a record of this run"
                raise UserError("lines", got=got, rule=rule, do="restore the file or start anew")
    return lines


def measure_run(
    command: str,
    loaded: LoadedModel,
    measure: Measure,
    rows: Rows,
    settings: Mapping[str, Any],
    *,
    name: str | None = None,
    conclude: _Conclude = list,
    documents: Sequence[Window] = (),
    out: str | Path | None = None,
    workers: str | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Measure all rows; what metrics.json holds. Writes a run folder where `out` names one, and resumes one there.

    name: of the measure in metrics.json, where it is made of another. conclude: what becomes of the results at the end.
    documents: the windows of documents that items are made of, for config.json. Raises UserError as the measure does,
    before anything is written for prompts that do not fit.
    """
    lengths = sorted({length for _, length in rows})
    loaded.widen_window(lengths[-1])
    items: dict[int, Sequence[Item]] = {length: measure.items(loaded, length) for length in lengths}
    for note in loaded.notes:
        logger.info(note)
    told = {**settings, **measure.settings}
    hashes = {str(length): fingerprint_of(of_length) for length, of_length in items.items()}
    if out is None:
        results = execute(loaded, measure, rows, items, workers=workers, on_step=on_step)
        return metrics(command, loaded, told, conclude(results), name or measure.name, documents, hashes)
    config = {
        "command": command,
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": told,
        "items": hashes,  # a run goes on with the very prompts that it began with
        "records": _RECORDS,
        "documents": {"unseen": describe_windows(documents)},
        "ignored": {"command_line": command_line(), "items": sum(len(items[length]) for _, length in rows)},
    }
    with RunFolder.open(Path(out), config) as run:
        if run.finished:
            measured_before = run.metrics()
            logger.info("%s is finished: its measurements are in %s", out, Path(out) / METRICS)
            return measured_before
        results = execute(
            loaded,
            measure,
            rows,
            items,
            known=_checked(run.results(), measure, run.path / RESULTS),
            workers=workers,
            on_record=run.log_result,
            on_step=on_step,
        )
        run.save_metrics(metrics(command, loaded, told, conclude(results), name or measure.name, documents, hashes))
        run.finish()
        return run.metrics()
