"""Methods side by side on the same windows: baselines, factor tables, and the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope.baselines import baseline
from longrope.evaluate.perplexity import Perplexity, measure
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel
from longrope.windows import Window

DEFAULT_METHODS = ("none", "pi", "ntk", "ntk+su", "ntk-cd", "dynamic-ntk", "yarn", "yarn+su", "yarn-rcd", "llama3")


@dataclass(frozen=True)
class Result:
    """A figure of one method at one length."""

    method: str
    length: int
    perplexity: Perplexity
    windows: str = "unseen"

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        measured = self.perplexity
        return {
            "method": self.method,
            "length": self.length,
            "value": measured.value,
            "tokens": measured.tokens,
            "ci": list(measured.ci) if measured.ci else None,
            "windows": self.windows,
        }


def method_factors(loaded: LoadedModel, method: str, target: int, length: int) -> RopeFactors | None:
    """Factors of a method set up for `target` and used at `length`; None for `none`, the checkpoint as it is.

    Raises UserError for an unknown method.
    """
    if method == "none":
        return None
    return baseline(method, loaded.rope.shape, target, length)


def measure_methods(
    loaded: LoadedModel,
    windows: Mapping[int, Sequence[Window]],
    methods: Sequence[str],
    tables: Mapping[str, FactorTable],
    *,
    windows_name: str = "unseen",
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Perplexity of every method and table on windows by length; baselines are set up for the longest length.

    A table is measured at the lengths it reaches. Raises UserError for an unknown method.
    """
    target = max(windows)
    for method in methods:
        method_factors(loaded, method, target, target)  # refuse an unknown one before anything is paid
    results = []
    with loaded.patch() as patch:
        for length, chosen in sorted(windows.items()):
            rows = {method: method_factors(loaded, method, target, length) for method in methods}
            reached = {name: table for name, table in tables.items() if length <= table.rows[-1].up_to}
            rows |= {name: table.row_for(length) for name, table in reached.items()}
            for method, row in rows.items():
                patch.install(row)
                result = Result(method, length, measure(loaded, chosen), windows_name)
                results.append(result)
                if on_result:
                    on_result(result)
    return results
