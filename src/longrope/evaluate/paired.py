"""Paired differences of two methods on the same items: what the items have in common does not blur them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from longrope.evaluate.measures import Record

Vector = NDArray[np.float64]

_RESAMPLES = 5000


@dataclass(frozen=True)
class Difference:
    """A difference with its paired 95% interval.

    Not a number where a value is not finite; nor is the interval where there is one item.
    """

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{100 * self.value:+.2f}% ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def perplexity_difference(
    ours: ArrayLike, theirs: ArrayLike, counts: ArrayLike, documents: Sequence[str], *, seed: int = 0
) -> Difference:
    """Relative difference in perplexity, ours / theirs - 1, of summed losses (N,) in nats over the same `counts` (N,).

    It is exp of the difference in mean loss, less 1. Resampled are documents, whose windows are not independent;
    windows where there is one document.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    counted = np.asarray(counts, dtype=np.float64)
    several = len(set(documents)) > 1
    units = np.unique(np.asarray(documents), return_inverse=True)[1] if several else np.arange(len(gaps))
    return _bootstrap(gaps, counted, units, seed, np.expm1)


def share_difference(ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0) -> Difference:
    """Difference of two shares, ours - theirs, of what was found or scored (N,) on the same items.

    Resampled are items.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return _bootstrap(gaps, np.ones_like(gaps), np.arange(len(gaps)), seed, np.asarray)


def score_difference(ours: ArrayLike, theirs: ArrayLike, tasks: Sequence[str], *, seed: int = 0) -> Difference:
    """Difference of two means over tasks of the mean score, ours - theirs, of scores (N,) of the same items.

    Resampled are the items of each task.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    rng, of = np.random.default_rng(seed), np.asarray(tasks)
    parts = [gaps[of == task] for task in dict.fromkeys(tasks)]
    value = float(np.mean([part.mean() for part in parts]))
    if min(map(len, parts)) == 1:
        return Difference(value, math.nan, math.nan)
    draws = np.mean([part[rng.integers(len(part), size=(_RESAMPLES, len(part)))].mean(1) for part in parts], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Difference(value, float(low), float(high))


def records_difference(ours: Sequence[Record], theirs: Sequence[Record], *, seed: int = 0) -> Difference:
    """Of the records of two methods on the same items: relative in perplexity, else of what was found or scored."""
    if "count" in ours[0]:
        mine, others = ([_number(each["loss"]) for each in records] for records in (ours, theirs))
        counts, documents = [each["count"] for each in ours], [each["document"] for each in ours]
        assert counts == [each["count"] for each in theirs], "the same items"
        return perplexity_difference(mine, others, counts, documents, seed=seed)
    if "score" in ours[0]:
        tasks = [each["task"] for each in ours]
        return score_difference([each["score"] for each in ours], [each["score"] for each in theirs], tasks, seed=seed)
    return share_difference([each["found"] for each in ours], [each["found"] for each in theirs], seed=seed)


def against_best(
    values: Mapping[str, float], records: Mapping[str, Sequence[Record]], *, lower: bool
) -> dict[str, tuple[str, Difference]]:
    """The best method and the difference from it, of every other method that has a value; items are the same for all.

    values, records: by method. lower: the lowest value is the best.
    """
    finite = {method: value for method, value in values.items() if math.isfinite(value)}
    if not finite:
        return {}
    best = (min if lower else max)(finite, key=lambda method: finite[method])
    others = [method for method in finite if method != best]
    return {method: (best, records_difference(records[method], records[best])) for method in others}


def _bootstrap(
    gaps: Vector, counts: Vector, units: NDArray[np.int64], seed: int, scale: Callable[[Vector], Vector]
) -> Difference:
    """The mean gap a count on a scale, with its 95% percentile bootstrap over units."""
    if not np.isfinite(gaps).all():
        return Difference(math.nan, math.nan, math.nan)
    value = float(scale(gaps.sum() / counts.sum()))
    summed, counted = np.bincount(units, weights=gaps), np.bincount(units, weights=counts)
    if len(summed) == 1:
        return Difference(value, math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(len(summed), size=(_RESAMPLES, len(summed)))
    low, high = np.quantile(scale(summed[draws].sum(1) / counted[draws].sum(1)), [0.025, 0.975])
    return Difference(value, float(low), float(high))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
