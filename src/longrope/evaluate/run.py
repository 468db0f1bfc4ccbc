"""`longrope evaluate`: one measure of one model by length."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope.convert import read_factors
from longrope.errors import UserError
from longrope.evaluate.passkey import passkey
from longrope.evaluate.perplexity import Perplexity, measure, measure_sliding
from longrope.factors import FactorTable
from longrope.model import LoadedModel, LoadOptions, load_model
from longrope.windows import Window, whole_documents, windows_for

logger = logging.getLogger(__name__)

MEASURES = ("perplexity", "passkey")


def evaluate(
    measure_name: str,
    model: str | LoadedModel,
    *,
    lengths: Sequence[int],
    factors: FactorTable | str | Path | None = None,
    documents: Sequence[str] = (),
    windows: int | None = None,
    stride: int | None = None,
    tries: int = 10,
    seed: int = 0,
    options: LoadOptions | None = None,
) -> dict[str, Any]:
    """Measure `perplexity` or `passkey` at lengths; returns the document that --json prints.

    factors: a table or its file, by default the checkpoint's own factors.json; "none" ignores that one.
    Raises UserError for bad input.
    """
    if measure_name not in MEASURES:
        rule = f"it is one of {', '.join(MEASURES)}"
        raise UserError("measure", got=repr(measure_name), rule=rule, do="choose one of them")
    if not lengths:
        raise UserError("lengths", got="none", rule="there is at least one", do="give lengths in tokens")
    loaded = model if isinstance(model, LoadedModel) else load_model(model, options)
    table = _table(loaded, factors)
    loaded.widen_window(max(lengths))
    for note in loaded.notes:
        logger.info(note)
    rows = {length: table.row_for(length) if table else None for length in lengths}
    results = []
    with loaded.patch() as patch:
        for length in sorted(lengths):
            patch.install(rows[length])
            if measure_name == "passkey":
                found = passkey(loaded, length, tries=tries, seed=seed)
                measured = {"value": found.value, "tokens": tries * length, "ci": list(found.ci)}
            else:
                chosen = _windows(loaded, documents, length, windows, stride, seed)
                figure = (
                    measure_sliding(loaded, chosen, length=length, stride=stride) if stride else measure(loaded, chosen)
                )
                measured = _perplexity(figure)
            results.append({"method": "factors" if table else "none", "length": length, **measured})
    settings: dict[str, Any] = {"lengths": sorted(lengths), "seed": seed}
    settings |= {"tries": tries} if measure_name == "passkey" else {"windows": windows, "stride": stride}
    settings |= {"dtype": loaded.options.dtype, "attention": loaded.options.attention, "device": loaded.device.type}
    return {
        "command": f"evaluate {measure_name}",
        "model": loaded.name,
        "settings": settings,
        "measure": measure_name,
        "results": results,
    }


def _table(loaded: LoadedModel, factors: FactorTable | str | Path | None) -> FactorTable | None:
    """The table to measure, None for the checkpoint as it is without its factors.json."""
    if factors is None:
        return loaded.table  # checked when it was loaded
    if factors == "none":
        return None
    table = factors if isinstance(factors, FactorTable) else read_factors(Path(factors))
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
