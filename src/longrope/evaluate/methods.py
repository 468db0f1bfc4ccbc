"""Methods side by side on the same windows: baselines, factor tables, and the model as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope.evaluate.perplexity import Perplexity, measure
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel
from longrope.windows import Window

DEFAULT_METHODS = ("none", "pi", "ntk", "ntk+su", "ntk-cd", "dynamic-ntk", "yarn", "yarn+su", "yarn-rcd", "llama3")


@dataclass(frozen=True)
class Result:
    """A figure of one method at one length: `value`, of `tokens` tokens, with its 95% interval where there is one.

    windows: which ones it was measured on, None where that says nothing.
    """

    method: str
    length: int
    value: float
    tokens: int
    ci: tuple[float, float] | None
    windows: str | None = "unseen"

    @classmethod
    def of(cls, method: str, length: int, measured: Perplexity, windows: str | None = "unseen") -> Result:
        """A perplexity."""
        return cls(method, length, measured.value, measured.tokens, measured.ci, windows)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Result:
        """What `to_dict` wrote."""
        value, ci = record["value"], record.get("ci")
        figures = math.nan if value is None else float(value), record["tokens"], tuple(ci) if ci else None
        return cls(record["method"], record["length"], *figures, record.get("windows"))

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it; a value that is not finite is None."""
        return {
            "method": self.method,
            "length": self.length,
            "value": self.value if math.isfinite(self.value) else None,
            "tokens": self.tokens,
            "ci": list(self.ci) if self.ci else None,
            **({"windows": self.windows} if self.windows else {}),
        }


@dataclass(frozen=True)
class Step:
    """Where a measurement is: `done` results of `total`, and the method and length that come next."""

    done: int
    total: int
    method: str
    length: int


OnStep = Callable[[Step], None]
OnResult = Callable[[Result], None]


def method_factors(loaded: LoadedModel, method: str, target: int, length: int) -> RopeFactors | None:
    """Factors of a method set up for `target` and used at `length`; None for `none`, the checkpoint as it is.

    Raises UserError for an unknown method.
    """
    if method == "none":
        return None
    return loaded.baseline(method, target, length)


def measure_methods(
    loaded: LoadedModel,
    windows: Mapping[int, Sequence[Window]],
    methods: Sequence[str],
    tables: Mapping[str, FactorTable],
    *,
    windows_name: str = "unseen",
    known: Sequence[Result] = (),
    on_step: OnStep | None = None,
    on_result: OnResult | None = None,
) -> list[Result]:
    """Perplexity of every method and table on windows by length; baselines are set up for the longest length.

    A table is measured at the lengths it reaches. See `measure_each` for the rest. Raises UserError for an unknown
    method.
    """
    target = max(windows)
    rows: dict[tuple[str, int], RopeFactors | None] = {}
    for length in sorted(windows):
        rows |= {(method, length): method_factors(loaded, method, target, length) for method in methods}
        reached = {name: table for name, table in tables.items() if length <= table.rows[-1].up_to}
        rows |= {(name, length): table.row_for(length) for name, table in reached.items()}
    with loaded.patch() as patch:

        def measure_one(method: str, length: int) -> Result:
            patch.install(rows[method, length])
            return Result.of(method, length, measure(loaded, windows[length]), windows_name)

        return measure_each(
            list(rows), measure_one, windows_name=windows_name, known=known, on_step=on_step, on_result=on_result
        )


def measure_each(
    wanted: Sequence[tuple[str, int]],
    measure_one: Callable[[str, int], Result],
    *,
    windows_name: str | None = None,
    known: Sequence[Result] = (),
    on_step: OnStep | None = None,
    on_result: OnResult | None = None,
) -> list[Result]:
    """Results of methods at lengths, in order: a `known` one as it is, any other measured now.

    on_step is called before each measurement, on_result with what it gave.
    """
    there = {(result.method, result.length, result.windows): result for result in known}
    results = []
    for done, (method, length) in enumerate(wanted):
        result = there.get((method, length, windows_name))
        if result is None:
            if on_step:
                on_step(Step(done, len(wanted), method, length))
            result = measure_one(method, length)
            if on_result:
                on_result(result)
        results.append(result)
    return results
