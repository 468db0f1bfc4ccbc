"""Methods side by side: baselines, factor tables and the model as it is, and what was measured of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longrope.evaluate.measures import Summary
from longrope.evaluate.paired import Difference
from longrope.factors import FactorTable, RopeFactors
from longrope.files import finite_or_none
from longrope.model import LoadedModel

DEFAULT_METHODS = tuple("none pi ntk ntk+su ntk-cd dynamic-ntk yarn yarn+su yarn-rcd llama3 llama3+su".split())
"""What `compare` compares where nothing is named."""


@dataclass(frozen=True)
class Result:
    """A figure of one method at one length: `value`, of `tokens` tokens, with its 95% interval where there is one.

    windows: which ones it was measured on, None where that says nothing. details: what plots show beside it.
    against_best: the best method at this length and the paired difference from it, of each other one. items: hash of
    what was run at this length, which metrics.json holds once for all methods.
    """

    method: str
    length: int
    value: float
    tokens: int
    ci: tuple[float, float] | None
    windows: str | None = "unseen"
    details: Mapping[str, Any] = field(default_factory=dict)
    against_best: tuple[str, Difference] | None = None
    items: str | None = None

    @classmethod
    def summing(
        cls,
        method: str,
        length: int,
        summary: Summary,
        windows: str | None,
        against_best: tuple[str, Difference] | None = None,
        items: str | None = None,
    ) -> Result:
        """What a measure says of all its items."""
        details = dict(summary.details)
        return cls(method, length, summary.value, summary.tokens, summary.ci, windows, details, against_best, items)

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it; a value that is not finite is None."""
        return {
            "method": self.method,
            "length": self.length,
            "value": finite_or_none(self.value),
            "tokens": self.tokens,
            "ci": list(self.ci) if self.ci else None,
            **({"windows": self.windows} if self.windows else {}),
            **({"against_best": _against(*self.against_best)} if self.against_best else {}),
            **({"details": dict(self.details)} if self.details else {}),
        }


def _against(best: str, difference: Difference) -> dict[str, Any]:
    interval = [difference.low, difference.high]
    ci = interval if all(map(math.isfinite, interval)) else None
    return {"method": best, "value": finite_or_none(difference.value), "ci": ci}


def method_factors(loaded: LoadedModel, method: str, target: int, length: int) -> RopeFactors | None:
    """Factors of a method set up for `target` and used at `length`; None for `none`, the checkpoint as it is.

    Raises UserError for an unknown method.
    """
    if method == "none":
        return None
    return loaded.baseline(method, target, length)


def rows_of(
    loaded: LoadedModel, lengths: Sequence[int], methods: Sequence[str], tables: Mapping[str, FactorTable]
) -> dict[tuple[str, int], RopeFactors | None]:
    """Factors by (method or table, length): baselines set up for the longest length, tables where they reach.

    Raises UserError for an unknown method.
    """
    target = max(lengths)
    rows: dict[tuple[str, int], RopeFactors | None] = {}
    for length in sorted(lengths):
        rows |= {(method, length): method_factors(loaded, method, target, length) for method in methods}
        reached = {name: table for name, table in tables.items() if length <= table.rows[-1].up_to}
        rows |= {(name, length): table.row_for(length) for name, table in reached.items()}
    return rows


def outdone(results: Sequence[Result], name: str = "longrope", windows: str = "search") -> tuple[Result, Result] | None:
    """The result of `name` on these windows and the lowest of another method, where that is lower by a thousandth.

    What is found lies on a grid, and may be a hair above the method that it began with.
    """
    there = [each for each in results if each.windows == windows]
    own = next((each for each in there if each.method == name), None)
    others = [each for each in there if each.method != name and math.isfinite(each.value)]
    best = min(others, key=lambda each: each.value, default=None)
    return (own, best) if own and best and not own.value <= best.value * 1.001 else None
