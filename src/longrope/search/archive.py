"""What is known of candidates so far: the loss of each on each search window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from longrope.factors import RopeFactors
from longrope.search.tasks import Outcome, Task
from longrope.windows import Window

Losses = NDArray[np.float64]
"""Nats by window, times its weight."""

# Pieces that the windows of a search are run in. Windows of a piece run as one batch, which short ones need to be fast.
_PIECES = 8


def in_pieces(windows: Sequence[int], together: int = 1) -> list[tuple[int, ...]]:
    """Windows in order, in at most 8 pieces whose sizes differ by one at most; up to 8 windows are each a piece.

    together: windows that are never in two pieces, where they come in groups of so many.
    """
    groups = np.reshape(windows, (-1, together))
    pieces = np.array_split(groups, min(_PIECES, len(groups)))
    return [tuple(int(window) for window in piece.flatten()) for piece in pieces]


class Archive:
    """Losses of candidates on the search windows, of which there are len(counts); further windows are not kept.

    counts: scored tokens of each search window. weights: of each of its tokens, 1 by default. A candidate's value is
    its perplexity on all of them, each token by its weight. together: windows of different kinds that are compared as
    one, since only the differences of equals tell their spread; groups of so many, in order.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float] | None = None, together: int = 1) -> None:
        self._scored, self._weights, self.together = tuple(counts), tuple(weights or [1.0] * len(counts)), together
        self.counts = np.array(self._scored) * np.array(self._weights)
        """Scored tokens of each search window, times its weight."""
        self._losses: dict[str, Losses] = {}
        self._factors: dict[str, RopeFactors] = {}
        self._best: tuple[float, RopeFactors] | None = None

    @classmethod
    def of(cls, windows: Sequence[Window], together: int = 1) -> Archive:
        """An archive of nothing yet, for some search windows."""
        return cls([window.scored for window in windows], [window.weight for window in windows], together)

    def empty(self) -> Archive:
        """One of the same windows in which nothing is known."""
        return Archive(self._scored, self._weights, self.together)

    @property
    def everything(self) -> tuple[int, ...]:
        """Indices of all search windows."""
        return tuple(range(len(self.counts)))

    @property
    def pieces(self) -> list[tuple[int, ...]]:
        """Indices of all search windows, in the pieces that a race goes by."""
        return in_pieces(self.everything, self.together)

    def differences(self, losses: Losses, others: Losses) -> Losses:
        """Difference in loss a token (..., N / together) of losses (..., N) to others, NaN where one was not tried."""
        groups = (len(self.counts) // self.together, self.together)
        by_group = (losses - others).reshape(*losses.shape[:-1], *groups).sum(-1)
        return np.asarray(by_group / self.counts.reshape(groups).sum(-1))

    @property
    def best(self) -> tuple[float, RopeFactors] | None:
        """The lowest value and its candidate; of equals the first to be complete."""
        return self._best

    def add(self, task: Task, outcome: Outcome, *, may_win: bool = True) -> float | None:
        """Take in an outcome; the candidate's value when that completes it. Gradients say nothing of candidates.

        may_win: whether the candidate may become the best, and is among the complete ones.
        """
        if task.gradient:
            return None
        key = task.factors.key
        if self.value(task.factors) is not None:
            return None
        known = self._losses.setdefault(key, np.full(len(self.counts), np.nan))
        for window, loss in zip(task.windows, outcome.losses, strict=True):
            if window < len(known):
                known[window] = self._weights[window] * loss if math.isfinite(loss) else math.inf
        value = self.value(task.factors)
        if value is None:
            return None
        if not may_win:
            return value
        self._factors[key] = task.factors
        if math.isfinite(value) and (self._best is None or value < self._best[0]):
            self._best = value, task.factors
        return value

    def losses(self, factors: RopeFactors) -> Losses:
        """Loss (N,) of a candidate on each window, weighted, NaN where it was not tried, infinite where it failed."""
        return self._losses.get(factors.key, np.full(len(self.counts), np.nan))

    def value(self, factors: RopeFactors) -> float | None:
        """Perplexity of a candidate on all search windows, infinite when it failed; None while it is incomplete."""
        return self._perplexity(self.losses(factors))

    def _perplexity(self, losses: Losses) -> float | None:
        if np.isnan(losses).any():
            return None
        mean = float(losses.sum() / self.counts.sum())
        return math.exp(mean) if mean < 700 else math.inf

    def complete(self) -> Iterator[tuple[float, RopeFactors]]:
        """All candidates with a finite value, in the order in which they came."""
        for factors in self._factors.values():
            value = self.value(factors)
            if value is not None and math.isfinite(value):
                yield value, factors
