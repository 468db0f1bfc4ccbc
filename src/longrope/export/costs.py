"""What an engine's way with a factor table costs in perplexity, measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longrope.checkpoint import LoadOptions
from longrope.documents import as_sources, read_sources
from longrope.errors import UserError
from longrope.evaluate.perplexity import measure
from longrope.export.engines import row_of_engine
from longrope.factors import FactorTable, last_row
from longrope.files import finite_or_none
from longrope.model import load_model
from longrope.windows import windows_of

_WINDOWS = 2


def measured_costs(
    name: str,
    table: FactorTable,
    served: FactorTable,
    engine: str,
    window: str,
    documents: str | Sequence[str],
    options: LoadOptions,
) -> list[dict[str, Any]]:
    """Perplexity by the whole table and by what an engine serves of it, at the original length and the longest.

    A length that no document reaches has no value, and says so. The model is loaded.
    """
    loaded = load_model(name, options)
    texts = read_sources(as_sources(documents))
    found: list[dict[str, Any]] = []
    longest = served.rows[-1].up_to
    for length in sorted({table.original_length, longest}):
        rows = last_row(table, length), row_of_engine(served, engine, window, length, longest)
        try:
            windows = windows_of(loaded, texts, length, _WINDOWS, 0)
        except UserError as error:
            found.append({"length": length, "why": f"{error.what}: {error.got}"})
            continue
        loaded.widen_window(length)
        with loaded.patch() as patch:
            values = []
            for row in rows:
                patch.install(row)
                values.append(finite_or_none(measure(loaded, windows).value))
        found.append({"length": length, "table": values[0], "engine": values[1], "windows": len(windows)})
    return found
