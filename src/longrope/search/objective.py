"""What a search minimises: factors in, value out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from longrope.evaluate.perplexity import measure
from longrope.factors import RopeFactors
from longrope.model import LoadedModel
from longrope.windows import Window


@dataclass(frozen=True)
class Evaluation:
    """The value of a candidate (lower is better), the tokens its forward passes took and the seconds."""

    value: float
    tokens: int
    seconds: float


class Objective(Protocol):
    """Anything that evaluates factors."""

    def __call__(self, factors: RopeFactors) -> Evaluation:
        """Evaluate factors."""
        ...


class PerplexityObjective:
    """Token-weighted perplexity on the same windows for every candidate, so that differences are paired.

    Carries a patch on the model for as long as it lives; `close` (or leaving it as a context) restores the model.
    """

    def __init__(self, loaded: LoadedModel, windows: Sequence[Window]) -> None:
        self.loaded, self.windows = loaded, windows
        self.patch = loaded.patch()

    def __call__(self, factors: RopeFactors) -> Evaluation:
        """Perplexity under the factors; one evaluation is all windows once forward."""
        start = time.perf_counter()
        self.patch.install(factors)
        value = measure(self.loaded, self.windows).value
        tokens = sum(len(window.ids) for window in self.windows)
        return Evaluation(value=value, tokens=tokens, seconds=time.perf_counter() - start)

    def close(self) -> None:
        """Restore the model."""
        self.patch.undo()

    def __enter__(self) -> PerplexityObjective:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
